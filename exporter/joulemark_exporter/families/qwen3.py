"""Qwen 3 (dense): LLaMA's layout with norms on the heads' queries and keys, and a head size of its own."""

from __future__ import annotations

from joulemark.errors import BadInput
from joulemark_exporter.families import Config, Tensor, Value, _decoder
from joulemark_exporter.families._decoder import EMBEDDING, LAYERS, LINEARS, PREFIX
from joulemark_exporter.weights import Float32

__all__ = [
    "EMBEDDING",
    "GGUF",
    "LAYERS",
    "LINEARS",
    "MODEL_TYPES",
    "PREFIX",
    "TIED",
    "generated",
    "metadata",
    "tensors",
]

MODEL_TYPES = ("qwen3",)
TIED = False
GGUF = "qwen3"


def tensors(config: Config) -> tuple[Tensor, ...]:
    """See the contract."""
    if config.get("use_sliding_window") or config.get("attention_bias"):
        raise BadInput("this Qwen 3 has a sliding window or biases", "llama.cpp's qwen3 has neither: not supported")
    layout = _decoder.Layout(head_norms=True, tied=bool(config.get("tie_word_embeddings", TIED)))
    return _decoder.tensors({"head_dim": 128, **config}, layout)


def metadata(config: Config) -> dict[str, Value]:
    """See the contract. A head has 128 numbers unless config.json says otherwise (transformers' Qwen3Config)."""
    return _decoder.metadata({"head_dim": 128, **config})


def generated(config: Config) -> dict[str, Float32]:
    """See the contract."""
    del config
    return {}
