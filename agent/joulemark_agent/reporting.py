"""From the journal's rows to the one record of a run.

Closes what a dead attempt left open, joins the attempts' traces where they share a clock, and asks `summary` for the figures.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

from joulemark.errors import BadInput
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
from joulemark_agent.giving_up import WORKER_HUNG, unsaid
from joulemark_agent.journal import Attempt, Journal
from joulemark_agent.summary import summarise
from joulemark_agent.traces import join, merge
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
    current, trace = _together([entry for entry in traced if entry[0].clock.boot_id == boot])
    numbers = {attempt.number for attempt, _ in current}
    items = journal.items(spec.run_id)
    phases = tuple(phase for attempt, part in current for phase in _phases(attempt, part, items))
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
        items=tuple(_on_this_clock(item, number in numbers) for number, item in items),
        trace=trace,
        verdict=Verdict(valid=False, reasons=("not judged yet",)),
        problem=problem,
        attempts=len(attempts),
        interruptions=tuple(ended),
    )
    summary, verdict = summarise(record, limits)
    return record.model_copy(update={"summary": summary, "verdict": verdict})


def lasted_s(journal: Journal, run_id: str, attempt: Attempt) -> float:
    """From an attempt's first sample to its last."""
    trace = _trace(journal, run_id, attempt)
    return trace.times_s[-1] - trace.times_s[0] if trace is not None and trace.times_s else 0.0


def _on_this_clock(item: ItemRecord, current: bool) -> ItemRecord:
    """An item of an earlier boot, or of an attempt that was measured otherwise, keeps its answer but not its time."""
    return item if current else item.model_copy(update={"end_s": None})


def _trace(journal: Journal, run_id: str, attempt: Attempt) -> Trace | None:
    """The attempt's whole trace, or what was kept of it when the agent died."""
    if attempt.trace is not None:
        return attempt.trace
    parts = journal.sample_chunks(run_id, attempt.number)
    return join(parts) if parts else None


def _together(entries: list[tuple[Attempt, Trace | None]]) -> tuple[list[tuple[Attempt, Trace | None]], Trace | None]:
    """The last attempts whose traces are one, and that one. Between two attempts somebody may have changed what a channel is: what was
    measured before has no place beside what was measured after."""
    refused: BadInput | None = None
    while True:
        traces = [trace for _, trace in entries if trace is not None]
        try:
            merged = merge(traces) if traces else None
            break
        except BadInput as error:
            entries, refused = entries[1:], error
    if merged is not None and refused is not None:
        left_out = Absent(
            reason=f"what was measured before attempt {entries[0][0].number} is left out: {refused.message}"[:4000]
        )
        merged = merged.model_copy(update={"absent": {**merged.absent, "sampler (former attempts)": left_out}})
    return entries, merged


def _phases(attempt: Attempt, trace: Trace | None, items: Sequence[tuple[int, ItemRecord]]) -> tuple[Phase, ...]:
    """Closed phases, and the open one of a dead attempt: closed at its last sample, or, of a worker that hung, at its last answer, for its
    silence is no work. A load that did not end is none."""
    if attempt.open_phase is None or attempt.open_phase[0] == "load":
        return attempt.phases
    name, start = attempt.open_phase
    end = trace.times_s[-1] if trace is not None and trace.times_s else start
    if attempt.problem is not None and attempt.problem.code == WORKER_HUNG:
        answers = [item.end_s for number, item in items if number == attempt.number and item.end_s is not None]
        spoken = [sample.token_times_s[-1] for sample in attempt.latency if sample.token_times_s]
        end = min(end, max((*answers, *spoken), default=start))
    for known in _PHASE_NAMES:
        if known == name and end > start:
            return (*attempt.phases, Phase(name=known, start_s=start, end_s=end))
    return attempt.phases


def _latency(attempts: list[Attempt]) -> tuple[LatencySample, ...]:
    """The fullest set of one attempt: samples of different attempts are not pooled."""
    return max((attempt.latency for attempt in attempts), key=len, default=())
