"""From the journal's rows to the one record of a run.

Closes what a dead attempt left open, joins the attempts' traces where they share a clock, and asks `summary` for the figures.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

from joulemark.wire import (
    Absent,
    Clock,
    DeviceFacts,
    ItemRecord,
    LatencySample,
    Manifest,
    PackHeader,
    Phase,
    Problem,
    RunRecord,
    RunSpec,
    Trace,
    Verdict,
)
from joulemark_agent.giving_up import unsaid
from joulemark_agent.journal import Attempt, Journal
from joulemark_agent.sampling import join, merge
from joulemark_agent.summary import summarise
from joulemark_agent.verdict import Limits

FinalStatus = Literal["done", "failed", "cancelled", "interrupted"]
_PHASE_NAMES = ("idle", "load", "warmup", "latency", "accuracy", "cooldown")


def not_measured() -> Absent:
    """The memory bandwidth of a run that never came to measuring it."""
    return Absent(reason="the run ended before the memory bandwidth was measured")


def build_record(
    journal: Journal,
    spec: RunSpec,
    status: FinalStatus,
    problem: Problem | None,
    manifest: Manifest,
    pack: PackHeader,
    device: DeviceFacts,
    clock: Clock,
    limits: Limits | None = None,
) -> RunRecord:
    """The record with summary and verdict. `clock` anchors a run that never got as far as an attempt."""
    attempts = journal.attempts(spec.run_id)
    traced = [(attempt, _trace(journal, spec.run_id, attempt)) for attempt in attempts]
    # After a reboot the monotonic clock begins anew: only the last boot's attempts share a clock with each other.
    boot = attempts[-1].clock.boot_id if attempts else clock.boot_id
    current = [entry for entry in traced if entry[0].clock.boot_id == boot]
    numbers = {attempt.number for attempt, _ in current}
    phases = tuple(phase for attempt, trace in current for phase in _phases(attempt, trace))
    ended = [
        one.problem or unsaid(one.clock.boot_id, after.clock.boot_id) for one, after in itertools.pairwise(attempts)
    ]
    record = RunRecord(
        spec=spec,
        manifest=manifest,
        pack=pack,
        device=device,
        status=status,
        clock=attempts[-1].clock if attempts else clock,
        engine=journal.engine(spec.run_id),
        phases=phases,
        latency=_latency([attempt for attempt, _ in current]),
        items=tuple(_on_this_clock(item, number in numbers) for number, item in journal.items(spec.run_id)),
        trace=_merged([trace for _, trace in current if trace is not None]),
        verdict=Verdict(valid=False, reasons=("not judged yet",)),
        problem=problem,
        attempts=len(attempts),
        interruptions=tuple(ended),
    )
    summary, verdict = summarise(record, limits)
    return record.model_copy(update={"summary": summary, "verdict": verdict})


def _on_this_clock(item: ItemRecord, current: bool) -> ItemRecord:
    """An item of an earlier boot keeps its answer but not its time, which the present clock cannot place."""
    return item if current else item.model_copy(update={"end_s": None})


def _trace(journal: Journal, run_id: str, attempt: Attempt) -> Trace | None:
    """The attempt's whole trace, or what was kept of it when the agent died."""
    if attempt.trace is not None:
        return attempt.trace
    parts = journal.sample_chunks(run_id, attempt.number)
    return join(parts) if parts else None


def _merged(traces: Sequence[Trace]) -> Trace | None:
    return merge(traces) if traces else None


def _phases(attempt: Attempt, trace: Trace | None) -> tuple[Phase, ...]:
    """Closed phases, and the open one of a dead attempt closed at its last sample."""
    if attempt.open_phase is None:
        return attempt.phases
    name, start = attempt.open_phase
    end = trace.times_s[-1] if trace is not None and trace.times_s else start
    for known in _PHASE_NAMES:
        if known == name and end > start:
            return (*attempt.phases, Phase(name=known, start_s=start, end_s=end))
    return attempt.phases


def _latency(attempts: list[Attempt]) -> tuple[LatencySample, ...]:
    """The fullest set of one attempt: samples of different attempts are not pooled."""
    return max((attempt.latency for attempt in attempts), key=len, default=())
