"""Gemma 3 (text): Gemma 2's norms without soft-capping, head norms, five windowed layers to one full, each kind with its rotary base."""

from __future__ import annotations

from joulemark.errors import BadInput
from joulemark_exporter import configuration
from joulemark_exporter.families import Config, Value, _decoder, _gemma

LARGE_LAYERS = 62
"""Of the 27B model."""
PERIOD = 6
"""llama.cpp's gemma3 has every sixth layer full and takes no other pattern."""


def _check(config: Config) -> None:
    _gemma.check(config, LARGE_LAYERS)
    kinds, layers = config.get("layer_types"), range(_decoder.sizes(config).layers)
    pattern = ["full_attention" if (layer + 1) % PERIOD == 0 else "sliding_attention" for layer in layers]
    if kinds is not None and kinds != pattern:
        raise BadInput(f"the layers are not windowed as llama.cpp's gemma3 has them: {kinds}", "use the ONNX format")


def _more_metadata(config: Config) -> dict[str, Value]:
    local = configuration.rope(config, "sliding_attention")
    window = configuration.count(config, "sliding_window", default=4096)
    values: dict[str, Value] = {"rope.freq_base_swa": local.theta, "attention.sliding_window": window}
    if config.get("final_logit_softcapping"):
        values["final_logit_softcapping"] = configuration.real(config, "final_logit_softcapping")
    return values


FAMILY = _decoder.family(
    _decoder.Layout(
        model_types=("gemma3_text",),
        gguf="gemma3",
        class_name="Gemma3ForCausalLM",
        activation=_decoder.GELU,
        norms=_gemma.NORMS,
        head_norms=True,
        norm_offset=1.0,
        tied=True,
        defaults={"head_dim": 256},
        check=_check,
        more_metadata=_more_metadata,
        more_from_gguf=lambda config: {"query_pre_attn_scalar": _gemma.divisor(config, LARGE_LAYERS)},
    )
)
