"""Round to nearest: every group of a row on its own grid, no calibration. The same grid as `gptq`, so that the two differ by method
alone."""

from __future__ import annotations

import functools
from typing import Annotated, Literal

from pydantic import Field

from joulemark_exporter.families import Linear, linears
from joulemark_exporter.grid import Grid, round_to_grid
from joulemark_exporter.group_quantized import GroupQuantized
from joulemark_exporter.quantizers import (
    Choice,
    Choices,
    IntegerForm,
    Integers,
    Rounded,
    Task,
    float_parts,
    grouped,
    outputs_first,
)
from joulemark_exporter.recipe import Settings

NEEDS: frozenset[str] = frozenset()


class Options(Settings):
    """`embedding` is the type of the token embedding and of the output matrix."""

    bits: Literal[2, 3, 4, 8] = 4
    group_size: Annotated[int, Field(ge=-1, le=1 << 20)] = 32
    symmetric: bool = True
    search: bool = False
    embedding: str = "Q8_0"

    def form(self) -> IntegerForm:
        """What kind of integers come."""
        return IntegerForm(self.bits, self.group_size, self.symmetric)

    def grid(self) -> Grid:
        """The grid that these options describe."""
        return Grid(self.bits, self.group_size, self.symmetric, self.search)


def check(task: Task, options: Options) -> IntegerForm:
    """See the contract."""
    float_parts(task, options.embedding)
    list(grouped(task, options.group_size))
    return options.form()


def quantize(task: Task, options: Options) -> Choices:
    """See the contract. Matrices are rounded when the writer asks for them."""
    chosen: dict[str, Choice] = dict(float_parts(task, options.embedding))
    chosen |= {name: Rounded("F16") for name in linears(task.family, task.model.config)}
    for name, linear in grouped(task, options.group_size):
        load = functools.partial(_round, task, name, linear, options.grid())
        chosen[name] = Integers(load, options.form())
    return Choices(chosen, f"RTN-{options.bits}-g{options.group_size}")


def _round(task: Task, name: str, linear: Linear, grid: Grid) -> GroupQuantized:
    return round_to_grid(outputs_first(task.model.weights[name], linear), grid, threads=task.threads)
