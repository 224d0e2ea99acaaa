"""What a board accepts: rising numbers, the same order again, nothing old, nothing late by the host's clock; also after a crash."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from joulemark.errors import Untrusted
from joulemark.statements import FetchOrder, Order, RunOrder
from joulemark.wire import RunSpec
from joulemark_agent.ledger import KEEP, Ledger
from tests.fixtures.clocks import Clock
from tests.fixtures.grids import SMOL_Q8

YEAR = 365 * 86_400.0


@pytest.fixture
def clock() -> Clock:
    return Clock(100.0)


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "ledger.sqlite", clock)
    yield opened
    opened.close()


def run(sequence: int, run_id: str = "r", **changes: float) -> RunOrder:
    spec = RunSpec(run_id=run_id, artifact_id="a" * 64, pack_id="b" * 64)
    times = {"issued_at": 0.0, "expires_at": 100 * YEAR, **changes}
    return RunOrder(device_id="dev-1", sequence=sequence, spec=spec, **times)


def fetch(sequence: int, release: int, name: str = "m", downgrade: bool = False) -> FetchOrder:
    manifest = SMOL_Q8.model_copy(update={"name": name})
    return FetchOrder(
        device_id="dev-1", sequence=sequence, issued_at=0.0, expires_at=100 * YEAR, manifest=manifest, release=release,
        downgrade=downgrade,
    )  # fmt: skip


def refused(ledger: Ledger, order: Order, why: str) -> None:
    with pytest.raises(Untrusted, match=why):
        ledger.accept(order)


def test_numbers_rise_and_the_very_same_order_may_come_again(ledger: Ledger):
    ledger.accept(run(1))
    ledger.accept(run(5))
    ledger.accept(run(5))
    ledger.accept(run(1))
    refused(ledger, run(5, "another"), "replay")
    refused(ledger, run(4), "replay")
    refused(ledger, fetch(5, 1), "replay")
    assert ledger.accepted() == 5
    ledger.accept(run(6))
    assert ledger.accepted() == 6


def test_it_holds_after_a_crash(tmp_path: Path, ledger: Ledger, clock: Clock):
    ledger.accept(run(7))
    ledger.accept(fetch(8, 3))
    ledger.hear_time(50 * YEAR)
    again = Ledger(tmp_path / "ledger.sqlite", clock)  # the first was never closed
    refused(again, run(6), "replay")
    again.accept(run(7))
    refused(again, fetch(9, 2), "older than 3")
    refused(again, run(10, expires_at=49 * YEAR), "expired")
    assert again.accepted() == 8
    again.close()


def test_late_is_judged_by_the_hosts_clock_and_not_by_the_boards(ledger: Ledger, clock: Clock):
    ledger.accept(run(1, expires_at=1.0))  # nobody has told the time yet: only numbers count
    ledger.hear_time(1000.0)
    refused(ledger, run(2, expires_at=1000.0), "expired")
    ledger.accept(run(2, expires_at=1001.0))
    clock.now += 500
    assert ledger.host_time() == 1500.0
    refused(ledger, run(3, expires_at=1500.0), "expired")


def test_a_hosts_clock_may_be_set_right_but_not_back_before_what_was_written(ledger: Ledger):
    ledger.hear_time(10 * YEAR)
    ledger.hear_time(10 * YEAR + 500)
    ledger.hear_time(10 * YEAR + 100)
    assert ledger.host_time() == 10 * YEAR + 100
    ledger.hear_time(5 * YEAR)
    assert ledger.host_time() == 10 * YEAR


def test_releases_do_not_go_back_unless_told(ledger: Ledger):
    ledger.accept(fetch(1, 4))
    refused(ledger, fetch(2, 3), "older than 4")
    ledger.accept(fetch(3, 1, name="another"))
    ledger.accept(fetch(4, 2, downgrade=True))
    ledger.accept(fetch(5, 3))
    assert ledger.accepted() == 5


def test_it_stays_small(ledger: Ledger):
    for sequence in range(1, 30):
        ledger.accept(run(sequence * KEEP))
    refused(ledger, run(KEEP), "replay")
    with sqlite3.connect(ledger._path) as database:
        assert database.execute("SELECT count(*) FROM accepted").fetchone() == (1,)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=30))
def test_whatever_comes_no_number_is_used_twice_and_none_is_older(sequences: list[int]):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "l.sqlite", Clock(100.0))
        accepted: list[int] = []
        for count, sequence in enumerate(sequences):
            try:
                ledger.accept(run(sequence, f"r{count}"))
            except Untrusted:
                assert accepted and sequence <= max(accepted)
            else:
                assert not accepted or sequence > max(accepted)
                accepted.append(sequence)
        ledger.close()
