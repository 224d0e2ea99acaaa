"""Reads a GGUF file's header before any engine sees the file, and refuses what an engine should not see.

Owns the pre-flight check. Model files are hostile input: engines crash on a wrong block count and loaders allocate what
a 49-byte file claims. Here every count is bounded before it is used, no array is ever turned into Python objects, and
only ModelRejected leaves `read_header`. Time and memory are bounded by the limits below, not by what the file says. It
does not look at weights, knows no engine and does not compare with the machine's memory (`Header.weight_bytes` is for
that).

Sizes in bytes. Truth: the GGUF specification in ggml's repository; the checks mirror and exceed ggml's gguf.cpp.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from joulemark.errors import ModelRejected
from joulemark.gguf_bytes import LENGTH, MAX_STRING_BYTES, HeaderBytes, HeaderError
from joulemark.gguf_format import (
    ARCHITECTURES,
    ARRAY,
    DEFAULT_ALIGNMENT,
    FILE_TYPES,
    MAGIC,
    STRING,
    TENSOR_TYPES,
    VALUE_TYPES,
    VERSIONS,
)

MAX_METADATA = 1 << 14
MAX_TENSORS = 1 << 14
MAX_KEY_BYTES = 1 << 16
MAX_KEPT_BYTES = 4 << 20
"""Keys and strings that are decoded and kept, all together; a string beyond it is only summarised."""
MAX_NAME_BYTES = 63
MAX_ALIGNMENT = 1 << 16
MAX_DIMENSIONS = 4
MAX_BLOCKS = 512
MAX_CONTEXT_TOKENS = 1 << 24

_UINT32 = 4
_UINT32_KEYS = ("general.alignment", "general.file_type")
_TYPE = struct.Struct("<I")
_ARRAY_HEAD = struct.Struct("<IQ")
_TENSOR_TAIL = struct.Struct("<IQ")
_SCALARS = {number: (name, struct.Struct(form)) for number, (name, form) in VALUE_TYPES.items()}
_SHAPES = {count: struct.Struct(f"<{count}Q") for count in range(1, MAX_DIMENSIONS + 1)}
_BLOCK = re.compile(r"blk\.([0-9]{1,4})\.")

# What the engine reads through a typed pointer without asking: an array of another type is read out of bounds.
_TOKENIZER_ARRAYS = {
    "tokenizer.ggml.tokens": ("string",),
    "tokenizer.ggml.merges": ("string",),
    "tokenizer.ggml.scores": ("float32", "int32"),
    "tokenizer.ggml.token_type": ("int32", "uint32"),
}
_LOOKUP_TABLES = frozenset({"per_layer_token_embd.weight", "position_embd.weight", "token_types.weight"})
"""Tables of which a token reads one row only."""


@dataclass(frozen=True)
class ArraySummary:
    """What is kept of an array or of an over-long string: the type of its elements ("utf8" for a string) and their
    number."""

    type_name: str
    count: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor. `shape` is in ggml's order (fastest dimension first); `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    size_bytes: int


Value = str | int | float | bool | ArraySummary


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself, checked."""

    version: int
    metadata: Mapping[str, Value]
    tensors: tuple[TensorInfo, ...]
    parameters: int
    """Elements of all tensors."""
    weight_bytes: int
    """Bytes of all tensors."""
    bytes_per_token: int | None
    """Weight bytes that decoding one token reads: all tensors but look-up tables. None for a mixture of experts."""
    architecture: str
    quantization: str
    context_tokens: int
    block_count: int
    chat_template: str | None
    tokenizer_sha256: str | None
    """sha256 over the raw bytes of every `tokenizer.ggml.*` entry (key, type, value) in file order; None without
    any."""
    licence: str | None


def read_header(path: Path) -> Header:
    """The checked header of the GGUF file at `path`. Raises ModelRejected and nothing else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise ModelRejected(
            f"cannot open the model file {path}: {error}", "check the path and its permissions"
        ) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise HeaderError("it is not a regular file")
        return _parse(HeaderBytes(descriptor, status.st_size))
    except HeaderError as refusal:
        raise ModelRejected(
            f"the model file {path.name} is rejected: {refusal}",
            "download or export the model again; if it is rejected again, its maker's tool wrote a bad file",
        ) from refusal
    except OSError as error:
        raise ModelRejected(f"cannot read the model file {path}: {error}", "check the disk and try again") from error
    finally:
        os.close(descriptor)


def _parse(data: HeaderBytes) -> Header:
    if data.take(4, "the magic") != MAGIC:
        raise HeaderError("it is not a GGUF file (bad magic)")
    (version,) = data.unpack(_TYPE, "the version")
    if version not in VERSIONS:
        raise HeaderError(f"GGUF version {version} is not supported (or its byte order is big-endian)")
    tensor_count, metadata_count = data.unpack(_SHAPES[2], "the counts")
    if metadata_count > MAX_METADATA or tensor_count > MAX_TENSORS:
        raise HeaderError(f"it claims {metadata_count} metadata entries and {tensor_count} tensors")
    metadata, tokenizer_sha256 = _read_metadata(data, metadata_count)
    tensors = _read_tensors(data, tensor_count, _alignment(metadata))
    return _describe(version, metadata, tensors, tokenizer_sha256)


def _read_metadata(data: HeaderBytes, count: int) -> tuple[dict[str, Value], str | None]:
    metadata: dict[str, Value] = {}
    hasher = hashlib.sha256()
    hashed = False
    for index in range(count):
        start = data.position
        key = _read_key(data, index)
        if key in metadata:
            raise HeaderError(f"the key {key[:80]!r} occurs twice")
        metadata[key] = _read_value(data, key)
        if key.startswith("tokenizer.ggml."):
            for piece in data.since(start):
                hasher.update(piece)
            hashed = True
    return metadata, hasher.hexdigest() if hashed else None


def _read_key(data: HeaderBytes, index: int) -> str:
    (length,) = data.unpack(LENGTH, f"key {index}")
    if not 0 < length <= MAX_KEY_BYTES:
        raise HeaderError(f"key {index} has {length} bytes")
    data.kept_bytes += length
    if data.kept_bytes > MAX_KEPT_BYTES:
        raise HeaderError(f"its keys have more than {MAX_KEPT_BYTES} bytes")
    try:
        return data.take(length, f"key {index}").decode("ascii")
    except UnicodeDecodeError as error:
        raise HeaderError(f"key {index} is not ASCII") from error


def _read_value(data: HeaderBytes, key: str) -> Value:
    what = f"the value of {key[:80]!r}"
    (number,) = data.unpack(_TYPE, what)
    if number == STRING:
        return _read_string(data, what)
    if number == ARRAY:
        return _read_array(data, what)
    if number not in _SCALARS:
        raise HeaderError(f"{what} has the unknown type {number}")
    if number != _UINT32 and (key in _UINT32_KEYS or key.endswith((".block_count", ".context_length"))):
        raise HeaderError(f"{what} must have the type uint32")
    return data.unpack(_SCALARS[number][1], what)[0]


def _read_string(data: HeaderBytes, what: str) -> Value:
    (length,) = data.unpack(LENGTH, what)
    if length > MAX_STRING_BYTES:
        raise HeaderError(f"{what} is a string of {length} bytes")
    if data.kept_bytes + length > MAX_KEPT_BYTES:
        data.skip(length, what)
        return ArraySummary("utf8", length)
    data.kept_bytes += length
    try:
        return data.take(length, what).decode("utf-8")
    except UnicodeDecodeError as error:
        raise HeaderError(f"{what} is not UTF-8") from error


def _read_array(data: HeaderBytes, what: str) -> ArraySummary:
    number, count = data.unpack(_ARRAY_HEAD, what)
    if number == STRING:
        if 8 * count > data.size - data.position:
            raise HeaderError(f"{what} claims {count} strings, more than the file can hold")
        data.skip_strings(count, what)
        return ArraySummary("string", count)
    if number not in _SCALARS:
        raise HeaderError(f"{what} is an array of the type {number}, which is unknown or not allowed")
    name, form = _SCALARS[number]
    data.skip(count * form.size, what)
    return ArraySummary(name, count)


def _alignment(metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if isinstance(value, bool) or not isinstance(value, int):
        raise HeaderError("general.alignment is not a number")
    if not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise HeaderError(f"general.alignment is {value}, not a power of two up to {MAX_ALIGNMENT}")
    return value


def _read_tensors(data: HeaderBytes, count: int, alignment: int) -> tuple[TensorInfo, ...]:
    """Tensor data must lie in the order of the descriptions, each padded to the alignment, as the engine demands."""
    entries: list[tuple[str, tuple[int, ...], str, int, int]] = []
    names: set[str] = set()
    expected = 0
    for index in range(count):
        name, shape, type_name, offset, size = _read_tensor(data, index)
        if name in names:
            raise HeaderError(f"the tensor {name!r} occurs twice")
        if offset != expected:
            raise HeaderError(f"the tensor {name!r} lies at {offset}, expected {expected}")
        names.add(name)
        entries.append((name, shape, type_name, offset, size))
        if expected + size > data.size:
            raise HeaderError(f"the tensor {name!r} reaches beyond the end of the file ({data.size} bytes)")
        expected += _padded(size, alignment)
    start = _padded(data.position, alignment)
    if entries and start + entries[-1][3] + entries[-1][4] > data.size:
        raise HeaderError(f"the tensor {entries[-1][0]!r} reaches beyond the end of the file ({data.size} bytes)")
    return tuple(TensorInfo(name, shape, kind, start + offset, size) for name, shape, kind, offset, size in entries)


def _read_tensor(data: HeaderBytes, index: int) -> tuple[str, tuple[int, ...], str, int, int]:
    what = f"the description of tensor {index}"
    (length,) = data.unpack(LENGTH, what)
    if not 0 < length <= MAX_NAME_BYTES:
        raise HeaderError(f"the name of tensor {index} has {length} bytes")
    try:
        name = data.take(length, what).decode("ascii")
    except UnicodeDecodeError as error:
        raise HeaderError(f"the name of tensor {index} is not ASCII") from error
    (dimensions,) = data.unpack(_TYPE, what)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise HeaderError(f"the tensor {name!r} has {dimensions} dimensions")
    shape = data.unpack(_SHAPES[dimensions], what)
    number, offset = data.unpack(_TENSOR_TAIL, what)
    if number not in TENSOR_TYPES:
        raise HeaderError(f"the tensor {name!r} has the unknown type {number}")
    type_name, block, block_bytes = TENSOR_TYPES[number]
    elements = 1
    for length in shape:
        elements *= length
    if not elements or shape[0] % block:
        raise HeaderError(f"the tensor {name!r} has the shape {shape}, which {type_name} cannot have")
    return name, shape, type_name, offset, elements // block * block_bytes


def _padded(size: int, alignment: int) -> int:
    return (size + alignment - 1) // alignment * alignment


def _describe(
    version: int, metadata: Mapping[str, Value], tensors: tuple[TensorInfo, ...], tokenizer_sha256: str | None
) -> Header:
    architecture = _text(metadata, "general.architecture")
    if architecture is None:
        raise HeaderError("it does not name its architecture (general.architecture)")
    if architecture not in ARCHITECTURES:
        raise HeaderError(f"its architecture {architecture[:80]!r} is not supported")
    if not tensors:
        raise HeaderError("it has no tensors")
    _check_tokenizer(metadata)
    weight_bytes = sum(tensor.size_bytes for tensor in tensors)
    return Header(
        version=version,
        metadata=metadata,
        tensors=tensors,
        parameters=sum(_elements(tensor.shape) for tensor in tensors),
        weight_bytes=weight_bytes,
        bytes_per_token=_bytes_per_token(tensors),
        architecture=architecture,
        quantization=_quantization(metadata, tensors),
        context_tokens=_count(metadata, f"{architecture}.context_length", MAX_CONTEXT_TOKENS),
        block_count=_block_count(metadata, architecture, tensors),
        chat_template=_text(metadata, "tokenizer.chat_template"),
        tokenizer_sha256=tokenizer_sha256,
        licence=_text(metadata, "general.license"),
    )


def _text(metadata: Mapping[str, Value], key: str) -> str | None:
    value = metadata.get(key)
    if value is not None and not isinstance(value, str):
        raise HeaderError(f"{key} is not a string of sensible length")
    return value


def _count(metadata: Mapping[str, Value], key: str, limit: int) -> int:
    value = metadata.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise HeaderError(f"{key} is missing or is not a whole number")
    if not 0 < value <= limit:
        raise HeaderError(f"{key} is {value}, allowed are 1 to {limit}")
    return value


def _block_count(metadata: Mapping[str, Value], architecture: str, tensors: tuple[TensorInfo, ...]) -> int:
    """The engine indexes fixed arrays with it, so it must be the number of blocks that are there."""
    claimed = _count(metadata, f"{architecture}.block_count", MAX_BLOCKS)
    found = {int(match.group(1)) for tensor in tensors if (match := _BLOCK.match(tensor.name))}
    if found != set(range(claimed)):
        raise HeaderError(f"{architecture}.block_count is {claimed}, but the tensors form {len(found)} blocks")
    return claimed


def _check_tokenizer(metadata: Mapping[str, Value]) -> None:
    counts: dict[str, int] = {}
    for key, allowed in _TOKENIZER_ARRAYS.items():
        value = metadata.get(key)
        if value is None:
            continue
        if not isinstance(value, ArraySummary) or value.type_name not in allowed:
            raise HeaderError(f"{key} is not an array of {allowed[0]}")
        counts[key] = value.count
    tokens = counts.get("tokenizer.ggml.tokens")
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        if key in counts and counts[key] != tokens:
            raise HeaderError(f"{key} has {counts[key]} entries for {tokens} tokens")


def _quantization(metadata: Mapping[str, Value], tensors: tuple[TensorInfo, ...]) -> str:
    """The name of `general.file_type`; where that says nothing, the tensor type with the most bytes."""
    claimed = metadata.get("general.file_type")
    if isinstance(claimed, int) and not isinstance(claimed, bool) and claimed in FILE_TYPES:
        return FILE_TYPES[claimed]
    totals: dict[str, int] = {}
    for tensor in tensors:
        totals[tensor.type_name] = totals.get(tensor.type_name, 0) + tensor.size_bytes
    return max(totals, key=lambda name: totals[name])


def _bytes_per_token(tensors: tuple[TensorInfo, ...]) -> int | None:
    names = {tensor.name for tensor in tensors}
    if any("_exps" in name for name in names):
        return None
    skipped = _LOOKUP_TABLES | ({"token_embd.weight"} if "output.weight" in names else frozenset[str]())
    return sum(tensor.size_bytes for tensor in tensors if tensor.name not in skipped)


def _elements(shape: tuple[int, ...]) -> int:
    elements = 1
    for length in shape:
        elements *= length
    return elements
