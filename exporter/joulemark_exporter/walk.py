"""The model computed layer by layer: one layer's weights are in memory at a time, and the states of all windows between them.

Owns the forward pass that calibration, GPTQ and verification need, for any family of transformers, without knowing any: the class itself
computes embeddings, masks, rotary angles and logits while its layers are stand-ins that note what they are called with. So a layer gets
exactly the arguments that its class would give it. float32, one window after the other. Not aware of what the layers' inputs are measured
for."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import AutoConfig

from joulemark_exporter.families import HEAD, Family
from joulemark_exporter.weights import Model


class _StandIn(nn.Module):
    """Takes a layer's place: notes the arguments; lets the states through, or puts `states` in their place."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.states: Tensor | None = None
        self.given: Tensor | None = None
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._returns_tuple = returns_tuple

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        """The layer's call."""
        self.given, self.arguments = hidden_states, (arguments, named)
        states = hidden_states if self.states is None else self.states
        return (states, None) if self._returns_tuple else states


class Walk:
    """A model whose layers are visited one after the other. Not thread-safe."""

    def __init__(self, model: Model, family: Family) -> None:
        self._weights = model.weights
        self._prefix: str = family.layers
        self.layers = family.layer_count(model.config)
        config = AutoConfig.for_model(
            **{key: value for key, value in model.config.items() if key != "quantization_config"}
        )
        # Buffers (rotary frequencies, causal masks) are computed by the class when it is made; only parameters come from the checkpoint.
        with init_empty_weights(include_buffers=False), torch.device("cpu"):
            self._module: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self._module.eval()
        self._layers: nn.ModuleList = self._module.get_submodule(self._prefix)
        self._real = list(self._layers)
        self._stand_ins = [_StandIn(family.returns_tuple) for _ in self._real]
        for index, stand_in in enumerate(self._stand_ins):
            self._layers[index] = stand_in
        outer = {name for name in model.weights if not name.startswith(f"{self._prefix}.")}
        _load(self._module, {name: torch.from_numpy(model.weights[name].whole()) for name in outer})
        if family.is_tied(model.config):
            head = self._module.get_submodule(HEAD.removesuffix(".weight"))
            head.weight = self._module.get_submodule(family.embedding.removesuffix(".weight")).weight

    @torch.inference_mode()
    def embed(self, windows: Tensor) -> Tensor:
        """The states before the first layer: (windows, tokens) int64 → (windows, tokens, width) float32."""
        states: list[Tensor] = []
        for stand_in in self._stand_ins:
            stand_in.states = None
        for window in windows:
            self._module(input_ids=window[None], use_cache=False)
            given = self._stand_ins[0].given
            assert given is not None
            states.append(given[0].clone())
        return torch.stack(states)

    def outer(self, name: str) -> nn.Parameter:
        """A parameter outside the layers, such as the embedding."""
        return self._module.get_parameter(name)

    def prepare(self, windows: Tensor, states: Tensor) -> Tensor:
        """Takes up stored states: the layers' arguments come from embedding one window again."""
        self.embed(windows[:1])
        return states

    @contextlib.contextmanager
    def layer(self, index: int) -> Generator[nn.Module]:
        """The layer with its weights, which are given back afterwards."""
        layer = self._real[index]
        prefix = f"{self._prefix}.{index}."
        values = {
            name.removeprefix(prefix): torch.from_numpy(weight.whole())
            for name, weight in self._weights.items()
            if name.startswith(prefix)
        }
        _load(layer, values)
        try:
            yield layer
        finally:
            layer.to_empty(device="meta")

    @torch.inference_mode()
    def run(self, index: int, layer: nn.Module, states: Tensor, keep: bool = True) -> None:
        """Computes the layer for every window; the results replace `states` when they are to be kept."""
        arguments, named = self._stand_ins[index].arguments
        for window in range(len(states)):
            result = layer(states[window : window + 1], *arguments, **named)
            if keep:
                states[window] = (result if isinstance(result, Tensor) else result[0])[0]

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """Of one window's states behind the last layer, (tokens, width), the logits (tokens, vocabulary), as the class computes them."""
        for stand_in in self._stand_ins:
            stand_in.states = states[None]
        tokens = torch.zeros((1, len(states)), dtype=torch.int64)
        return self._module(input_ids=tokens, use_cache=False).logits[0]


def _load(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Puts the values in place of meta parameters; all names must be there."""
    module.load_state_dict(dict(values), strict=False, assign=True)
    for name, parameter in module.named_parameters():
        if name in values and parameter.is_meta:
            raise AssertionError(f"{name} was not loaded")
