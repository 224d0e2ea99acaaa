"""Gemma 3 (text): Gemma 2's norms without soft-capping, head norms, five windowed layers to one full, each kind with its rotary base."""

from __future__ import annotations

from joulemark.errors import BadInput
from joulemark_exporter import configuration
from joulemark_exporter.families import Config, Tensor, Value, _decoder
from joulemark_exporter.families._decoder import EMBEDDING, LAYERS, LINEARS, PREFIX
from joulemark_exporter.families.gemma2 import NORMS, check_scale
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

MODEL_TYPES = ("gemma3_text",)
TIED = True
GGUF = "gemma3"
LARGE_LAYERS = 62
"""Of the 27B model."""
PERIOD = 6
"""llama.cpp's gemma3 has every sixth layer full and takes no other pattern."""


def tensors(config: Config) -> tuple[Tensor, ...]:
    """See the contract."""
    layout = _decoder.Layout(norms=NORMS, norm_offset=1.0, head_norms=True, tied=True)
    return _decoder.tensors({"head_dim": 256, **config}, layout)


def metadata(config: Config) -> dict[str, Value]:
    """See the contract. Raises BadInput for a pattern of layers that llama.cpp does not have."""
    kinds = config.get("layer_types")
    pattern = [
        "full_attention" if (layer + 1) % PERIOD == 0 else "sliding_attention"
        for layer in range(_decoder.sizes(config).layers)
    ]
    if kinds is not None and kinds != pattern:
        raise BadInput(f"the layers are not windowed as llama.cpp's gemma3 has them: {kinds}", "use the ONNX format")
    check_scale(config, LARGE_LAYERS)
    values = _decoder.metadata({"head_dim": 256, **config})
    local = configuration.rope(config, "sliding_attention")
    values |= {
        "rope.freq_base_swa": local.theta,
        "attention.sliding_window": configuration.count(config, "sliding_window", default=4096),
    }
    if config.get("final_logit_softcapping"):
        values["final_logit_softcapping"] = configuration.real(config, "final_logit_softcapping")
    return values


def generated(config: Config) -> dict[str, Float32]:
    """See the contract."""
    del config
    return {}
