"""GGUF: one file with the weights, the tokenizer and the chat template, as llama.cpp reads it.

Owns the order of things in the file and the way of each tensor into it: transposed, reordered, rounded or repacked. One tensor is in
memory at a time, large ones in pieces. Integers that a quantizer chose are repacked, never rounded again. Truth: the GGUF specification,
and llama.cpp's converter (llama-cpp-python 0.3.36), beside which the tests run this.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from joulemark import artifact
from joulemark.errors import BadInput
from joulemark.gguf_format import DEFAULT_ALIGNMENT, FILE_TYPES
from joulemark.wire import Manifest
from joulemark_exporter import engine_quantizer, ggml, gguf_source, gguf_tokenizer, packing
from joulemark_exporter.families import Placement, Tensor
from joulemark_exporter.quantizers import (
    ByEngine,
    Choice,
    Choices,
    IntegerForm,
    Integers,
    Numbers,
    Rounded,
    Task,
    grouped,
    inputs,
)
from joulemark_exporter.recipe import Settings
from joulemark_exporter.weights import Float32, Weight
from joulemark_exporter.writers import Written, versions

FLOATS = ("F32", "F16", "BF16")
PIECE = 1 << 22
"""Numbers that are rounded at a time, where nothing asks for the whole matrix."""
QUANTIZATION_VERSION = 2
Bytes = NDArray[np.uint8]


class Options(Settings):
    """`tokenizer_pre`: llama.cpp's name of the pre-tokenizer, where the tokenizer's own rules are not in our table."""

    tokenizer_pre: str | None = None


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: what it is called there, its type and shape (rows first), and its bytes in pieces."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    size_bytes: int
    pieces: functools.partial[Iterator[Bytes]]


def check(task: Task, options: Options, numbers: Numbers) -> None:
    """Architecture, tokenizer, settings and integers can be written. Raises BadInput."""
    if isinstance(numbers, IntegerForm):
        _check_form(task, numbers)
    task.family.metadata(task.model.config)
    gguf_tokenizer.read(task.model.folder, _vocabulary(task), options.tokenizer_pre)


def write(task: Task, choices: Choices, folder: Path, options: Options) -> Written:
    """See the contract."""
    path = folder / "model.gguf"
    if choices.by_engine is not None:
        _let_engine_quantize(path, task, choices.by_engine, options)
        return Written((path,), "llamacpp")
    digest = _write(path, task, choices, options)
    # A float32 file is a reference: the board's engine gives it a memory of 32-bit floats.
    full = {choice.type_name for choice in choices.by_name.values() if isinstance(choice, Rounded)} == {"F32"}
    return Written((path,), "llamacpp", digest, memory_number_bytes=4 if full else 2)


def tools(options: Options) -> dict[str, str]:
    """See the contract."""
    del options
    return versions("gguf", "llama-cpp-python")


def describe(task: Task, choices: Choices, written: Written) -> Manifest:
    """See the contract."""
    found = artifact.describe(written.files[0], task.name, task.licence)
    return Manifest.model_validate({**dict(found), "quantization": choices.title})


def read_back(task: Task, choices: Choices, written: Written) -> dict[str, Weight]:
    """See the contract: from the file itself."""
    del choices
    return gguf_source.weights(written.files[0], task.family, task.model.config)


def _let_engine_quantize(path: Path, task: Task, wanted: ByEngine, options: Options) -> None:
    """A file in the checkpoint's own floating-point type first, which llama.cpp's quantizer then works on."""
    own = {
        name: Rounded(weight.stored if weight.stored in FLOATS else "F32")
        for name, weight in task.model.weights.items()
    }
    full = path.with_name("float.gguf")
    _write(full, task, Choices(own, "float"), options)
    places = {
        tensor.name: tensor.placement.name for tensor in task.family.tensors(task.model.config) if tensor.placement
    }
    importance = {places[name]: values for name, values in wanted.importance.items()}
    task.say("llama.cpp quantizes", 0, 1)
    engine_quantizer.run(full, path, wanted, importance, task.threads)
    task.say("llama.cpp quantizes", 1, 1)
    full.unlink()


def _write(path: Path, task: Task, choices: Choices, options: Options) -> str:
    """Writes the file; returns the sha256 of what was written."""
    entries = list(_entries(task, choices))
    # Once in the working folder, and once more when it is published.
    artifact.check_space(path.parent, 2 * sum(entry.size_bytes for entry in entries))
    _write_header(path, task, entries, options)
    hasher = hashlib.sha256(path.read_bytes())
    with path.open("ab") as file:

        def put(data: bytes | memoryview) -> int:
            hasher.update(data)
            return file.write(data)

        put(bytes(-file.tell() % DEFAULT_ALIGNMENT))
        for done, entry in enumerate(entries):
            task.say("writing the weights", done, len(entries))
            written = sum(put(piece.data) for piece in entry.pieces())
            if written != entry.size_bytes:
                raise AssertionError(f"{entry.name}: {written} bytes were written, {entry.size_bytes} announced")
            put(bytes(-written % DEFAULT_ALIGNMENT))
        file.flush()
        os.fsync(file.fileno())
    task.say("writing the weights", len(entries), len(entries))
    return hasher.hexdigest()


def _check_form(task: Task, form: IntegerForm) -> None:
    packing.gguf_type(form.bits, symmetric=form.symmetric)
    for name, linear in grouped(task, form.group_size):
        columns = inputs(task.model.weights[name], linear)
        why = packing.unpackable(columns, columns if form.group_size == -1 else form.group_size, form.contiguous)
        if why is not None:
            raise BadInput(
                f"{name} cannot be written as GGUF: {why}", "use static_groups = true, and groups of 32, 64 or 128"
            )


# --- the header -------------------------------------------------------------------------------------------------------
def _write_header(path: Path, task: Task, entries: list[Entry], options: Options) -> None:
    architecture = task.family.gguf
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("model")
    writer.add_name(task.name)
    if task.licence:
        writer.add_license(task.licence)
    for key, value in task.family.metadata(task.model.config).items():
        _add(writer, f"{architecture}.{key}", value)
    gguf_tokenizer.add(writer, gguf_tokenizer.read(task.model.folder, _vocabulary(task), options.tokenizer_pre))
    writer.add_file_type(_file_type(entries))
    writer.add_quantization_version(QUANTIZATION_VERSION)
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.type_name]
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float16), entry.size_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _file_type(entries: list[Entry]) -> int:
    """`general.file_type`: the type of most weights, as llama.cpp names it (Q4_K of a mixture counts as Q4_K_M)."""
    sizes: Counter[str] = Counter()
    for entry in entries:
        sizes[entry.type_name] += int(np.prod(entry.shape))
    most = sizes.most_common(1)[0][0]
    names = {name: number for number, name in FILE_TYPES.items()}
    return names.get(most, names.get(f"{most}_M", 0))


def _vocabulary(task: Task) -> int:
    return int(task.model.config["vocab_size"])


# --- the tensors ------------------------------------------------------------------------------------------------------
def _entries(task: Task, choices: Choices) -> Iterator[Entry]:
    for name, values in task.family.generated(task.model.config).items():
        yield Entry(name, "F32", values.shape, values.nbytes, functools.partial(_one_piece, values))
    for tensor in task.family.tensors(task.model.config):
        yield _entry(task, tensor, choices.by_name.get(tensor.name))


def _one_piece(values: Float32) -> Iterator[Bytes]:
    yield np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _entry(task: Task, tensor: Tensor, choice: Choice | None) -> Entry:
    place, weight = tensor.placement, task.model.weights[tensor.name]
    if place is None:
        raise BadInput(f"GGUF has no place for {tensor.name}", 'use the ONNX format: [writer] use = "onnx"')
    shape = tuple(reversed(tensor.shape)) if place.transpose else tensor.shape
    if place.full_precision or len(shape) == 1:
        choice = Rounded("F32")
    if choice is None:
        raise AssertionError(f"the quantizer chose nothing for {tensor.name}")
    columns = shape[-1]
    if isinstance(choice, Integers):
        type_name = packing.gguf_type(choice.form.bits, symmetric=choice.form.symmetric)
        pieces = functools.partial(_repacked, choice, place)
    else:
        type_name = choice.type_name
        pieces = functools.partial(_rounded, weight, place, choice, task.threads)
    rows = shape[0] if len(shape) == 2 else 1
    return Entry(place.name, type_name, shape, rows * ggml.row_bytes(type_name, columns), pieces)


def _repacked(choice: Integers, place: Placement) -> Iterator[Bytes]:
    matrix = choice.load()
    _, data = packing.to_gguf(matrix if place.row_order is None else matrix.rows(place.row_order))
    yield data


def _rounded(weight: Weight, place: Placement, choice: Rounded, threads: int) -> Iterator[Bytes]:
    for values in _arranged(weight, place):
        rows = values.reshape(1, -1) if values.ndim == 1 else values
        if not np.isfinite(rows).all():
            raise BadInput(f"{weight.name} holds NaN or infinity", "the checkpoint or an adapter is damaged")
        yield ggml.encode(rows, choice.type_name, choice.importance, threads)


def _arranged(weight: Weight, place: Placement) -> Iterator[Float32]:
    """The tensor as GGUF wants it, in pieces of rows."""
    if place.transpose or place.row_order is not None or len(weight.shape) == 1:
        values = weight.whole()
        values = values.T if place.transpose else values
        values = values if place.row_order is None else values[place.row_order]
        yield values + np.float32(place.add) if place.add else values
        return
    step = max(1, PIECE // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        yield weight.read(start, min(start + step, weight.shape[0]))
