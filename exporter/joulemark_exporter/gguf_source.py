"""A GGUF file as a source: its weights de-quantised, its configuration and tokenizer in Hugging Face's words.

That is how real weights reach a machine without a hub. Owns the way back from GGUF: names, row order, added constants. The header is
checked by `joulemark.gguf_header` before anything else is read, and rows are read one by one, never mapped. What GGUF does not state well
enough to go back from (rotary factors as a tensor, mixtures of experts) is refused."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from joulemark import durable
from joulemark.artifact import hash_file
from joulemark.errors import BadInput
from joulemark.gguf_header import Header, TensorInfo, read_header
from joulemark_exporter import ggml, hub_tokenizer
from joulemark_exporter.families import Config, Family, Placement, Tensor, known
from joulemark_exporter.weights import Float32, Model, Weight

LLAMA_CPP_ROPE_BASE = 10_000.0
"""What llama.cpp takes where a file does not state the rotary base (llama-model.cpp, rope_freq_base_train)."""


def open_file(path: Path, cache: Path) -> Model:
    """The model in a GGUF file. Its configuration and tokenizer are written to the cache. Raises ModelRejected, BadInput."""
    header = read_header(path)
    family = _family(header)
    digest = hash_file(path)
    config = _config(header, family)
    folder = cache / "from-gguf" / digest[:32]
    # Written anew each time: what an older version made of the same file may differ.
    hub_tokenizer.write(gguf.GGUFReader(path), folder)
    durable.replace_file(folder / "config.json", [json.dumps(config, indent=1).encode()])
    return Model(folder, config, weights(path, family, config), ((f"GGUF file {header.quantization}", digest),))


def weights(path: Path, family: Family, config: Config) -> dict[str, Weight]:
    """Every tensor of the model as this file gives it back, by state_dict name. Raises ModelRejected, BadInput."""
    by_name = {tensor.name: tensor for tensor in read_header(path).tensors}
    return {item.name: _weight(path, item, by_name) for item in family.tensors(config)}


def _family(header: Header) -> Family:
    sources = [family for family in known() if family.from_gguf is not None]
    for family in sources:
        if family.gguf == header.architecture:
            return family
    raise BadInput(
        f"GGUF files of architecture {header.architecture!r} cannot be a source",
        "give the Hugging Face folder of this model; GGUF sources are read for "
        + ", ".join(family.gguf for family in sources),
    )


# --- configuration ----------------------------------------------------------------------------------------------------
def _config(header: Header, family: Family) -> Config:
    """config.json, with the rotary settings in both generations' keys."""
    values: dict[str, Any] = {
        key.removeprefix(f"{header.architecture}."): value
        for key, value in header.metadata.items()
        if key.startswith(f"{header.architecture}.")
    }
    names = {tensor.name for tensor in header.tensors}
    if "rope_freqs.weight" in names or "rope.scaling.type" in values or "expert_count" in values:
        raise BadInput(
            "this GGUF holds scaled rotary factors or experts, which cannot be turned back into a configuration",
            "give the Hugging Face folder of this model",
        )
    heads = _whole(values, "attention.head_count")
    width = _whole(values, "embedding_length")
    theta = _number(values, "rope.freq_base", LLAMA_CPP_ROPE_BASE)
    config: Config = {
        "hidden_size": width,
        "intermediate_size": _whole(values, "feed_forward_length"),
        "num_hidden_layers": _whole(values, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _whole(values, "attention.head_count_kv", heads),
        "head_dim": _whole(values, "attention.key_length", _whole(values, "rope.dimension_count", width // heads)),
        "rms_norm_eps": _shortest(_number(values, "attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": _whole(values, "context_length"),
        "vocab_size": _vocabulary(header),
        "tie_word_embeddings": "output.weight" not in names,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "dtype": "float32",
    }
    assert family.from_gguf is not None
    return {**config, **family.from_gguf(config), **_windows(values, theta), **_special(header)}


def _windows(values: Mapping[str, Any], theta: float) -> Config:
    """The keys of Gemma's windowed layers."""
    found: Config = {}
    if "attention.sliding_window" in values:
        found["sliding_window"] = _whole(values, "attention.sliding_window")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if key in values:
            found[key] = _number(values, key)
    if "rope.freq_base_swa" in values:
        local = _number(values, "rope.freq_base_swa")
        kinds = {"full_attention": theta, "sliding_attention": local}
        found["rope_parameters"] = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in kinds.items()}
        found["rope_local_base_freq"] = local
    return found


def _special(header: Header) -> Config:
    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {key: header.metadata.get(f"tokenizer.ggml.{word}_token_id") for key, word in ids.items()}
    return {key: value for key, value in found.items() if isinstance(value, int)}


def _vocabulary(header: Header) -> int:
    """Rows of the embedding: the last dimension in ggml's order."""
    return next(tensor.shape[-1] for tensor in header.tensors if tensor.name == "token_embd.weight")


def _whole(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadInput(
            f"the GGUF states {key} = {value!r}", "the file is damaged, or its layers differ from one another"
        )
    return value


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise BadInput(f"the GGUF states {key} = {value!r}", "the file is damaged")
    return float(value)


def _shortest(value: float) -> float:
    """The number that a person wrote: GGUF keeps 32 bits, in which 1e-5 reads 9.99999974e-06."""
    return float(str(np.float32(value)))


# --- weights ----------------------------------------------------------------------------------------------------------
def _weight(path: Path, item: Tensor, stored: Mapping[str, TensorInfo]) -> Weight:
    place = item.placement
    if place is None or place.name not in stored:
        raise BadInput(
            f"the GGUF lacks the tensor of {item.name}", "the file is damaged or of another variant of the architecture"
        )
    info = stored[place.name]
    shape = tuple(reversed(info.shape))
    if shape != item.shape:
        raise BadInput(f"{info.name} has shape {shape}, its header implies {item.shape}", "the file is damaged")
    if info.type_name not in ggml.WRITABLE:
        raise BadInput(f"{info.name} is stored as {info.type_name}, which cannot be read", "use a file of another type")
    return Weight(item.name, item.shape, info.type_name, functools.partial(_rows, path, info, place))


def _rows(path: Path, info: TensorInfo, place: Placement, start: int, stop: int) -> Float32:
    vector = len(info.shape) == 1
    columns = info.shape[0]
    count = 1 if vector else info.shape[1]
    if place.row_order is not None and not vector:
        values = np.empty((count, columns), np.float32)
        values[place.row_order] = _read(path, info, columns, 0, count)
        return np.ascontiguousarray(values[start:stop])
    if not vector:
        return _read(path, info, columns, start, stop)
    values = _read(path, info, columns, 0, 1)[0]
    if place.row_order is not None:
        values, permuted = np.empty_like(values), values
        values[place.row_order] = permuted
    return np.ascontiguousarray(values[start:stop] - np.float32(place.add))


def _read(path: Path, info: TensorInfo, columns: int, start: int, stop: int) -> Float32:
    size = ggml.row_bytes(info.type_name, columns)
    with path.open("rb") as file:
        data = os.pread(file.fileno(), (stop - start) * size, info.offset + start * size)
    if len(data) != (stop - start) * size:
        raise BadInput(f"{path} ends within {info.name}", "the file is cut short: fetch it again")
    return ggml.decode(np.frombuffer(data, np.uint8).reshape(stop - start, size), info.type_name, columns)
