"""No quantization: every matrix as float. What all others are compared with."""

from __future__ import annotations

from typing import Literal

from joulemark_exporter.quantizers import Choices, Rounded, Task
from joulemark_exporter.recipe import Settings


class Options(Settings):
    """`type`: the floating-point type of the matrices. `auto` keeps the checkpoint's own."""

    type: Literal["auto", "F32", "F16", "BF16"] = "auto"


def calibrated(options: Options) -> bool:
    """Nothing is rounded that a text could tell about."""
    del options
    return False


def check(task: Task, options: Options) -> None:
    """Nothing can be wrong beforehand."""
    del task, options


def quantize(task: Task, options: Options) -> Choices:
    """See the contract."""
    chosen: dict[str, Rounded] = {}
    for name, weight in task.model.weights.items():
        if len(weight.shape) == 2:
            own = weight.stored if weight.stored in ("F32", "F16", "BF16") else "F32"
            chosen[name] = Rounded(own if options.type == "auto" else options.type)
    kinds = {choice.type_name for choice in chosen.values()}
    return Choices(chosen, kinds.pop() if len(kinds) == 1 else "mixed")
