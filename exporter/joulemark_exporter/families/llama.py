"""LLaMA 1 to 3, SmolLM and SmolLM2, TinyLlama, Mistral: one layout. GGUF's architecture `llama` covers all of them.

Mistral 7B v0.1 attends through a window that llama.cpp's llama architecture does not have; within the window the two agree, so the window
is written as the context.
"""

from __future__ import annotations

from joulemark_exporter import configuration
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

MODEL_TYPES = ("llama", "mistral")
TIED = False
GGUF = "llama"


def tensors(config: Config) -> tuple[Tensor, ...]:
    """See the contract."""
    biased = {linear.role for linear in LINEARS if config.get(_bias(linear.role), False)}
    layout = _decoder.Layout(
        permuted=True, biased=frozenset(biased), tied=bool(config.get("tie_word_embeddings", TIED))
    )
    return _decoder.tensors(config, layout)


def _bias(role: str) -> str:
    return "attention_bias" if role.startswith("attn") else "mlp_bias"


def metadata(config: Config) -> dict[str, Value]:
    """See the contract."""
    size = _decoder.sizes(config)
    values = {**_decoder.metadata(config), "vocab_size": size.vocabulary, "rope.dimension_count": size.head}
    if config.get("sliding_window") is not None:
        window = configuration.count(config, "sliding_window")
        values["context_length"] = min(window, _decoder.context(config))
    return values


def generated(config: Config) -> dict[str, Float32]:
    """See the contract."""
    return _decoder.rope_tensor(config)
