"""Governor, clocks and power mode while a run lasts: set, recorded, put back; also after an error, a kill, a refusal in the middle."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from joulemark.errors import BadInput
from joulemark.wire import Absent, RunRecord, Tuning
from joulemark.wishes import tuning_of
from joulemark_agent import holding, tuning
from joulemark_agent.holding import TuningRefused, held, put_back
from joulemark_agent.jobs import Jobs
from joulemark_agent.journal import Journal
from joulemark_agent.profiles import device_facts, load_profiles, match
from joulemark_agent.programs import ask_behind
from joulemark_agent.sysfs import Roots
from tests.fixtures import root_helper, trees
from tests.fixtures.small_world import make_files, make_machine, make_spec

NVPMODEL = """
case "$1" in -m) echo "pmode:000$2" > {status}; echo "NV Power Mode changed";; *) exit 64;; esac
"""


def jetson(tmp_path: Path) -> Roots:
    roots = trees.board("jetson-orin-nano-jetpack6", tmp_path / "board")
    trees.answer(roots, "nvpmodel", NVPMODEL.format(status=roots.var / "lib/nvpmodel/status"))
    return roots


def state(roots: Roots) -> tuple[str | None, str | None, set[str]]:
    policies = (roots.sys / "devices/system/cpu/cpufreq").glob("policy*/scaling_governor")
    return tuning.power_mode(roots), tuning.clock_limits(roots), {path.read_text().strip() for path in policies}


BEFORE = ("MAXN_SUPER (2)", "cpu 0.73 to 1.73 GHz, 17000000.gpu 0.31 to 1.02 GHz", {"schedutil"})
WANTED = Tuning(governor="performance", power_mode="15W", fixed_clocks=True)


def test_everything_is_set_and_put_back(tmp_path: Path) -> None:
    roots, note = jetson(tmp_path), tmp_path / "note.json"
    assert state(roots) == BEFORE
    with held(roots, WANTED, note):
        fixed = "cpu fixed at 1.73 GHz, 17000000.gpu fixed at 1.02 GHz"
        assert state(roots) == ("15W (0)", fixed, {"performance"})
        assert note.exists(), "what was before is on the disk while it is otherwise"
    assert state(roots) == BEFORE
    assert not note.exists()


@pytest.fixture
def run_folder() -> Iterator[Path]:
    """A socket's path has 107 bytes at most: pytest's own folders may be longer."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_root_behind_a_socket_sets_what_the_agent_may_not(tmp_path: Path, run_folder: Path) -> None:
    """The agent itself has no nvpmodel here."""
    roots, programs = dataclasses.replace(jetson(tmp_path), run=run_folder), tmp_path / "roots-own"
    assert roots.bin is not None
    programs.mkdir()
    (roots.bin / "nvpmodel").rename(programs / "nvpmodel")
    with pytest.raises(TuningRefused, match="no program nvpmodel"), held(roots, WANTED, tmp_path / "n"):
        pytest.fail("it must not begin")
    with root_helper.listening(roots.run / "joulemark-power-mode.socket", programs):
        with held(roots, WANTED, tmp_path / "n"):
            assert state(roots)[0] == "15W (0)"
        assert state(roots) == BEFORE
        (programs / "nvpmodel").write_text("#!/bin/sh\necho NVPM WARN: Reboot required\n")
        with (
            pytest.raises(TuningRefused, match="is not 3 after nvpmodel -m 3: NVPM WARN: Reboot required"),
            held(roots, Tuning(power_mode="7W"), tmp_path / "n"),
        ):
            pytest.fail("it must not begin")


def test_a_socket_that_does_not_answer_or_says_nothing_is_named(run_folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(run_folder / "s"))
        assert "failed" in str(ask_behind(run_folder / "s", "2", 1.0)), "nobody listens"
        listener.listen()
        began = time.monotonic()
        assert "no answer in time" in str(ask_behind(run_folder / "s", "2", 0.2))
        assert time.monotonic() - began < 2


def test_an_error_in_the_run_puts_everything_back(tmp_path: Path) -> None:
    roots = jetson(tmp_path)
    with pytest.raises(RuntimeError), held(roots, WANTED, tmp_path / "note.json"):
        raise RuntimeError("the run")
    assert state(roots) == BEFORE


def test_a_killed_agent_is_tidied_up_after_at_the_next_start(tmp_path: Path) -> None:
    roots, note = jetson(tmp_path), tmp_path / "note.json"
    child = os.fork()
    if child == 0:
        with held(roots, WANTED, note):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert state(roots) != BEFORE and note.exists()
    put_back(roots, note)
    assert state(roots) == BEFORE and not note.exists()
    put_back(roots, note)


def test_what_cannot_be_set_leaves_all_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = jetson(tmp_path)
    write = holding._write

    def refuse(path: Path, content: str) -> None:
        if path.name == "min_freq" and content == "1020000000":  # the last of the settings
            raise TuningRefused(f"{path} cannot be set", "x")
        write(path, content)

    monkeypatch.setattr(holding, "_write", refuse)
    with pytest.raises(TuningRefused), held(roots, WANTED, tmp_path / "note.json"):
        pytest.fail("it must not begin")
    assert state(roots) == BEFORE


def test_what_cannot_be_put_back_is_remembered_and_stops_the_next_run_that_wants_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots, note = jetson(tmp_path), tmp_path / "note.json"
    write = holding._write

    def refuse(path: Path, content: str) -> None:
        if content == "schedutil":  # the former governor
            raise TuningRefused(f"{path} cannot be set", "x")
        write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(holding, "_write", refuse)
        with held(roots, WANTED, note):
            pass
        assert note.exists() and state(roots)[2] == {"performance"}
        with (
            pytest.raises(TuningRefused, match="not set as it was") as caught,
            held(roots, Tuning(fixed_clocks=True), note),
        ):
            pytest.fail("its note would say that performance was there before")
        assert str(note) in caught.value.hint
    with held(roots, Tuning(fixed_clocks=True), note):
        assert state(roots)[2] == {"schedutil"}, "now it can be, and is first"
    assert state(roots) == BEFORE and not note.exists()


def test_a_power_mode_that_takes_cores_away_gives_them_back_as_they_were(tmp_path: Path) -> None:
    roots = jetson(tmp_path)
    cores = roots.sys / "devices/system/cpu/cpufreq/policy4"
    (cores / "scaling_min_freq").write_text("1728000\n")  # fixed by hand before
    away = f"mv {cores} {tmp_path}/away 2>/dev/null || {{ mv {tmp_path}/away {cores}; echo 729600 > {cores}/scaling_min_freq; }}"
    trees.answer(roots, "nvpmodel", NVPMODEL.format(status=roots.var / "lib/nvpmodel/status") + away)
    with held(roots, Tuning(power_mode="7W", governor="performance"), tmp_path / "note.json"):
        assert not cores.exists()
    assert (cores / "scaling_governor").read_text().strip() == "schedutil"
    with held(roots, Tuning(power_mode="7W", fixed_clocks=True), tmp_path / "note.json"):
        assert not cores.exists()
    assert (cores / "scaling_min_freq").read_text().strip() == "1728000"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo NVPM ERROR: need root; exit 1", "need root"),
        ("echo NVPM WARN: Reboot required for changing to this power mode", "restart"),
    ],
)
def test_a_power_mode_that_nvpmodel_refuses(script: str, words: str, tmp_path: Path) -> None:
    roots = jetson(tmp_path)
    trees.answer(roots, "nvpmodel", script)
    with pytest.raises(TuningRefused) as caught, held(roots, Tuning(power_mode="7W"), tmp_path / "note.json"):
        pytest.fail("it must not begin")
    assert words in str(caught.value)
    assert state(roots) == BEFORE


def test_names_that_the_board_has_not_are_refused_with_those_that_it_has(tmp_path: Path) -> None:
    roots = jetson(tmp_path)
    with (
        pytest.raises(BadInput, match="no governor 'turbo'") as caught,
        held(roots, Tuning(governor="turbo"), tmp_path / "n"),
    ):
        pytest.fail("it must not begin")
    assert "schedutil" in caught.value.hint
    with (
        pytest.raises(BadInput, match="no power mode '40W'") as caught,
        held(roots, Tuning(power_mode="40W"), tmp_path / "n"),
    ):
        pytest.fail("it must not begin")
    assert "2: MAXN_SUPER" in caught.value.hint
    pi = trees.board("arm64-virtual-machine", tmp_path / "vm")
    with pytest.raises(BadInput, match="no power mode"), held(pi, Tuning(power_mode="0"), tmp_path / "n"):
        pytest.fail("it must not begin")
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}x",
        '{"files": [["../../etc/passwd", "x"]]}',
        '{"files": [["devices/system/cpu/online", "0"]]}',
        '{"power_mode": "x"}',
    ],
)
def test_a_note_that_is_none_writes_nothing_else(text: str, tmp_path: Path) -> None:
    roots, note = jetson(tmp_path), tmp_path / "note.json"
    (tmp_path / "board/etc/passwd").write_text("precious")
    online = (roots.sys / "devices/system/cpu/online").read_text()
    note.write_text(text)
    put_back(roots, note)
    assert state(roots) == BEFORE and not note.exists()
    assert (tmp_path / "board/etc/passwd").read_text() == "precious"
    assert (roots.sys / "devices/system/cpu/online").read_text() == online


def test_words_of_a_command_line() -> None:
    assert tuning_of(None, None, False) is None
    assert tuning_of("performance", "MAXN", True) == Tuning(
        governor="performance", power_mode="MAXN", fixed_clocks=True
    )
    with pytest.raises(BadInput, match="governor"):
        tuning_of("../x", None, False)


def test_a_run_is_measured_and_recorded_as_it_was_set(tmp_path: Path) -> None:
    """The real queue and worker; the settings are a Jetson's files, the record has what was in force and not what is afterwards."""
    roots, files = jetson(tmp_path), make_files(tmp_path, 4)
    machine, board = make_machine(), match(load_profiles(), roots)

    def facts(measured: object):
        here = machine.facts(measured)  # type: ignore[arg-type]
        there = device_facts(board, roots, "d", "n", (), {}, here.memory_bandwidth)
        return here.model_copy(update={name: getattr(there, name) for name in ("governor", "power_mode", "clocks")})

    note = tmp_path / "note.json"
    modes: list[str | None] = []

    def bandwidth() -> Absent:
        modes.append(tuning.power_mode(roots))
        return Absent(reason="not measured in this test")

    put_together = dataclasses.replace(machine, facts=facts, note=note, bandwidth=bandwidth)
    # The worker needs this machine's /proc, the settings are the board's.
    mixed = dataclasses.replace(machine.roots, sys=roots.sys, etc=roots.etc, var=roots.var, bin=roots.bin)
    put_together = dataclasses.replace(put_together, roots=mixed)
    journal = Journal(tmp_path / "journal.sqlite")
    jobs = Jobs(journal, files, put_together, lambda *_: None)
    jobs.start()
    try:
        jobs.submit(make_spec(files, "set", tuning=WANTED))
        jobs.submit(make_spec(files, "impossible", tuning=Tuning(governor="turbo")))
        deadline = time.monotonic() + 60
        while jobs.state("impossible").status in ("queued", "running"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        record = RunRecord.model_validate_json(jobs.record("set"))
        refused = RunRecord.model_validate_json(jobs.record("impossible"))
    finally:
        jobs.stop()
        journal.close()
    assert record.status == "done", record.problem
    assert (record.device.power_mode, record.device.governor) == ("15W (0)", "performance")
    assert record.device.clocks == "cpu fixed at 1.73 GHz, 17000000.gpu fixed at 1.02 GHz"
    assert record.spec.tuning == WANTED
    assert modes == ["15W (0)"], "the memory's clock is the power mode's"
    assert state(roots) == BEFORE
    assert (
        refused.status == "failed" and refused.problem is not None and "no governor 'turbo'" in refused.problem.message
    )
    assert json.loads(record.model_dump_json())["spec"]["tuning"]["fixed_clocks"] is True
