"""The queue: one run at a time, leases that are renewed and returned, states that all end; boards speak for themselves only."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from joulemark.errors import BadInput, Conflict, Forbidden, NotFound
from joulemark.protocol import Holding, Refusal, Report
from joulemark.signing import SigningKey, opened
from joulemark.statements import FetchOrder, RunOrder
from joulemark.wire import Problem, RunSpec, RunState, content_id
from joulemark_host import sweep
from joulemark_host.dispatch import LEASE_S, Dispatch
from joulemark_host.evaluation import Subject
from joulemark_host.holdings import PENDING_TIMEOUT_S
from joulemark_host.issuing import ORDER_LIFE_S
from joulemark_host.records import Records
from joulemark_host.registry import Registry
from tests.fixtures.boards_at_host import Board
from tests.fixtures.clocks import Clock
from tests.fixtures.grids import SMOL_Q8
from tests.fixtures.records import make_record, record_bytes

KEY = SigningKey(bytes(range(32)))
ARTIFACT = content_id(SMOL_Q8)
SIZE = sum(entry.size_bytes for entry in SMOL_Q8.files)
PACK = "b" * 64


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def boards(database: str, clock: Clock) -> Iterator[list[str]]:
    registry = Registry(database, "ab" * 32, clock)
    ids: list[str] = []
    for name in ("one", "two"):
        board = Board(name)
        registry.enrol(board.enrolment(registry.issue_key("device", "test", approved=True)), "192.0.2.5")
        ids.append(board.device_id)
    registry.enrol(Board("new").enrolment(registry.issue_key("device", "test")), "192.0.2.5")
    yield ids
    registry.close()


@pytest.fixture
def dispatch(database: str, clock: Clock, boards: list[str]) -> Iterator[Dispatch]:
    made = Dispatch(database, KEY, clock)
    yield made
    made.close()


def spec(run_id: str, **changes: object) -> RunSpec:
    return RunSpec.model_validate({"run_id": run_id, "artifact_id": ARTIFACT, "pack_id": PACK, **changes})


def says(run_id: str, status: str, done: int = 0) -> Report:
    return Report(runs=(RunState.model_validate({"run_id": run_id, "status": status, "items_done": done}),))


def held(dispatch: Dispatch, device_id: str) -> str | None:
    envelope = dispatch.orders(device_id).run
    return opened(envelope, RunOrder, [KEY.public]).spec.run_id if envelope is not None else None


def states(dispatch: Dispatch) -> dict[str, str]:
    return {run.run_id: run.status for run in dispatch.runs()}


def test_one_run_at_a_time_for_each_board(dispatch: Dispatch, boards: list[str]):
    one, two = boards
    for run_id, device_id in (("a", one), ("b", one), ("c", two)):
        dispatch.queue(device_id, spec(run_id), SMOL_Q8)
    assert (held(dispatch, one), held(dispatch, one), held(dispatch, two)) == ("a", "a", "c")
    first = dispatch.orders(one).run
    assert first == dispatch.orders(one).run  # the very same order, not another number
    dispatch.report(one, says("a", "done", 7))
    assert held(dispatch, one) == "b"
    assert states(dispatch) == {"a": "done", "b": "leased", "c": "leased"}


def test_the_revision_rises_with_every_news(dispatch: Dispatch, boards: list[str]):
    one, two = boards
    seen = [dispatch.revision(one)]
    for change in (
        lambda: dispatch.push(one, SMOL_Q8),
        lambda: dispatch.queue(one, spec("a"), SMOL_Q8),
        lambda: dispatch.report(one, says("a", "done")),
        lambda: dispatch.forget(ARTIFACT, one),
    ):
        change()
        seen.append(dispatch.revision(one))
    assert seen == sorted(set(seen)) and dispatch.revision(two) == 0
    assert dispatch.revisions() | {one: seen[-1], two: 0} == dispatch.revisions()
    quiet = dispatch.revision(one)
    dispatch.report(one, Report())
    assert dispatch.revision(one) == quiet


def test_a_push_is_ordered_once_and_followed(dispatch: Dispatch, boards: list[str]):
    one = boards[0]
    assert dispatch.push(one, SMOL_Q8) and not dispatch.push(one, SMOL_Q8)
    (envelope,) = dispatch.orders(one).fetch
    order = opened(envelope, FetchOrder, [KEY.public])
    assert (order.device_id, order.manifest, order.release) == (one, SMOL_Q8, 1)
    dispatch.report(one, Report(holdings=(Holding(artifact_id=ARTIFACT, state="pending", received_bytes=SIZE + 99),)))
    (target,) = dispatch.targets(one)
    assert (target.state, target.received_bytes, target.size_bytes) == ("pending", SIZE, SIZE)
    dispatch.report(one, Report(holdings=(Holding(artifact_id=ARTIFACT, state="in_sync", received_bytes=SIZE),)))
    assert dispatch.orders(one).fetch == () and not dispatch.push(one, SMOL_Q8)


def test_what_gave_way_on_a_board_is_ordered_again_when_it_is_needed(dispatch: Dispatch, boards: list[str]):
    one = boards[0]
    gone = Report(holdings=(Holding(artifact_id=ARTIFACT, state="evicted"),))
    there = Report(holdings=(Holding(artifact_id=ARTIFACT, state="in_sync", received_bytes=SIZE),))
    dispatch.push(one, SMOL_Q8)
    dispatch.report(one, there)
    dispatch.report(one, gone)
    (target,) = dispatch.targets(one)
    assert (target.state, target.received_bytes, target.problem) == ("registered", 0, None)
    assert dispatch.orders(one).fetch == () and dispatch.orders(one).needed == ()
    dispatch.queue(one, spec("a"), SMOL_Q8)  # a run needs it: it is ordered with the run
    assert len(dispatch.orders(one).fetch) == 1 and dispatch.orders(one).needed == (ARTIFACT,)
    dispatch.report(one, there)
    dispatch.report(one, gone)  # it gave way although a run waits: ordered anew at once
    assert dispatch.targets(one)[0].state == "pending" and len(dispatch.orders(one).fetch) == 1
    assert dispatch.issued(one, ARTIFACT)


def test_a_board_that_begins_anew_says_what_it_has(dispatch: Dispatch, boards: list[str]):
    one, two = boards
    for device_id in boards:
        dispatch.push(device_id, SMOL_Q8)
        dispatch.report(device_id, Report(holdings=(Holding(artifact_id=ARTIFACT, state="in_sync"),)))
    dispatch.compare(one, [ARTIFACT, "f" * 64])
    dispatch.compare(two, ["f" * 64])
    assert [dispatch.targets(device_id)[0].state for device_id in boards] == ["in_sync", "registered"]
    assert dispatch.push(two, SMOL_Q8) and not dispatch.push(one, SMOL_Q8)
    dispatch.compare(two, [])
    assert dispatch.targets(two)[0].state == "pending"  # what is on its way is not gone


def test_every_board_has_a_state_for_an_artifact(dispatch: Dispatch, boards: list[str], clock: Clock):
    one, _ = boards
    dispatch.push(one, SMOL_Q8)
    shown = {target.device: target.state for target in dispatch.targets(artifact_id=ARTIFACT)}
    assert shown == {"one": "pending", "two": "registered", "new": "unknown"}
    asked = {
        target.device: (target.received_bytes, target.size_bytes) for target in dispatch.targets(artifact_id=ARTIFACT)
    }
    assert asked == {"one": (0, SIZE), "two": (None, None), "new": (None, None)}
    clock.now += PENDING_TIMEOUT_S + 1
    dispatch.expire()
    (target, *_) = dispatch.targets(artifact_id=ARTIFACT)
    assert target.state == "error" and target.problem is not None
    assert dispatch.push(one, SMOL_Q8)  # asked for anew
    assert dispatch.targets(one)[0].state == "pending"


def test_an_expired_order_is_signed_anew(dispatch: Dispatch, boards: list[str], clock: Clock):
    one = boards[0]
    dispatch.push(one, SMOL_Q8)
    clock.now += ORDER_LIFE_S
    assert dispatch.push(one, SMOL_Q8)
    order = opened(dispatch.orders(one).fetch[0], FetchOrder, [KEY.public])
    assert order.sequence == 2 and order.expires_at > clock.now


def test_releases_count_within_a_name(dispatch: Dispatch, boards: list[str]):
    one, two = boards
    changed = SMOL_Q8.model_copy(update={"licence": "other"})
    foreign = SMOL_Q8.model_copy(update={"name": "foreign"})
    for manifest in (SMOL_Q8, changed, foreign):
        dispatch.push(one, manifest)
    dispatch.push(two, SMOL_Q8)
    releases = [opened(e, FetchOrder, [KEY.public]).release for e in dispatch.orders(one).fetch]
    assert releases == [1, 2, 1]
    assert opened(dispatch.orders(two).fetch[0], FetchOrder, [KEY.public]).release == 1


def test_a_lease_is_renewed_by_reports_and_returns_without_them(dispatch: Dispatch, boards: list[str], clock: Clock):
    one = boards[0]
    dispatch.queue(one, spec("a"), SMOL_Q8)
    assert held(dispatch, one) == "a"
    for _ in range(5):
        clock.now += LEASE_S - 1
        dispatch.report(one, says("a", "running"))
    assert dispatch.expire() == [] and states(dispatch) == {"a": "leased"}
    clock.now += LEASE_S + 1
    assert dispatch.expire() == ["a"] and states(dispatch) == {"a": "queued"}
    assert dispatch.runs()[0].problem is not None
    dispatch.report(one, says("a", "running", 3))  # it was only away
    (run,) = dispatch.runs()
    assert (run.status, run.items_done, run.problem, run.leases) == ("leased", 3, None, 1)
    assert held(dispatch, one) == "a"  # under the order that it had


def test_how_many_items_there_are_is_the_boards_word(dispatch: Dispatch, boards: list[str]):
    one = boards[0]
    dispatch.queue(one, spec("a", limit=50), SMOL_Q8)  # the pack may have fewer
    assert dispatch.runs()[0].items_total is None
    held(dispatch, one)
    dispatch.report(one, says("a", "queued"))  # it waits for its artifact: nothing is known yet
    assert dispatch.runs()[0].items_total is None
    total = RunState(run_id="a", status="running", items_done=1, items_total=12)
    dispatch.report(one, Report(runs=(total,)))
    assert dispatch.runs()[0].items_total == 12


def refuses(sequence: int, stale: bool, accepted: int) -> Report:
    problem = Problem(code="untrusted", message="no", hint="h")
    return Report(refused=(Refusal(sequence=sequence, stale=stale, accepted=accepted, problem=problem),))


def test_an_order_that_came_too_late_or_out_of_turn_is_signed_anew(dispatch: Dispatch, boards: list[str]):
    """An order was brought by hand past this one; or the host was restored from a copy and counts from an old number."""
    one = boards[0]
    dispatch.push(one, SMOL_Q8)
    dispatch.report(one, refuses(1, stale=True, accepted=40))
    order = opened(dispatch.orders(one).fetch[0], FetchOrder, [KEY.public])
    assert (order.sequence, order.manifest) == (41, SMOL_Q8)
    dispatch.queue(one, spec("a"), SMOL_Q8)
    envelope = dispatch.orders(one).run
    assert envelope is not None
    first = opened(envelope, RunOrder, [KEY.public])
    before = dispatch.revision(one)
    dispatch.report(one, refuses(first.sequence, stale=True, accepted=99))
    envelope = dispatch.orders(one).run
    assert envelope is not None and dispatch.revision(one) > before
    assert opened(envelope, RunOrder, [KEY.public]).sequence == 100
    dispatch.report(one, refuses(7777, stale=True, accepted=0))  # no order of ours
    assert dispatch.orders(one).run == envelope


def test_an_order_that_a_board_will_never_accept_is_an_end(dispatch: Dispatch, boards: list[str]):
    one, two = boards
    dispatch.queue(one, spec("a"), SMOL_Q8)
    envelope = dispatch.orders(one).run
    assert envelope is not None
    dispatch.report(two, refuses(1, stale=False, accepted=0))  # another board's number 1
    assert dispatch.targets(one)[0].state == "pending"
    dispatch.report(one, refuses(1, stale=False, accepted=0))
    dispatch.report(one, refuses(opened(envelope, RunOrder, [KEY.public]).sequence, stale=False, accepted=0))
    (target,) = dispatch.targets(one)
    assert target.state == "error" and target.problem is not None
    assert states(dispatch) == {"a": "failed"}


def test_what_a_board_still_has_to_do_never_expires_under_its_hands(
    dispatch: Dispatch, boards: list[str], clock: Clock
):
    one = boards[0]
    dispatch.queue(one, spec("a"), SMOL_Q8)
    old = dispatch.orders(one)
    for _ in range(31):  # a month in which it reports progress every day
        clock.now += 86_400.0
        dispatch.report(one, Report(holdings=(Holding(artifact_id=ARTIFACT, state="pending", received_bytes=1),)))
        dispatch.report(one, says("a", "running"))
    orders = dispatch.orders(one)
    assert orders.run is not None and orders.run != old.run and orders.fetch != old.fetch
    for envelope, kind in ((orders.run, RunOrder), (orders.fetch[0], FetchOrder)):
        assert opened(envelope, kind, [KEY.public]).expires_at > clock.now
    assert dispatch.orders(one).fetch == orders.fetch


def test_cancelling(dispatch: Dispatch, boards: list[str], clock: Clock):
    one = boards[0]
    for run_id in "abc":
        dispatch.queue(one, spec(run_id), SMOL_Q8)
    assert held(dispatch, one) == "a"
    assert dispatch.cancel(["a", "b", "nonsense"]) == 2
    assert states(dispatch) == {"a": "cancelling", "b": "cancelled", "c": "queued"}
    orders = dispatch.orders(one)
    assert orders.cancel == ("a",) and orders.run is None  # nothing new before the old one has ended
    assert dispatch.report(one, says("a", "running")).cancel == ("a",)
    dispatch.report(one, says("a", "cancelled"))
    assert held(dispatch, one) == "c" and dispatch.cancel(["a"]) == 0
    dispatch.cancel(["c"])
    clock.now += LEASE_S + 1  # the board never answers
    dispatch.expire()
    assert states(dispatch)["c"] == "cancelled"
    assert dispatch.report(one, says("c", "running")).cancel == (
        "c",
    )  # it comes back with the run still in its journal


def test_a_record_ends_a_run_whatever_was_said(dispatch: Dispatch, boards: list[str], database: str):
    one = boards[0]
    dispatch.queue(one, spec("run-1"), SMOL_Q8)
    dispatch.queue(one, spec("b"), SMOL_Q8)
    assert held(dispatch, one) == "run-1"
    records = Records(database)
    records.put(record_bytes(make_record("run-1")))
    assert states(dispatch)["run-1"] == "done"
    dispatch.settle("run-1")
    dispatch.settle("run-1")
    assert held(dispatch, one) == "b"
    dispatch.report(one, says("run-1", "running"))
    assert states(dispatch)["run-1"] == "done"
    records.close()


def test_a_board_speaks_only_about_what_is_its_own(dispatch: Dispatch, boards: list[str]):
    one, two = boards
    dispatch.queue(one, spec("a"), SMOL_Q8)
    held(dispatch, one)
    hostile = Problem(code="x", message="\x1b[31mred\n<b>", hint="h")
    dispatch.report(two, says("a", "done"))
    dispatch.report(two, Report(holdings=(Holding(artifact_id=ARTIFACT, state="in_sync"),)))
    assert states(dispatch) == {"a": "leased"} and dispatch.targets(one)[0].state == "pending"
    assert dispatch.targets(two) == [] and not dispatch.issued(two, ARTIFACT) and dispatch.issued(one, ARTIFACT)
    dispatch.report(one, Report(holdings=(Holding(artifact_id=ARTIFACT, state="error", problem=hostile),)))
    problem = dispatch.targets(one)[0].problem
    assert problem is not None and problem.message == "[31mred <b>"


def test_asking_twice_changes_nothing_and_mistakes_are_refused(dispatch: Dispatch, boards: list[str]):
    one, two = boards
    dispatch.queue(one, spec("a"), SMOL_Q8)
    dispatch.queue(one, spec("a"), SMOL_Q8)
    assert len(dispatch.runs()) == 1
    for device_id, changed in ((one, spec("a", limit=3)), (two, spec("a"))):
        with pytest.raises(Conflict):
            dispatch.queue(device_id, changed, SMOL_Q8)
    with pytest.raises(BadInput):
        dispatch.queue(one, spec("x", artifact_id="0" * 64), SMOL_Q8)
    with pytest.raises(NotFound):
        dispatch.queue("dev-none", spec("y"), SMOL_Q8)
    with pytest.raises(Conflict, match="run a on 'one' needs"):
        dispatch.forget(ARTIFACT, one)
    with pytest.raises(NotFound):
        dispatch.fetch_order(two, ARTIFACT)


def test_a_board_may_fetch_what_was_issued_to_it_and_no_more(dispatch: Dispatch, boards: list[str]):
    one, two = boards
    file = SMOL_Q8.files[0].sha256
    assert not dispatch.may_fetch(one, file)
    dispatch.push(one, SMOL_Q8)
    dispatch.queue(two, spec("a", pack_id="d" * 64), SMOL_Q8)
    assert [dispatch.may_fetch(one, name) for name in (file, "d" * 64)] == [True, False]
    assert [dispatch.may_fetch(two, name) for name in (file, "d" * 64, ARTIFACT, "")] == [True, True, False, False]
    dispatch.forget(ARTIFACT, one)
    assert not dispatch.may_fetch(one, file) and dispatch.may_fetch(two, file)


def test_an_artifact_goes_off_all_boards_of_a_group_or_off_none(dispatch: Dispatch, boards: list[str]):
    one, two = boards
    with pytest.raises(NotFound, match="on none of these"):
        dispatch.forget(ARTIFACT, one, two)
    dispatch.push(one, SMOL_Q8)
    dispatch.queue(two, spec("a"), SMOL_Q8)
    with pytest.raises(Conflict, match="run a on 'two'"):
        dispatch.forget(ARTIFACT, one, two)
    assert dispatch.orders(one).forget == () and len(dispatch.orders(one).fetch) == 1
    dispatch.cancel(["a"])
    dispatch.forget(ARTIFACT, one, two)
    assert dispatch.orders(one).forget == dispatch.orders(two).forget == (ARTIFACT,)
    with pytest.raises(NotFound):
        dispatch.forget(ARTIFACT, one, two)


def test_boards_are_meant_by_name_id_group_or_all(dispatch: Dispatch, boards: list[str]):
    one, two = boards
    dispatch.group("lab", [two])
    assert dispatch.groups() == {"lab": ["two"]}
    assert dispatch.devices("one") == {one: "one"}
    assert dispatch.devices(f"{one}, lab") == {one: "one", two: "two"}
    assert dispatch.devices("all") == {one: "one", two: "two"}  # nobody approved the third
    dispatch.group("lab", [two], member=False)
    for wrong in ("lab", "new", "nobody"):
        with pytest.raises(NotFound):
            dispatch.devices(wrong)


@pytest.mark.parametrize("name", ["all", "one", "a,b", "", " lab", "lab ", "x" * 61, "l\nab", "läb"])
def test_a_group_is_not_called_what_could_not_be_said_where_boards_are_named(
    dispatch: Dispatch, boards: list[str], name: str
):
    with pytest.raises(BadInput, match="cannot be called"):
        dispatch.group(name, boards)
    assert dispatch.groups() == {}


def test_a_word_that_is_a_board_and_a_group_means_neither(
    dispatch: Dispatch, boards: list[str], database: str, clock: Clock
):
    one, two = boards
    dispatch.group("lab", [two])
    registry = Registry(database, "ab" * 32, clock)
    registry.rename("one", "lab", "test")
    assert registry.device("two").groups == ("lab",) and [row.groups for row in registry.devices()] == [
        (),
        (),
        ("lab",),
    ]
    registry.close()
    with pytest.raises(BadInput, match="a board and a group"):
        dispatch.devices("lab")
    assert dispatch.devices(one) == {one: "lab"}


def test_a_board_that_was_revoked_while_it_waited_gets_no_orders(
    dispatch: Dispatch, boards: list[str], database: str, clock: Clock
):
    one, two = boards
    for device_id in boards:
        dispatch.queue(device_id, spec(f"for-{device_id}"), SMOL_Q8)
    registry = Registry(database, "ab" * 32, clock)
    registry.revoke("one", "ann")
    with pytest.raises(Forbidden, match="takes no part"):
        dispatch.orders(one)
    assert held(dispatch, two) is not None
    assert states(dispatch) == {f"for-{one}": "queued", f"for-{two}": "leased"}
    registry.close()


def test_many_askers_at_once_get_one_lease(dispatch: Dispatch, boards: list[str]):
    one = boards[0]
    for run_id in "abcdef":
        dispatch.queue(one, spec(run_id), SMOL_Q8)
    found: list[str | None] = []
    barrier = threading.Barrier(6)

    def ask() -> None:
        barrier.wait()
        found.append(held(dispatch, one))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["a"] * 6
    assert [run.leases for run in dispatch.runs()] == [1, 0, 0, 0, 0, 0]


def test_a_sweep_adds_only_what_is_missing(dispatch: Dispatch, boards: list[str]):
    one, _ = boards
    subject = Subject(ARTIFACT, SMOL_Q8, {"arc_challenge": PACK, "gsm8k_cot": "c" * 64})
    wanted = sweep.cells([subject], dispatch.devices("all"))
    assert len(wanted) == 4
    assert [sweep.queue(dispatch, "night", wanted, {}) for _ in range(2)] == [4, 0]
    assert sweep.queue(dispatch, "night", wanted, {"limit": 5}) == 4  # other options are other runs
    first = held(dispatch, one)
    assert first is not None
    dispatch.report(one, says(first, "failed"))
    assert sweep.queue(dispatch, "night", wanted, {}) == 0
    assert sweep.queue(dispatch, "night", wanted, {}, retry_failed=True) == 1
    assert sweep.counts(dispatch.runs("night")) == {"queued": 8}
    dispatch.cancel([run.run_id for run in dispatch.runs("night")])
    assert sweep.over(dispatch.runs("night"))
    assert sweep.queue(dispatch, "night", wanted, {}) == 4
    assert len({run.run_id for run in dispatch.runs()}) == len(dispatch.runs())
