"""Lo-Bi: every matrix in the type that it deserves, within a budget of bytes (the low-bitwidth part of HOLA, arXiv 2506.18952).

The paper's objective has no budget, so that its optimum is 16 bits everywhere; here the sum of expected divergences is made least within
one. Owns the order of work; measuring is `sensitivity`, choosing is `allocation`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from joulemark.errors import BadInput
from joulemark_exporter import allocation, ggml, importance, sensitivity
from joulemark_exporter.quantizers import Choice, Choices, GgufTypes, Rounded, Task, inputs
from joulemark_exporter.recipe import Settings

LADDER = ("Q3_K", "IQ4_NL", "Q4_0", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0", "F16")


class Options(Settings):
    """Exactly one of `budget_bytes` and `bits_per_weight`: what all matrices together may take. `types` are those to choose from."""

    budget_bytes: Annotated[int, Field(ge=1)] | None = None
    bits_per_weight: Annotated[float, Field(gt=0, le=32)] | None = None
    types: Annotated[tuple[str, ...], Field(min_length=2, max_length=32)] = LADDER
    windows: Annotated[int, Field(ge=1, le=256)] = 4
    """Windows of the calibration text on which divergences are measured."""
    tokens: Annotated[int, Field(ge=16, le=4096)] = 128


def calibrated(options: Options) -> bool:
    """Errors are weighed, and their effect measured, on the calibration text."""
    del options
    return True


def check(task: Task, options: Options) -> GgufTypes:
    """See the contract."""
    budget = _budget(task, options)
    least = 0
    for name in sensitivity.matrices(task):
        columns = _columns(task, name)
        fitting = [kind for kind in options.types if ggml.fits(kind, columns)]
        if not fitting:
            raise BadInput(
                f"none of the types {', '.join(options.types)} can store {name}, whose rows have {columns} numbers",
                "add F16",
            )
        least += min(ggml.row_bytes(kind, columns) for kind in fitting) * (task.model.weights[name].size // columns)
    if budget < least:
        raise BadInput(
            f"a budget of {budget:,} bytes is below the smallest possible, {least:,} bytes",
            "allow more, or smaller types",
        )
    return GgufTypes()


def _columns(task: Task, name: str) -> int:
    linear = task.family.matrices(task.model.config).get(name)
    weight = task.model.weights[name]
    return inputs(weight, linear) if linear else weight.shape[1]


def _budget(task: Task, options: Options) -> int:
    if (options.budget_bytes is None) == (options.bits_per_weight is None):
        raise BadInput(
            "a Lo-Bi recipe states either budget_bytes or bits_per_weight", "write one of them in [quantizer]"
        )
    if options.budget_bytes is not None:
        return options.budget_bytes
    numbers = sum(task.model.weights[name].size for name in sensitivity.matrices(task))
    assert options.bits_per_weight is not None
    return int(numbers * options.bits_per_weight / 8)


def quantize(task: Task, options: Options) -> Choices:
    """See the contract."""
    measured, windows = importance.measure(task)
    rows = sensitivity.measure(task, options.types, measured, windows.tokens[: options.windows, : options.tokens])
    budget = _budget(task, options)
    types = allocation.allocate({row.name: row.candidates for row in rows}, budget)
    chosen: dict[str, Choice] = {name: Rounded(kind, measured.get(name)) for name, kind in types.items()}
    table = _table(rows, types, budget)
    numbers = sum(task.model.weights[name].size for name in types)
    used = sum(row.candidates[types[row.name]][0] for row in rows)
    return Choices(chosen, f"LoBi-{8 * used / numbers:.2f}", {"sensitivity.json": table})


def _table(rows: Sequence[sensitivity.Row], types: dict[str, str], budget: int) -> bytes:
    """The sensitivity table with what was chosen: what the heatmap draws."""
    matrices = [{**row.plain(), "chosen": types[row.name]} for row in rows]
    used = sum(row.candidates[types[row.name]][0] for row in rows)
    expected = sum(row.candidates[types[row.name]][1] for row in rows)
    about = {"budget_bytes": budget, "bytes": used, "expected_divergence": expected}
    return json.dumps({**about, "matrices": matrices}, indent=1).encode()
