"""What a trace's power and energy channels say about windows of a run. Pure.

Owns: which channels make up the run's joules, how much of a window must be covered, what happens to an uncovered rest.
Not aware of: metrics, scores, how channels were read. Units: seconds, watts, joules.

Rules
* Only channels marked `total` are summed (wire.Channel). Totals of different meaning measure the same energy at
  different places, so only those of the most inclusive meaning present count (wire.Meaning's order).
* A phase that ran several times (a resumed run) is the sum of its windows, and every one must be covered.
* A window must be covered to 95 % and hold two readings. An uncovered rest of at most 5 % is taken at the window's own
  mean power, which is unbiased when reads fail by chance; what was certainly used is kept as the lower bound.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from joulemark.wire import Absent, Meaning, Phase, Trace
from joulemark_agent.statistics import WindowEnergy, counter_energy, percentile, power_energy

REQUIRED_COVERAGE = 0.95
GAP_INTERVALS = 5
"""Readings further apart than so many times a channel's own median spacing leave a gap."""
MEANINGS: tuple[str, ...] = get_args(Meaning)
_NOT_METERS = (
    "contention", "cpu", "devfreq", "memory", "overcurrent", "pi_throttling", "thermal", "throttle", "undervoltage"
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """One total channel: its name, how to read it, and its values at the trace's times."""

    name: str
    source: str
    quantity: Literal["power", "energy"]
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Meter:
    """The channels whose sum is the run's power."""

    columns: tuple[Column, ...]
    meaning: str
    trace: Trace

    @property
    def source(self) -> str:
        """Channels, meaning and method, for Measure.source."""
        methods = {"power": "trapezoid of sampled power", "energy": "difference of an energy counter"}
        used = " and ".join(methods[quantity] for quantity in sorted({column.quantity for column in self.columns}))
        named = " + ".join(f"{column.name} of {column.source}" for column in self.columns)
        return f"{named} ({self.meaning}; {used})"


@dataclass(frozen=True)
class Energy:
    """Joules of one or several windows. `certain_j` leaves out what was not covered."""

    joules: float
    certain_j: float
    duration_s: float
    coverage: float
    readings: int

    @property
    def mean_power_w(self) -> float:
        """Joules ÷ seconds."""
        return self.joules / self.duration_s


def interval_in(trace: Trace, window: Phase) -> float:
    """The sampler's slowest interval (s) inside a window: it slows down in long runs."""
    before = [interval for time, interval in trace.slowed if time <= window.start_s]
    inside = [interval for time, interval in trace.slowed if window.start_s < time < window.end_s]
    return max([before[-1] if before else trace.interval_s, *inside])


def gap_limit(times_s: Sequence[float], column: Sequence[float | None], interval_s: float) -> float:
    """The longest pause between two readings that still counts as covered: five times the channel's median spacing.

    Costly channels are read more rarely than the sampler ticks, so the channel's own rhythm decides, not the tick's.
    """
    read = [time for time, value in zip(times_s, column, strict=True) if value is not None]
    steps = [right - left for left, right in pairwise(read)]
    return GAP_INTERVALS * max(percentile(steps, 50) if steps else 0.0, interval_s)


def times_rise(trace: Trace) -> bool:
    """Whether the trace lies on one clock: after a reboot the monotonic clock starts again from zero."""
    return all(left < right for left, right in pairwise(trace.times_s))


def find_meter(trace: Trace | None) -> Meter | Absent:
    """The channels that make up the run's energy, or why there are none."""
    if trace is None:
        return Absent(reason="the run has no trace")
    if not times_rise(trace):
        return Absent(reason="the trace's times do not rise: the board restarted during the run")
    totals = [
        (channel, values)
        for channel, values in zip(trace.channels, trace.values, strict=True)
        if channel.total and channel.quantity in ("power", "energy")
    ]
    if not totals:
        return Absent(reason=_no_meter(trace)[:4000])
    present = {channel.meaning or "unknown" for channel, _ in totals}
    meaning = next(candidate for candidate in MEANINGS if candidate in present)
    columns = tuple(
        Column(
            name=channel.name,
            source=channel.source,
            quantity="power" if channel.quantity == "power" else "energy",
            values=values,
        )
        for channel, values in totals
        if (channel.meaning or "unknown") == meaning
    )
    return Meter(columns, meaning, trace)


def _no_meter(trace: Trace) -> str:
    parts = [channel.name for channel in trace.channels if channel.quantity in ("power", "energy")]
    why = [f"{name}: {absent.reason}" for name, absent in trace.absent.items() if not name.startswith(_NOT_METERS)]
    if parts:
        why.insert(0, f"{', '.join(parts)} measure parts only")
    return "no meter for the whole board or package" + (f" ({'; '.join(why)})" if why else "")


def energy_of(meter: Meter | Absent, windows: Sequence[Phase]) -> Energy | Absent:
    """Energy of all `windows` together, or why it is not known."""
    if isinstance(meter, Absent):
        return meter
    if not windows:
        return Absent(reason="the run has no such phase")
    parts: list[Energy] = []
    missed: Absent | None = None
    for window in windows:
        part = _of_window(meter, window)
        if isinstance(part, Energy):
            parts.append(part)
        elif not _is_short(meter, window):
            return part
        else:
            missed = missed or part
    duration_s = sum(window.end_s - window.start_s for window in windows)
    measured_s = sum(part.duration_s for part in parts)
    coverage = sum(part.coverage * part.duration_s for part in parts) / duration_s if parts else 0.0
    if missed is not None and coverage < REQUIRED_COVERAGE:
        return missed
    return Energy(
        joules=sum(part.joules for part in parts) * duration_s / measured_s,
        certain_j=sum(part.certain_j for part in parts),
        duration_s=duration_s,
        coverage=coverage,
        readings=sum(part.readings for part in parts),
    )


def _is_short(meter: Meter, window: Phase) -> bool:
    """Whether a window may end before its meter was read twice in it, by the meter's own rhythm: an attempt died as soon as it began. What
    it used is counted at the mean power of the other windows, like any gap."""
    spacing_s = max(_max_gap(meter.trace, column, window) for column in meter.columns) / GAP_INTERVALS
    return window.end_s - window.start_s < 2 * spacing_s


def _max_gap(trace: Trace, column: Column, window: Phase) -> float:
    """A channel's rhythm is that of the whole trace, but where the sampler slowed down only the window's own counts."""
    times, values = trace.times_s, column.values
    if trace.slowed:
        first, last = bisect_left(times, window.start_s), bisect_right(times, window.end_s)
        times, values = times[first:last], values[first:last]
    return gap_limit(times, values, interval_in(trace, window))


def _of_window(meter: Meter, window: Phase) -> Energy | Absent:
    if not window.end_s > window.start_s:
        return Absent(reason=f"the {window.name} phase is empty")
    parts: list[WindowEnergy] = []
    for column in meter.columns:
        integrate = power_energy if column.quantity == "power" else counter_energy
        max_gap_s = _max_gap(meter.trace, column, window)
        part = integrate(meter.trace.times_s, column.values, window.start_s, window.end_s, max_gap_s)
        if part.coverage < REQUIRED_COVERAGE:
            return Absent(
                reason=f"{column.name} covers {part.coverage:.1%} of the {window.name} phase"
                f" ({part.duration_s:.2f} s), {REQUIRED_COVERAGE:.0%} are required"
            )
        if part.readings < 2:
            return Absent(
                reason=f"{column.name} was read {part.readings} times in the {window.name} phase"
                f" ({part.duration_s:.2f} s), two readings are required"
            )
        parts.append(part)
    return Energy(
        joules=sum(part.joules / part.coverage for part in parts),
        certain_j=sum(part.joules for part in parts),
        duration_s=window.end_s - window.start_s,
        coverage=min(part.coverage for part in parts),
        readings=min(part.readings for part in parts),
    )
