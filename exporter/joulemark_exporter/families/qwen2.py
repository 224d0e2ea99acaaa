"""Qwen 2 and 2.5: LLaMA's layout with biases on queries, keys and values. The rotary embedding pairs halves in GGUF too."""

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

MODEL_TYPES = ("qwen2",)
TIED = False
GGUF = "qwen2"


def tensors(config: Config) -> tuple[Tensor, ...]:
    """See the contract."""
    if config.get("use_sliding_window"):
        raise BadInput("this Qwen attends through a sliding window", "llama.cpp has no window for it: not supported")
    biased = frozenset({"attn_q", "attn_k", "attn_v"})
    return _decoder.tensors(config, _decoder.Layout(biased=biased, tied=bool(config.get("tie_word_embeddings", TIED))))


def metadata(config: Config) -> dict[str, Value]:
    """See the contract."""
    return _decoder.metadata(config)


def generated(config: Config) -> dict[str, Float32]:
    """See the contract."""
    del config
    return {}
