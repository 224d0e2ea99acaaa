"""Records are stored once, whole and durably; conflicts are refused and kept aside; bounds hold."""

from __future__ import annotations

import gzip
import hashlib
import random
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from joulemark.errors import BadInput, Conflict, NotFound, Unavailable
from joulemark.metrics import METRICS
from joulemark.wire import Absent, Measure, Summary
from joulemark_host import records as module
from joulemark_host.compare import latest_runs, names_of_devices
from joulemark_host.facts import facts_of
from joulemark_host.records import QUARANTINE_PER_RUN, Origin, Records, TooLarge, parse_record
from tests.fixtures.grids import PI, SMOL_Q8
from tests.fixtures.records import make_record, make_summary, record_bytes


@pytest.fixture
def records(database: str) -> Iterator[Records]:
    store = Records(database, clock=lambda: 1234.5)
    yield store
    store.close()


def test_a_record_is_kept_byte_for_byte_and_stored_once(records: Records):
    body = b"  " + record_bytes(make_record()) + b"\n"
    assert records.put(body) == "created"
    assert records.put(body) == "unchanged"
    assert records.put(body, "run-1") == "unchanged"
    assert records.raw("run-1") == body
    with sa.create_engine(records._engine.url).connect() as asked:  # pyright: ignore[reportPrivateUsage]
        row = asked.exec_driver_sql(
            "select sha256, received_at, body from records join bodies using (run_id)"
        ).fetchall()
    assert len(row) == 1
    assert row[0][:2] == (hashlib.sha256(body).hexdigest(), 1234.5)
    assert gzip.decompress(row[0][2]) == body


def test_facts_come_back_as_they_were_derived(records: Records):
    first = make_record("run-1", figures={"accuracy": Absent(reason="no items")})
    second = make_record("run-2", task="gsm8k_cot", status="failed")
    for record in (first, second):
        records.put(record_bytes(record))
    stored = records.facts()
    assert [run.sequence for run in stored] == [1, 2]
    for run, record in zip(stored, (first, second), strict=True):
        expected = facts_of(record)
        for name in vars(expected):
            if name not in ("sequence", "received_at"):
                assert getattr(run, name) == getattr(expected, name), name
        assert run.received_at == 1234.5
    assert stored[0].metrics["decode_rate"] == Measure(
        value=50.0, unit="tok/s", n=20, low=45.0, high=50.0 * 1.1, source="fixture"
    )
    assert set(stored[0].metrics) == set(METRICS)
    assert [run.run_id for run in records.facts("gsm8k_cot")] == ["run-2"]
    assert set(records.facts("arc_challenge", ["accuracy"])[0].metrics) == {"accuracy"}
    assert records.tasks() == ["arc_challenge", "gsm8k_cot"]


def test_a_grid_is_given_the_run_that_speaks_for_each_cell_and_all_names(records: Records):
    chance = random.Random(7)
    boards = [PI, PI.model_copy(update={"device_id": "dev-2", "name": "two"}), None]
    manifests = [SMOL_Q8, SMOL_Q8.model_copy(update={"name": "other"})]
    for number in range(60):
        device, manifest = chance.choice(boards), chance.choice(manifests)
        task = chance.choice(("arc_challenge", "gsm8k_cot"))
        status = chance.choice(("done", "failed", "cancelled", "interrupted"))
        records.put(
            record_bytes(make_record(f"run-{number}", task=task, status=status, device=device, manifest=manifest))
        )
    everything = records.facts()
    for task in ("arc_challenge", "gsm8k_cot"):
        expected = sorted(latest_runs(everything, task).values(), key=lambda run: run.sequence)
        found = records.cells(task, "accuracy")
        assert [run.run_id for run in found] == [run.run_id for run in expected] and len(found) == 6
        assert all(set(run.metrics) <= {"accuracy"} for run in found)
    assert records.cells("nothing", "accuracy") == []
    devices, models = records.names()
    assert devices == names_of_devices(everything)
    assert models == {run.artifact_id: (run.model, run.quantization) for run in everything}


def test_a_database_of_an_older_layout_is_brought_up_to_date_and_loses_nothing(database: str):
    """Layout 1 had the bodies among the columns of the records."""
    store = Records(database)
    record = make_record()
    body, board = record_bytes(record), record.device.device_id
    store.put(body, "run-1", Origin(board, b"by the board"))
    with store._engine.begin() as old:  # pyright: ignore[reportPrivateUsage]
        kind = "BLOB" if old.dialect.name == "sqlite" else "BYTEA"
        for column in ("body", "signature"):
            old.exec_driver_sql(f"ALTER TABLE records ADD COLUMN {column} {kind}")
            old.exec_driver_sql(f"UPDATE records SET {column} = (SELECT {column} FROM bodies)")
        old.exec_driver_sql("DROP TABLE bodies")
        old.exec_driver_sql("DROP INDEX records_cells")
        old.exec_driver_sql("CREATE INDEX ix_records_task ON records (task)")
        old.exec_driver_sql("UPDATE about SET value = '1' WHERE key = 'layout'")
    store.close()
    for _ in range(2):
        again = Records(database)
        assert again.raw("run-1") == body and again.signature("run-1") == b"by the board"
        assert [run.run_id for run in again.cells("arc_challenge", "accuracy")] == ["run-1"]
        inspected = sa.inspect(again._engine)  # pyright: ignore[reportPrivateUsage]
        assert "body" not in {column["name"] for column in inspected.get_columns("records")}
        assert {"records_cells"} <= {index["name"] for index in inspected.get_indexes("records")}
        again.close()


def test_another_body_under_the_same_run_id_is_refused_and_kept_aside(records: Records):
    first, second = (record_bytes(make_record(correct=n)) for n in (8, 9))
    records.put(first)
    for _ in range(2):
        with pytest.raises(Conflict, match="run-1"):
            records.put(second)
    assert records.raw("run-1") == first
    (aside,) = records.quarantined()
    assert (aside.run_id, aside.sha256, aside.size_bytes) == ("run-1", hashlib.sha256(second).hexdigest(), len(second))


def test_the_quarantine_is_bounded_for_each_run(records: Records):
    records.put(record_bytes(make_record()))
    hints: list[str] = []
    for number in range(QUARANTINE_PER_RUN + 3):
        with pytest.raises(Conflict) as caught:
            records.put(record_bytes(make_record(attempts=number + 2)))
        hints.append(caught.value.hint)
    assert ["was not kept" in hint for hint in hints] == [False] * QUARANTINE_PER_RUN + [True] * 3
    assert len(records.quarantined()) == QUARANTINE_PER_RUN


def test_many_writers_of_one_run_store_it_once(database: str):
    body, other = record_bytes(make_record()), record_bytes(make_record(attempts=2))
    stores = [Records(database) for _ in range(4)]
    said: list[str] = []
    barrier = threading.Barrier(8)

    def send(store: Records, sent: bytes) -> None:
        barrier.wait()
        try:
            said.append(store.put(sent))
        except Conflict:
            said.append("conflict")

    threads = [threading.Thread(target=send, args=(stores[i % 4], body if i < 4 else other)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(said) == ["conflict"] * 4 + ["created"] + ["unchanged"] * 3
    assert len(stores[0].facts()) == 1
    assert len(stores[0].quarantined()) == 1
    for store in stores:
        store.close()


def test_a_kill_in_the_middle_of_storing_leaves_nothing_behind(database: str, monkeypatch: pytest.MonkeyPatch):
    store = Records(database)

    class Killed(BaseException):
        pass

    def killed(_facts: object) -> object:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "_metric_rows", killed)  # after the record's row was written, before the commit
        with pytest.raises(Killed):
            store.put(record_bytes(make_record()))
    again = Records(database)
    assert again.facts() == []
    assert again.put(record_bytes(make_record())) == "created"
    assert len(again.facts()[0].metrics) == len(METRICS)


def test_sqlite_commits_are_durable(tmp_path: Path):
    records = Records(f"sqlite:///{tmp_path / 'records.db'}")
    with records._engine.connect() as connection:  # pyright: ignore[reportPrivateUsage]
        assert connection.exec_driver_sql("pragma synchronous").scalar() == 2
        assert connection.exec_driver_sql("pragma journal_mode").scalar() == "wal"


GOOD = record_bytes(make_record())
BAD_BODIES = {
    "empty": b"",
    "not JSON": b"<xml/>",
    "truncated": GOOD[: len(GOOD) // 2],
    "not UTF-8": GOOD.replace(b"lab workstation", b"lab \xff\xfe"),
    "NaN in a field": GOOD.replace(b'"attempts":1', b'"attempts":NaN'),
    "NaN in an ignored field": GOOD.replace(b'"attempts":1', b'"attempts":1,"more":NaN'),
    "infinity": GOOD.replace(b'"cooldown_s":1.0', b'"cooldown_s":1e999'),
    "deep": b"[" * 1_000_000,
    "deep in an ignored field": GOOD.replace(b'"attempts":1', b'"more":' + b"[" * 50_000 + b"]" * 50_000),
    "a list": b"[]",
    "wrong type": GOOD.replace(b'"attempts":1', b'"attempts":"1"'),
    "path as run id": GOOD.replace(b'"run_id":"run-1"', b'"run_id":"../../etc"'),
    "unknown status": GOOD.replace(b'"status":"done"', b'"status":"great"'),
    "huge number": GOOD.replace(b'"weight_bytes":96000000', b'"weight_bytes":9' + b"9" * 30),
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_what_is_not_a_record_is_refused_in_words_and_not_stored(records: Records, body: bytes):
    assert body != GOOD
    with pytest.raises(BadInput) as caught:
        records.put(body)
    assert caught.value.hint
    assert records.facts() == []


def test_bounds_newer_schema_and_wrong_address(records: Records):
    with pytest.raises(TooLarge, match="takes 100"):
        parse_record(GOOD, 100)
    newer = GOOD.replace(b'{"schema_number":1', b'{"schema_number":99', 1).replace(
        b'"status":"done"', b'"status":"new"'
    )
    with pytest.raises(BadInput, match="schema 99") as caught:
        records.put(newer)
    assert "update" in caught.value.hint
    with pytest.raises(BadInput, match="sent under 'run-2'"):
        records.put(GOOD, "run-2")
    with pytest.raises(NotFound):
        records.raw("run-1")


def test_columns_are_derived_again_when_the_derivation_changes(database: str, monkeypatch: pytest.MonkeyPatch):
    store = Records(database)
    store.put(GOOD)
    store.close()
    monkeypatch.setattr(module, "FACTS_VERSION", module.FACTS_VERSION + 1)
    monkeypatch.setattr(module, "facts_of", lambda record: facts_of(make_record(summary=Summary(metrics={}))))  # type: ignore[misc]
    again = Records(database)
    assert again.facts()[0].metrics == {}
    assert again.raw("run-1") == GOOD


def test_figures_of_a_newer_agent_stay_in_the_raw_record_only(records: Records):
    summary = make_summary()
    strange = summary.model_copy(update={"metrics": {**summary.metrics, "warp\x00factor": Absent(reason="x")}})
    records.put(record_bytes(make_record(summary=strange)))
    assert set(records.facts()[0].metrics) == set(METRICS)
    assert b"warp" in records.raw("run-1")


def test_a_database_that_cannot_be_used_is_said_so(tmp_path: Path):
    (tmp_path / "other.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(BadInput, match="not a record database"):
        Records(f"sqlite:///{tmp_path / 'other.db'}")
    with pytest.raises(Unavailable, match="cannot be opened"):
        Records(f"sqlite:///{tmp_path / 'no' / 'such' / 'folder.db'}")
    with pytest.raises(BadInput, match="database URL"):
        Records("what is this")
    newer = Records(f"sqlite:///{tmp_path / 'newer.db'}")
    newer.close()
    with sqlite3.connect(tmp_path / "newer.db") as connection:
        connection.execute("update about set value = '99'")
    connection.close()
    with pytest.raises(BadInput, match="layout 99"):
        Records(f"sqlite:///{tmp_path / 'newer.db'}")


def test_a_signature_that_comes_after_its_record_is_kept_and_the_first_one_stays(records: Records):
    record = make_record()
    body, board = record_bytes(record), record.device.device_id
    assert records.put(body) == "created" and records.signature("run-1") is None
    assert records.put(body, "run-1", Origin(board, b"by the board")) == "unchanged"
    assert records.signature("run-1") == b"by the board"
    records.put(body, "run-1", Origin(board, b"another"))
    records.put(body)
    assert records.signature("run-1") == b"by the board"
    with pytest.raises(NotFound):
        records.signature("run-2")
