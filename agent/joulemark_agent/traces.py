"""Traces put together: the parts that one sampler left, and what the attempts of a run measured. Pure.

Owns: what becomes of running sums and of counts where two meet. Not aware of how they were sampled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from joulemark.errors import BadInput
from joulemark.wire import Channel, Trace


def join(parts: Sequence[Trace]) -> Trace:
    """One trace of all parts of one sampler, in their order: what is left of it when the agent died.

    Running energy sums go on from part to part as they are, unlike those of attempts (`merge`). Raises BadInput as `merge` does.
    """
    if not parts:
        raise BadInput("there is no trace to join", "pass the parts of one attempt")
    _check_mergeable(parts)
    last = parts[-1]
    return last.model_copy(
        update={
            "times_s": tuple(t for part in parts for t in part.times_s),
            "values": tuple(
                tuple(value for part in parts for value in part.values[column]) for column in range(len(last.channels))
            ),
            "read_times_s": tuple(t for part in parts for t in part.read_times_s),
        }
    )


def merge(traces: Sequence[Trace]) -> Trace:
    """One trace of the attempts of one run on one boot, in order of time.

    Channels of the same name are joined, others have None where their trace is not. Running energy sums begin at 0 in each and go on from
    where the attempt before ended: what was used between the attempts is unknown and is not added. Raises BadInput when there is no trace,
    when they overlap in time, differ in interval, or disagree on what a channel is.
    """
    parts = sorted((trace for trace in traces if trace.times_s), key=lambda trace: trace.times_s[0])
    if not parts:
        if traces:
            return traces[0]
        raise BadInput("there is no trace to merge", "pass the traces of the run's attempts")
    _check_mergeable(parts)
    channels = {channel.name: channel for part in parts for channel in part.channels}
    columns = {name: _joined(parts, channel) for name, channel in channels.items()}
    return Trace(
        channels=tuple(channels.values()),
        times_s=tuple(t for part in parts for t in part.times_s),
        values=tuple(tuple(column) for column in columns.values()),
        absent={name: reason for part in parts for name, reason in part.absent.items()},
        interval_s=parts[0].interval_s,
        slowed=_slowed(parts),
        missed_ticks=sum(part.missed_ticks for part in parts),
        read_times_s=tuple(t for part in parts for t in part.read_times_s),
        cpu_s=math.fsum(part.cpu_s for part in parts),
    )


def _slowed(parts: Sequence[Trace]) -> tuple[tuple[float, float], ...]:
    """Every change of interval; each part begins at the full rate again."""
    if not any(part.slowed for part in parts):
        return ()
    return tuple(change for part in parts for change in ((part.times_s[0], part.interval_s), *part.slowed))


def _check_mergeable(parts: Sequence[Trace]) -> None:
    hint = "merge only the attempts of one run on one boot"
    known: dict[str, Channel] = {}
    for earlier, later in itertools.pairwise(parts):
        if later.times_s[0] <= earlier.times_s[-1]:
            raise BadInput("two traces overlap in time", hint)
        if later.interval_s != earlier.interval_s:
            raise BadInput(f"two traces have different intervals: {earlier.interval_s} and {later.interval_s} s", hint)
    for channel in (channel for part in parts for channel in part.channels):
        first = known.setdefault(channel.name, channel)
        if (first.quantity, first.unit, first.meaning, first.total) != (
            channel.quantity,
            channel.unit,
            channel.meaning,
            channel.total,
        ):
            raise BadInput(f"two traces disagree on what the channel {channel.name!r} is", hint)


def _joined(parts: Sequence[Trace], channel: Channel) -> list[float | None]:
    running = channel.quantity == "energy"
    column: list[float | None] = []
    base = 0.0
    for part in parts:
        index = next((i for i, c in enumerate(part.channels) if c.name == channel.name), None)
        if index is None:
            column.extend([None] * len(part.times_s))
            continue
        values = part.values[index]
        column.extend(v + base if running and v is not None else v for v in values)
        known = [v for v in values if v is not None]
        base += known[-1] if running and known else 0.0
    return column
