"""Qwen 3 (dense): LLaMA's layout with norms on the heads' queries and keys, and a head size of its own: 128 unless config.json says
otherwise (transformers' Qwen3Config)."""

from __future__ import annotations

from joulemark.errors import BadInput
from joulemark_exporter.families import Config, _decoder

ATTENTION = frozenset({"attn_q", "attn_k", "attn_v", "attn_output"})


def _check(config: Config) -> None:
    if config.get("use_sliding_window") or config.get("attention_bias"):
        raise BadInput(
            "this Qwen 3 has a sliding window or biases", "llama.cpp's qwen3 has neither: use the ONNX format"
        )


FAMILY = _decoder.family(
    _decoder.Layout(
        model_types=("qwen3",),
        gguf="qwen3",
        class_name="Qwen3ForCausalLM",
        biased=lambda config: ATTENTION if config.get("attention_bias") else frozenset(),
        head_norms=True,
        defaults={"head_dim": 128},
        check=_check,
    )
)
