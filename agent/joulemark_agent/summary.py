"""The figures of a run, from its raw data: every name of `joulemark.metrics`, and one entry per score of the task.

Owns the definition of each figure, with `latency`, `energy` and `scores`. Pure: a record in, figures out; no clock, no
files. Not aware of who asks or how the data were taken. Whether figures may be compared is the business of `verdict`.
SI units; times are monotonic.

Latency figures come from the latency phase only (single stream, no prefix reuse), items_rate and wall_time from the
accuracy phase only. A figure says its n; a tail percentile that n cannot support is Absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from joulemark.metrics import METRICS
from joulemark.wire import Absent, ItemRecord, Measure, Metric, Phase, RunRecord, Summary, Trace, Verdict
from joulemark_agent.energy import GAP_INTERVALS, Energy, Meter, energy_of, find_meter
from joulemark_agent.latency import latency_metrics, median_metric
from joulemark_agent.scores import (
    Tally,
    TaskFacts,
    correct_count,
    first_of_each,
    score_interval,
    score_metric,
    score_metrics,
    tally,
    task_facts,
)
from joulemark_agent.statistics import peak, percentile, supports_percentile
from joulemark_agent.verdict import Evidence, Limits, judge

_SLACK_S = 0.001
"""Times are written by two processes at the phase's border; a millisecond is no reason to call one outside."""


@dataclass(frozen=True)
class _Run:
    """A record with what several figures need of it, computed once."""

    record: RunRecord
    counted: Tally
    task: TaskFacts | Absent
    meter: Meter | Absent
    energy: Mapping[str, Energy | Absent]


def _windows(record: RunRecord, name: str) -> list[Phase]:
    return [phase for phase in record.phases if phase.name == name]


def _latency_windows(record: RunRecord) -> list[Phase]:
    """Those that hold samples, if any does: an attempt that crashed in its latency phase left energy but no figures, and was repeated."""
    windows = _windows(record, "latency")
    complete = [sample for sample in record.latency if sample.token_times_s]
    return [window for window in windows if any(_inside(sample.start_s, [window]) for sample in complete)] or windows


def summarise(record: RunRecord, limits: Limits | None = None) -> tuple[Summary, Verdict]:
    """All figures of `record`, and whether they may be compared.

    The record's own `summary` and `verdict` are not looked at. `limits` are the board's, from its profile. Never raises
    for a record that passed validation: what cannot be computed is Absent with the reason.
    """
    meter = find_meter(record.trace)
    windows = {
        "idle": _windows(record, "idle"), "latency": _latency_windows(record), "accuracy": _windows(record, "accuracy"),
    }  # fmt: skip
    energy = {name: energy_of(meter, found) for name, found in windows.items()}
    run = _Run(record, tally(record), task_facts(record.pack.task), meter, energy)
    latency = latency_metrics(record.latency)
    metrics = {
        **_accuracy(run),
        **latency,
        **_throughput(run, latency["decode_rate"]),
        **_energy(run),
        **_peaks(record),
        **_sampler(record.trace),
    }
    if record.status != "done":
        metrics = {name: _because(metric, record) for name, metric in metrics.items()}
    metrics = {name: metrics[name] for name in (*METRICS, *(name for name in metrics if name not in METRICS))}
    evidence = Evidence(run.counted, run.task, run.meter, run.energy, metrics)
    return Summary(metrics=metrics), judge(record, evidence, limits or Limits())


def _because(metric: Metric, record: RunRecord) -> Metric:
    """Of a run that did not end well, every absence also says so."""
    if isinstance(metric, Measure):
        return metric
    why = f": {record.problem.message}" if record.problem else ""
    return Absent(reason=f"{metric.reason} (the run is {record.status}{why})"[:4000])


# --- scores -----------------------------------------------------------------------------------------------------------
def _accuracy(run: _Run) -> dict[str, Metric]:
    task, counted = run.task, run.counted
    accuracy = task if isinstance(task, Absent) else score_metric(counted, task.primary)
    return {"accuracy": accuracy, "truncated_share": _truncated(run.record), **score_metrics(counted)}


def _truncated(record: RunRecord) -> Metric:
    if record.pack.kind == "choice":
        return Absent(reason="a choice task generates no output")
    ended = [item.finish for item in first_of_each(record.items) if item.finish is not None]
    if not ended:
        return Absent(reason="no output was generated")
    cut = sum(finish == "length" for finish in ended)
    return Measure(
        value=cut / len(ended), unit="1", n=len(ended), source=f"{cut} of {len(ended)} outputs ended at the token limit"
    )


# --- speed and time ---------------------------------------------------------------------------------------------------
def _throughput(run: _Run, decode: Metric) -> dict[str, Metric]:
    loads = [phase.end_s - phase.start_s for phase in _windows(run.record, "load")]
    return {
        "items_rate": _items_rate(run),
        "wall_time": _wall_time(run),
        "load_time": median_metric(loads, "s", "load phase", "the model was not loaded to the end"),
        "bandwidth_utilisation": _bandwidth_utilisation(run.record, decode),
    }


def _inside(time_s: float | None, windows: Sequence[Phase]) -> bool:
    return time_s is not None and any(
        window.start_s - _SLACK_S <= time_s <= window.end_s + _SLACK_S for window in windows
    )


def _strays(run: _Run) -> str | None:
    """What is wrong when items were answered outside the recorded windows of the accuracy phase (before a crash)."""
    items = first_of_each(run.record.items)
    outside = sum(not _inside(item.end_s, _windows(run.record, "accuracy")) for item in items)
    if not outside:
        return None
    return f"{outside} of {len(items)} items were answered outside the recorded windows of the accuracy phase"


def _items_rate(run: _Run) -> Metric:
    windows = _windows(run.record, "accuracy")
    duration_s = sum(window.end_s - window.start_s for window in windows)
    inside: list[ItemRecord] = [item for item in first_of_each(run.record.items) if _inside(item.end_s, windows)]
    if not inside or duration_s <= 0:
        return Absent(reason="no item was answered in a recorded accuracy phase")
    strays = _strays(run)
    return Measure(
        value=len(inside) / duration_s,
        unit="1/s",
        n=len(inside),
        source=f"items ÷ {duration_s:.3f} s of the accuracy phase" + (f"; {strays} and do not count" if strays else ""),
    )


def _wall_time(run: _Run) -> Metric:
    windows = _windows(run.record, "accuracy")
    if not windows:
        return Absent(reason="the run has no accuracy phase")
    strays = _strays(run)
    if strays:
        return Absent(reason=strays)
    return Measure(
        value=sum(window.end_s - window.start_s for window in windows),
        unit="s",
        n=len(windows),
        source="accuracy phase" if len(windows) == 1 else f"sum of {len(windows)} windows of the accuracy phase",
    )


def _bandwidth_utilisation(record: RunRecord, decode: Metric) -> Metric:
    weights, bandwidth = record.manifest.bytes_per_token, record.device.memory_bandwidth
    if weights is None:
        return Absent(reason="the bytes of weights that one token reads are not known for this model")
    if isinstance(decode, Absent):
        return decode
    if isinstance(bandwidth, Absent):
        return Absent(reason=f"the memory bandwidth was not measured: {bandwidth.reason}"[:4000])
    if bandwidth.value <= 0:
        return Absent(reason=f"the measured memory bandwidth is {bandwidth.value:g} {bandwidth.unit}")
    scale = weights / bandwidth.value
    return Measure(
        value=decode.value * scale,
        unit="1",
        n=decode.n,
        low=None if decode.low is None else decode.low * scale,
        high=None if decode.high is None else decode.high * scale,
        source=f"{weights} bytes per token × decode_rate ÷ {bandwidth.value / 1e9:.2f} GB/s ({bandwidth.source})",
    )


# --- energy -----------------------------------------------------------------------------------------------------------
def _energy(run: _Run) -> dict[str, Metric]:
    idle, latency = run.energy["idle"], run.energy["latency"]
    strays = _strays(run)
    accuracy = Absent(reason=strays) if strays else run.energy["accuracy"]
    return {
        "energy_latency": _gross(latency, run.meter),
        "energy_accuracy": _gross(accuracy, run.meter),
        "energy_latency_net": _net(latency, idle, run.meter),
        "energy_accuracy_net": _net(accuracy, idle, run.meter),
        "idle_power": _idle_power(idle, run.meter),
        "energy_per_token": _per_token(run),
        "energy_per_correct": _per_correct(run, accuracy),
    }


def _source(meter: Meter | Absent, energy: Energy) -> str:
    named = meter.source if isinstance(meter, Meter) else meter.reason
    gap = "" if energy.coverage >= 1 - 1e-9 else f"; {energy.coverage:.1%} covered, the rest at its mean power"
    return f"{named}{gap}"


def _measured(
    value: Callable[[float], float], unit: str, energy: Energy | Absent, meter: Meter | Absent, note: str = ""
) -> Metric:
    """A figure that rises with the energy: `value` of the joules; low from what is certain when there is a gap."""
    if isinstance(energy, Absent):
        return energy
    gap = energy.coverage < 1 - 1e-9
    return Measure(
        value=value(energy.joules),
        unit=unit,
        n=energy.readings,
        low=value(energy.certain_j) if gap else None,
        source=_source(meter, energy) + note,
    )


def _gross(energy: Energy | Absent, meter: Meter | Absent) -> Metric:
    return _measured(lambda joules: joules, "J", energy, meter)


def _idle_power(idle: Energy | Absent, meter: Meter | Absent) -> Metric:
    if isinstance(idle, Absent):
        return idle
    return _measured(
        lambda joules: joules / idle.duration_s, "W", idle, meter, f"; {idle.duration_s:.2f} s idle window"
    )


def _net(energy: Energy | Absent, idle: Energy | Absent, meter: Meter | Absent) -> Metric:
    if isinstance(energy, Absent):
        return energy
    if isinstance(idle, Absent):
        return Absent(reason=f"the idle power is not known: {idle.reason}"[:4000])
    below = idle.mean_power_w * energy.duration_s
    note = f"; less {idle.mean_power_w:.3f} W idle power × {energy.duration_s:.3f} s"
    return _measured(lambda joules: joules - below, "J", energy, meter, note)


def _per_token(run: _Run) -> Metric:
    windows = _windows(run.record, "latency")
    complete = [sample for sample in run.record.latency if sample.token_times_s]
    outside = sum(not (_inside(s.start_s, windows) and _inside(s.token_times_s[-1], windows)) for s in complete)
    if outside:
        return Absent(reason=f"{outside} of {len(complete)} latency samples lie outside the recorded latency phase")
    if not complete:
        return Absent(reason="the latency phase gave no token")
    tokens = sum(len(sample.token_times_s) for sample in complete)
    note = f"; ÷ {tokens} new tokens, prefill included"
    return _measured(lambda joules: joules / tokens, "J/tok", run.energy["latency"], run.meter, note)


def _per_correct(run: _Run, energy: Energy | Absent) -> Metric:
    if isinstance(energy, Absent):
        return energy
    if isinstance(run.task, Absent):
        return run.task
    values = run.counted.values.get(run.task.primary, ())
    if not values:
        return Absent(reason="no item was graded")
    right = correct_count(values)
    if right is None:
        return Absent(reason=f"{run.task.primary} is not a right-or-wrong score")
    if right == 0:
        return Absent(reason=f"none of {len(values)} answers is correct")
    low, high = score_interval(values)
    return Measure(
        value=energy.joules / right,
        unit="J",
        n=right,
        low=energy.joules / (high * len(values)),
        high=energy.joules / (low * len(values)),
        source=f"{_source(run.meter, energy)}; ÷ {right} correct of {len(values)}; interval from the score's",
    )


# --- memory, temperature, the sampler's cost --------------------------------------------------------------------------
def _peaks(record: RunRecord) -> dict[str, Metric]:
    trace = record.trace
    if trace is None:
        absent = Absent(reason="the run has no trace")
        return {"peak_pss": absent, "peak_temperature": absent}
    memory = _peak(trace, "memory", "By", lambda name: name == "memory.worker_pss", "memory")
    if isinstance(memory, Measure) and not _windows(record, "load"):
        # What a worker has that ended before is no figure of this model.
        memory = Absent(
            reason=f"the model was never loaded; until then the worker had {memory.value / 1e6:.1f} MB at most"
        )
    return {"peak_pss": memory, "peak_temperature": _peak(trace, "temperature", "Cel", lambda _: True, "thermal")}


def _peak(trace: Trace, quantity: str, unit: str, wanted: Callable[[str], bool], sensor: str) -> Metric:
    found = [
        (highest[0], channel.name, highest[1])
        for channel, values in zip(trace.channels, trace.values, strict=True)
        if channel.quantity == quantity and wanted(channel.name) and (highest := peak(values)) is not None
    ]
    if not found:
        why = [f"{name}: {absent.reason}" for name, absent in trace.absent.items() if name.startswith(sensor)]
        return Absent(reason=("; ".join(why) or f"no {sensor} channel gave a reading")[:4000])
    value, name, n = max(found)
    return Measure(value=value, unit=unit, n=n, source=f"{name}, highest of {n} readings")


def _sampled(trace: Trace) -> float:
    """Seconds of sampling. Where the sampler slowed down: the steps between ticks, without the pauses between attempts."""
    if not trace.slowed:
        return (len(trace.times_s) + trace.missed_ticks) * trace.interval_s
    longest_s = GAP_INTERVALS * max(interval for _, interval in trace.slowed)
    return sum(step for step in (b - a for a, b in pairwise(trace.times_s)) if 0 < step <= longest_s)


def _sampler(trace: Trace | None) -> dict[str, Metric]:
    if trace is None or not trace.times_s:
        absent = Absent(reason="the run has no trace" if trace is None else "the sampler made no tick")
        return {"sampler_read_p95": absent, "sampler_cpu_share": absent}
    reads = trace.read_times_s
    sampled_s = _sampled(trace)
    return {
        "sampler_read_p95": Measure(
            value=percentile(reads, 95), unit="s", n=len(reads), source="time of all reads of one tick"
        )
        if supports_percentile(len(reads), 95)
        else Absent(reason=f"{len(reads)} ticks; the 95th percentile needs 20"),
        "sampler_cpu_share": Measure(
            value=trace.cpu_s / sampled_s,
            unit="1",
            n=len(trace.times_s),
            source=f"{trace.cpu_s:.3f} CPU seconds of the sampling thread in {sampled_s:.1f} s",
        )
        if sampled_s > 0
        else Absent(reason="the sampling interval is zero"),
    }
