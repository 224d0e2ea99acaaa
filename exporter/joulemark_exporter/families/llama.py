"""LLaMA 1 to 3, SmolLM and SmolLM2, TinyLlama, Mistral: one layout. GGUF's architecture `llama` covers all of them.

Mistral 7B v0.1 attends through a window that llama.cpp's llama architecture does not have; within the window the two agree, so the window
is written as the context.
"""

from __future__ import annotations

from joulemark_exporter import configuration
from joulemark_exporter.families import Config, Value, _decoder


def _biased(config: Config) -> frozenset[str]:
    """Roles with a bias, where the configuration asks for them."""
    keys = {
        linear.role: "attention_bias" if linear.role.startswith("attn") else "mlp_bias" for linear in _decoder.LINEARS
    }
    return frozenset(role for role, key in keys.items() if config.get(key, False))


def _more_metadata(config: Config) -> dict[str, Value]:
    size = _decoder.sizes(config)
    return {"vocab_size": size.vocabulary, "rope.dimension_count": size.head}


def _context(config: Config) -> int:
    trained = configuration.count(config, "max_position_embeddings")
    return min(trained, configuration.count(config, "sliding_window", default=trained))


FAMILY = _decoder.family(
    _decoder.Layout(
        model_types=("llama", "mistral"),
        gguf="llama",
        class_name="LlamaForCausalLM",
        permuted=True,
        biased=_biased,
        more_metadata=_more_metadata,
        context=_context,
        generated=_decoder.rope_tensor,
    )
)
