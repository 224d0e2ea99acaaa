"""The outbox and its sender with a fake clock: a host away for days, bounds, duplicates, kills, a damaged file."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from joulemark.errors import BadInput, Conflict, JoulemarkError
from joulemark_agent import database as database_module
from joulemark_agent import outbox as outbox_module
from joulemark_agent.outbox import HOUSEKEEPING_S, PAUSE_POLL_S, Outbox, Sender
from joulemark_agent.sinks import SinkUnavailable

DAY_S = 86_400.0


class Clock:
    """A clock that moves only when told."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


class Host:
    """A sink with a scripted temper: `answer(run_id)` raises or returns."""

    def __init__(self, answer: Callable[[str], None] = lambda _: None) -> None:
        self.answer = answer
        self.tries: list[str] = []
        self.records: dict[str, bytes] = {}
        self.closed = False

    def put(self, run_id: str, body: bytes) -> None:
        self.tries.append(run_id)
        self.answer(run_id)
        assert self.records.get(run_id, body) == body
        self.records[run_id] = body

    def close(self) -> None:
        self.closed = True


def away(_: str) -> None:
    raise SinkUnavailable("the host cannot be reached: no route")


def never() -> bool:
    return False


def make(path: Path, clock: Clock | None = None, **changes: Any) -> Outbox:
    fields: dict[str, Any] = {
        "max_bytes": 1 << 30,
        "max_age_s": 90 * DAY_S,
        "clock": clock or Clock(),
        "wall": lambda: 1_780_000_000.0,
        "jitter": lambda: 0.0,
        **changes,
    }
    return Outbox(path / "outbox.sqlite", **fields)


def run(sender: Sender, clock: Clock, until_s: float) -> None:
    """Steps the sender, moving the clock by what each step asks for."""
    while clock.now_s < until_s:
        clock.now_s += max(sender.step(), 0.001)


# --- adding -----------------------------------------------------------------------------------------------------------
def test_a_record_waits_until_it_is_delivered(tmp_path: Path) -> None:
    outbox = make(tmp_path)
    assert outbox.due() is None
    outbox.add("run-1", b"one")
    outbox.add("run-2", b"two")
    first = outbox.due()
    assert first is not None
    assert (first.run_id, first.body) == ("run-1", b"one")
    assert (outbox.pending(), outbox.waiting_bytes()) == (2, 6)
    outbox.delivered("run-1")
    second = outbox.due()
    assert second is not None
    assert second.run_id == "run-2"
    assert (outbox.pending(), outbox.waiting_bytes()) == (1, 3)


def test_adding_twice_is_adding_once_also_after_delivery(tmp_path: Path) -> None:
    outbox = make(tmp_path)
    for _ in range(2):
        outbox.add("run-1", b"one")
    assert outbox.pending() == 1
    outbox.delivered("run-1")
    outbox.add("run-1", b"one")
    assert outbox.pending() == 0
    with pytest.raises(Conflict, match="another record"):
        outbox.add("run-1", b"other")
    outbox.add("run-2", b"two")
    assert outbox.pending() == 1


def test_what_was_added_is_there_after_a_restart(tmp_path: Path) -> None:
    make(tmp_path).add("run-1", b"\x00\xff one")
    again = make(tmp_path)
    entry = again.due()
    assert entry is not None
    assert entry.body == b"\x00\xff one"


# --- back-off ---------------------------------------------------------------------------------------------------------
def test_the_delays_double_up_to_an_hour(tmp_path: Path) -> None:
    clock = Clock()
    outbox = make(tmp_path, clock)
    outbox.add("run-1", b"one")
    waits: list[float] = []
    for _ in range(14):
        outbox.failed("run-1")
        waits.append(outbox.wait_s())
        assert outbox.due() is None
        clock.now_s += waits[-1]
        assert outbox.due() is not None
    assert waits == [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 3600, 3600, 3600]
    outbox.delivered("run-1")
    outbox.add("run-2", b"two")
    outbox.failed("run-2")
    assert outbox.wait_s() == 2


@given(jitter=st.floats(0, 1), failures=st.integers(1, 2000))
@settings(max_examples=25, deadline=None)
def test_jitter_takes_at_most_half(tmp_path_factory: pytest.TempPathFactory, jitter: float, failures: int) -> None:
    outbox = make(tmp_path_factory.mktemp("outbox"), jitter=lambda: jitter)
    for _ in range(failures):
        outbox.failed("run-1")
    full = min(3600.0, 2.0**failures) if failures < 64 else 3600.0
    assert outbox.wait_s() == pytest.approx(full * (1 - jitter / 2))


def test_what_the_host_asks_for_is_honoured_within_a_day(tmp_path: Path) -> None:
    outbox = make(tmp_path)
    outbox.failed("run-1", retry_after_s=120)
    assert outbox.wait_s() == 120
    outbox.failed("run-1", retry_after_s=1)  # shorter than our own 4 s
    assert outbox.wait_s() == 4
    outbox.failed("run-1", retry_after_s=1e12)
    assert outbox.wait_s() == DAY_S
    outbox.retry_now()
    assert outbox.wait_s() == 0


def test_a_record_that_the_host_puts_off_lets_the_others_pass(tmp_path: Path) -> None:
    def busy_with_one(run_id: str) -> None:
        if run_id == "run-1":
            raise SinkUnavailable("the host answered 503", answered=True)

    clock, host = Clock(), Host(busy_with_one)
    outbox = make(tmp_path, clock)
    for name in ("run-1", "run-2", "run-3"):
        outbox.add(name, name.encode())
    run(Sender(outbox, host, never), clock, 1100)
    assert host.tries[:3] == ["run-1", "run-2", "run-3"]
    assert set(host.records) == {"run-2", "run-3"}
    assert outbox.pending() == 1
    host.answer = lambda _: None
    run(Sender(outbox, host, never), clock, 10_000)
    assert set(host.records) == {"run-1", "run-2", "run-3"}


# --- a host that is away ----------------------------------------------------------------------------------------------
def test_host_away_for_five_days(tmp_path: Path) -> None:
    clock, host = Clock(), Host(away)
    outbox = make(tmp_path, clock)
    sender = Sender(outbox, host, never)
    for day in range(5):
        outbox.add(f"run-{day}", f"record {day}".encode())
        run(sender, clock, 1000 + (day + 1) * DAY_S)
    assert outbox.pending() == 5
    assert outbox.dropped() == ()
    assert outbox.oldest_age_s() == pytest.approx(5 * DAY_S, abs=3700)
    # eleven tries in the first hour or so, then one an hour
    assert 5 * 24 <= len(host.tries) <= 5 * 24 + 12
    host.answer = lambda _: None
    run(sender, clock, clock.now_s + 3700)
    assert list(host.records) == [f"run-{day}" for day in range(5)]  # in order
    assert host.records["run-3"] == b"record 3"
    assert (outbox.pending(), outbox.oldest_age_s()) == (0, None)


def test_an_acknowledgement_that_got_lost_is_a_second_delivery_of_the_same_bytes(tmp_path: Path) -> None:
    clock, host = Clock(), Host()
    outbox = make(tmp_path, clock)
    outbox.add("run-1", b"one")

    def lost_once(run_id: str) -> None:
        if len(host.tries) == 1:
            host.records[run_id] = b"one"
            raise SinkUnavailable("the connection broke before the answer")

    host.answer = lost_once
    run(Sender(outbox, host, never), clock, 1100)
    assert host.tries == ["run-1", "run-1"]
    assert host.records == {"run-1": b"one"}
    assert outbox.pending() == 0


# --- refused for good -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("error", [BadInput("the host refuses it"), Conflict("the host has another")])
def test_a_refused_record_is_kept_aside_and_the_next_one_goes(tmp_path: Path, error: JoulemarkError) -> None:
    def refuse_one(run_id: str) -> None:
        if run_id == "run-1":
            raise error

    clock, host = Clock(), Host(refuse_one)
    outbox = make(tmp_path, clock)
    outbox.add("run-1", b"one")
    outbox.add("run-2", b"two")
    run(Sender(outbox, host, never), clock, 3000)
    assert host.tries == ["run-1", "run-2"]
    assert outbox.pending() == 0
    (kept,) = outbox.rejected()
    assert (kept.run_id, kept.size_bytes, kept.reason) == ("run-1", 3, error.message)
    assert outbox.waiting_bytes() == 3
    again = make(tmp_path, clock)
    assert [record.run_id for record in again.rejected()] == ["run-1"]
    assert again.retry_rejected() == 1
    entry = again.due()
    assert entry is not None
    assert (entry.run_id, entry.body) == ("run-1", b"one")


# --- bounds -----------------------------------------------------------------------------------------------------------
def test_bounded_by_bytes_the_oldest_goes_and_is_written_down(tmp_path: Path) -> None:
    outbox = make(tmp_path, max_bytes=100)
    for index in range(4):
        outbox.add(f"run-{index}", bytes(30))
    assert outbox.pending() == 3
    (dropped,) = outbox.dropped()
    assert (dropped.run_id, dropped.size_bytes, dropped.wall_s) == ("run-0", 30, 1_780_000_000.0)
    assert dropped.reason == "the outbox held 120 bytes, 100 are allowed"
    assert make(tmp_path, max_bytes=100).dropped() == (dropped,)
    outbox.add("run-0", bytes(30))  # dropped is dropped
    assert outbox.pending() == 3


def test_exactly_at_the_bound_nothing_is_dropped(tmp_path: Path) -> None:
    outbox = make(tmp_path, max_bytes=90)
    for index in range(3):
        outbox.add(f"run-{index}", bytes(30))
    assert (outbox.pending(), outbox.dropped()) == (3, ())


def test_rejected_records_go_before_pending_ones(tmp_path: Path) -> None:
    outbox = make(tmp_path, max_bytes=100)
    for index in range(3):
        outbox.add(f"run-{index}", bytes(30))
    outbox.reject("run-2", "refused")
    outbox.add("run-3", bytes(30))
    (dropped,) = outbox.dropped()
    assert dropped.run_id == "run-2"
    assert dropped.reason.endswith("it had been rejected before")
    assert outbox.pending() == 3


def test_dropped_while_on_its_way(tmp_path: Path) -> None:
    outbox = make(tmp_path, max_bytes=10)
    for name in ("run-1", "run-2", "run-3"):
        outbox.add(name, bytes(10))
    assert [record.run_id for record in outbox.dropped()] == ["run-1", "run-2"]
    outbox.delivered("run-1")  # it arrived after all
    outbox.reject("run-2", "refused")  # and this one did not
    assert [record.run_id for record in outbox.dropped()] == ["run-2"]
    assert outbox.rejected() == ()


def test_delivered_records_take_no_room(tmp_path: Path) -> None:
    outbox = make(tmp_path, max_bytes=100)
    for index in range(10):
        outbox.add(f"run-{index}", bytes(60))
        outbox.delivered(f"run-{index}")
    assert (outbox.pending(), outbox.dropped(), outbox.waiting_bytes()) == (0, (), 0)


def test_bounded_by_age(tmp_path: Path) -> None:
    clock = Clock()
    outbox = make(tmp_path, clock, max_age_s=2 * DAY_S)
    sender = Sender(outbox, Host(away), never)
    outbox.add("run-1", b"one")
    run(sender, clock, 1000 + DAY_S)
    outbox.add("run-2", b"two")
    run(sender, clock, 1000 + 2 * DAY_S - 4000)
    assert outbox.dropped() == ()
    run(sender, clock, 1000 + 2 * DAY_S + 4000)
    (dropped,) = outbox.dropped()
    assert (dropped.run_id, dropped.reason) == ("run-1", "older than 2.0 days")
    assert outbox.pending() == 1


def test_a_sender_without_a_host_still_keeps_the_bounds(tmp_path: Path) -> None:
    clock = Clock()
    outbox = make(tmp_path, clock, max_age_s=DAY_S)
    outbox.add("run-1", b"one")
    run(outbox.sender(None, never), clock, 1000 + DAY_S + 2 * HOUSEKEEPING_S)
    assert [record.run_id for record in outbox.dropped()] == ["run-1"]


def test_age_counts_running_time_over_restarts_and_not_the_wall_clock(tmp_path: Path) -> None:
    wall = {"s": 0.0}  # 1970: no clock battery
    outbox = make(tmp_path, Clock(50.0), max_age_s=10_000, wall=lambda: wall["s"])
    outbox.add("run-1", b"one")
    wall["s"] = 1_780_000_000.0  # the network came
    outbox.keep_bounds()
    assert outbox.pending() == 1

    clock = Clock(50.0)
    outbox = make(tmp_path, clock, max_age_s=10_000)
    clock.now_s += 6000
    outbox.close()
    clock = Clock(7.0)  # after a reboot the monotonic clock begins anew
    outbox = make(tmp_path, clock, max_age_s=10_000)
    assert outbox.oldest_age_s() == pytest.approx(6000)
    clock.now_s += 3999
    outbox.keep_bounds()
    assert outbox.pending() == 1
    clock.now_s += 2 + HOUSEKEEPING_S
    outbox.keep_bounds()
    assert [record.run_id for record in outbox.dropped()] == ["run-1"]


def test_the_memory_of_delivered_runs_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "KEEP_TRACES", 5)
    outbox = make(tmp_path)
    outbox.add("waiting", b"w")
    for index in range(20):
        outbox.add(f"run-{index}", b"x")
        outbox.delivered(f"run-{index}")
    rows = sqlite3.connect(tmp_path / "outbox.sqlite").execute("SELECT run_id FROM entries ORDER BY sequence")
    assert [row[0] for row in rows] == ["waiting", *(f"run-{index}" for index in range(15, 20))]
    assert outbox.pending() == 1


# --- not disturbing ---------------------------------------------------------------------------------------------------
def test_nothing_is_sent_while_a_run_is_measured(tmp_path: Path) -> None:
    clock, host, busy = Clock(), Host(), {"now": True}
    outbox = make(tmp_path, clock)
    sender = Sender(outbox, host, lambda: busy["now"])
    outbox.add("run-1", b"one")
    for _ in range(50):
        assert sender.step() == PAUSE_POLL_S
        clock.now_s += 1000
    assert host.tries == []
    busy["now"] = False
    sender.step()
    assert host.records == {"run-1": b"one"}


def test_settle_waits_for_the_delivery_in_flight(tmp_path: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow(_: str) -> None:
        entered.set()
        leave.wait(10)

    outbox = make(tmp_path)
    sender = Sender(outbox, Host(slow), never)
    assert sender.settle(0.01)
    outbox.add("run-1", b"one")
    sender.start()
    assert entered.wait(10)
    assert not sender.settle(0.05)
    leave.set()
    assert sender.settle(10)
    sender.stop()


def test_the_thread_delivers_what_is_added_and_stops(tmp_path: Path) -> None:
    host = Host()
    outbox = Outbox(tmp_path / "outbox.sqlite", 1 << 20, DAY_S)
    sender = Sender(outbox, host, never)
    sender.start()
    outbox.add("run-1", b"one")
    deadline = time.monotonic() + 10
    while outbox.pending() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert host.records == {"run-1": b"one"}
    sender.stop()
    assert host.closed
    Sender(outbox, host, never).stop()  # one that never began


def test_the_thread_lives_through_a_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    outbox = make(tmp_path)
    outbox.add("run-1", b"one")
    original, calls = Outbox.delivered, list[str]()

    def refuse_once(self: Outbox, run_id: str) -> None:
        calls.append(run_id)
        if len(calls) == 1:
            raise JoulemarkError("the disk is read-only")
        original(self, run_id)

    monkeypatch.setattr(Outbox, "delivered", refuse_once)
    sender = Sender(outbox, host, never)
    sender.start()
    deadline = time.monotonic() + 10
    while not calls and time.monotonic() < deadline:
        time.sleep(0.01)
    while outbox.pending() and time.monotonic() < deadline:
        outbox.changed.set()
        time.sleep(0.01)
    sender.stop()
    assert calls == ["run-1", "run-1"]
    assert host.records == {"run-1": b"one"}


# --- kills and damage -------------------------------------------------------------------------------------------------
def test_kill_minus_nine_between_add_and_delivery(tmp_path: Path) -> None:
    child = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from joulemark_agent.outbox import Outbox
        outbox = Outbox(Path(sys.argv[1]) / "outbox.sqlite", 1 << 30, 1e6)
        outbox.add("run-1", b"one" * 100000)
        outbox.add("run-2", b"two")
        outbox.delivered("run-2")
        outbox.add("run-3", b"three")
        print("added", flush=True)
        time.sleep(60)
        """
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, "-c", child, str(tmp_path)], stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "added\n"
        process.kill()
    clock, host = Clock(), Host()
    outbox = make(tmp_path, clock)
    outbox.add("run-1", b"one" * 100000)  # the agent reports its runs again after a restart
    outbox.add("run-2", b"two")
    run(Sender(outbox, host, never), clock, 1100)
    assert host.tries == ["run-1", "run-3"]
    assert host.records == {"run-1": b"one" * 100000, "run-3": b"three"}
    assert outbox.note() is None


@pytest.mark.parametrize("damage", ["garbage", "cut", "scribbled"])
def test_a_damaged_database_is_moved_aside_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    outbox = make(tmp_path)
    for index in range(50):
        outbox.add(f"run-{index}", bytes(5000))
    outbox.close()
    path = tmp_path / "outbox.sqlite"
    content = path.read_bytes()
    damaged = {
        "garbage": b"this is no database" * 1000,
        "cut": content[: len(content) // 2],
        "scribbled": content[:4096] + b"\xaa" * 8192 + content[12288:],
    }[damage]
    path.write_bytes(damaged)
    again = make(tmp_path)
    note = again.note()
    assert note is not None
    assert "outbox.sqlite.damaged-1" in note
    assert note in caplog.text
    assert (tmp_path / "outbox.sqlite.damaged-1").read_bytes() == damaged
    again.add("run-new", b"new")
    assert again.pending() == 1
    assert make(tmp_path).note() == note


def test_a_second_damage_does_not_overwrite_the_first(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "outbox.sqlite").write_bytes(b"no database %d" % number * 100)
        make(tmp_path).close()
    assert (tmp_path / "outbox.sqlite.damaged-1").read_bytes() == b"no database 1" * 100
    assert (tmp_path / "outbox.sqlite.damaged-2").read_bytes() == b"no database 2" * 100


def test_what_belongs_to_a_damaged_database_goes_with_it(tmp_path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / f"outbox.sqlite{suffix}").write_bytes(f"old{suffix}".encode())
    assert "outbox.sqlite.damaged-1" in database_module._move_aside(tmp_path / "outbox.sqlite", "torn")
    for suffix in ("", "-wal", "-shm"):
        assert (tmp_path / f"outbox.sqlite.damaged-1{suffix}").read_bytes() == f"old{suffix}".encode()
        assert not (tmp_path / f"outbox.sqlite{suffix}").exists()


def test_a_commit_is_on_the_disk_when_it_returns(tmp_path: Path) -> None:
    database = make(tmp_path)._database
    assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert database.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_a_database_that_cannot_even_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("joulemark_agent.database.BUSY_TIMEOUT_S", 0.05)
    holder = sqlite3.connect(tmp_path / "outbox.sqlite", isolation_level=None)
    holder.execute("PRAGMA locking_mode=EXCLUSIVE")
    holder.execute("CREATE TABLE mine (x)")
    with pytest.raises(JoulemarkError, match="database is locked"):
        make(tmp_path)
    holder.close()
    make(tmp_path)
    assert not list(tmp_path.glob("*damaged*"))


def test_a_database_that_another_process_holds_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("joulemark_agent.database.BUSY_TIMEOUT_S", 0.05)
    first = make(tmp_path)
    first.add("run-1", b"one")
    holder = sqlite3.connect(tmp_path / "outbox.sqlite", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    second = make(tmp_path)
    with pytest.raises(JoulemarkError, match="another agent"):
        second.add("run-2", b"two")
    holder.execute("ROLLBACK")
    second.add("run-2", b"two")
    assert second.pending() == 2
    assert not list(tmp_path.glob("*damaged*"))


def test_a_full_disk_is_said_and_nothing_is_half_there(tmp_path: Path) -> None:
    outbox = make(tmp_path)
    outbox.add("run-1", b"one")
    database = outbox._database
    pages = database.execute("PRAGMA page_count").fetchone()[0]
    database.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(JoulemarkError, match="full") as caught:
        outbox.add("run-2", bytes(100_000))
    assert caught.value.code == "no_space"
    assert outbox.pending() == 1
    outbox.delivered("run-1")
    assert outbox.pending() == 0


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(JoulemarkError, match="cannot make the folder"):
        make(tmp_path / "file")
