"""A host whose records are in PostgreSQL and whose artifacts are in object storage, real ones; the database goes away and comes back."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from joulemark.errors import JoulemarkError, Unavailable
from joulemark.wire import RunSpec, content_id
from joulemark_host.records import Records
from tests.fixtures.agent_process import AgentProcess
from tests.fixtures.fleet import enrolled, make_subject
from tests.fixtures.host_process import HostProcess, wait_until
from tests.fixtures.object_storage import ObjectServer
from tests.fixtures.postgresql import PostgresServer
from tests.fixtures.records import make_items, make_record, record_bytes


@pytest.fixture
def host(
    tmp_path: Path, postgres_server: PostgresServer, object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HostProcess]:
    bucket = object_server.new_bucket(monkeypatch)
    running = HostProcess(tmp_path / "host", database=postgres_server.new_database(), shelf=bucket)
    yield running
    running.close()


@pytest.fixture
def board(host: HostProcess, tmp_path: Path) -> Iterator[AgentProcess]:
    agent = enrolled(host, tmp_path / "board", JOULEMARK_FAKE_FAULT="slow:0.2")
    yield agent
    agent.stop()


def run_of(board: AgentProcess) -> dict[str, Any]:
    return board.client.get("/api/runs/r1").json()


def test_a_run_goes_on_while_the_hosts_database_is_away_and_its_record_arrives_once(
    host: HostProcess, board: AgentProcess, tmp_path: Path, postgres_server: PostgresServer
):
    subject = make_subject(host, tmp_path)
    fields = {"backend": "fake", "idle_s": 0.5, "cooldown_s": 0.0, "artifact_id": subject.artifact_id}
    spec = RunSpec.model_validate({"run_id": "r1", "pack_id": subject.packs["arc_challenge"], **fields})
    host.dispatch.queue(host.registry.device("board").device_id, spec, subject.manifest)
    wait_until(lambda: run_of(board).get("items_done", 0) > 0, 60)
    postgres_server.stop()
    try:
        answer = host.client.get("/api/runs")
        assert answer.status_code == 503 and answer.json()["code"] == "unavailable" and answer.json()["hint"]
        wait_until(lambda: run_of(board)["status"] == "done", 60)
    finally:
        postgres_server.start()
    wait_until(lambda: len(host.records.facts()) == 1, 60)
    wait_until(lambda: host.dispatch.runs(run_ids=["r1"])[0].status == "done", 60)
    record = host.records.raw("r1")
    assert record == board.client.get("/api/runs/r1/record").content
    assert host.records.signature("r1") is not None and host.records.quarantined() == []
    assert [path for path in (host.data / "shelf").rglob("*") if path.is_file()] == []  # nothing lies on this machine
    assert content_id(host.shelf.manifest(subject.artifact_id)) == subject.artifact_id
    assert "Traceback" not in host.log_text()


def test_a_record_is_not_taken_by_a_database_that_is_away_and_taken_once_it_is_back(postgres_server: PostgresServer):
    records = Records(postgres_server.new_database())
    body = record_bytes(make_record())
    postgres_server.stop()
    try:
        with pytest.raises(Unavailable) as raised:
            records.put(body)
        assert raised.value.hint
    finally:
        postgres_server.start()
    assert records.put(body) == "created" and records.put(body) == "unchanged"
    records.close()


def test_a_writer_that_holds_the_database_too_long_is_not_waited_for_for_ever(
    database: str, monkeypatch: pytest.MonkeyPatch
):
    from joulemark_host import database as module

    monkeypatch.setattr(module, "PATIENCE_S", 1)
    first, second = module.open_database(database), module.open_database(database)
    with module.transaction(first, write=True) as connection:
        connection.execute(sa.text("select 1"))
        with pytest.raises(Unavailable, match="does not answer"), module.transaction(second, write=True):
            sys.exit("two writers at once")
    with module.transaction(second, write=True) as connection:
        assert connection.execute(sa.text("select 1")).scalar() == 1
    first.dispose()
    second.dispose()


def test_no_password_is_shown(capsys: pytest.CaptureFixture[str]):
    for url in (
        "postgresql://ann:secret@127.0.0.1:9/x",
        "what://ann:secret@127.0.0.1:9/x",
        "postgresql://ann:secret@:x:/",
    ):
        with pytest.raises(Exception, match="ann") as raised:
            Records(url)
        assert "secret" not in str(raised.value) + str(getattr(raised.value, "hint", ""))


@pytest.mark.parametrize("whole", [True, False], ids=["a page of garbage", "one byte of a page"])
def test_a_damaged_record_database_is_said_in_words_and_gives_no_wrong_record(tmp_path: Path, whole: bool):
    """Whatever page of the file the disk has forgotten: an error of ours or the right bytes, and never another body."""
    bodies = {
        f"run-{n}": record_bytes(make_record(f"run-{n}", items=make_items("arc_challenge", 60))) for n in range(4)
    }
    path, chance = tmp_path / "records.db", random.Random(3)
    records = Records(f"sqlite:///{path}")
    for run_id, body in bodies.items():
        records.put(body, run_id)
    records.close()
    sound, said = path.read_bytes(), set[str]()
    for start in range(0, len(sound), 4096):
        damaged = bytearray(sound)
        if whole:
            damaged[start : start + 4096] = chance.randbytes(4096)
        else:
            damaged[start + chance.randrange(4096)] ^= 0xFF
        copy = tmp_path / f"damaged-{start}.db"
        copy.write_bytes(damaged)
        said |= said_of(copy, bodies)
        copy.unlink()
    assert len(sound) > 20 * 4096 and said & {"bad_input", "unavailable"} and "digest_mismatch" in said


def said_of(path: Path, bodies: dict[str, bytes]) -> set[str]:
    """Everything that is asked of a record database is answered rightly or with an error of ours: the errors' codes."""
    said: set[str] = set()
    try:
        records = Records(f"sqlite:///{path}")
    except JoulemarkError as error:
        assert error.hint
        return {error.code}

    def ask(what: Callable[[], object]) -> None:
        try:
            what()
        except JoulemarkError as error:
            assert error.message and error.hint
            said.add(error.code)

    def compare(run_id: str, body: bytes) -> None:
        assert records.raw(run_id) == body

    for run_id, body in bodies.items():
        ask(partial(compare, run_id, body))
        ask(partial(records.put, body, run_id))
    for what in (records.facts, records.names, records.tasks, lambda: records.cells("arc_challenge", "accuracy")):
        ask(what)
    ask(lambda: records.put(record_bytes(make_record("new"))))
    records.close()
    return said
