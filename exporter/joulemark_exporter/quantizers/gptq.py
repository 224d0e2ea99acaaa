"""GPTQ: each column is rounded, and what the rounding costs is made up for by the columns that are not yet (Frantar et al. 2022).

Owns the order of work: layer after layer, each measured on what the already quantized ones before it give out. What is finished is stored
layer by layer, so that an interrupted run goes on where it was. The rounding itself is `error_feedback`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from joulemark_exporter import calibration, error_feedback
from joulemark_exporter.calibration import Moments
from joulemark_exporter.families import Linear
from joulemark_exporter.finished_layers import FinishedLayers
from joulemark_exporter.group_quantized import GroupQuantized
from joulemark_exporter.quantizers import Choices, Integers, Task, grouped
from joulemark_exporter.quantizers._groups import GroupOptions, check, floats
from joulemark_exporter.rounding import round_to_grid
from joulemark_exporter.walk import Walk

__all__ = ["Options", "calibrated", "check", "quantize"]


class Options(GroupOptions):
    """`true_sequential` measures the stages of a layer one after the other, each behind the quantized ones before it: twice the time."""

    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    act_order: bool = False
    static_groups: bool = False
    true_sequential: bool = False

    def contiguous(self) -> bool:
        """Groups follow the order of rounding, unless they are static or whole rows."""
        return not self.act_order or self.static_groups or self.group_size == -1


def calibrated(options: Options) -> bool:
    """It rounds by what the inputs look like."""
    del options
    return True


def quantize(task: Task, options: Options) -> Choices:
    """See the contract."""
    windows = calibration.calibration_windows(task.model, task.calibration, task.cache)
    chosen = floats(task, options)
    wanted = dict(grouped(task, options.group_size))
    finished = FinishedLayers(task.work, "gptq")
    walk = Walk(task.model, task.family)
    states = finished.states()
    states = walk.embed(windows.tokens) if states is None else walk.prepare(windows.tokens, torch.from_numpy(states))
    for index in range(finished.count, walk.layers):
        task.say("GPTQ, layer by layer", index, walk.layers)
        with walk.layer(index) as layer:
            matrices, errors = _layer(task, options, walk, index, layer, states, wanted)
            walk.run(index, layer, states)
        finished.add(matrices, {"layer": index, "errors": errors}, states.numpy())
    task.say("GPTQ, layer by layer", walk.layers, walk.layers)
    for name in wanted:
        chosen[name] = Integers(functools.partial(finished.matrix, name), options.form())
    return Choices(
        chosen, options.form().title("GPTQ"), {"gptq.json": json.dumps({"layers": finished.notes()}, indent=1).encode()}
    )


def _layer(
    task: Task,
    options: Options,
    walk: Walk,
    index: int,
    layer: nn.Module,
    states: torch.Tensor,
    wanted: Mapping[str, Linear],
) -> tuple[dict[str, GroupQuantized], dict[str, Any]]:
    """Quantizes the matrices of a layer in place. Returns them by state_dict name, and each one's output error beside RTN's."""
    every = task.family.stages()
    matrices: dict[str, GroupQuantized] = {}
    errors: dict[str, Any] = {}
    for together in [(stage,) for stage in every] if options.true_sequential else [every]:
        with calibration.measured(layer, task.family, together) as moments:
            walk.run(index, layer, states, keep=False)
        for linear in task.family.linears:
            name = task.family.parameter(index, linear)
            if linear.stage in together and name in wanted:
                matrix, error = _matrix(task, options, layer.get_submodule(linear.name), linear, moments[linear.stage])
                matrices[name], errors[linear.name] = matrix, error
    return matrices, errors


def _matrix(
    task: Task, options: Options, module: Any, linear: Linear, moments: Moments
) -> tuple[GroupQuantized, dict[str, float]]:
    values = module.weight.detach().numpy()
    values = np.ascontiguousarray(values.T if linear.transposed else values)
    rounding = options.rounding()
    found = error_feedback.quantize(
        values,
        moments,
        rounding,
        damping=options.damping,
        act_order=options.act_order,
        static_groups=options.static_groups,
    )
    rounded = found.matrix.dequantize()
    nearest = round_to_grid(values, rounding, threads=task.threads).dequantize()
    error = {"gptq": output_error(values, rounded, moments), "rtn": output_error(values, nearest, moments)}
    module.weight.data = torch.from_numpy(np.ascontiguousarray(rounded.T) if linear.transposed else rounded)
    return found.matrix, error


def output_error(values: calibration.Moments | Any, rounded: Any, moments: Moments) -> float:
    """‖(W − Ŵ)X‖² ÷ ‖WX‖² on the calibration text, from the second moments."""
    wide, moment = values.astype(np.float64), moments
    difference = wide - rounded
    power = float(np.einsum("oi,oi->", wide @ moment, wide))
    return float(np.einsum("oi,oi->", difference @ moment, difference)) / power if power else 0.0
