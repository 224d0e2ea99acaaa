"""What Gemma 2 and 3 share: four norms a layer, and how attention scores are scaled. Not a plug-in.

llama.cpp divides them by the root of the head's size (of the width by the heads in the largest model, which it knows by its number of
layers); transformers by the root of query_pre_attn_scalar. Truth: llama-model.cpp, f_attention_scale.
"""

from __future__ import annotations

from joulemark.errors import BadInput
from joulemark_exporter import configuration
from joulemark_exporter.families import Config, _decoder

NORMS = (
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
)


def divisor(config: Config, large_layers: int) -> int:
    """What llama.cpp takes the root of; `large_layers` is the number of layers of the largest model."""
    size = _decoder.sizes(config)
    return size.width // size.heads if size.layers == large_layers else size.head


def check(config: Config, large_layers: int) -> None:
    """Raises BadInput where transformers scales otherwise."""
    expected, stated = divisor(config, large_layers), configuration.real(config, "query_pre_attn_scalar", 256)
    if stated != expected:
        raise BadInput(
            f"query_pre_attn_scalar is {stated:g}, llama.cpp computes with {expected} for this model",
            "its logits would be wrong without a word: use the ONNX format",
        )
