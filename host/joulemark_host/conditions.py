"""The conditions under which a run was made, and which of them each metric depends on. Pure.

Two runs are compared for a metric only if every condition that this metric depends on is the same. A condition counts
*everywhere* (the questions, the engine, what a joule means) or only *on one device* (threads, governor, build): a board
with four cores and one with six may stand in one figure with all their cores, but two models on one board may not be
run with different thread counts. `joulemark_host.facts` fills the values in; this module does not know records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from joulemark.metrics import METRICS
from joulemark_host.facts import RunFacts

Scope = Literal["grid", "device"]

ACCURACY_PHASE = frozenset(
    {
        "accuracy",
        "truncated_share",
        "items_rate",
        "energy_accuracy",
        "energy_accuracy_net",
        "energy_per_correct",
        "wall_time",
    }
)
LATENCY_PHASE = frozenset(
    {
        "ttft_p50",
        "ttft_p95",
        "ttft_p99",
        "itl_p50",
        "itl_p95",
        "itl_p99",
        "prefill_rate",
        "decode_rate",
        "bandwidth_utilisation",
        "energy_latency",
        "energy_latency_net",
        "energy_per_token",
    }
)
WHOLE_RUN = frozenset({"peak_pss", "peak_temperature", "sampler_read_p95", "sampler_cpu_share"})
ENERGY = frozenset(name for name in METRICS if name.startswith("energy_") or name == "idle_power")
QUALITY = frozenset({"accuracy", "truncated_share"})
COST = frozenset(METRICS) - QUALITY
ON_ITEMS = ACCURACY_PHASE | LATENCY_PHASE | WHOLE_RUN
SAMPLED = ENERGY | WHOLE_RUN
NET = frozenset({"energy_latency_net", "energy_accuracy_net", "idle_power"})


@dataclass(frozen=True)
class Condition:
    """One thing that must be equal. `scope` is where: over the whole grid, or among the runs of one device."""

    name: str
    title: str
    scope: Scope
    metrics: frozenset[str]


CONDITIONS: tuple[Condition, ...] = (
    Condition("task", "task", "grid", ON_ITEMS),
    Condition("task_version", "task version", "grid", ON_ITEMS),
    Condition("task_hash", "task hash", "grid", ON_ITEMS),
    Condition("chat_template", "chat template", "grid", ON_ITEMS),
    Condition("items", "number of items", "grid", ACCURACY_PHASE | WHOLE_RUN),
    Condition("pack", "task pack", "grid", ON_ITEMS),
    Condition("variant", "variant", "grid", frozenset(METRICS)),
    Condition("backend", "backend", "grid", frozenset(METRICS)),
    Condition("engine", "engine version", "grid", frozenset(METRICS)),
    Condition("kv_type", "KV cache type", "grid", frozenset(METRICS) - {"load_time"}),
    Condition("flash_attention", "flash attention", "grid", frozenset(METRICS) - {"load_time"}),
    Condition("context", "context", "grid", frozenset(METRICS)),
    Condition("batch_tokens", "batch", "grid", COST - {"load_time"}),
    Condition("sequences", "sequences", "grid", (ACCURACY_PHASE | WHOLE_RUN) & COST),
    Condition("latency_plan", "latency plan", "grid", LATENCY_PHASE | WHOLE_RUN),
    Condition("power_source", "meaning of power", "grid", ENERGY),
    Condition("sample_rate", "sample rate", "grid", SAMPLED),
    Condition("idle_window", "idle window", "grid", NET),
    Condition("compute_device", "compute device", "device", frozenset(METRICS)),
    Condition("build", "engine build", "device", COST),
    Condition("threads", "threads", "device", COST),
    Condition("governor", "CPU governor", "device", COST),
    Condition("power_mode", "power mode", "device", COST),
)


@dataclass(frozen=True)
class Difference:
    """A condition in which two runs differ, with both values (`unknown` where a run does not say)."""

    name: str
    title: str
    left: str
    right: str


def relevant(metric: str, *scopes: Scope) -> tuple[Condition, ...]:
    """The conditions that `metric` depends on, of the given scopes."""
    return tuple(condition for condition in CONDITIONS if metric in condition.metrics and condition.scope in scopes)


def differing_fields(a: RunFacts, b: RunFacts, metric: str) -> tuple[Difference, ...]:
    """The conditions that `metric` depends on and in which the runs differ; none means: they may be compared."""
    scopes: tuple[Scope, ...] = ("grid", "device") if a.device_id == b.device_id else ("grid",)
    return differences(a, b, metric, *scopes)


def differences(a: RunFacts, b: RunFacts, metric: str, *scopes: Scope) -> tuple[Difference, ...]:
    """As `differing_fields`, for the given scopes only."""
    return tuple(
        Difference(condition.name, condition.title, _value(a, condition), _value(b, condition))
        for condition in relevant(metric, *scopes)
        if _value(a, condition) != _value(b, condition)
    )


def most_shared(runs: Sequence[RunFacts], metric: str, scope: Scope) -> RunFacts | None:
    """A run with the conditions that most of `runs` share; of equally many the ones of the latest run. None of none."""
    if not runs:
        return None
    conditions = relevant(metric, scope)
    keys = {run.run_id: tuple(_value(run, condition) for condition in conditions) for run in runs}
    counts = Counter(keys.values())
    return max(runs, key=lambda run: (counts[keys[run.run_id]], run.sequence))


def shared_conditions(run: RunFacts | None, metric: str) -> Mapping[str, str]:
    """By title, what a run that is comparable with `run` has everywhere in the grid; digests are shortened."""
    if run is None:
        return {}
    return {condition.title: short(_value(run, condition)) for condition in relevant(metric, "grid")}


def short(value: str) -> str:
    """A digest by its first 12 digits, other values up to 80 characters."""
    if len(value) == 64 and all(character in "0123456789abcdef" for character in value):
        return value[:12]
    return value if len(value) <= 80 else value[:79] + "…"


def _value(run: RunFacts, condition: Condition) -> str:
    return run.conditions.get(condition.name, "unknown")
