"""Gemma 1: LLaMA's layout with norms stored minus one, embeddings tied and scaled, a head size of its own."""

from __future__ import annotations

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

MODEL_TYPES = ("gemma",)
TIED = True
GGUF = "gemma"


def tensors(config: Config) -> tuple[Tensor, ...]:
    """See the contract."""
    return _decoder.tensors({"head_dim": 256, **config}, _decoder.Layout(norm_offset=1.0, tied=True))


def metadata(config: Config) -> dict[str, Value]:
    """See the contract."""
    return _decoder.metadata({"head_dim": 256, **config})


def generated(config: Config) -> dict[str, Float32]:
    """See the contract."""
    del config
    return {}
