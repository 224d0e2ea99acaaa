"""The host's book: one-time keys are used once, boards get in by their own key only, copies are noticed, decisions hold, all is noted."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from joulemark.credentials import Credential, EnrolmentKey
from joulemark.errors import (
    BadInput,
    Conflict,
    Forbidden,
    JoulemarkError,
    NotAuthenticated,
    NotFound,
    TooNew,
    Untrusted,
    http_status,
)
from joulemark.signing import SigningKey
from joulemark.wire import SCHEMA
from joulemark_host.registry import KEY_LIFE_S, Caller, Registry
from joulemark_host.sightings import SEEN_EVERY_S
from tests.fixtures.boards_at_host import Board
from tests.fixtures.clocks import Clock

HERE = "ab" * 32


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(database: str, clock: Clock) -> Iterator[Registry]:
    book = Registry(database, HERE, clock)
    yield book
    book.close()


def enrol(registry: Registry, board: Board, approved: bool = True) -> Board:
    key = registry.issue_key("device", "ann", approved)
    _, board.credential, _ = registry.enrol(board.enrolment(key), "192.0.2.5")
    return board


def take_part(registry: Registry, board: Board) -> None:
    registry.begin_session(board.device_id, board.session(), "192.0.2.5")
    registry.admit(board.device_id, board.instance_id, "192.0.2.5")


def whats(registry: Registry) -> list[str]:
    return [event.what for event in registry.events()]


def test_a_board_gets_in_waits_is_approved_and_takes_part(registry: Registry):
    board = enrol(registry, Board(), approved=False)
    assert board.credential is not None
    assert registry.caller(board.credential) == Caller("device", board.device_id)
    assert registry.begin_session(board.device_id, board.session(), "192.0.2.5").admission == "pending"
    with pytest.raises(Forbidden, match="waits for an operator") as raised:
        registry.admit(board.device_id, board.instance_id, "192.0.2.5")
    assert raised.value.code == "pending_approval" and "approve pi5" in raised.value.hint
    assert registry.approve("pi5", "ann").admission == "approved"
    take_part(registry, board)
    assert registry.device("pi5").address == "192.0.2.5"
    assert whats(registry) == ["key issued", "enrolled", "approved"]


def test_a_key_is_good_for_one_board_only_and_its_answer_may_be_asked_for_again(registry: Registry):
    key = registry.issue_key("device", "ann", approved=True)
    first = Board()
    _, lost, _ = registry.enrol(first.enrolment(key), "192.0.2.5")
    _, again, _ = registry.enrol(first.enrolment(key), "192.0.2.5")
    assert registry.caller(lost) is None and registry.caller(again) is not None
    with pytest.raises(NotAuthenticated):
        registry.enrol(Board("thief").enrolment(key), "192.0.2.66")
    assert [device.name for device in registry.devices()] == ["pi5"]
    assert whats(registry)[-1] == "refused"  # a right secret in wrong hands is an alarm


def test_of_two_boards_at_the_same_moment_one_gets_the_key(registry: Registry):
    key = registry.issue_key("device", "ann", approved=True)
    boards, outcomes = [Board(f"b{number}") for number in range(8)], []
    barrier = threading.Barrier(len(boards))

    def try_it(board: Board) -> None:
        barrier.wait()
        try:
            registry.enrol(board.enrolment(key), "192.0.2.5")
        except NotAuthenticated:
            outcomes.append("refused")
        else:
            outcomes.append("in")

    threads = [threading.Thread(target=try_it, args=(board,)) for board in boards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["in"] + ["refused"] * 7
    assert len(registry.devices()) == 1
    registry.close()


def test_a_key_ends_by_the_hosts_clock(registry: Registry, clock: Clock):
    key = registry.issue_key("device", "ann")
    clock.now += KEY_LIFE_S
    with pytest.raises(NotAuthenticated):
        registry.enrol(Board().enrolment(key), "192.0.2.5")
    assert registry.devices() == [] and whats(registry)[-1] == "refused"


def test_wrong_keys_get_one_answer(registry: Registry):
    key, person = registry.issue_key("device", "ann"), registry.issue_key("viewer", "ann")
    answers: set[str] = set()
    for wrong in (EnrolmentKey(key.id, "x" * 43, HERE), EnrolmentKey("0" * 16, key.secret, HERE), person):
        with pytest.raises(NotAuthenticated) as raised:
            registry.enrol(Board().enrolment(wrong), "192.0.2.5")
        answers.add(str(raised.value))
    with pytest.raises(NotAuthenticated) as raised:
        registry.enrol_person(key, "ann")
    assert answers == {str(raised.value)}
    assert registry.devices() == []


def test_an_enrolment_is_believed_only_from_the_key_it_is_about(registry: Registry):
    key = registry.issue_key("device", "ann")
    board, other = Board(), Board()
    for wrong in (
        board.enrolment(key, host_fingerprint="cd" * 32),
        board.enrolment(key, device_id=other.device_id),
        board.enrolment(key, public_key=other.key.public),
        board.enrolment(key).model_copy(update={"facts": other.facts}),
        board.enrolment(key).model_copy(update={"statement": other.enrolment(key).statement}),
    ):
        with pytest.raises(Untrusted):
            registry.enrol(wrong, "192.0.2.5")
    assert registry.devices() == []
    registry.enrol(board.enrolment(key), "192.0.2.5")  # none of these used the key up


def test_an_agent_of_a_newer_version_is_told_which_side_to_update(registry: Registry):
    board = enrol(registry, Board())
    newer = board.session().model_copy(update={"schema_number": SCHEMA + 1})
    with pytest.raises(TooNew, match=f"up to {SCHEMA}") as raised:
        registry.begin_session(board.device_id, newer, "192.0.2.5")
    assert "update joulemark on the host" in raised.value.hint and http_status(raised.value.code) == 426
    take_part(registry, board)


@pytest.mark.parametrize(("wall_s", "ahead"), [(None, None), (0.0, -1_000_000.0), (1_000_010.0, 10.0)])
def test_a_boards_clock_is_shown_and_judges_nothing(registry: Registry, wall_s: float | None, ahead: float | None):
    board = enrol(registry, Board())
    registry.begin_session(board.device_id, board.session().model_copy(update={"wall_s": wall_s}), "192.0.2.5")
    registry.admit(board.device_id, board.instance_id, "192.0.2.5")
    assert registry.device("pi5").clock_ahead_s == ahead


def test_when_boards_were_seen_is_written_for_all_of_them_together(
    registry: Registry, clock: Clock, database: str, monkeypatch: pytest.MonkeyPatch
):
    boards = [enrol(registry, Board(name)) for name in ("one", "two", "three")]
    for board in boards:
        take_part(registry, board)
    writes: list[int] = []
    real = registry._sightings.write
    monkeypatch.setattr(registry._sightings, "write", lambda: (writes.append(1), real()))
    clock.now += SEEN_EVERY_S
    for step in range(3):
        for board in boards:
            clock.now += 0.1
            registry.admit(board.device_id, board.instance_id, f"192.0.2.{step}")
    assert len(writes) == 1
    assert registry.device("one").seen_at is not None and registry.device("one").address == "192.0.2.0"
    clock.now += SEEN_EVERY_S
    registry.admit(boards[0].device_id, boards[0].instance_id, "192.0.2.9")
    assert [registry.device(name).address for name in ("one", "two", "three")] == [
        "192.0.2.9",
        "192.0.2.2",
        "192.0.2.2",
    ]
    registry.admit(boards[1].device_id, boards[1].instance_id, "192.0.2.8")
    registry.close()  # what is not written yet is written at the end
    again = Registry(database, HERE, clock)
    assert again.device("two").address == "192.0.2.8"
    again.close()


def test_a_book_without_the_boards_clocks_is_brought_up_to_date(database: str, clock: Clock):
    """Layout 2 had no clocks."""
    registry = Registry(database, HERE, clock)
    board = enrol(registry, Board())
    with registry._engine.begin() as old:
        old.exec_driver_sql("ALTER TABLE devices DROP COLUMN clock_ahead_s")
        old.exec_driver_sql("UPDATE about SET value = '2' WHERE key = 'layout'")
    registry.close()
    for _ in range(2):
        again = Registry(database, HERE, clock)
        assert again.device("pi5").device_id == board.device_id and again.device("pi5").clock_ahead_s is None
        again.close()


def test_secrets_are_stored_as_digests_only(tmp_path: Path, clock: Clock):
    registry = Registry(f"sqlite:///{tmp_path / 'records.db'}", HERE, clock)
    board = enrol(registry, Board())
    key = registry.issue_key("viewer", "ann")
    credential, _ = registry.enrol_person(key, "ann")
    registry.close()
    with sqlite3.connect(tmp_path / "records.db") as database:
        text = "\n".join(database.iterdump())
    assert board.credential is not None
    for secret in (board.credential.secret, key.secret, credential.secret):
        assert secret not in text


def test_boards_of_the_same_name_get_a_number_and_hostile_names_are_cleaned(registry: Registry):
    for name in ("pi", "pi", "pi", "\x1b[31m../../<b>ü\u202e", ""):
        enrol(registry, Board(name))
    assert [device.name for device in registry.devices()] == ["31m....b", "board", "pi", "pi-2", "pi-3"]


def test_renaming(registry: Registry):
    enrol(registry, Board("one"))
    enrol(registry, Board("two"))
    assert registry.rename("one", "kitchen", "ann").name == "kitchen"
    assert registry.rename("kitchen", "kitchen", "ann").name == "kitchen"
    with pytest.raises(Conflict):
        registry.rename("kitchen", "two", "ann")
    for wrong in ("", "a\nb", "<x>", "x" * 61, " x"):
        with pytest.raises(BadInput):
            registry.rename("kitchen", wrong, "ann")
    with pytest.raises(NotFound):
        registry.rename("one", "x", "ann")


def test_a_revoked_board_is_out_for_good(registry: Registry):
    board = enrol(registry, Board())
    take_part(registry, board)
    assert board.credential is not None
    registry.revoke("pi5", "ann")
    assert registry.caller(board.credential) is None
    with pytest.raises(NotAuthenticated):
        registry.admit(board.device_id, board.instance_id, "192.0.2.5")
    with pytest.raises(Forbidden):
        enrol(registry, board)
    with pytest.raises(Conflict):
        registry.approve("pi5", "ann")


def test_the_same_identity_on_other_hardware_is_refused_and_the_first_board_goes_on(registry: Registry):
    board = enrol(registry, Board())
    take_part(registry, board)
    copy = Board(hardware="22" * 32, key=board.key, credential=board.credential)
    with pytest.raises(Conflict) as raised:
        take_part(registry, copy)
    assert raised.value.code == "cloned" and "copied card" in raised.value.hint
    with pytest.raises(Conflict):  # nor without asking for a session
        registry.admit(copy.device_id, copy.instance_id, "192.0.2.6")
    registry.admit(board.device_id, board.instance_id, "192.0.2.5")
    assert "refused" in whats(registry)


def test_two_agents_that_show_one_identity_are_both_stopped_until_an_operator_decides(registry: Registry):
    board = enrol(registry, Board(hardware=None))
    take_part(registry, board)
    copy = Board(hardware=None, key=board.key, credential=board.credential)
    take_part(registry, copy)  # could be a restart
    with pytest.raises(Conflict) as raised:  # it was none: the first still speaks
        registry.admit(board.device_id, board.instance_id, "192.0.2.5")
    assert raised.value.code == "cloned"
    for either in (board, copy):
        with pytest.raises(Conflict):
            registry.admit(either.device_id, either.instance_id, "192.0.2.5")
        with pytest.raises(Conflict):
            registry.begin_session(either.device_id, either.session(), "192.0.2.5")
    assert registry.device("pi5").admission == "cloned" and "two agents" in str(registry.device("pi5").problem)
    registry.approve("pi5", "ann")
    take_part(registry, copy)
    assert registry.device("pi5").problem is None


def test_a_copy_that_asks_for_its_old_session_again_is_noticed_too(registry: Registry):
    board = enrol(registry, Board(hardware=None))
    take_part(registry, board)
    take_part(registry, Board(hardware=None, key=board.key, credential=board.credential))
    with pytest.raises(Conflict, match="two agents"):
        registry.begin_session(board.device_id, board.session(), "192.0.2.5")


def test_restarts_and_repeated_sessions_are_no_copies(registry: Registry):
    board = enrol(registry, Board(hardware=None))
    for number in range(20):
        board.instance_id = f"i-{number}"
        take_part(registry, board)
        take_part(registry, board)
    assert registry.device("pi5").admission == "approved"


def test_a_new_key_for_a_board_that_was_stopped_is_the_operators_word(registry: Registry):
    board = enrol(registry, Board(hardware=None), approved=False)
    enrol(registry, board, approved=True)
    assert registry.device("pi5").admission == "approved"
    take_part(registry, board)
    take_part(registry, Board(hardware=None, key=board.key))
    with pytest.raises(Conflict):
        registry.admit(board.device_id, board.instance_id, "192.0.2.5")
    enrol(registry, board, approved=True)
    take_part(registry, board)


def test_hardware_that_was_unknown_at_enrolment_is_learnt(registry: Registry):
    board = enrol(registry, Board(hardware=None))
    board.hardware = "33" * 32
    take_part(registry, board)
    with pytest.raises(Conflict):
        take_part(registry, Board(hardware="44" * 32, key=board.key))


def test_people(registry: Registry):
    key = registry.issue_key("operator", "ann")
    credential, role = registry.enrol_person(key, "bob")
    assert role == "operator" and registry.caller(credential) == Caller("operator", "bob")
    with pytest.raises(NotAuthenticated):
        registry.enrol_person(key, "bob")
    with pytest.raises(Conflict):  # nobody takes the name, and with it the credential, of another
        registry.enrol_person(registry.issue_key("viewer", "ann"), "bob")
    assert registry.caller(credential) is not None
    assert [(person.name, person.role) for person in registry.people()] == [("bob", "operator")]
    registry.revoke_person("bob", "ann")
    assert registry.caller(credential) is None and registry.people() == []
    with pytest.raises(NotFound):
        registry.revoke_person("bob", "ann")
    credential, _ = registry.enrol_person(registry.issue_key("viewer", "ann"), "bob")
    forged = Credential(credential.id, "x" * 43)
    assert registry.caller(forged) is None and registry.caller(Credential("0" * 16, credential.secret)) is None


def test_an_unknown_board_is_told_nothing(registry: Registry):
    stranger = Board(key=SigningKey(bytes(32)))
    for attempt in (
        lambda: registry.admit(stranger.device_id, "i-1", "192.0.2.5"),
        lambda: registry.begin_session(stranger.device_id, stranger.session(), "192.0.2.5"),
    ):
        with pytest.raises(JoulemarkError) as raised:
            attempt()
        assert raised.value.code == "not_authenticated"
