"""A model whole in memory as its transformers class, float32: for exporters that trace it. Layer-by-layer work is `walk`'s."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import AutoConfig

from joulemark_exporter.families import HEAD, Family
from joulemark_exporter.weights import Model


def build(model: Model, family: Family, instead: Mapping[str, Callable[[Any], Any]] | None = None) -> Any:
    """The class with its weights, in evaluation mode. `instead` makes what takes the place of a submodule, by its name: its weight is not
    read then, its bias is."""
    replaced = instead or {}
    config = AutoConfig.for_model(**{key: value for key, value in model.config.items() if key != "quantization_config"})
    with init_empty_weights(include_buffers=False), torch.device("cpu"):
        module: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, make in replaced.items():
        module.set_submodule(name, make(module.get_submodule(name)))
    wanted = {name: weight for name, weight in model.weights.items() if name.removesuffix(".weight") not in replaced}
    module.load_state_dict(
        {name: torch.from_numpy(weight.whole()) for name, weight in wanted.items()}, strict=False, assign=True
    )
    if family.is_tied(model.config) and HEAD.removesuffix(".weight") not in replaced:
        head = module.get_submodule(HEAD.removesuffix(".weight"))
        head.weight = module.get_submodule(family.embedding.removesuffix(".weight")).weight
    left = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if left:
        raise AssertionError(f"{left[0]} was not loaded")
    return module.eval()
