"""Gemma 2: norms before and after each block, soft-capped scores, a window in every other layer."""

from __future__ import annotations

from joulemark.errors import BadInput
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
LARGE_LAYERS = 46
"""Of the 27B model."""
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
    """See the contract. Raises BadInput for scores that llama.cpp scales otherwise."""
    check_scale(config, LARGE_LAYERS)
    return {
        **_decoder.metadata({"head_dim": 256, **config}),
        "attn_logit_softcapping": configuration.real(config, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": configuration.real(config, "final_logit_softcapping", 30.0),
        "attention.sliding_window": configuration.count(config, "sliding_window", default=4096),
    }


def check_scale(config: Config, large_layers: int) -> None:
    """llama.cpp divides scores by the root of the head's size (of the width by the heads in the largest model, which it knows by its
    layers); transformers by the root of query_pre_attn_scalar. Raises BadInput where they differ."""
    size = _decoder.sizes({"head_dim": 256, **config})
    expected = size.width // size.heads if size.layers == large_layers else size.head
    stated = configuration.real(config, "query_pre_attn_scalar", 256)
    if stated != expected:
        raise BadInput(
            f"query_pre_attn_scalar is {stated:g}, llama.cpp computes with {expected} for this model",
            "its logits would be wrong without a word: use the ONNX format",
        )


def generated(config: Config) -> dict[str, Float32]:
    """See the contract."""
    del config
    return {}
