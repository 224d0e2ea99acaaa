"""What the host keeps of a record beside its raw bytes: names, figures, verdict, and the conditions it ran under.

Pure: a RunRecord goes in, a RunFacts comes out. The raw record stays the truth; `FACTS_VERSION` is raised whenever
`facts_of` changes, and `joulemark_host.records` then derives everything again. Not aware of databases or of grids.
Conditions are text because they are only compared and shown; times are in seconds, sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from joulemark.metrics import METRICS
from joulemark.plain_text import printable, printable_problem
from joulemark.wire import Absent, Meaning, Measure, Metric, Problem, RunRecord

FACTS_VERSION = 2
OUTCOMES = ("done", "failed")
"""A run that ended so says something about its cell."""


@dataclass(frozen=True)
class RunFacts:
    """One run as grids and listings need it. `sequence` is the order of receipt, whatever a board's clock says."""

    run_id: str
    status: str
    device_id: str
    device_name: str
    device_profile: str
    artifact_id: str
    model: str
    quantization: str
    weight_bytes: int
    pack_id: str
    task: str
    task_hash: str
    variant: str
    valid: bool
    reasons: tuple[str, ...]
    problem: Problem | None
    finished_at: float | None
    """Wall-clock seconds by the board's own clock; None when the run had no phases."""
    conditions: Mapping[str, str]
    """Comparability conditions by the names of `joulemark_host.compare.CONDITIONS`."""
    metrics: Mapping[str, Metric]
    sequence: int = 0
    received_at: float | None = None


def facts_of(record: RunRecord) -> RunFacts:
    """The facts of one record. Free text from outside is made printable here, once."""
    problem = printable_problem(record.problem) if record.problem is not None else None
    return RunFacts(
        run_id=record.spec.run_id,
        status=record.status,
        device_id=record.device.device_id,
        device_name=printable(record.device.name) or record.device.device_id,
        device_profile=record.device.profile,
        artifact_id=record.spec.artifact_id,
        model=record.manifest.name,
        quantization=record.manifest.quantization,
        weight_bytes=record.manifest.weight_bytes,
        pack_id=record.pack.pack_id,
        task=record.pack.task,
        task_hash=record.pack.task_hash,
        variant=printable(record.spec.variant),
        valid=record.verdict.valid,
        reasons=tuple(printable(reason) for reason in record.verdict.reasons[:50]),
        problem=problem,
        finished_at=_finished_at(record),
        conditions=_conditions(record),
        metrics=_metrics(record),
    )


def _metrics(record: RunRecord) -> dict[str, Metric]:
    """The figures that this host knows; those of a newer agent stay in the raw record."""
    found = record.summary.metrics if record.summary else {}
    return {name: _printable_metric(metric) for name, metric in found.items() if name in METRICS}


def _printable_metric(metric: Metric) -> Metric:
    if isinstance(metric, Measure):
        return metric.model_copy(update={"unit": printable(metric.unit)[:40], "source": printable(metric.source)[:400]})
    return Absent(reason=printable(metric.reason))


def _finished_at(record: RunRecord) -> float | None:
    if not record.phases:
        return None
    return record.clock.wall_s + (max(phase.end_s for phase in record.phases) - record.clock.monotonic_s)


def _conditions(record: RunRecord) -> dict[str, str]:
    """Requested values where the setting is a choice, actual values where the board decides."""
    spec, pack, device = record.spec, record.pack, record.device
    plan = spec.latency
    conditions = {
        "task": pack.task,
        "task_version": pack.version,
        "task_hash": pack.task_hash,
        "chat_template": "applied" if pack.apply_chat_template else "not applied",
        "items": str(min(spec.limit or pack.size, pack.size)),
        "pack": pack.pack_id,
        "format": record.manifest.format,
        "variant": printable(spec.variant) or "none",
        "context": str(spec.context_tokens or "automatic"),
        "batch_tokens": str(spec.batch_tokens),
        "sequences": str(spec.sequences),
        "latency_plan": f"{plan.prompts} prompts × {plan.new_tokens} tokens after {plan.warmup} warm-up",
        "sample_rate": f"{spec.sample_hz:g} Hz",
        "idle_window": f"{spec.idle_s:g} s" if spec.idle_s else "the board's own",
        "governor": printable(device.governor or "") or "unknown",
        "power_mode": printable(device.power_mode or "") or "none",
        "clocks": printable(device.clocks or "") or "unknown",
        "power_source": _power_source(record),
    }
    if record.engine is not None:
        engine = record.engine
        conditions |= {
            "backend": engine.backend,
            "engine": f"{printable(engine.engine)} {printable(engine.version)}",
            "build": printable(engine.build) or "unknown",
            "compute_device": printable(engine.device),
            "threads": str(engine.threads),
            "kv_type": printable(engine.kv_type),
            "flash_attention": "on" if engine.flash_attention else "off",
        }
    return conditions


def _power_source(record: RunRecord) -> str:
    """What the run's joules mean: of the meanings of its totals the one whose channels were summed into its energy."""
    if record.trace is None:
        return "no meter"
    meanings = {
        channel.meaning or "unknown"
        for channel in record.trace.channels
        if channel.total and channel.quantity in ("power", "energy")
    }
    return next((meaning for meaning in get_args(Meaning) if meaning in meanings), "no meter")
