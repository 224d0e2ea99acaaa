"""The page of a sweep, or of everything that waits: boards down, models and tasks across, how far each run is.

Pure: runs and names in, HTML out. What came from outside is text, which Jinja escapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from joulemark_host.page import render
from joulemark_host.run_queue import QueuedRun, in_words
from joulemark_host.sweep import counts, latest, over


@dataclass(frozen=True)
class _Cell:
    status: str
    word: str
    done: int
    total: int | None
    problem: str


@dataclass(frozen=True)
class _Row:
    board: str
    cells: Sequence[_Cell | None]


def queue_page(title: str, runs: Sequence[QueuedRun], models: Mapping[str, str]) -> str:
    """`models` are names by artifact id; one that is not on the shelf any more shows its id."""
    current = latest(runs)
    columns = list(dict.fromkeys(run.what(models) for run in current))
    boards = list(dict.fromkeys(run.device for run in current))
    found = {(run.device, run.what(models)): run for run in current}
    rows = [_Row(board, [_cell(found.get((board, column))) for column in columns]) for board in boards]
    return render(
        "queue.html",
        title=title,
        rows=rows,
        columns=columns,
        counts=[(status, in_words(status), count) for status, count in sorted(counts(runs).items())],
        going_on=not over(current),
    )


def _cell(run: QueuedRun | None) -> _Cell | None:
    if run is None:
        return None
    problem = run.problem.message if run.problem is not None else ""
    return _Cell(run.status, run.words, run.items_done, run.items_total, problem)
