"""The figures that a summary may hold: their names, units, titles, and which direction is better.

`joulemark_agent.summary` computes them, `joulemark_host.charts` draws them; both read this table, nobody else defines one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MetricDefinition:
    """One figure. `better` is None where more is neither good nor bad."""

    unit: str
    title: str
    better: Literal["higher", "lower"] | None


METRICS: dict[str, MetricDefinition] = {
    "accuracy": MetricDefinition("1", "accuracy (the task's primary score)", "higher"),
    "ttft_p50": MetricDefinition("s", "time to first token, median", "lower"),
    "ttft_p95": MetricDefinition("s", "time to first token, 95th percentile", "lower"),
    "ttft_p99": MetricDefinition("s", "time to first token, 99th percentile", "lower"),
    "itl_p50": MetricDefinition("s", "inter-token latency, median", "lower"),
    "itl_p95": MetricDefinition("s", "inter-token latency, 95th percentile", "lower"),
    "itl_p99": MetricDefinition("s", "inter-token latency, 99th percentile", "lower"),
    "prefill_rate": MetricDefinition("tok/s", "prefill speed, single stream", "higher"),
    "decode_rate": MetricDefinition("tok/s", "decode speed, single stream", "higher"),
    "items_rate": MetricDefinition("1/s", "questions per second, accuracy phase", "higher"),
    "bandwidth_utilisation": MetricDefinition("1", "weight bytes × decode speed ÷ measured memory bandwidth", None),
    "energy_latency": MetricDefinition("J", "energy of the latency phase, gross", "lower"),
    "energy_accuracy": MetricDefinition("J", "energy of the accuracy phase, gross", "lower"),
    "energy_latency_net": MetricDefinition("J", "energy of the latency phase, above idle", "lower"),
    "energy_accuracy_net": MetricDefinition("J", "energy of the accuracy phase, above idle", "lower"),
    "idle_power": MetricDefinition("W", "mean power of the idle window", "lower"),
    "energy_per_token": MetricDefinition("J/tok", "energy per new token, latency phase, gross", "lower"),
    "energy_per_correct": MetricDefinition("J", "energy per correct answer, accuracy phase, gross", "lower"),
    "peak_pss": MetricDefinition("By", "peak memory of the worker (proportional set size)", "lower"),
    "peak_temperature": MetricDefinition("Cel", "peak temperature, hottest zone", "lower"),
    "load_time": MetricDefinition("s", "time to load the model", "lower"),
    "wall_time": MetricDefinition("s", "time of the accuracy phase", "lower"),
    "truncated_share": MetricDefinition("1", "outputs cut by the token limit", "lower"),
    "sampler_read_p95": MetricDefinition("s", "time of one sampler tick, 95th percentile", "lower"),
    "sampler_cpu_share": MetricDefinition("1", "CPU share of one core used by the sampler", "lower"),
}
