"""Workers that crash, hang, run out of memory or are killed: the run says which, nothing is lost or doubled, the next run works."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from joulemark.errors import NoSpace
from joulemark.wire import Absent, Clock, ItemRecord, LatencyPlan, RunRecord
from joulemark_agent.giving_up import MAX_ATTEMPTS
from joulemark_agent.jobs import Jobs
from joulemark_agent.journal import Journal
from joulemark_agent.machine import boot_id
from joulemark_agent.sysfs import Roots
from tests.fixtures.small_world import make_files, make_machine, make_spec

SIZE = 20


class Bench:
    """A queue over the fake backend, with what it delivered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = make_files(folder, SIZE)
        self.delivered: list[tuple[str, bytes]] = []
        self.open()

    def open(self) -> None:
        self.journal = Journal(self.folder / "journal.sqlite")
        self.jobs = Jobs(self.journal, self.files, make_machine(), lambda *pair: self.delivered.append(pair))
        self.jobs.start()

    def close(self) -> None:
        self.jobs.stop()
        self.journal.close()

    def run(self, run_id: str, **changes: object) -> RunRecord:
        self.jobs.submit(make_spec(self.files, run_id, **changes))
        return self.wait(run_id)

    def wait(self, run_id: str, timeout_s: float = 60) -> RunRecord:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.jobs.state(run_id).status not in ("queued", "running"):
                return RunRecord.model_validate_json(self.jobs.record(run_id))
            time.sleep(0.05)
        raise AssertionError(f"the run did not end: {self.jobs.state(run_id)}")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def complete(record: RunRecord) -> bool:
    return [item.doc_id for item in record.items] == list(range(SIZE))


def test_a_clean_run_is_done_in_one_attempt(bench: Bench) -> None:
    record = bench.run("clean")
    assert (record.status, record.attempts, record.interruptions) == ("done", 1, ())
    assert complete(record) and record.problem is None
    assert [phase.name for phase in record.phases] == ["idle", "load", "warmup", "latency", "accuracy", "cooldown"]
    starts = [phase.start_s for phase in record.phases]
    assert starts == sorted(starts) and all(phase.end_s >= phase.start_s for phase in record.phases)
    assert record.trace is not None
    assert record.trace.times_s[0] <= record.phases[0].start_s + 0.2
    assert record.trace.times_s[-1] >= record.phases[-1].end_s
    bench.jobs.stop()  # the run is done when its record is in the journal; that is handed on right after, before the thread ends
    assert [run_id for run_id, _ in bench.delivered] == ["clean"]


@pytest.mark.parametrize("fault", ["kill:7", "abort:7"])
def test_a_worker_that_dies_again_and_again_is_resumed_until_done(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv("JOULEMARK_FAKE_FAULT", fault)
    record = bench.run("dying")
    # Seven results an attempt: 7, 14, 20.
    assert record.status == "done" and complete(record)
    assert record.attempts == 3 and len(record.interruptions) == 2
    signal_name = "SIGKILL" if fault.startswith("kill") else "SIGABRT"
    assert all(problem.code == "worker_crashed" for problem in record.interruptions)
    assert all(signal_name in problem.message for problem in record.interruptions)
    monkeypatch.delenv("JOULEMARK_FAKE_FAULT")
    clean = bench.run("clean")
    assert [(item.doc_id, item.prompt_sha256, item.choice_logprobs) for item in clean.items] == [
        (item.doc_id, item.prompt_sha256, item.choice_logprobs) for item in record.items
    ]


@pytest.mark.parametrize(
    ("fault", "code"), [("kill:0", "worker_crashed"), ("abort:0", "worker_crashed"), ("memory:0", "out_of_memory")]
)
def test_a_worker_without_progress_fails_the_run_and_the_next_works(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, fault: str, code: str
) -> None:
    monkeypatch.setenv("JOULEMARK_FAKE_FAULT", fault)
    record = bench.run("failing")
    assert record.status == "failed" and record.problem is not None and record.problem.code == code
    assert record.problem.hint and not record.verdict.valid and record.items == ()
    monkeypatch.delenv("JOULEMARK_FAKE_FAULT")
    assert bench.run("next").status == "done"


def went_down(bench: Bench, boots: list[str], items: dict[int, ItemRecord] | None = None) -> RunRecord:
    """What becomes of a run that was begun once on each of these boots, each of which ended without a word. `items`: by the attempt
    (from 1) that finished it."""
    bench.close()
    journal = Journal(bench.folder / "journal.sqlite")
    journal.add_run(make_spec(bench.files, "cut"), SIZE)
    for boot in boots:
        attempt = journal.begin_attempt("cut", Clock(monotonic_s=5.0, wall_s=5.0, boot_id=boot))
        if items and attempt in items:
            journal.add_item("cut", attempt, items[attempt])
    journal.set_status("cut", "running")
    journal.close()
    bench.open()
    return bench.wait("cut")


def test_a_run_in_which_the_board_goes_down_again_and_again_is_given_up_and_the_next_works(bench: Bench) -> None:
    record = went_down(bench, ["boot-1", "boot-2", "boot-3"])
    assert record.status == "failed" and record.problem is not None and record.problem.code == "board_went_down"
    assert "3 times" in record.problem.message and record.attempts == 3
    assert bench.run("next").status == "done"


@pytest.mark.parametrize("boots", [["boot-1", "boot-2"], ["boot-1", "boot-2", "boot-2"], ["boot-1"] * 5])
def test_a_run_whose_board_went_down_less_often_goes_on(bench: Bench, boots: list[str]) -> None:
    record = went_down(bench, boots)
    assert record.status == "done" and complete(record) and record.attempts == len(boots) + 1


def test_power_cuts_between_which_an_item_was_finished_do_not_end_a_run(bench: Bench) -> None:
    item = bench.run("whole").items[0]
    record = went_down(bench, ["boot-1", "boot-2", "boot-3", "boot-4"], {2: item})
    assert record.status == "done" and complete(record) and record.attempts == 5
    assert [problem.code for problem in record.interruptions] == ["board_went_down"] * 4


def test_a_run_that_the_agent_never_lives_through_says_so(bench: Bench) -> None:
    record = went_down(bench, [str(boot_id(Roots()))] * MAX_ATTEMPTS)
    assert record.status == "failed" and record.problem is not None and record.problem.code == "agent_stopped"
    assert f"each of the run's last {MAX_ATTEMPTS} attempts" in record.problem.message
    assert record.attempts == MAX_ATTEMPTS


def test_a_run_that_gets_on_is_begun_as_often_as_it_takes(bench: Bench) -> None:
    whole = bench.run("whole").items
    steps = {2 + 3 * index: item for index, item in enumerate(whole[:-1])}  # an item at every third attempt
    record = went_down(bench, [str(boot_id(Roots()))] * (3 * SIZE), steps)
    assert record.status == "done" and complete(record) and record.attempts == 3 * SIZE + 1 > MAX_ATTEMPTS
    assert [problem.code for problem in record.interruptions] == ["agent_stopped"] * 3 * SIZE


@pytest.mark.parametrize(("since", "status"), [(MAX_ATTEMPTS, "failed"), (MAX_ATTEMPTS - 1, "done")])
def test_a_run_that_no_longer_gets_on_is_given_up_with_its_items(bench: Bench, since: int, status: str) -> None:
    item = bench.run("whole").items[0]
    record = went_down(bench, [str(boot_id(Roots()))] * (2 + since), {2: item})
    assert record.status == status and record.items[0] == item
    if status == "failed":
        assert record.problem is not None and record.problem.code == "agent_stopped" and record.items == (item,)


def test_a_hanging_worker_is_killed_and_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOULEMARK_FAKE_FAULT", "hang:0")
    record = bench.run("hanging", stall_timeout_s=1.5)
    assert record.status == "failed" and record.problem is not None and record.problem.code == "worker_hung"
    assert "1.5 s" in record.problem.message
    monkeypatch.delenv("JOULEMARK_FAKE_FAULT")
    assert bench.run("next").status == "done"


def test_a_worker_that_hangs_after_progress_is_resumed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOULEMARK_FAKE_FAULT", "hang:12")
    record = bench.run("stumbling", stall_timeout_s=1.5)
    assert record.status == "done" and complete(record) and record.attempts == 2
    assert record.interruptions[0].code == "worker_hung"
    # What it was silent is no time of the run: 1.5 s here, ten minutes by default, and its idle power with it.
    accuracy = [phase.end_s - phase.start_s for phase in record.phases if phase.name == "accuracy"]
    assert sum(accuracy) < 1.0 and record.summary is not None
    assert record.summary.metrics["wall_time"].value == pytest.approx(sum(accuracy))  # type: ignore[union-attr]


def test_the_time_between_attempts_is_not_the_runs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that was off for longer than the run's limit goes on with the run."""
    monkeypatch.setenv("JOULEMARK_FAKE_FAULT", "slow:0.1")
    bench.jobs.submit(make_spec(bench.files, "paused", timeout_s=6.0))
    with stopped(bench, "paused", 3):
        time.sleep(6.0)
    record = bench.wait("paused")
    assert record.status == "done" and complete(record), record.problem


def test_a_record_that_the_disk_refuses_is_made_again_as_it_was(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """All items are answered: the attempt that follows has none left, and no second accuracy phase."""
    monkeypatch.setattr("joulemark_agent.jobs.DISK_PATIENCE_S", 0.2)
    keep, refusals = bench.journal.set_record, iter([NoSpace("the disk is full", "free some")])

    def refuse_once(*arguments: Any) -> None:
        if error := next(refusals, None):
            raise error
        keep(*arguments)

    monkeypatch.setattr(bench.journal, "set_record", refuse_once)
    record = bench.run("refused")
    assert record.status == "done" and complete(record) and record.attempts == 2
    assert [phase.name for phase in record.phases].count("accuracy") == 1
    assert [phase.name for phase in record.phases].count("latency") == 1 and record.latency


def test_the_latency_phase_is_measured_again_after_a_reboot_and_only_then(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there are fewer prompts than asked for."""
    monkeypatch.setenv("JOULEMARK_FAKE_FAULT", "slow:0.1")
    for run_id, booted in (("same-boot", False), ("rebooted", True)):
        bench.jobs.submit(
            make_spec(bench.files, run_id, limit=SIZE, latency=LatencyPlan(prompts=SIZE + 5, new_tokens=4))
        )
        with stopped(bench, run_id, 3) as journal:
            if booted:
                journal.execute(
                    "UPDATE attempts SET clock = json_set(clock, '$.boot_id', 'another') WHERE run_id = ?", (run_id,)
                )
        record = bench.wait(run_id)
        assert record.status == "done" and record.attempts == 2, record.problem
        assert [phase.name for phase in record.phases].count("latency") == 1
        assert len(record.latency) == SIZE
        assert not any("latency phase is missing" in reason for reason in record.verdict.reasons)


def test_a_channel_that_changed_between_two_attempts_stops_neither_run_nor_queue(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody edits the profile while the agent is off: what was measured before is left out and said so."""
    monkeypatch.setenv("JOULEMARK_FAKE_FAULT", "slow:0.1")
    bench.jobs.submit(make_spec(bench.files, "edited"))
    with stopped(bench, "edited", 3) as journal:
        (text,) = journal.execute("SELECT trace FROM attempts WHERE run_id = 'edited'").fetchone()
        changed = text.replace('"quantity":"memory"', '"quantity":"count"').replace('"unit":"By"', '"unit":"1"')
        assert changed != text
        journal.execute("UPDATE attempts SET trace = ? WHERE run_id = 'edited'", (changed,))
    record = bench.wait("edited")
    assert record.status == "done" and complete(record) and record.attempts == 2
    assert record.trace is not None
    assert "disagree on what the channel" in record.trace.absent["sampler (former attempts)"].reason
    assert [phase.name for phase in record.phases].count("idle") == 1
    assert record.summary is not None
    wall_time = record.summary.metrics["wall_time"]
    assert isinstance(wall_time, Absent) and "answered outside the recorded windows" in wall_time.reason
    assert bench.run("next").status == "done"


def test_a_run_that_outlasts_its_limit_is_ended(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOULEMARK_FAKE_FAULT", "slow:0.3")
    record = bench.run("endless", timeout_s=4.0)
    assert record.status == "failed" and record.problem is not None and record.problem.code == "worker_hung"
    assert "limit of 4 s" in record.problem.message and 0 < len(record.items) < SIZE


def worker_pid(bench: Bench) -> int:
    """The running worker, found as a child of this process."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for task in Path("/proc/self/task").iterdir():
            try:
                children = (task / "children").read_text().split()
            except OSError:
                continue
            for child in children:
                command = Path(f"/proc/{child}/cmdline").read_bytes()
                if b"joulemark_agent.worker" in command:
                    return int(child)
        time.sleep(0.02)
    raise AssertionError("no worker was started")


@contextlib.contextmanager
def stopped(bench: Bench, run_id: str, items: int) -> Generator[sqlite3.Connection]:
    """The agent stops in mid-run, after so many items, and starts again afterwards; meanwhile this is its journal."""
    wait_for_items(bench, run_id, items)
    bench.close()
    with contextlib.closing(sqlite3.connect(bench.folder / "journal.sqlite")) as journal, journal:
        yield journal
    bench.open()


def wait_for_items(bench: Bench, run_id: str, count: int) -> None:
    deadline = time.monotonic() + 30
    while bench.jobs.state(run_id).items_done < count:
        assert time.monotonic() < deadline, bench.jobs.state(run_id)
        time.sleep(0.01)


def test_kill_9_of_the_worker_in_mid_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOULEMARK_FAKE_FAULT", "slow:0.05")
    bench.jobs.submit(make_spec(bench.files, "victim"))
    wait_for_items(bench, "victim", 5)
    os.kill(worker_pid(bench), signal.SIGKILL)
    record = bench.wait("victim")
    assert record.status == "done" and complete(record)
    assert record.attempts == 2 and "SIGKILL" in record.interruptions[0].message


def test_cancelling_a_running_and_a_queued_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOULEMARK_FAKE_FAULT", "slow:0.2")
    bench.jobs.submit(make_spec(bench.files, "first"))
    bench.jobs.submit(make_spec(bench.files, "second"))
    wait_for_items(bench, "first", 2)
    bench.jobs.cancel("second")
    bench.jobs.cancel("first")
    first, second = bench.wait("first"), bench.wait("second")
    assert (first.status, second.status) == ("cancelled", "cancelled")
    assert 2 <= len(first.items) < SIZE and second.items == ()


def test_an_agent_that_stops_resumes_the_run_at_its_next_start(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOULEMARK_FAKE_FAULT", "slow:0.05")
    bench.jobs.submit(make_spec(bench.files, "long"))
    with stopped(bench, "long", 4) as journal:
        (before,) = journal.execute("SELECT count(*) FROM items").fetchone()
    assert 4 <= before < SIZE
    record = bench.wait("long")
    assert record.status == "done" and complete(record) and record.attempts == 2
    assert record.interruptions[0].code == "agent_stopped"
    assert [phase.name for phase in record.phases].count("accuracy") == 2


def test_the_same_run_id_is_one_run(bench: Bench) -> None:
    spec = make_spec(bench.files, "once")
    threads = [threading.Thread(target=bench.jobs.submit, args=(spec,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bench.journal.runs()) == 1
    bench.wait("once")
    bench.jobs.submit(spec)
    assert bench.jobs.state("once").status == "done"


def test_a_rotten_model_file_is_refused_before_loading(bench: Bench) -> None:
    data = bytearray(bench.files.model.read_bytes())
    data[-100] ^= 0xFF
    bench.files.model.write_bytes(data)
    record = bench.run("rotten")
    assert record.status == "failed" and record.problem is not None and record.problem.code == "digest_mismatch"
