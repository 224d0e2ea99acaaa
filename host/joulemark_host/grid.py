"""The grid, device × model for one metric and one task, and its cells: what the host answers and what it draws.

Owns the two types as they leave the host. How a cell comes about is in `compare`.
"""

from __future__ import annotations

from typing import Literal

from joulemark.wire import Identifier, Metric, Text, Wire


class Cell(Wire):
    """One cell of a grid. `why` is set for every status but `measured` and `not_run`."""

    row: str
    column: str
    status: Literal["measured", "failed", "unsupported", "not_run", "not_comparable"]
    metric: Metric | None = None
    valid: bool | None = None
    why: Text = ""
    run_id: Identifier | None = None


class Grid(Wire):
    """Device × model for one metric and one task; what the heatmap draws."""

    metric: Identifier
    task: Identifier
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[Cell, ...]
