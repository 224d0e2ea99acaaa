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


FAMILY = _gemma.family(
    "gemma3_text", "gemma3", "Gemma3ForCausalLM", LARGE_LAYERS, _more_metadata, _check, head_norms=True
)
