"""Gemma 1: LLaMA's layout with norms stored minus one, embeddings tied and scaled, a head size of its own."""

from __future__ import annotations

from joulemark_exporter.families import _decoder

FAMILY = _decoder.family(
    _decoder.Layout(
        model_types=("gemma",),
        gguf="gemma",
        class_name="GemmaForCausalLM",
        activation=_decoder.GELU,
        norm_offset=1.0,
        tied=True,
        defaults={"head_dim": 256},
    )
)
