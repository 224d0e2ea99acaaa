"""From stored runs to a figure: the grid, its chart, its table, and the conditions that its cells share. Pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from joulemark.metrics import METRICS
from joulemark.wire import Measure
from joulemark_host.charts import heatmap
from joulemark_host.compare import build_grid, label_artifacts, label_devices, latest_runs, measured, names_of_devices
from joulemark_host.conditions import reference_of
from joulemark_host.facts import RunFacts
from joulemark_host.grid import Cell, Grid
from joulemark_host.readable import TITLES, amount, explanation, grid_unit, interval, kind

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Line:
    """One cell of the grid in words: a line of the table beside the chart."""

    device: str
    model: str
    state: str
    said: str
    value: str
    interval: str
    n: str
    source: str
    why: str
    run_id: str


@dataclass(frozen=True)
class Figure:
    """A grid with everything that is shown of it. `chart` is None when there is no cell to draw."""

    title: str
    task: str
    grid: Grid
    chart: dict[str, Any] | None
    lines: tuple[Line, ...]
    conditions: Mapping[str, str]


def grid_of(
    runs: Sequence[RunFacts],
    metric: str,
    task: str,
    artifacts: Mapping[str, tuple[str, str]] | None = None,
    devices: Mapping[str, str] | None = None,
) -> Grid:
    """The grid of one metric on one task.

    `artifacts` are further columns, `{artifact id: (model, quantization)}`, for models that nothing was run on yet; `devices` further rows,
    `{board id: name}`. Raises BadInput for an unknown metric.
    """
    names = dict(artifacts or {}) | {run.artifact_id: (run.model, run.quantization) for run in runs}
    boards = {**names_of_devices(runs), **(devices or {})}
    return build_grid(runs, metric, task, label_devices(boards), label_artifacts(names))


def draw(
    runs: Sequence[RunFacts],
    metric: str,
    task: str,
    artifacts: Mapping[str, tuple[str, str]] | None = None,
    devices: Mapping[str, str] | None = None,
) -> Figure:
    """The figure of one metric on one task: its grid (see `grid_of`) and everything that is shown of it."""
    grid = grid_of(runs, metric, task, artifacts, devices)
    judged = [run for run in latest_runs(runs, task).values() if measured(run, metric)]
    unit = grid_unit(grid)
    reference = reference_of(judged, metric, "grid")
    return Figure(
        title=METRICS[metric].title,
        task=task,
        grid=grid,
        chart=heatmap(grid) if grid.cells else None,
        lines=tuple(_line(cell, unit) for cell in grid.cells),
        conditions=reference.shared() if reference else {},
    )


def grid_csv(grid: Grid) -> str:
    """The grid as CSV (RFC 4180) in SI units, one line per cell, with no text that a spreadsheet would run."""
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(
        (
            "metric",
            "task",
            "device",
            "model",
            "status",
            "value",
            "unit",
            "n",
            "low",
            "high",
            "source",
            "valid",
            "why",
            "run_id",
        )
    )
    for cell in grid.cells:
        measure = cell.metric if isinstance(cell.metric, Measure) else None
        numbers = (
            (measure.value, measure.unit, measure.n, measure.low, measure.high, measure.source) if measure else [""] * 6
        )
        value, symbol, n, low, high, source = numbers
        row = (grid.metric, grid.task, cell.row, cell.column, cell.status, value, symbol, n, low, high, source)
        writer.writerow([_guarded(field) for field in (*row, cell.valid, explanation(cell), cell.run_id)])
    return out.getvalue()


def _guarded(field: object) -> object:
    """Text that starts like a formula gets a quote before it (OWASP, CSV injection); the rest is written as it is."""
    if field is None:
        return ""
    if isinstance(field, str) and field.lstrip().startswith(FORMULA_STARTS):
        return f"'{field}"
    return field


def _line(cell: Cell, unit: Any) -> Line:
    measure = cell.metric if isinstance(cell.metric, Measure) else None
    state = kind(cell)
    return Line(
        device=cell.row,
        model=cell.column,
        state=state,
        said=TITLES[state],
        value=amount(measure.value, unit) if measure else "",
        interval=interval(measure, unit) if measure else "",
        n=str(measure.n) if measure and measure.n is not None else "",
        source=measure.source if measure else "",
        why=explanation(cell),
        run_id=cell.run_id or "",
    )
