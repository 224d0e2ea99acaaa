"""Gemma 2: norms before and after each block, soft-capped scores, a window in every other layer."""

from __future__ import annotations

from joulemark_exporter import configuration
from joulemark_exporter.families import Config, Value, _decoder, _gemma

LARGE_LAYERS = 46
"""Of the 27B model."""


def _more_metadata(config: Config) -> dict[str, Value]:
    return {
        "attn_logit_softcapping": configuration.real(config, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": configuration.real(config, "final_logit_softcapping", 30.0),
        "attention.sliding_window": configuration.count(config, "sliding_window", default=4096),
    }


FAMILY = _decoder.family(
    _decoder.Layout(
        model_types=("gemma2",),
        gguf="gemma2",
        class_name="Gemma2ForCausalLM",
        activation=_decoder.GELU,
        norms=_gemma.NORMS,
        norm_offset=1.0,
        tied=True,
        defaults={"head_dim": 256},
        check=lambda config: _gemma.check(config, LARGE_LAYERS),
        more_metadata=_more_metadata,
        more_from_gguf=lambda config: {"query_pre_attn_scalar": _gemma.divisor(config, LARGE_LAYERS)},
    )
)
