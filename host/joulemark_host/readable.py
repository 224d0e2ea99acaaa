"""Numbers and cells in words: one place decides how many digits, which unit, and what a cell says about itself.

Pure. Input values are SI, as on the wire (s, By, J, W, Cel, tok/s, 1); output is for people. A unit is chosen once for
a grid, so that all its cells can be compared by eye.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from joulemark.metrics import METRICS
from joulemark.wire import Absent, Measure
from joulemark_host.grid import Cell, Grid

SYMBOLS = {"Cel": "°C", "1/s": "questions/s"}
TITLES = {
    "measured": "measured",
    "invalid": "measured, not valid",
    "absent": "no figure",
    "failed": "failed",
    "unsupported": "unsupported",
    "not_run": "not run",
    "not_comparable": "not comparable",
}


@dataclass(frozen=True)
class Unit:
    """How SI values are shown: multiplied by `factor`, followed by `symbol`."""

    factor: float
    symbol: str


def unit_for(unit: str, values: Iterable[float]) -> Unit:
    """The unit in which the largest of `values` reads well."""
    largest = max((abs(value) for value in values), default=0.0)
    if unit == "1":
        return Unit(100.0, "%")
    if unit in ("s", "J/tok") and 0 < largest < 1:
        return Unit(1000.0, "m" + unit)
    if unit == "By":
        return Unit(2.0**-30, "GiB") if largest >= 2**31 else Unit(2.0**-20, "MiB")
    return Unit(1.0, SYMBOLS.get(unit, unit))


def grid_unit(grid: Grid) -> Unit:
    """The unit of all cells of a grid."""
    return unit_for(METRICS[grid.metric].unit, (c.metric.value for c in grid.cells if isinstance(c.metric, Measure)))


def number(value: float) -> str:
    """Three significant digits, without an exponent where that is readable."""
    magnitude = abs(value)
    if magnitude and (magnitude < 1e-3 or magnitude >= 1e7):
        return f"{value:.2e}"
    if magnitude >= 100:
        return f"{value:,.0f}"
    if magnitude >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if magnitude >= 1 else f"{value:.3g}"


def amount(value: float, unit: Unit) -> str:
    """A number with its unit, as 27.8 % or 41.2 ms."""
    return f"{number(value * unit.factor)} {unit.symbol}"


def interval(measure: Measure, unit: Unit) -> str:
    """`low – high` in the given unit, or the empty text where no interval was computed."""
    if measure.low is None or measure.high is None:
        return ""
    return f"{number(measure.low * unit.factor)} – {number(measure.high * unit.factor)} {unit.symbol}"


def kind(cell: Cell) -> str:
    """The cell's status, with `invalid` and `absent` told apart from `measured`: a key of TITLES."""
    if cell.status != "measured":
        return cell.status
    if not isinstance(cell.metric, Measure):
        return "absent"
    return "measured" if cell.valid else "invalid"


def explanation(cell: Cell) -> str:
    """Why the cell is what it is, in one sentence; empty for a valid measurement."""
    parts: list[str] = []
    if cell.status == "not_run":
        parts.append("nothing was run here: `joulemark run` fills this cell")
    if isinstance(cell.metric, Absent):
        parts.append(cell.metric.reason)
    if cell.why:
        parts.append(f"not valid: {cell.why}" if cell.status == "measured" else cell.why)
    return "; ".join(parts)
