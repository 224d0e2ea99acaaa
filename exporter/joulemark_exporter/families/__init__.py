"""The family plug-in contract: one file an architecture of transformers, found by `model_type`.

A family module offers

    MODEL_TYPES: tuple[str, ...]                the values of config.json's `model_type` that it describes
    LAYERS: str                                 the state_dict prefix of the list of layers, such as `model.layers`
    LINEARS: tuple[Linear, ...]                 the matrices of a layer that are quantized, in the order in which a layer computes them
    EMBEDDING: str, HEAD: str                   names of the token embedding and of the output matrix
    GGUF: str                                   the architecture's name in GGUF, or "" where llama.cpp has none
    WHY_NOT_GGUF: str                           the reason of the latter
    metadata(config) -> dict[str, Value]        GGUF key-values under `<GGUF>.`, without that prefix
    placement(name, config) -> Placement | None where a tensor goes in GGUF; None for tensors that GGUF does not hold
    generated(config) -> dict[str, array]       tensors that no checkpoint holds (RoPE factors), by GGUF name

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

Config = dict[str, Any]
Value = str | int | float | bool | list[int] | list[float] | list[bool]


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


def rotary_rows(heads: int, rows: int) -> NDArray[np.intp]:
    """The order of the rows of a query or key matrix in GGUF's llama architecture, whose rotary embedding pairs neighbours where
    transformers pairs the halves of a head."""
    half = rows // heads // 2
    return np.arange(rows, dtype=np.intp).reshape(heads, 2, half).swapaxes(1, 2).reshape(-1)


Placing = Callable[[str, Config], Placement | None]
