"""A sweep: every artifact on every task on every board, planned once, queued once, however often it is asked for.

A sweep has a name, and a run's id follows from the name and from what is run, so that asking again (after a laptop slept, with more
models) adds only what is missing. Cancelled and interrupted cells are queued again, failed ones only on demand. Not aware of the terminal.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from joulemark.wire import ENDED, Identifier, RunSpec, canonical_json
from joulemark_host.dispatch import Dispatch
from joulemark_host.evaluation import Subject
from joulemark_host.run_queue import QueuedRun, RunStatus


@dataclass(frozen=True)
class Cell:
    """One artifact on one pack on one board."""

    device_id: str
    device: str
    subject: Subject
    task: str


def cells(subjects: Sequence[Subject], devices: Mapping[str, str]) -> list[Cell]:
    """All combinations, board by board, so that a board loads one model after another and not each again for every task."""
    return [
        Cell(device_id, name, subject, task)
        for device_id, name in devices.items()
        for subject in subjects
        for task in subject.packs
    ]


def queue(
    dispatch: Dispatch, name: Identifier, wanted: Sequence[Cell], options: Mapping[str, Any], retry_failed: bool = False
) -> int:
    """Queues what the sweep lacks; how many runs that were. `options` are fields of RunSpec."""
    before: dict[str, list[QueuedRun]] = {}
    for run in dispatch.runs(name):
        before.setdefault(_key(run.device_id, run.spec), []).append(run)
    added = 0
    for cell in wanted:
        spec = RunSpec(
            run_id=name, artifact_id=cell.subject.artifact_id, pack_id=cell.subject.packs[cell.task], **options
        )
        key = _key(cell.device_id, spec)
        earlier = before.get(key, [])
        if earlier and _stands(earlier[-1], retry_failed):
            continue
        suffix = f"-{len(earlier) + 1}" if earlier else ""
        run_id = f"{name[:40]}-{cell.task[:20]}-{key[:10]}{suffix}"
        dispatch.queue(
            cell.device_id, spec.model_copy(update={"run_id": run_id}), cell.subject.manifest, cell.task, name
        )
        added += 1
    return added


def counts(runs: Sequence[QueuedRun]) -> dict[RunStatus, int]:
    """How many runs are in which state; of several runs of one cell the latest counts."""
    return dict(Counter(run.status for run in latest(runs)))


def latest(runs: Sequence[QueuedRun]) -> list[QueuedRun]:
    """The last run of every cell, in the order of the cells."""
    found: dict[str, QueuedRun] = {}
    for run in runs:
        found[_key(run.device_id, run.spec)] = run
    return list(found.values())


def over(runs: Sequence[QueuedRun]) -> bool:
    """Whether every run has ended."""
    return all(run.status in ENDED for run in runs)


def _stands(run: QueuedRun, retry_failed: bool) -> bool:
    """Whether this run keeps its cell."""
    return run.status not in ("cancelled", "interrupted") and not (retry_failed and run.status == "failed")


def _key(device_id: str, spec: RunSpec) -> str:
    """What is run where: everything but the run's id."""
    plain = {**spec.model_dump(mode="json"), "run_id": "", "device_id": device_id}
    return hashlib.sha256(canonical_json(plain)).hexdigest()
