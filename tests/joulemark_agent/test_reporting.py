"""What a killed agent left in its journal becomes a record whose figures are as right as those of an undisturbed run."""

from __future__ import annotations

from pathlib import Path

import pytest

from joulemark.wire import Absent, Channel, Clock, Phase, Problem, Trace
from joulemark_agent.journal import Journal
from joulemark_agent.reporting import build_record
from tests.fixtures.records import make_device, make_manifest, make_pack_header
from tests.fixtures.small_world import make_files, make_spec

CLOCK = Clock(monotonic_s=0.0, wall_s=2e9, boot_id="boot")
CHANNEL = Channel(name="package", quantity="energy", unit="J", source="test", meaning="package", total=True)


def part(start_s: float, begun_s: float) -> Trace:
    """Five seconds of a counter under 20 W, as a sampler that began at `begun_s` leaves them."""
    times = tuple(start_s + tick / 10 for tick in range(50))
    return Trace(
        channels=(CHANNEL,), times_s=times, values=(tuple(20.0 * (time - begun_s) for time in times),), absent={}, interval_s=0.1,
        missed_ticks=0, read_times_s=(0.001,) * 50, cpu_s=0.1,
    )  # fmt: skip


def test_the_energy_of_an_attempt_whose_agent_was_killed_is_counted_once(tmp_path: Path) -> None:
    spec = make_spec(make_files(tmp_path))
    journal = Journal(tmp_path / "journal.sqlite")
    journal.add_run(spec, 20)
    for begun_s, ended_s, whole in ((0.0, 60.0, False), (100.0, 130.0, True)):
        attempt = journal.begin_attempt(spec.run_id, CLOCK)
        parts = [part(begun_s + 5.0 * number, begun_s) for number in range(int(ended_s - begun_s) // 5)]
        for number, each in enumerate(parts):
            journal.add_samples(spec.run_id, attempt, number, each)
        journal.start_phase(spec.run_id, attempt, "accuracy", begun_s + 1)
        if whole:
            journal.end_phase(spec.run_id, attempt, Phase(name="accuracy", start_s=begun_s + 1, end_s=ended_s - 1))
    journal.close()
    record = build_record(
        Journal(tmp_path / "journal.sqlite"), spec, "interrupted", None, make_manifest(), make_pack_header(), make_device(), CLOCK
    )  # fmt: skip
    assert [(phase.name, phase.start_s, phase.end_s) for phase in record.phases] == [
        ("accuracy", 1.0, 59.9),
        ("accuracy", 101.0, 129.0),
    ]
    assert record.summary is not None
    energy = record.summary.metrics["energy_accuracy"]
    assert energy.value == pytest.approx(20.0 * (58.9 + 28.0))  # type: ignore[union-attr]


def test_a_load_that_did_not_end_is_none(tmp_path: Path) -> None:
    """Neither its time nor what the worker had then is a figure of the model."""
    spec = make_spec(make_files(tmp_path))
    journal = Journal(tmp_path / "journal.sqlite")
    journal.add_run(spec, 20)
    attempt = journal.begin_attempt(spec.run_id, CLOCK)
    memory = Channel(name="memory.worker_pss", quantity="memory", unit="By", source="test")
    journal.add_samples(
        spec.run_id, attempt, 0, part(0.0, 0.0).model_copy(update={"channels": (memory,), "values": ((5e6,) * 50,)})
    )  # fmt: skip
    journal.start_phase(spec.run_id, attempt, "load", 1.0)
    problem = Problem(code="missing_extra", message="no engine", hint="install one")
    journal.end_attempt(spec.run_id, attempt, problem, None)
    record = build_record(journal, spec, "failed", problem, make_manifest(), make_pack_header(), make_device(), CLOCK)
    assert record.phases == () and record.summary is not None
    for name, words in (("load_time", "not loaded to the end"), ("peak_pss", "the worker had 5.0 MB at most")):
        metric = record.summary.metrics[name]
        assert isinstance(metric, Absent) and words in metric.reason
