"""Before a run: a warm board is given its time, one with too little voltage is refused; and what the queue makes of it."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest

from joulemark_agent import readiness
from joulemark_agent.jobs import Jobs
from joulemark_agent.journal import Journal
from joulemark_agent.profiles import load_profiles, match
from joulemark_agent.sysfs import Roots
from tests.fixtures import trees
from tests.fixtures.boards import HandClock
from tests.fixtures.small_world import make_files, make_machine, make_spec


def pi(tmp_path: Path, temperature_c: float = 48.3, throttled: str = "0x0") -> Roots:
    roots = trees.board("raspberry-pi-4-bookworm", tmp_path / "board")
    (roots.sys / "class/thermal/thermal_zone0/temp").write_text(f"{temperature_c * 1000:.0f}\n")
    trees.answer(roots, "vcgencmd", f"echo throttled={throttled}")
    return roots


def waited(roots: Roots, patience_s: float, cools_c: float = 0.0) -> tuple[float | None, list[str], float]:
    """(temperature at the end, what was told, seconds waited) while the board cools by so much at every look."""
    clock, told, temperature = HandClock(0.0), list[str](), roots.sys / "class/thermal/thermal_zone0/temp"

    def sleep(seconds: float) -> None:
        clock.wait(seconds)
        temperature.write_text(f"{float(temperature.read_text()) - cools_c * 1000:.0f}\n")

    profile = match(load_profiles(), roots)
    last = readiness.wait_until_cool(profile, roots, patience_s, lambda: True, told.append, clock, sleep)
    return last, told, clock()


def test_a_cool_board_does_not_wait(tmp_path: Path) -> None:
    assert waited(pi(tmp_path, 59.9), 600) == (59.9, [], 0.0)


def test_a_warm_board_waits_until_it_is_below_its_profiles_temperature(tmp_path: Path) -> None:
    last, told, seconds = waited(pi(tmp_path, 70.0), 600, cools_c=1.0)
    assert (last, seconds) == (59.0, 22.0)
    assert told[0] == "cooling down: 70.0 °C, it begins below 60 °C or in 600 s"
    assert len(told) == 11


def test_a_board_that_stays_warm_begins_when_its_time_is_over(tmp_path: Path) -> None:
    last, told, seconds = waited(pi(tmp_path, 70.0), 31)
    assert (last, seconds) == (70.0, 31.0)
    assert len(told) == 16


def test_a_board_without_a_zone_or_a_limit_does_not_wait(tmp_path: Path) -> None:
    roots = trees.board("arm64-virtual-machine", tmp_path)
    profile = match(load_profiles(), roots)
    assert readiness.wait_until_cool(profile, roots, 600, lambda: True, pytest.fail) is None
    limited = profile.model_copy(update={"limits": profile.limits.model_copy(update={"start_temperature_c": 50.0})})
    assert readiness.wait_until_cool(limited, roots, 600, lambda: True, pytest.fail) is None


@pytest.mark.parametrize(
    ("throttled", "refused"),
    [("0x0", False), ("0x50000", False), ("0x50005", True), ("0x1", True), ("0x4", False), ("broken", False)],
)
def test_only_a_voltage_that_is_too_low_now_is_a_reason(tmp_path: Path, throttled: str, refused: bool) -> None:
    roots = pi(tmp_path, throttled=throttled)
    problem = readiness.low_voltage(match(load_profiles(), roots), roots)
    assert (problem is not None) is refused
    if problem is not None:
        assert problem.code == "low_voltage" and "--anyway" in problem.hint


def test_a_board_that_has_no_such_firmware_is_not_asked(tmp_path: Path) -> None:
    roots = trees.board("jetson-nano-jetpack4", tmp_path)
    trees.answer(roots, "vcgencmd", "echo throttled=0x1")
    assert readiness.low_voltage(match(load_profiles(), roots), roots) is None


class Queue:
    """The real queue and worker on this machine, with the gate looking at a Raspberry Pi's files."""

    def __init__(self, folder: Path, roots: Roots, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files = make_files(folder, 4)
        self.journal = Journal(folder / "journal.sqlite")
        machine = make_machine()
        profile = match(load_profiles(), roots)
        low, hot = readiness.low_voltage, readiness.hottest
        monkeypatch.setattr(readiness, "low_voltage", lambda *_: low(profile, roots))
        monkeypatch.setattr(readiness, "hottest", lambda *_: hot(profile, roots))
        monkeypatch.setattr(readiness, "LOOK_S", 0.05)
        limited = machine.profile.model_copy(update={"limits": profile.limits})
        self.jobs = Jobs(self.journal, self.files, dataclasses.replace(machine, profile=limited), lambda *_: None)
        self.jobs.start()

    def wait_for(self, run_id: str, *statuses: str) -> None:
        deadline = time.monotonic() + 30
        while self.jobs.state(run_id).status not in statuses:
            assert time.monotonic() < deadline, self.jobs.state(run_id)
            time.sleep(0.02)

    def close(self) -> None:
        self.jobs.stop()
        self.journal.close()


def test_low_voltage_refuses_a_run_unless_it_is_told_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(tmp_path, pi(tmp_path, throttled="0x50001"), monkeypatch)
    queue.jobs.submit(make_spec(queue.files, "refused"))
    queue.wait_for("refused", "failed")
    problem = queue.jobs.state("refused").problem
    assert problem is not None and problem.code == "low_voltage"
    queue.jobs.submit(make_spec(queue.files, "anyway", anyway=True))
    queue.wait_for("anyway", "done")
    queue.close()


def test_a_run_waits_says_why_and_begins_when_the_board_is_cool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = pi(tmp_path, 72.0)
    queue = Queue(tmp_path, roots, monkeypatch)
    queue.jobs.submit(make_spec(queue.files, "warm"))
    deadline = time.monotonic() + 10
    while "cooling down: 72.0 °C" not in queue.jobs.state("warm").message:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    assert queue.jobs.state("warm").status == "running" and queue.journal.attempts("warm") == ()
    (roots.sys / "class/thermal/thermal_zone0/temp").write_text("45000\n")
    queue.wait_for("warm", "done")
    assert queue.jobs.state("warm").message == ""
    queue.close()


def test_a_waiting_run_can_be_cancelled_and_a_stopping_agent_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Queue(tmp_path, pi(tmp_path, 72.0), monkeypatch)
    queue.jobs.submit(make_spec(queue.files, "cancelled"))
    queue.wait_for("cancelled", "running")
    queue.jobs.cancel("cancelled")
    queue.wait_for("cancelled", "cancelled")
    queue.jobs.submit(make_spec(queue.files, "kept"))
    queue.wait_for("kept", "running")
    started = time.monotonic()
    queue.jobs.stop()
    assert time.monotonic() - started < 5
    assert queue.jobs.state("kept").status == "running", "it is taken up at the next start"
    queue.journal.close()
