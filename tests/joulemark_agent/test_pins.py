"""Sync pin, lamp and fan through gpiozero's mock pins: edges, levels, and pins that cannot be had."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from joulemark.errors import MissingExtra
from joulemark.wire import RunRecord
from joulemark_agent import pins
from joulemark_agent.messages import Message, PhaseEnded
from joulemark_agent.pins import Lamp, PinNotThere, State, SyncPin, steady_fan
from joulemark_agent.profiles import Pins
from joulemark_agent.runner import MARKED, Surroundings, _phase
from tests.faults.test_worker_faults import Bench

gpiozero = pytest.importorskip("gpiozero")
from gpiozero.pins.mock import MockFactory, MockPWMPin  # noqa: E402 - only where gpiozero is


@pytest.fixture
def header(monkeypatch: pytest.MonkeyPatch) -> Iterator[MockFactory]:
    """A Raspberry Pi's header of mock pins."""
    factory = MockFactory(pin_class=MockPWMPin)
    monkeypatch.setattr(gpiozero.Device, "pin_factory", factory)
    yield factory
    factory.reset()


def levels(header: MockFactory, gpio: int) -> list[bool]:
    return [bool(state.state) for state in header.pin(gpio).states]


# --- sync -------------------------------------------------------------------------------------------------------------
def run_phases(sync: SyncPin) -> dict[str, Any]:
    said: list[Message] = []
    around = Surroundings(time.monotonic, time.sleep, said.append, sync)
    for name in ("idle", "load", "warmup", "latency", "accuracy", "cooldown"):
        with _phase(name, around):  # type: ignore[arg-type]
            time.sleep(0.01)
    return {message.phase.name: message.phase for message in said if isinstance(message, PhaseEnded)}


def test_the_pin_falls_at_the_beginning_of_each_measured_phase_and_is_held(header: MockFactory) -> None:
    sync = SyncPin(17)
    header.pin(17).clear_states()
    phases = run_phases(sync)
    edges = header.pin(17).states[1:]  # the first is the level at which it idles
    assert levels(header, 17)[0] is True, "it idles high"
    assert [bool(edge.state) for edge in edges] == [False, True] * 3
    for phase, fall, rise in zip([phases[name] for name in MARKED], edges[::2], edges[1::2], strict=True):
        assert not fall.state and rise.timestamp >= 0.009, (
            "held as long as the phase lasts (mock pins count from edge to edge)"
        )
        assert phase.start_s <= phase.sync_s <= phase.start_s + 0.005
    assert all(phases[name].sync_s is None for name in ("load", "warmup", "cooldown"))
    sync.close()


def test_the_pin_rises_when_a_phase_ends_in_an_error(header: MockFactory) -> None:
    sync = SyncPin(17)
    around = Surroundings(time.monotonic, time.sleep, lambda _: None, sync)
    with pytest.raises(RuntimeError), _phase("latency", around):
        raise RuntimeError("the engine")
    assert header.pin(17).state
    sync.close()


def test_without_a_pin_no_phase_claims_to_have_marked_one() -> None:
    assert all(phase.sync_s is None for phase in run_phases(SyncPin(None)).values())


def test_off_a_board_the_pin_is_refused_in_words() -> None:
    """gpiozero is here, pins are not: the real libraries' own errors."""
    with pytest.raises(PinNotThere, match="GPIO 17 cannot be used") as caught:
        SyncPin(17)
    assert "group gpio" in caught.value.hint


def test_without_gpiozero_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gpiozero", None)
    with pytest.raises(MissingExtra, match="gpiozero is not installed"):
        SyncPin(17)


def with_pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **named: Any) -> RunRecord:
    """A whole run, worker process included, on this machine with a profile that names pins."""
    bench = Bench(tmp_path)
    try:
        profile = bench.jobs._machine.profile.model_copy(update={"pins": Pins(**named)})
        machine = __import__("dataclasses").replace(bench.jobs._machine, profile=profile)
        monkeypatch.setattr(bench.jobs, "_machine", machine)
        return bench.run("pins")
    finally:
        bench.close()


def test_a_whole_run_marks_its_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPIOZERO_PIN_FACTORY", "mock")
    record = with_pins(tmp_path, monkeypatch, sync_gpio=17)
    assert record.status == "done", record.problem
    marked = {phase.name: phase for phase in record.phases if phase.sync_s is not None}
    assert set(marked) == set(MARKED)
    assert all(phase.start_s <= (phase.sync_s or 0) < phase.end_s for phase in marked.values())


def test_a_run_whose_pin_cannot_be_used_fails_before_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner waits for edges: figures without them would be taken for marked ones."""
    record = with_pins(tmp_path, monkeypatch, sync_gpio=17)
    assert record.status == "failed" and record.problem is not None
    assert record.problem.code == "pin_not_there"
    assert record.items == ()


# --- fan --------------------------------------------------------------------------------------------------------------
def test_the_fan_turns_at_one_speed_while_a_run_lasts(header: MockFactory) -> None:
    with steady_fan(18, 0.6):
        assert header.pin(18).state == pytest.approx(0.6)
    assert header.pin(18).state in (0, 0.0, None)
    with pytest.raises(RuntimeError), steady_fan(18, 1.0):
        raise RuntimeError("the run")
    assert header.pin(18).state in (0, 0.0, None), "also when the run fails"
    with steady_fan(None, 1.0):
        pass


def test_a_fan_that_cannot_be_used_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = with_pins(tmp_path, monkeypatch, fan_gpio=18)
    assert record.status == "failed" and record.problem is not None and record.problem.code == "pin_not_there"


# --- lamp -------------------------------------------------------------------------------------------------------------
def test_the_lamp_shows_what_the_agent_does(header: MockFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "LOOK_S", 0.02)
    now: list[State] = ["trouble"]
    lamp = Lamp(27, lambda: now[0])
    lamp.start()
    deadline = time.monotonic() + 5
    while len(levels(header, 27)) < 6:  # fast blinking
        assert time.monotonic() < deadline
        time.sleep(0.02)
    now[0] = "running"
    time.sleep(0.3)
    header.pin(27).clear_states()
    time.sleep(0.3)
    assert levels(header, 27) == [True], "on, without a pause"
    lamp.stop()
    assert not header.pin(27).state


def test_a_lamp_that_cannot_be_used_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    lamp = Lamp(27, lambda: "idle")
    lamp.start()
    deadline = time.monotonic() + 10
    while "no status lamp" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lamp.stop()
