"""A model whole in memory as its transformers class, float32: for exporters that trace it. Layer-by-layer work is `walk`'s."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import AutoConfig

from joulemark_exporter.families import HEAD, Family
from joulemark_exporter.weights import Model


def build(model: Model, family: Family) -> Any:
    """The class with its weights, in evaluation mode."""
    config = AutoConfig.for_model(**{key: value for key, value in model.config.items() if key != "quantization_config"})
    with init_empty_weights(include_buffers=False), torch.device("cpu"):
        module: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    module.load_state_dict(
        {name: torch.from_numpy(weight.whole()) for name, weight in model.weights.items()}, strict=False, assign=True
    )
    if family.is_tied(model.config):
        head = module.get_submodule(HEAD.removesuffix(".weight"))
        head.weight = module.get_submodule(family.embedding.removesuffix(".weight")).weight
    left = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if left:
        raise AssertionError(f"{left[0]} was not loaded")
    return module.eval()
