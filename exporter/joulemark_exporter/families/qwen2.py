"""Qwen 2 and 2.5: LLaMA's layout with biases on queries, keys and values. The rotary embedding pairs halves in GGUF too."""

from __future__ import annotations

from joulemark.errors import BadInput
from joulemark_exporter.families import Config, _decoder


def _check(config: Config) -> None:
    if config.get("use_sliding_window"):
        raise BadInput(
            "this Qwen attends through a sliding window", "llama.cpp has no window for it: use the ONNX format"
        )


FAMILY = _decoder.family(
    _decoder.Layout(
        model_types=("qwen2",),
        gguf="qwen2",
        class_name="Qwen2ForCausalLM",
        biased=lambda _: frozenset({"attn_q", "attn_k", "attn_v"}),
        check=_check,
    )
)
