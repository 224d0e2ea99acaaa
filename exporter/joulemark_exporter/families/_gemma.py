"""What Gemma 2 and 3 share: four norms a layer, and how attention scores are scaled. Not a plug-in.

llama.cpp divides them by the root of the head's size (of the width by the heads in the largest model, which it knows by its number of
layers); transformers by the root of query_pre_attn_scalar. Truth: llama-model.cpp, f_attention_scale.
"""

from __future__ import annotations

from collections.abc import Callable

from joulemark.errors import BadInput
from joulemark_exporter import configuration
from joulemark_exporter.families import Config, Family, Value, _decoder

NORMS: tuple[tuple[str, str], ...] = (
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
)


def family(
    model_type: str,
    gguf: str,
    class_name: str,
    large_layers: int,
    more_metadata: Callable[[Config], dict[str, Value]],
    check: Callable[[Config], None] = lambda _: None,
    head_norms: bool = False,
) -> Family:
    """A family with these norms; `large_layers` is the number of layers of its largest model."""

    def check_both(config: Config) -> None:
        check_scale(config, large_layers)
        check(config)

    layout = _decoder.Layout(
        model_types=(model_type,),
        gguf=gguf,
        class_name=class_name,
        activation=_decoder.GELU,
        norms=NORMS,
        head_norms=head_norms,
        norm_offset=1.0,
        tied=True,
        defaults={"head_dim": 256},
        check=check_both,
        more_metadata=more_metadata,
        more_from_gguf=lambda config: {"query_pre_attn_scalar": divisor(config, large_layers)},
    )
    return _decoder.family(layout)


def divisor(config: Config, large_layers: int) -> int:
    """What llama.cpp takes the root of; `large_layers` is the number of layers of the largest model."""
    size = _decoder.sizes(config)
    return size.width // size.heads if size.layers == large_layers else size.head


def check_scale(config: Config, large_layers: int) -> None:
    """Raises BadInput where transformers scales otherwise."""
    expected, stated = divisor(config, large_layers), configuration.real(config, "query_pre_attn_scalar", 256)
    if stated != expected:
        raise BadInput(
            f"query_pre_attn_scalar is {stated:g}, llama.cpp computes with {expected} for this model",
            "its logits would be wrong without a word: use the ONNX format",
        )
