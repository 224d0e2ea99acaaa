"""The family plug-in contract: one file an architecture of transformers, found by `model_type`, offering `FAMILY: Family`.

Facts come from the transformers class, llama.cpp's loader and its converter (llama-cpp-python 0.3.36), which the tests run beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from joulemark import plugins
from joulemark.errors import BadInput
from joulemark_exporter import configuration
from joulemark_exporter.weights import Float32

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


@dataclass(frozen=True)
class Memory:
    """The key-value memory of a model: what one position of it holds."""

    layers: int
    heads: int
    head_size: int

    @property
    def numbers(self) -> int:
        """Numbers of one position: keys and values of all layers."""
        return 2 * self.layers * self.heads * self.head_size


def nothing(config: Config) -> dict[str, Float32]:
    """No tensors beside the checkpoint's own."""
    del config
    return {}


@dataclass(frozen=True)
class Family:
    """An architecture. Functions take config.json; those that look at what llama.cpp can compute raise BadInput where it cannot."""

    model_types: tuple[str, ...]
    """The values of config.json's `model_type` that it describes."""
    prefix: str
    """What every state_dict name but the head's begins with, such as `model.`."""
    layers: str
    """The state_dict prefix of the list of layers, such as `model.layers`."""
    embedding: str
    """The name of the token embedding."""
    linears: tuple[Linear, ...]
    """The matrices of a layer that are quantized, in the order in which a layer computes them."""
    tied: bool
    """Whether the output matrix is the embedding where config.json does not say."""
    gguf: str
    """The architecture's name in GGUF, or "" where llama.cpp has none."""
    tensors: Callable[[Config], tuple[Tensor, ...]]
    """Every tensor of a checkpoint, with its shape and its place in GGUF."""
    metadata: Callable[[Config], dict[str, Value]]
    """GGUF's key-values under `<gguf>.`, without that prefix."""
    context: Callable[[Config], int]
    """Positions that the model was trained for."""
    memory: Callable[[Config], Memory]
    """The shape of its key-value memory."""
    generated: Callable[[Config], dict[str, Float32]] = nothing
    """Tensors that no checkpoint holds (RoPE factors), by GGUF name."""
    from_gguf: Callable[[Config], Config] | None = None
    """What config.json must say beside the sizes that a GGUF file states; None: GGUF files of it cannot be a source."""
    returns_tuple: bool = False
    """Whether a layer returns a tuple whose first part are the states."""

    def is_tied(self, config: Config) -> bool:
        """Whether the output matrix is the token embedding itself."""
        return bool(config.get("tie_word_embeddings", self.tied))

    def layer_count(self, config: Config) -> int:
        """How many layers the model has."""
        return self.memory(config).layers

    def parameter(self, layer: int, linear: Linear) -> str:
        """The state_dict name of a layer's matrix."""
        return f"{self.layers}.{layer}.{linear.name}.weight"

    def layer_of(self, name: str) -> int:
        """The layer of a state_dict name that belongs to one."""
        return int(name.removeprefix(f"{self.layers}.").split(".")[0])

    def matrices(self, config: Config) -> dict[str, Linear]:
        """Every matrix that quantizers work on, layer by layer in the order of computing: state_dict name → what it is."""
        every = range(self.layer_count(config))
        return {self.parameter(layer, linear): linear for layer in every for linear in self.linears}

    def stages(self) -> tuple[int, ...]:
        """The stages of a layer, in the order of computing."""
        return tuple(sorted({linear.stage for linear in self.linears}))


def known() -> Iterator[Family]:
    """All families."""
    return (plugins.load(PACKAGE, name).FAMILY for name in plugins.names(PACKAGE))


def find(model_type: str) -> Family:
    """The family of a model type. Raises BadInput that names the known ones."""
    for family in known():
        if model_type in family.model_types:
            return family
    types = sorted(name for family in known() for name in family.model_types)
    raise BadInput(
        f"models of type {model_type!r} cannot be exported",
        f"known: {', '.join(types)}; a new one is one file in families/",
    )


def vector(name: str, place: str, size: int, add: float = 0.0, row_order: NDArray[np.intp] | None = None) -> Tensor:
    """A norm or a bias, which llama.cpp keeps in float32."""
    return Tensor(name, (size,), Placement(place, row_order=row_order, add=add, full_precision=True))


def affine_norm(name: str, place: str, size: int) -> tuple[Tensor, Tensor]:
    """A layer norm with weight and bias."""
    return vector(f"{name}.weight", f"{place}.weight", size), vector(f"{name}.bias", f"{place}.bias", size)


def head(config: Config, tied: bool, width: int) -> tuple[Tensor, ...]:
    """The output matrix, where it is a tensor of its own."""
    return () if tied else (Tensor(HEAD, (int(config["vocab_size"]), width), Placement("output.weight")),)


def plain_metadata(config: Config, memory: Memory, width: int, inner: int, context: int) -> dict[str, Value]:
    """GGUF's key-values of the families with layer norms that take biases."""
    return {
        "block_count": memory.layers,
        "context_length": context,
        "embedding_length": width,
        "feed_forward_length": inner,
        "attention.head_count": memory.heads,
        "attention.layer_norm_epsilon": configuration.real(config, "layer_norm_epsilon", 1e-5),
    }


def memory_of_all_heads(config: Config, width: int) -> Memory:
    """Of models whose key heads are as many as their query heads. Raises BadInput."""
    heads = configuration.count(config, "n_head", "num_attention_heads", most=configuration.MOST_WIDTH)
    layers = configuration.count(config, "n_layer", "num_hidden_layers", most=configuration.MOST_LAYERS)
    return Memory(layers, heads, configuration.head_size(width, heads))


def rotary_rows(heads: int, rows: int) -> NDArray[np.intp]:
    """The order of the rows of a query or key matrix in GGUF's llama architecture, whose rotary embedding pairs neighbours where
    transformers pairs the halves of a head."""
    half = rows // heads // 2
    return np.arange(rows, dtype=np.intp).reshape(heads, 2, half).swapaxes(1, 2).reshape(-1)


def with_defaults(config: Config, defaults: Mapping[str, Any]) -> Config:
    """What config.json says, with the class's own defaults where it says nothing (None counts as nothing)."""
    return {**defaults, **{key: value for key, value in config.items() if value is not None}}
