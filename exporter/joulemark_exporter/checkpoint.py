"""Opens a Hugging Face folder as a `Model`: safetensors in one file or in shards, tied weights, GPTQ checkpoints of both formats.

Owns finding, checking and lazily reading the tensors. Never pickle, never remote code. All that can be wrong with a checkpoint is said
before anything is computed: a missing shard, a tensor that is absent or of another shape, a type nobody reads. Files are opened anew for
every read, so that mapped pages do not count as this process' memory for longer than a read lasts.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 # pyright: ignore[reportUnusedImport]  # tells numpy what bfloat16 is
import numpy as np
from safetensors import SafetensorError, safe_open

from joulemark.artifact import hash_file
from joulemark.errors import BadInput, NotFound
from joulemark_exporter import configuration, packing
from joulemark_exporter.families import HEAD, Config, Family, Tensor, find
from joulemark_exporter.group_quantized import GroupQuantized, IntegerForm
from joulemark_exporter.weights import Float32, Model, Weight

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARDS = 4096
READABLE = ("F32", "F16", "BF16", "F64")
IGNORED_ENDINGS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", ".masked_bias")
"""Buffers that old checkpoints hold and no class reads."""
GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    path: Path
    key: str
    shape: tuple[int, ...]
    type_name: str


def open_folder(folder: Path) -> Model:
    """The model in `folder`. Reads headers only. Raises NotFound, BadInput."""
    config = configuration.read(folder)
    family = find(config["model_type"])
    stored = _canonical(_list(folder), family)
    quantization = _gptq_settings(config)
    tensors = family.tensors(config)
    weights = {item.name: _weight(item, stored, quantization) for item in tensors}
    _refuse_rest(stored, tensors, family.is_tied(config))
    return Model(folder, config, weights, (("checkpoint", digest(folder)),))


def digest(folder: Path) -> str:
    """sha256 over the names and contents of what makes the model: configuration, tokenizer and weights."""
    hasher = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".model", ".jinja", ".txt"):
            hasher.update(f"{path.name}\0{hash_file(path)}\n".encode())
    return hasher.hexdigest()


# --- finding the tensors ----------------------------------------------------------------------------------------------
def _list(folder: Path) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for path in _files(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118 - this is not a mapping
                    part = file.get_slice(key)
                    found[key] = Stored(path, key, tuple(part.get_shape()), str(part.get_dtype()))
        except (SafetensorError, OSError, ValueError) as error:
            raise BadInput(f"{path} is not a readable safetensors file: {error}", "download it again") from error
    return found


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        index = configuration.read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, Mapping) or not index:
            raise BadInput(f"{folder / INDEX} has no weight_map", "download it again")
        names = sorted({str(name) for name in index.values()})
        if len(names) > MAX_SHARDS or any(Path(name).name != name for name in names):
            raise BadInput(
                f"{folder / INDEX} names files outside its folder, or too many", "this index is not to be trusted"
            )
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise NotFound(
                f"{len(missing)} of {len(names)} shards are missing: {', '.join(missing[:3])}", "download them again"
            )
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    others = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if others:
        raise BadInput(
            f"{folder} has its weights in {others[0]} only",
            "pickle files run code when they are read: save the model again with safe_serialization=True",
        )
    raise NotFound(f"there are no weights in {folder}", f"expected {SINGLE} or {INDEX}")


def _canonical(stored: dict[str, Stored], family: Family) -> dict[str, Stored]:
    """By the names of the state_dict: checkpoints of the bare model (without head) lack its prefix."""
    prefix: str = family.prefix
    result: dict[str, Stored] = {}
    for key, item in stored.items():
        if key.endswith(IGNORED_ENDINGS):
            continue
        has_prefix = key.startswith((prefix, HEAD.removesuffix("weight")))
        result[key if has_prefix else prefix + key] = item
    return result


def _refuse_rest(stored: Mapping[str, Stored], tensors: tuple[Tensor, ...], tied: bool) -> None:
    """A tensor that nobody reads would be lost without a word."""
    known = {item.name for item in tensors}
    known |= {f"{name.removesuffix('weight')}{part}" for name in known for part in GPTQ_PARTS}
    known |= {f"{name.removesuffix('weight')}bias" for name in known}
    rest = [name for name in stored if name not in known and not (tied and name == HEAD)]
    if rest:
        raise BadInput(
            f"{len(rest)} tensors of the checkpoint have no place in this architecture, for example {rest[0]}",
            "config.json does not describe this checkpoint; or it holds a part (vision, experts) that is not supported",
        )


# --- reading them -----------------------------------------------------------------------------------------------------
def _weight(item: Tensor, stored: Mapping[str, Stored], quantization: _Gptq | None) -> Weight:
    found = stored.get(item.name)
    if found is None and quantization is not None:
        module = item.name.removesuffix(".weight")
        if f"{module}.qweight" in stored:
            return _gptq_weight(item, {part: stored.get(f"{module}.{part}") for part in GPTQ_PARTS}, quantization)
    if found is None:
        raise BadInput(
            f"the checkpoint lacks the tensor {item.name}", "a shard is incomplete, or config.json is another model's"
        )
    if found.shape != item.shape:
        raise BadInput(
            f"{item.name} has shape {found.shape}, config.json implies {item.shape}", "they belong to different models"
        )
    if found.type_name not in READABLE:
        raise BadInput(f"{item.name} is stored as {found.type_name}", f"readable types: {', '.join(READABLE)}")
    return Weight(item.name, item.shape, found.type_name, functools.partial(_rows, found))


def _rows(stored: Stored, start: int, stop: int) -> Float32:
    with safe_open(stored.path, framework="numpy") as file:
        part = file.get_slice(stored.key)[start:stop]
        return np.ascontiguousarray(part.astype(np.float32))


@dataclass(frozen=True)
class _Gptq:
    bits: int
    group_size: int
    symmetric: bool
    version: str


def _gptq_settings(config: Config) -> _Gptq | None:
    stated = config.get("quantization_config")
    if stated is None:
        return None
    if not isinstance(stated, Mapping) or stated.get("quant_method") != "gptq":
        method = stated.get("quant_method") if isinstance(stated, Mapping) else stated
        raise BadInput(
            f"checkpoints quantized by {method!r} cannot be read", "use the unquantized model, or a GPTQ checkpoint"
        )
    version = stated.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise BadInput(f"GPTQ checkpoints of format {version!r} cannot be read", "known: gptq, gptq_v2")
    bits, size = stated.get("bits"), stated.get("group_size")
    if bits not in (2, 3, 4, 8) or not isinstance(size, int) or size < -1 or size == 0:
        raise BadInput(
            f"quantization_config states {bits} bits in groups of {size}",
            "known: 2, 3, 4 or 8 bits; a group size or -1",
        )
    return _Gptq(int(bits), size, bool(stated.get("sym", True)), str(version))


def _gptq_weight(item: Tensor, parts: Mapping[str, Stored | None], settings: _Gptq) -> Weight:
    missing = [name for name, part in parts.items() if part is None and name != "g_idx"]
    if missing:
        raise BadInput(f"{item.name} is quantized but lacks {', '.join(missing)}", "a shard is incomplete")
    present = {name: part for name, part in parts.items() if part is not None}
    load = functools.partial(_integers, item, present, settings)

    def read(start: int, stop: int) -> Float32:
        values = load().dequantize()
        return np.ascontiguousarray((values.T if _turned(item) else values)[start:stop])

    form = IntegerForm(
        settings.bits, settings.group_size, settings.symmetric, _contiguous(present.get("g_idx"), settings.group_size)
    )
    return Weight(item.name, item.shape, f"GPTQ{settings.bits}", read, load, form)


def _contiguous(stored: Stored | None, group_size: int) -> bool:
    """Whether groups are neighbouring columns: act-order leaves them scattered."""
    if stored is None or group_size == -1:
        return True
    with safe_open(stored.path, framework="numpy") as file:
        groups = file.get_tensor(stored.key)
    return bool(np.array_equal(groups, np.arange(len(groups)) // group_size))


def _integers(item: Tensor, parts: Mapping[str, Stored], settings: _Gptq) -> GroupQuantized:
    arrays: dict[str, Any] = {}
    for name, part in parts.items():
        with safe_open(part.path, framework="numpy") as file:
            arrays[name] = file.get_tensor(part.key)
    matrix = packing.from_gptq(
        arrays,
        bits=settings.bits,
        group_size=settings.group_size,
        symmetric=settings.symmetric,
        checkpoint_format=settings.version,
    )
    wanted = tuple(reversed(item.shape)) if _turned(item) else item.shape
    if matrix.shape != wanted:
        raise BadInput(
            f"{item.name} has {matrix.shape} outputs and inputs, config.json implies {wanted}",
            "they belong to different models",
        )
    return matrix


def _turned(item: Tensor) -> bool:
    """Whether the class stores the matrix with inputs as rows (Conv1D); integers always have outputs as rows."""
    return item.placement is not None and item.placement.transpose
