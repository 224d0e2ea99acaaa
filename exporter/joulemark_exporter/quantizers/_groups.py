"""What the quantizers by groups share: their keys in the recipe, what they check, and what stays float. Not a plug-in."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from joulemark_exporter.group_quantized import IntegerForm
from joulemark_exporter.quantizers import Choice, Rounded, Task, float_parts, grouped
from joulemark_exporter.recipe import Settings
from joulemark_exporter.rounding import Rounding


class GroupOptions(Settings):
    """`embedding` is the type of the token embedding and of the output matrix."""

    bits: Literal[2, 3, 4, 8] = 4
    group_size: Annotated[int, Field(ge=-1, le=1 << 20)] = 32
    symmetric: bool = True
    search: bool = False
    embedding: str = "Q8_0"

    def contiguous(self) -> bool:
        """Whether the groups will be neighbouring columns."""
        return True

    def form(self) -> IntegerForm:
        """What kind of integers come."""
        return IntegerForm(self.bits, self.group_size, self.symmetric, self.contiguous(), self.embedding)

    def rounding(self) -> Rounding:
        """The grid that these options describe."""
        return Rounding(self.bits, self.group_size, self.symmetric, self.search)


def check(task: Task, options: GroupOptions) -> IntegerForm:
    """See the contract."""
    float_parts(task, options.embedding)
    list(grouped(task, options.group_size))
    return options.form()


def floats(task: Task, options: GroupOptions) -> dict[str, Choice]:
    """What every matrix is before the quantizer replaces those that its groups divide."""
    rest: dict[str, Choice] = {name: Rounded("F16") for name in task.family.matrices(task.model.config)}
    return {**float_parts(task, options.embedding), **rest}
