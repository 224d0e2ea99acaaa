"""The family plug-in contract: one file an architecture of transformers, found by `model_type`.

A family module offers

    MODEL_TYPES: tuple[str, ...]              the values of config.json's `model_type` that it describes
    PREFIX: str                               what every state_dict name but the head's begins with, such as `model.`
    LAYERS: str                               the state_dict prefix of the list of layers, such as `model.layers`
    LINEARS: tuple[Linear, ...]               the matrices of a layer that are quantized, in the order in which a layer computes them
    EMBEDDING: str                            the name of the token embedding
    TIED: bool                                whether the output matrix is the embedding where config.json does not say
    RETURNS_TUPLE: bool = False               (optional) whether a layer returns a tuple whose first part are the states
    GGUF: str                                 the architecture's name in GGUF, or "" where llama.cpp has none
    tensors(config) -> tuple[Tensor, ...]     every tensor of a checkpoint, with its shape and its place in GGUF
    metadata(config) -> dict[str, Value]      GGUF key-values under `<GGUF>.`, without that prefix
    generated(config) -> dict[str, Float32]   tensors that no checkpoint holds (RoPE factors), by GGUF name

Facts come from the transformers class, llama.cpp's loader and its converter (llama-cpp-python 0.3.36), which the tests run beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from joulemark import plugins
from joulemark.errors import BadInput

PACKAGE = "joulemark_exporter.families"
HEAD = "lm_head.weight"
"""The output matrix, in every family."""

Config = dict[str, Any]
Value = str | int | float | bool


@dataclass(frozen=True)
class Linear:
    """A matrix of a layer. `name` is relative to the layer (`self_attn.q_proj`), `role` is GGUF's word (`attn_q`).

    Linears of the same `stage` read the same input, and stages follow one another."""

    name: str
    role: str
    stage: int
    transposed: bool = False
    """True for GPT-2's Conv1D, whose rows are inputs."""


@dataclass(frozen=True)
class Placement:
    """Where a tensor goes in GGUF and what is done to it on the way, in this order: transpose, reorder rows, add."""

    name: str
    transpose: bool = False
    row_order: NDArray[np.intp] | None = None
    """GGUF's row r is row `row_order[r]` of the checkpoint's (after transposing)."""
    add: float = 0.0
    full_precision: bool = False
    """True where llama.cpp wants float32 whatever the file's type: norms, biases, position embeddings."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint. `placement` None: GGUF does not hold it (or llama.cpp lacks the architecture)."""

    name: str
    shape: tuple[int, ...]
    placement: Placement | None = None


Placing = Callable[[str, Config], Placement | None]


def find(model_type: str) -> ModuleType:
    """The family of a model type. Raises BadInput that names the known ones."""
    known: list[str] = []
    for name in plugins.names(PACKAGE):
        family = plugins.load(PACKAGE, name)
        if model_type in family.MODEL_TYPES:
            return family
        known.extend(family.MODEL_TYPES)
    raise BadInput(
        f"models of type {model_type!r} cannot be exported",
        f"known: {', '.join(sorted(known))}; a new one is one file in families/",
    )


def placing(family: ModuleType) -> Placing:
    """The function (tensor's name, config) → its place in GGUF."""
    return lambda name, config: next((item.placement for item in family.tensors(config) if item.name == name), None)


def is_tied(family: ModuleType, config: Config) -> bool:
    """Whether the output matrix is the token embedding itself."""
    return bool(config.get("tie_word_embeddings", family.TIED))


def norm(name: str, place: str, size: int, add: float = 0.0) -> Tensor:
    """A vector that llama.cpp keeps in float32."""
    return Tensor(name, (size,), Placement(place, add=add, full_precision=True))


def head(config: Config, tied: bool, width: int) -> tuple[Tensor, ...]:
    """The output matrix, where it is a tensor of its own."""
    return () if tied else (Tensor(HEAD, (int(config["vocab_size"]), width), Placement("output.weight")),)


def rotary_rows(heads: int, rows: int) -> NDArray[np.intp]:
    """The order of the rows of a query or key matrix in GGUF's llama architecture, whose rotary embedding pairs neighbours where
    transformers pairs the halves of a head."""
    half = rows // heads // 2
    return np.arange(rows, dtype=np.intp).reshape(heads, 2, half).swapaxes(1, 2).reshape(-1)


def layer_count(family: ModuleType, config: Config) -> int:
    """How many layers the model has."""
    prefix = f"{family.LAYERS}."
    return 1 + max(
        int(item.name[len(prefix) :].split(".")[0]) for item in family.tensors(config) if item.name.startswith(prefix)
    )


def linears(family: ModuleType, config: Config) -> dict[str, Linear]:
    """Every matrix that quantizers work on, layer by layer in the order of computing: state_dict name → what it is."""
    return {
        f"{family.LAYERS}.{layer}.{linear.name}.weight": linear
        for layer in range(layer_count(family, config))
        for linear in family.LINEARS
    }
