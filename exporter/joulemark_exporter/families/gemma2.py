"""Gemma 2: norms before and after each block, soft-capped scores, a window in every other layer."""

from __future__ import annotations

from joulemark_exporter import configuration
from joulemark_exporter.families import Config, Value, _gemma

LARGE_LAYERS = 46
"""Of the 27B model."""


def _more_metadata(config: Config) -> dict[str, Value]:
    return {
        "attn_logit_softcapping": configuration.real(config, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": configuration.real(config, "final_logit_softcapping", 30.0),
        "attention.sliding_window": configuration.count(config, "sliding_window", default=4096),
    }


FAMILY = _gemma.family("gemma2", "gemma2", "Gemma2ForCausalLM", LARGE_LAYERS, _more_metadata)
