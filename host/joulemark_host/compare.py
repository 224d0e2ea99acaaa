"""Which runs may stand beside each other, and the grid of device × artifact that follows. Pure: no I/O, no clock.

What must be equal for which metric is the table in `joulemark_host.conditions`. The reference is what most cells share;
a cell that differs from it is not comparable, and the differing conditions are named with both values. GGUF and ONNX
artifacts may stand side by side: their engines are part of what is compared.
The latest run of a cell, in the order in which the host received them, speaks for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from joulemark.errors import BadInput
from joulemark.metrics import METRICS
from joulemark.wire import Absent, Measure
from joulemark_host.conditions import Difference, Reference, reference_of, short
from joulemark_host.facts import OUTCOMES, RunFacts
from joulemark_host.grid import Cell, Grid

UNSUPPORTED_CODES = frozenset({"model_rejected", "unsupported", "missing_extra", "does_not_fit"})
"""Problem codes that say: this model cannot run on this board as it is; trying again changes nothing."""


@dataclass(frozen=True)
class Entry:
    """A row or column of a grid: the device or artifact id, and the unique label that stands for it."""

    id: str
    label: str


def build_grid(
    records: Iterable[RunFacts],
    metric: str,
    task: str,
    devices: Sequence[Entry],
    artifacts: Sequence[Entry],
    reference: RunFacts | None = None,
) -> Grid:
    """The grid of `metric` on `task`: one cell per device × artifact, row by row.

    `reference` is the run that all others must be comparable with; without it, the conditions that most cells share.
    Raises BadInput for an unknown metric or for labels that are not unique.
    """
    if metric not in METRICS:
        raise BadInput(f"there is no metric {metric!r}", f"known: {', '.join(sorted(METRICS))}")
    for axis, entries in (("devices", devices), ("artifacts", artifacts)):
        if len({entry.label for entry in entries}) != len(entries):
            raise BadInput(f"the labels of the {axis} are not unique", "use label_devices and label_artifacts")
    latest = latest_runs(records, task)
    wanted = {(device.id, artifact.id) for device in devices for artifact in artifacts}
    judged = [run for key, run in latest.items() if key in wanted and measured(run, metric)]
    over_grid = reference_of(judged, metric, "grid", reference)
    over_device = {
        device.id: reference_of(
            [run for run in judged if run.device_id == device.id],
            metric,
            "device",
            reference if reference is not None and reference.device_id == device.id else None,
        )
        for device in devices
    }
    cells = tuple(
        _cell(device, artifact, latest.get((device.id, artifact.id)), metric, [over_grid, over_device[device.id]])
        for device in devices
        for artifact in artifacts
    )
    return Grid(
        metric=metric,
        task=task,
        rows=tuple(device.label for device in devices),
        columns=tuple(artifact.label for artifact in artifacts),
        cells=cells,
    )


def latest_runs(records: Iterable[RunFacts], task: str) -> dict[tuple[str, str], RunFacts]:
    """By (device id, artifact id) the run that speaks for the cell: the last received that came to an outcome.

    A cancelled or interrupted run says nothing about model or board, so it never hides an outcome; it speaks only for
    a cell that has nothing else.
    """
    latest: dict[tuple[str, str], RunFacts] = {}
    for run in records:
        if run.task != task:
            continue
        key = (run.device_id, run.artifact_id)
        if key not in latest or _rank(run) >= _rank(latest[key]):
            latest[key] = run
    return latest


def measured(run: RunFacts, metric: str) -> bool:
    """Whether the run ended with a number for this metric."""
    return run.status == "done" and isinstance(run.metrics.get(metric), Measure)


def names_of_devices(records: Iterable[RunFacts]) -> dict[str, str]:
    """The latest name of each device that sent a record, by id."""
    return {run.device_id: run.device_name for run in sorted(records, key=lambda run: run.sequence)}


def label_devices(names: Mapping[str, str]) -> tuple[Entry, ...]:
    """A row per device from `{device id: name}`, sorted by label; boards of the same name get their id beside it."""
    return _entries(names, lambda label, device_id: f"{label} ({device_id})")


def label_artifacts(names: Mapping[str, tuple[str, str]]) -> tuple[Entry, ...]:
    """A column per artifact from `{artifact id: (model, quantization)}`; equal labels get the start of their id too."""
    labels = {artifact_id: artifact_label(model, quantization) for artifact_id, (model, quantization) in names.items()}
    return _entries(labels, lambda label, artifact_id: f"{label} ({artifact_id[:12]})")


def artifact_label(model: str, quantization: str) -> str:
    """`model · quantization`; a quantization that the name ends with, as file names do, is said once."""
    if model.casefold().endswith(quantization.casefold()):
        model = model[: -len(quantization)].rstrip("-._") or model
    return f"{model} · {quantization}"


def _entries(labels: Mapping[str, str], distinguish: Callable[[str, str], str]) -> tuple[Entry, ...]:
    counts = Counter(labels.values())
    entries: dict[str, Entry] = {}
    for key, label in sorted(labels.items(), key=lambda item: (item[1].casefold(), item[0])):
        unique = label if counts[label] == 1 else distinguish(label, key)
        while unique in entries:  # a name from outside may imitate a distinguished one
            unique = f"{unique} ({key[:12]})"
        entries[unique] = Entry(key, unique)
    return tuple(entries.values())


def _rank(run: RunFacts) -> tuple[bool, int]:
    return run.status in OUTCOMES, run.sequence


def _cell(
    device: Entry,
    artifact: Entry,
    run: RunFacts | None,
    metric: str,
    references: Sequence[Reference | None],
) -> Cell:
    row, column = device.label, artifact.label
    if run is None:
        return Cell(row=row, column=column, status="not_run")
    if run.status != "done":
        unsupported = run.problem is not None and run.problem.code in UNSUPPORTED_CODES
        status = "unsupported" if unsupported else "failed"
        return Cell(row=row, column=column, status=status, valid=False, why=_failure(run), run_id=run.run_id)
    value = run.metrics.get(metric) or Absent(reason=f"the record has no figure called {metric}")
    differing: list[Difference] = []
    if isinstance(value, Measure):
        differing = [found for reference in references if reference is not None for found in reference.differences(run)]
    if differing:
        why = _clip("; ".join(f"{d.title}: {short(d.left)} here, {short(d.right)} in the rest" for d in differing))
        return Cell(
            row=row, column=column, status="not_comparable", metric=value, valid=run.valid, why=why, run_id=run.run_id
        )
    why = "" if run.valid else _clip("; ".join(run.reasons) or "the verdict is INVALID without a reason")
    return Cell(row=row, column=column, status="measured", metric=value, valid=run.valid, why=why, run_id=run.run_id)


def _failure(run: RunFacts) -> str:
    if run.problem is None:
        return _clip(f"the run was {run.status}: " + ("; ".join(run.reasons) or "no reason was recorded"))
    hint = f" Next step: {run.problem.hint}" if run.problem.hint else ""
    return _clip(f"{run.problem.code}: {run.problem.message}.{hint}".replace("..", "."))


def _clip(text: str) -> str:
    return text if len(text) <= 4000 else text[:3999] + "…"
