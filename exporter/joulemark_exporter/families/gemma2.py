"""Gemma 2: norms before and after each block, soft-capped scores, a window in every other layer."""

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

MODEL_TYPES = ("gemma2",)
TIED = True
GGUF = "gemma2"
NORMS = (
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
)


def tensors(config: Config) -> tuple[Tensor, ...]:
    """See the contract."""
    return _decoder.tensors({"head_dim": 256, **config}, _decoder.Layout(norms=NORMS, norm_offset=1.0, tied=True))


def metadata(config: Config) -> dict[str, Value]:
    """See the contract."""
    return {
        **_decoder.metadata({"head_dim": 256, **config}),
        "attn_logit_softcapping": configuration.real(config, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": configuration.real(config, "final_logit_softcapping", 30.0),
        "attention.sliding_window": configuration.count(config, "sliding_window", default=4096),
    }


def generated(config: Config) -> dict[str, Float32]:
    """See the contract."""
    del config
    return {}
