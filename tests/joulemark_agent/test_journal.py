"""The journal: committed means kept, the same item is never doubled, a damaged file is put aside."""

from __future__ import annotations

from pathlib import Path

import pytest

from joulemark.errors import Conflict, NotFound
from joulemark.wire import Clock, ItemRecord, Phase, Problem
from joulemark_agent.journal import Journal
from tests.fixtures.records import digest
from tests.fixtures.small_world import make_files, make_spec

CLOCK = Clock(monotonic_s=1.0, wall_s=2.0, boot_id="boot")


def item(doc_id: int, end_s: float = 1.0) -> ItemRecord:
    return ItemRecord(doc_id=doc_id, prompt_sha256=digest(str(doc_id)), end_s=end_s)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.sqlite")


def test_what_was_committed_is_there_after_reopening(journal: Journal, tmp_path: Path) -> None:
    spec = make_spec(make_files(tmp_path))
    journal.add_run(spec, 20)
    attempt = journal.begin_attempt(spec.run_id, CLOCK)
    journal.start_phase(spec.run_id, attempt, "accuracy", 5.0)
    journal.add_item(spec.run_id, attempt, item(3))
    # No close: as after a kill.
    other = Journal(tmp_path / "journal.sqlite")
    assert other.done(spec.run_id) == (3,)
    assert other.runs() == (spec,)
    found = other.attempts(spec.run_id)[0]
    assert found.open_phase == ("accuracy", 5.0) and found.clock == CLOCK
    assert other.state(spec.run_id).items_done == 1


def test_an_item_is_kept_as_it_was_first_recorded(journal: Journal, tmp_path: Path) -> None:
    spec = make_spec(make_files(tmp_path))
    journal.add_run(spec, 20)
    first = journal.begin_attempt(spec.run_id, CLOCK)
    second = journal.begin_attempt(spec.run_id, CLOCK)
    journal.add_item(spec.run_id, first, item(1, 10.0))
    journal.add_item(spec.run_id, second, item(1, 20.0))
    assert journal.items(spec.run_id) == ((first, item(1, 10.0)),)
    assert journal.item_count(spec.run_id, second) == 0


def test_a_run_id_means_one_spec(journal: Journal, tmp_path: Path) -> None:
    files = make_files(tmp_path)
    assert journal.add_run(make_spec(files), 20) is True
    assert journal.add_run(make_spec(files), 20) is False
    with pytest.raises(Conflict, match="another spec"):
        journal.add_run(make_spec(files, limit=5), 5)
    with pytest.raises(NotFound):
        journal.state("none")
    with pytest.raises(NotFound, match="no record"):
        journal.record("run-1")


def test_phases_problems_and_records(journal: Journal, tmp_path: Path) -> None:
    spec = make_spec(make_files(tmp_path))
    journal.add_run(spec, 20)
    attempt = journal.begin_attempt(spec.run_id, CLOCK)
    journal.start_phase(spec.run_id, attempt, "idle", 1.0)
    journal.end_phase(spec.run_id, attempt, Phase(name="idle", start_s=1.0, end_s=4.0))
    problem = Problem(code="worker_crashed", message="gone")
    journal.end_attempt(spec.run_id, attempt, problem, None)
    found = journal.attempts(spec.run_id)[0]
    assert found.phases == (Phase(name="idle", start_s=1.0, end_s=4.0),)
    assert found.problem == problem and found.open_phase is None
    journal.set_record(spec.run_id, "failed", problem, b"{}")
    assert journal.record(spec.run_id) == b"{}" and journal.state(spec.run_id).status == "failed"
    assert journal.runs("running", "queued") == ()


def test_a_damaged_journal_is_put_aside_with_a_note(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"this is no database, and it is long enough to be taken for one" * 100)
    journal = Journal(path)
    assert journal.note is not None and "moved" in journal.note
    assert journal.runs() == ()
    assert len(list(tmp_path.glob("journal.sqlite.damaged-*"))) >= 1
