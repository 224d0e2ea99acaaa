"""The conditions under which a run was made, and which of them each metric depends on. Pure.

Two runs are compared for a metric only if every condition that this metric depends on is the same. A condition counts
*everywhere* (the questions, the engine, what a joule means) or only *on one device* (threads, governor, build): a board
with four cores and one with six may stand in one figure with all their cores, but two models on one board may not be
run with different thread counts. What follows from an artifact's *format* (its engine, and what that computes with) is
part of what is compared: there only runs of the same format must agree. `joulemark_host.facts` fills the values in;
this module does not know records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
    """One thing that must be equal. `scope` is where: over the whole grid, or among the runs of one device. `of_format`: among those of
    the same format only."""

    name: str
    title: str
    scope: Scope
    metrics: frozenset[str]
    of_format: bool = False


CONDITIONS: tuple[Condition, ...] = (
    Condition("task", "task", "grid", ON_ITEMS),
    Condition("task_version", "task version", "grid", ON_ITEMS),
    Condition("task_hash", "task hash", "grid", ON_ITEMS),
    Condition("chat_template", "chat template", "grid", ON_ITEMS),
    Condition("items", "number of items", "grid", ACCURACY_PHASE | WHOLE_RUN),
    Condition("pack", "task pack", "grid", ON_ITEMS),
    Condition("variant", "variant", "grid", frozenset(METRICS)),
    Condition("backend", "backend", "grid", frozenset(METRICS), of_format=True),
    Condition("engine", "engine version", "grid", frozenset(METRICS), of_format=True),
    Condition("kv_type", "KV cache type", "grid", frozenset(METRICS) - {"load_time"}, of_format=True),
    Condition("flash_attention", "flash attention", "grid", frozenset(METRICS) - {"load_time"}, of_format=True),
    Condition("context", "context", "grid", frozenset(METRICS)),
    Condition("batch_tokens", "batch", "grid", COST - {"load_time"}),
    Condition("sequences", "sequences", "grid", (ACCURACY_PHASE | WHOLE_RUN) & COST),
    Condition("latency_plan", "latency plan", "grid", LATENCY_PHASE | WHOLE_RUN),
    Condition("power_source", "meaning of power", "grid", ENERGY),
    Condition("sample_rate", "sample rate", "grid", SAMPLED),
    Condition("idle_window", "idle window", "grid", NET),
    Condition("compute_device", "compute device", "device", frozenset(METRICS)),
    Condition("build", "engine build", "device", COST, of_format=True),
    Condition("threads", "threads", "device", COST),
    Condition("governor", "CPU governor", "device", COST),
    Condition("power_mode", "power mode", "device", COST),
    Condition("clocks", "clock limits", "device", COST),
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


def _differing(a: RunFacts, b: RunFacts, conditions: Iterable[Condition]) -> tuple[Difference, ...]:
    return tuple(
        Difference(condition.name, condition.title, _value(a, condition), _value(b, condition))
        for condition in conditions
        if _value(a, condition) != _value(b, condition)
    )


def format_of(run: RunFacts) -> str:
    """The artifact's format, which decides about the engine."""
    return run.conditions.get("format", "unknown")


# --- what most runs share ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Reference:
    """What the runs of a grid, or of one device, are held against: a run for what concerns all of them, and one of each format for what
    concerns that format."""

    metric: str
    scope: Scope
    common: RunFacts
    by_format: Mapping[str, RunFacts]

    def differences(self, run: RunFacts) -> tuple[Difference, ...]:
        """In what a run is not like the others."""
        general, of_format = _split(self.metric, self.scope)
        same = self.by_format.get(format_of(run), run)
        return _differing(run, self.common, general) + _differing(run, same, of_format)

    def shared(self) -> Mapping[str, str]:
        """By title, what all comparable runs have; digests are shortened. What formats differ in is said for each."""
        general, of_format = _split(self.metric, self.scope)
        told = {condition.title: short(_value(self.common, condition)) for condition in general}
        for condition in of_format:
            values = {name: short(_value(run, condition)) for name, run in sorted(self.by_format.items())}
            alike = len(set(values.values())) == 1
            told[condition.title] = (
                next(iter(values.values()))
                if alike
                else "; ".join(f"{name}: {value}" for name, value in values.items())
            )
        return {condition.title: told[condition.title] for condition in relevant(self.metric, self.scope)}


def reference_of(
    runs: Sequence[RunFacts], metric: str, scope: Scope, given: RunFacts | None = None
) -> Reference | None:
    """What most of `runs` share, or what the run `given` has; None of none."""
    general, of_format = _split(metric, scope)
    common = given or _most_shared(runs, general)
    if common is None:
        return None
    formats = {format_of(run) for run in runs}
    most = {name: _most_shared([run for run in runs if format_of(run) == name], of_format) for name in formats}
    by_format = {name: run for name, run in most.items() if run is not None}
    if given is not None:
        by_format[format_of(given)] = given
    return Reference(metric, scope, common, by_format)


def _split(metric: str, scope: Scope) -> tuple[list[Condition], list[Condition]]:
    """(conditions of all runs, conditions of a format's)."""
    conditions = relevant(metric, scope)
    return [item for item in conditions if not item.of_format], [item for item in conditions if item.of_format]


def _most_shared(runs: Sequence[RunFacts], conditions: Sequence[Condition]) -> RunFacts | None:
    """A run with the conditions that most of `runs` share; of equally many the ones of the latest run. None of none."""
    if not runs:
        return None
    keys = {run.run_id: tuple(_value(run, condition) for condition in conditions) for run in runs}
    counts = Counter(keys.values())
    return max(runs, key=lambda run: (counts[keys[run.run_id]], run.sequence))


def short(value: str) -> str:
    """A digest by its first 12 digits, other values up to 80 characters."""
    if len(value) == 64 and all(character in "0123456789abcdef" for character in value):
        return value[:12]
    return value if len(value) <= 80 else value[:79] + "…"


def _value(run: RunFacts, condition: Condition) -> str:
    return run.conditions.get(condition.name, "unknown")
