"""Round to nearest: every group of a row on its own grid, no calibration. The same grid as `gptq`, so that the two differ by method
alone."""

from __future__ import annotations

import functools

from joulemark_exporter.families import Linear
from joulemark_exporter.group_quantized import GroupQuantized
from joulemark_exporter.quantizers import Choices, Integers, Task, grouped, outputs_first
from joulemark_exporter.quantizers._groups import GroupOptions, check, floats
from joulemark_exporter.rounding import Rounding, round_to_grid

__all__ = ["Options", "calibrated", "check", "quantize"]


class Options(GroupOptions):
    """See GroupOptions."""


def calibrated(options: Options) -> bool:
    """It looks at weights only."""
    del options
    return False


def quantize(task: Task, options: Options) -> Choices:
    """See the contract. Matrices are rounded when the writer asks for them."""
    chosen = floats(task, options)
    for name, linear in grouped(task, options.group_size):
        chosen[name] = Integers(functools.partial(_round, task, name, linear, options.rounding()), options.form())
    return Choices(chosen, options.form().title("RTN"))


def _round(task: Task, name: str, linear: Linear, rounding: Rounding) -> GroupQuantized:
    return round_to_grid(outputs_first(task.model.weights[name], linear), rounding, threads=task.threads)
