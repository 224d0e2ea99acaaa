"""Whether a run's figures may be compared and published. Pure.

Owns the thresholds and why they are what they are. A reason makes the run INVALID and names its evidence in numbers; a
mere remark belongs to a Measure's source, never here. The verdict changes no figure. Missing evidence is a reason too:
a run whose contention nobody watched cannot be called undisturbed. A missing power meter is none: then there are no
joules to compare. Not aware of how the figures were computed.

Thresholds
* Contention. llama.cpp's threads spin at barriers: one busy neighbour took SmolLM2 from 141 to 6–13 tok/s on two cores
  (design notes, measured), so a neighbour that has one of the engine's cores for a share f of the time leaves about
  1 − 0.93 f of the speed. f = 0.05 costs five per cent, the smallest difference that one session may claim (sessions
  differ by 2–3 %, pi-llm-bench). So others may use, and the hypervisor may steal, 0.05 of one core, and as much again
  for every core that the engine leaves free.
* Pressure (PSI). It also counts the waits of the run's own sampler and agent for cores that the engine fills: ten
  wake-ups a second of up to 3 ms each are 3 %. So 0.10.
* Items. The half-width of the accuracy's 95 % interval may be 0.07: 200 items in the worst case (a score of 0.5), the
  smallest subset that the design plans for a board. Fewer items show that it runs, not what the model can do.
* Chance. One-sided exact binomial test at 5 %.
* Truncation. The token limit belongs to the task, so some cut outputs belong to the score; above one in ten the score
  measures the limit. A score of 0 with any cut output is suspect at once (an engine that stops at 16 tokens scores 0).
* Stuck meter. The same value for a whole minute of a measured phase, and in 60 readings, is a meter that stands still: under load power
  moves by more than any meter's last digit. (A socket that rounds to whole watts may look like one: it is too coarse for joules.)
* Coverage of 95 % and missed ticks of 5 %: the same share, seen from both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from joulemark.wire import Absent, Measure, Metric, Phase, RunRecord, Trace, Verdict
from joulemark_agent.energy import GAP_INTERVALS, REQUIRED_COVERAGE, Energy, Meter, interval_in, times_rise
from joulemark_agent.scores import Tally, TaskFacts, correct_count, score_interval
from joulemark_agent.statistics import binomial_tail, mean, power_energy

CONTENDED_CORES = 0.05
PRESSURE = 0.10
HALF_WIDTH = 0.07
SIGNIFICANCE = 0.05
CUT_OUTPUTS = 0.10
MISSED_TICKS = 0.05
STUCK_S = 60.0
STUCK_READINGS = 60
MEASURED_PHASES = ("latency", "accuracy")


@dataclass(frozen=True)
class Limits:
    """What a board can do at most, from its profile; None is not checked. Figures above are impossible or unsafe."""

    power_w: float | None = None
    temperature_c: float | None = None
    start_temperature_c: float | None = None


@dataclass(frozen=True)
class Evidence:
    """What the summary found, for the verdict to weigh."""

    counted: Tally
    task: TaskFacts | Absent
    meter: Meter | Absent
    energy: Mapping[str, Energy | Absent]
    metrics: Mapping[str, Metric]


def judge(record: RunRecord, evidence: Evidence, limits: Limits) -> Verdict:
    """VALID, or INVALID with every reason. Of a run that did not end well, the status is the only reason."""
    if record.status != "done":
        why = f": {record.problem.message}" if record.problem else ""
        return Verdict(valid=False, reasons=(f"the run is {record.status}{why}"[:4000],))
    reasons = (
        *_identity(record),
        *_items(evidence),
        *_score(record, evidence),
        *_truncated(record, evidence),
        *_implausible(record, evidence, limits),
        *_trace(record, evidence),
        *_disturbed(record),
    )
    return Verdict(valid=not reasons, reasons=tuple(reason[:4000] for reason in reasons))


def _identity(record: RunRecord) -> Iterator[str]:
    engine = record.engine
    if engine is None:
        yield "the engine's facts are missing: what really ran is not known"
    elif engine.model_sha256 not in {entry.sha256 for entry in record.manifest.files}:
        yield f"wrong model: the engine loaded {engine.model_sha256[:12]}…, which is no file of the artifact"
    for name in MEASURED_PHASES:
        if not any(phase.name == name for phase in record.phases):
            yield f"the {name} phase is missing"


# --- items and scores -------------------------------------------------------------------------------------------------
def _items(evidence: Evidence) -> Iterator[str]:
    counted = evidence.counted
    if counted.attempted < counted.expected:
        yield f"items missing: {counted.attempted} of {counted.expected} were put to the model"
    if counted.doubled:
        yield f"items doubled: {counted.doubled} answers to documents that were answered before"
    if counted.unanswered:
        yield (
            f"items with problems: {counted.unanswered} of {counted.attempted} have no answer and count as wrong"
            f" (the first: {counted.first_problem[:500]})"
        )


def _score(record: RunRecord, evidence: Evidence) -> Iterator[str]:
    task = evidence.task
    if isinstance(task, Absent):
        yield f"no score: {task.reason}"
        return
    values = evidence.counted.values.get(task.primary, ())
    if not values:
        yield f"no score: no item has a {task.primary}"
        return
    low, high = score_interval(values)
    if (high - low) / 2 > HALF_WIDTH:
        yield (
            f"too few items: {len(values)} give the accuracy a 95 % interval of ±{(high - low) / 2:.3f},"
            f" ±{HALF_WIDTH} is required"
        )
    right = correct_count(values)
    if record.pack.kind == "choice" and task.chance is not None and right is not None:
        p_value = binomial_tail(right, len(values), task.chance)
        if p_value > SIGNIFICANCE:
            yield (
                f"not above chance: {right} of {len(values)} correct where guessing gives {task.chance:.0%}"
                f" (p = {p_value:.3f}, at most {SIGNIFICANCE} is required)"
            )


def _truncated(record: RunRecord, evidence: Evidence) -> Iterator[str]:
    share = evidence.metrics["truncated_share"]
    if record.pack.kind == "choice" or isinstance(share, Absent):
        return
    if share.value > CUT_OUTPUTS:
        yield f"outputs truncated: {share.source} ({share.value:.0%}, {CUT_OUTPUTS:.0%} are allowed)"
    accuracy = evidence.metrics["accuracy"]
    if share.value > 0 and isinstance(accuracy, Measure) and accuracy.value == 0:
        yield f"score 0 with truncated outputs: {share.source}, so the limit and not the model may be the cause"


# --- plausibility -----------------------------------------------------------------------------------------------------
def _implausible(record: RunRecord, evidence: Evidence, limits: Limits) -> Iterator[str]:
    use, bandwidth = evidence.metrics["bandwidth_utilisation"], record.device.memory_bandwidth
    if isinstance(use, Measure) and isinstance(bandwidth, Measure):
        ceiling = max(bandwidth.value, bandwidth.high or bandwidth.value)
        needed = use.value * bandwidth.value
        if needed > ceiling:
            yield (
                f"implausible speed: decoding would read {needed / 1e9:.2f} GB/s of weights, the memory gave at most"
                f" {ceiling / 1e9:.2f} GB/s; only a model that fits into the processor's cache can do so"
            )
    if limits.power_w is not None:
        for name in MEASURED_PHASES:
            energy = evidence.energy[name]
            if isinstance(energy, Energy) and energy.mean_power_w > limits.power_w:
                yield (
                    f"implausible power: {energy.mean_power_w:.2f} W mean in the {name} phase,"
                    f" the board's limit is {limits.power_w:g} W"
                )
    hottest = evidence.metrics["peak_temperature"]
    if limits.temperature_c is not None and isinstance(hottest, Measure) and hottest.value > limits.temperature_c:
        yield f"too hot: {hottest.value:.1f} °C ({hottest.source}), the board's limit is {limits.temperature_c:g} °C"
    start_c = _start_temperature(record)
    if limits.start_temperature_c is not None and start_c is not None and start_c >= limits.start_temperature_c:
        yield f"too warm at the start: {start_c:.1f} °C, below {limits.start_temperature_c:g} °C is required"


def _start_temperature(record: RunRecord) -> float | None:
    """The hottest zone's first reading of the first idle window, before the run itself warms anything."""
    idle = next((phase for phase in record.phases if phase.name == "idle"), None)
    if idle is None or record.trace is None:
        return None
    zones = [channel.name for channel in record.trace.channels if channel.quantity == "temperature"]
    firsts = [found[0] for name in zones if (found := _readings(record.trace, name, idle))]
    return max(firsts, default=None)


# --- the trace --------------------------------------------------------------------------------------------------------
def _trace(record: RunRecord, evidence: Evidence) -> Iterator[str]:
    trace = record.trace
    if trace is None or not trace.times_s:
        yield "no trace: whether the run was disturbed, throttled or hot is not known"
        return
    if not times_rise(trace):
        yield "the trace's times do not rise: the board restarted during the run"
        return
    ticks = len(trace.times_s) + trace.missed_ticks
    if trace.missed_ticks > MISSED_TICKS * ticks:
        yield f"sampler late: {trace.missed_ticks} of {ticks} ticks were missed, {MISSED_TICKS:.0%} are allowed"
    for phase in _measured(record):
        # Constant 1 W: its coverage is that of the ticks themselves.
        ones = [1.0] * len(trace.times_s)
        limit_s = GAP_INTERVALS * interval_in(trace, phase)
        coverage = power_energy(trace.times_s, ones, phase.start_s, phase.end_s, limit_s).coverage
        if coverage < REQUIRED_COVERAGE:
            yield (
                f"trace incomplete: it covers {coverage:.1%} of the {phase.name} phase,"
                f" {REQUIRED_COVERAGE:.0%} are required"
            )
    if isinstance(evidence.meter, Meter):
        for name in ("idle", *MEASURED_PHASES):
            energy = evidence.energy[name]
            if isinstance(energy, Absent):
                yield f"energy incomplete though there is a meter: {energy.reason}"
        yield from _stuck(record, trace, evidence.meter)


def _stuck(record: RunRecord, trace: Trace, meter: Meter) -> Iterator[str]:
    """A total channel whose readings are all the same for a minute of a measured phase."""
    for column in meter.columns:
        for phase in _measured(record):
            pairs = zip(trace.times_s, column.values, strict=True)
            read = [
                (time, value) for time, value in pairs if value is not None and phase.start_s <= time <= phase.end_s
            ]
            if longest := _longest_standstill(read):
                seconds, readings = longest
                yield (
                    f"meter stuck: {column.name} gave the same value in {readings} readings over {seconds:.0f} s"
                    f" of the {phase.name} phase"
                )
                break


def _longest_standstill(read: Sequence[tuple[float, float]]) -> tuple[float, int] | None:
    """(seconds, readings) of the longest stretch of equal values, when it is long enough to count."""
    longest: tuple[float, int] | None = None
    start = 0
    for index in range(1, len(read) + 1):
        if index < len(read) and read[index][1] == read[start][1]:
            continue
        stretch = (read[index - 1][0] - read[start][0], index - start)
        if stretch[0] >= STUCK_S and stretch[1] >= STUCK_READINGS and (longest is None or stretch > longest):
            longest = stretch
        start = index
    return longest


def _measured(record: RunRecord) -> list[Phase]:
    return [phase for phase in record.phases if phase.name in MEASURED_PHASES and phase.end_s > phase.start_s]


def _readings(trace: Trace, name: str, phase: Phase) -> list[float]:
    for channel, values in zip(trace.channels, trace.values, strict=True):
        if channel.name == name:
            pairs = zip(trace.times_s, values, strict=True)
            return [value for time, value in pairs if value is not None and phase.start_s <= time <= phase.end_s]
    return []


def _disturbed(record: RunRecord) -> Iterator[str]:
    if record.trace is None or not record.trace.times_s:
        return
    watched = False
    for phase in _measured(record):
        other = _readings(record.trace, "contention.other_cpu", phase)
        stolen = _readings(record.trace, "contention.steal", phase)
        watched = watched or bool(other)
        yield from _over_cores(record, phase, other, "other processes used")
        yield from _over_cores(record, phase, stolen, "the hypervisor stole")
        for kind, what in (("psi_cpu", "a processor"), ("psi_memory", "memory")):
            waited = _readings(record.trace, f"contention.{kind}", phase)
            if waited and mean(waited) > PRESSURE:
                yield (
                    f"contended: some task waited for {what} in {mean(waited):.1%} of the {phase.name} phase"
                    f" (PSI, {len(waited)} readings), {PRESSURE:.0%} is allowed"
                )
    if not watched:
        why = [absent.reason for name, absent in record.trace.absent.items() if name.startswith("contention")]
        yield "contention not known: other processes' CPU use was not read" + (f" ({'; '.join(why)})" if why else "")
    yield from _throttled(record, record.trace)


def _over_cores(record: RunRecord, phase: Phase, shares: Sequence[float], what: str) -> Iterator[str]:
    """`shares` are of the machine's whole CPU capacity, so times the cores they are cores."""
    if not shares:
        return
    there = record.device.cores_online or record.device.cores
    cores = mean(shares) * there
    free = max(0, record.device.cores - record.engine.threads) if record.engine else 0
    allowed = CONTENDED_CORES * (1 + free)
    if cores > allowed:
        yield (
            f"contended: {what} {cores:.2f} of {there} cores on average in the {phase.name} phase"
            f" ({len(shares)} readings), {allowed:.2f} is allowed"
        )


def _throttled(record: RunRecord, trace: Trace) -> Iterator[str]:
    """Every throttle channel: a flag that is up, or a count of events that grew, inside a measured phase."""
    for channel, values in zip(trace.channels, trace.values, strict=True):
        if channel.quantity not in ("flag", "count") or not channel.name.startswith("throttle"):
            continue
        for phase in _measured(record):
            first_s = _first_throttle(trace.times_s, values, phase, channel.quantity == "count")
            if first_s is not None:
                what = "governor changed" if channel.name == "throttle.governor_changed" else "throttled"
                yield (
                    f"{what}: {channel.name} first at {first_s:.2f} s,"
                    f" {first_s - phase.start_s:.2f} s into the {phase.name} phase"
                )
                break


def _first_throttle(
    times_s: Sequence[float], values: Sequence[float | None], phase: Phase, counts: bool
) -> float | None:
    before = 0.0
    for time_s, value in zip(times_s, values, strict=True):
        if value is None:
            continue
        if time_s > phase.end_s:
            break
        risen = value > before if counts else value > 0
        if risen and time_s >= phase.start_s:
            return time_s
        before = value
    return None
