"""Carrying out orders: what is reported is what changed, what cannot be done is said, and what waits is taken up when it can be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from joulemark import artifact
from joulemark.errors import BadInput, NoSpace, NotFound, Unavailable, Untrusted
from joulemark.protocol import Orders
from joulemark.signing import SigningKey
from joulemark.statements import Envelope, FetchOrder, RunOrder
from joulemark.wire import Manifest, Problem, RunSpec, RunState, content_id
from joulemark_agent.ledger import Ledger
from joulemark_agent.orders import MOST_REPORTED, QUEUE_AGAIN_S, TRY_AGAIN_S, OrderBook
from joulemark_agent.store import Store
from tests.fixtures.gguf_files import write_tiny
from tests.fixtures.records import make_pack
from tests.fixtures.small_world import make_files

HOST = SigningKey(bytes(range(32)))


class FakePuller:
    """Remembers what it is asked for; `arrive` puts the file there."""

    def __init__(self, store: Store, model: Path) -> None:
        self.store, self.model = store, model
        self.started: list[str] = []
        self.problems: dict[str, Problem] = {}

    def start(self, artifact_id: str) -> None:
        self.started.append(artifact_id)

    def cancel(self, artifact_id: str) -> None:
        self.problems.pop(artifact_id, None)

    def active(self, _: str) -> bool:
        return False

    def problem(self, artifact_id: str) -> Problem | None:
        return self.problems.get(artifact_id)

    def arrive(self, manifest: Manifest) -> None:
        for entry in manifest.files:
            self.store.append(entry.sha256, 0, self.model.read_bytes())
            self.store.finish(entry.sha256)


class FakeJobs:
    def __init__(self) -> None:
        self.states: dict[str, RunState] = {}
        self.refuse: Exception | None = None

    def submit(self, spec: RunSpec) -> RunState:
        if self.refuse is not None:
            raise self.refuse
        self.states[spec.run_id] = RunState(run_id=spec.run_id, status="queued")
        return self.states[spec.run_id]

    def state(self, run_id: str) -> RunState:
        if run_id not in self.states:
            raise NotFound("no such run", "")
        return self.states[run_id]

    def cancel(self, run_id: str) -> None:
        self.states[run_id] = self.state(run_id).model_copy(update={"status": "cancelled"})

    def needs(self, _: str) -> bool:
        return any(state.status in ("queued", "running") for state in self.states.values())


@dataclass
class World:
    book: OrderBook
    store: Store
    puller: FakePuller
    jobs: FakeJobs
    manifest: Manifest
    pack_id: str
    pack: Callable[[], bytes]
    clock: list[float] = field(default_factory=lambda: [0.0])
    last: int = 0

    def sign(self, kind: type[FetchOrder | RunOrder], **content: object) -> Envelope:
        self.last += 1
        now = time.time()
        fields = {"device_id": "dev-1", "sequence": self.last, "issued_at": now, "expires_at": now + 1e6, **content}
        return HOST.sign(kind.model_validate(fields))

    def fetch(self, **changes: object) -> Envelope:
        return self.sign(FetchOrder, **{"manifest": self.manifest, "release": 1, **changes})

    def run(self, run_id: str = "r") -> Envelope:
        spec = RunSpec(run_id=run_id, artifact_id=content_id(self.manifest), pack_id=self.pack_id)
        return self.sign(RunOrder, spec=spec)

    def follow(self, **orders: object) -> None:
        found = {name: tuple(value) if isinstance(value, list) else value for name, value in orders.items()}
        self.book.follow(Orders.model_validate({"revision": 1, "host_time": time.time(), **found}))
        self.book.work()

    def tell(self) -> dict[str, str]:
        """What is reported now; the host takes it in."""
        report = self.book.report()
        if report is None:
            return {}
        self.book.told(report)
        said = {holding.artifact_id[:4]: str(holding.state) for holding in report.holdings}
        said |= {state.run_id: str(state.status) for state in report.runs}
        for refusal in report.refused:
            said["refused"] = f"{'stale' if refusal.stale else 'never'} {refusal.sequence}, at {refusal.accepted}"
        return said


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    files = make_files(tmp_path / "files", 3)
    ((pack_id, pack),) = files.packs.items()
    model = write_tiny(tmp_path / "m.gguf")
    store = Store(tmp_path / "store")
    ledger = Ledger(tmp_path / "ledger.sqlite", time.monotonic)
    puller, jobs, clock = FakePuller(store, model), FakeJobs(), [0.0]
    book = OrderBook(
        "dev-1", HOST.public, ledger, store, puller, jobs, lambda _: pack.read_bytes(), lambda: clock[0]  # type: ignore[arg-type]
    )  # fmt: skip
    yield World(book, store, puller, jobs, artifact.describe(model), pack_id, pack.read_bytes, clock)
    ledger.close()


def short(world: World) -> str:
    return content_id(world.manifest)[:4]


def test_from_an_order_to_a_run_with_a_report_for_each_change(world: World):
    assert world.tell() == {}
    world.follow(fetch=[world.fetch()], run=world.run())
    assert world.puller.started == [content_id(world.manifest)] and world.jobs.states == {}
    assert world.tell() == {short(world): "pending", "r": "queued"}
    assert world.tell() == {}
    world.puller.arrive(world.manifest)
    world.clock[0] += 1.0
    world.book.work()
    assert world.jobs.state("r").status == "queued" and world.store.packs() == (world.pack_id,)
    assert world.tell() == {short(world): "in_sync"}
    world.jobs.states["r"] = RunState(run_id="r", status="running", phase="accuracy", items_done=2)
    assert world.tell() == {"r": "running"}
    world.jobs.states["r"] = RunState(run_id="r", status="done", items_done=3)
    assert world.tell() == {"r": "done"}
    assert world.tell() == {}
    assert world.book._told == {} and world.book._runs == set()  # nothing is kept for ever


def test_a_report_that_did_not_arrive_is_made_again(world: World):
    world.follow(fetch=[world.fetch()])
    first = world.book.report()
    assert first == world.book.report() and first is not None
    world.book.told(first)
    assert world.book.report() is None
    world.book.forget_told()  # the host was restored from a copy, or the session is new
    assert world.book.report() == first


def test_a_report_in_the_middle_of_an_order_does_not_say_that_the_artifact_was_removed(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    """The thread that reports does not wait for the one that takes orders: ten thousand kills found it."""
    announce, said = world.store.announce, list[dict[str, str]]()

    def slowly(manifest: Manifest) -> object:
        said.append(world.tell())
        found = announce(manifest)
        said.append(world.tell())
        return found

    monkeypatch.setattr(world.store, "announce", slowly)
    world.follow(fetch=[world.fetch()])
    assert said == [{}, {}] and world.tell() == {short(world): "pending"}
    assert world.puller.started == [content_id(world.manifest)]


def test_what_is_ordered_anew_while_a_report_is_under_way_is_not_lost(world: World, monkeypatch: pytest.MonkeyPatch):
    announce = world.store.announce

    def full(_: Manifest) -> None:
        raise NoSpace("the store is full", "remove something")

    monkeypatch.setattr(world.store, "announce", full)
    world.follow(fetch=[world.fetch()])
    report = world.book.report()
    assert report is not None and report.holdings[0].state == "error"
    monkeypatch.setattr(world.store, "announce", announce)
    world.follow(fetch=[world.fetch()])  # a person made room and pushed again before the report had its answer
    world.book.told(report)
    assert world.tell() == {short(world): "pending"}
    world.puller.arrive(world.manifest)
    assert world.tell() == {short(world): "in_sync"}


def test_a_transfer_that_gave_up_is_begun_again_but_not_at_once(world: World):
    world.follow(fetch=[world.fetch()])
    away = Problem(code="unavailable", message="the host is away", retryable=True)
    world.puller.problems[content_id(world.manifest)] = away
    for _ in range(5):
        world.book.work()
    assert len(world.puller.started) == 1 and world.tell() == {short(world): "pending"}
    world.clock[0] += TRY_AGAIN_S
    world.book.work()
    assert len(world.puller.started) == 2
    world.puller.problems[content_id(world.manifest)] = Problem(code="not_found", message="the host lost it")
    assert world.tell() == {short(world): "error"}


def test_what_gave_way_is_told_and_may_be_ordered_again(world: World):
    artifact_id = content_id(world.manifest)
    world.follow(fetch=[world.fetch()])
    world.puller.arrive(world.manifest)
    assert world.tell() == {short(world): "in_sync"}
    world.store.delete(artifact_id)
    world.book.evicted(artifact_id)
    world.clock[0] += 2 * TRY_AGAIN_S
    world.book.work()
    assert len(world.puller.started) == 1  # nobody fetches what just gave way
    assert world.tell() == {short(world): "evicted"} and world.tell() == {}
    world.follow(fetch=[world.fetch()])
    assert len(world.puller.started) == 2 and world.tell() == {short(world): "pending"}


def test_what_waits_here_or_at_the_host_is_needed(world: World):
    artifact_id = content_id(world.manifest)
    assert not world.book.needs(artifact_id)
    world.follow(needed=[artifact_id])
    assert world.book.needs(artifact_id)
    world.follow()
    assert not world.book.needs(artifact_id)
    world.follow(run=world.run())
    assert world.book.needs(artifact_id)


def test_an_artifact_that_does_not_fit_is_an_error_with_its_reason(world: World, tmp_path: Path):
    full = Store(tmp_path / "full", free=lambda _: 10)
    world.book._store = full
    world.follow(fetch=[world.fetch()])
    assert world.puller.started == []
    report = world.book.report()
    assert report is not None
    (holding,) = report.holdings
    assert holding.state == "error" and holding.problem is not None and holding.problem.code == "no_space"


def test_orders_are_accepted_in_their_sequence_however_they_arrive(world: World):
    one, two = world.fetch(), world.run()
    world.follow(fetch=[], run=two)
    assert world.tell() == {"r": "queued"}
    world.follow(fetch=[one], run=two)
    assert world.tell() == {"refused": "stale 1, at 2"}  # an older number after a newer one: the host may sign it anew
    world.follow(fetch=[world.fetch()], run=two)
    assert world.tell() == {short(world): "pending"}


def test_what_is_not_by_the_host_does_not_stop_the_rest(world: World):
    forged = SigningKey(bytes(32)).sign(
        FetchOrder(device_id="dev-1", sequence=1, issued_at=0, expires_at=9e9, manifest=world.manifest, release=1)
    )
    world.follow(fetch=[forged], run=world.run())
    assert world.tell() == {"r": "queued", "refused": "never 1, at 0"}
    assert world.tell() == {}
    with pytest.raises(Untrusted, match="not known"):
        world.book.take(forged.model_copy(update={"payload_type": "application/x"}))


def test_a_run_that_can_never_be_is_failed_and_one_that_cannot_be_now_waits(world: World):
    world.follow(fetch=[world.fetch()])
    world.puller.arrive(world.manifest)
    world.jobs.refuse = Unavailable("busy", "later")
    world.follow(run=world.run("patient"))
    assert world.tell() == {short(world): "in_sync", "patient": "queued"}
    world.jobs.refuse = None
    world.clock[0] += QUEUE_AGAIN_S
    world.book.work()
    assert world.jobs.state("patient").status == "queued"
    world.jobs.refuse = BadInput("no such backend", "choose another")
    with pytest.raises(BadInput):
        world.book.take(world.run("never"))
    assert world.tell()["never"] == "failed"
    world.jobs.refuse = None
    world.book.work()
    assert "never" not in world.jobs.states


def test_two_runs_that_wait_are_both_kept(world: World):
    """One of the host's queue, one that a person brought: neither may be lost because the other came."""
    world.follow(fetch=[world.fetch()], run=world.run("queued"))
    assert world.book.take(world.run("by-hand")) is None
    assert world.tell() == {short(world): "pending", "queued": "queued", "by-hand": "queued"}
    world.puller.arrive(world.manifest)
    world.book.work()
    assert set(world.jobs.states) == {"queued", "by-hand"}


def test_a_downgrade_is_refused_for_good(world: World):
    world.follow(fetch=[world.fetch(release=2)])
    world.tell()
    older = world.manifest.model_copy(update={"licence": "older"})
    world.follow(fetch=[world.fetch(manifest=older, release=1)])
    assert world.tell() == {"refused": "never 2, at 1"}


def test_a_thousand_changes_are_told_in_several_reports(world: World):
    for number in range(MOST_REPORTED + 5):
        world.book.cancel(f"r{number}")
    told = [len(world.tell()), len(world.tell()), len(world.tell())]
    assert told == [MOST_REPORTED, 5, 0]


def test_cancelling_what_waits_what_runs_and_what_is_not_here(world: World):
    world.follow(fetch=[world.fetch()], run=world.run("waits"))
    world.follow(cancel=["waits", "unknown"])
    assert world.tell() == {short(world): "pending", "waits": "cancelled", "unknown": "cancelled"}
    world.puller.arrive(world.manifest)
    world.book.work()
    assert world.jobs.states == {}
    world.book.take(world.run("runs"))
    world.follow(cancel=["runs"])
    assert world.tell() == {short(world): "in_sync", "runs": "cancelled"}


def test_forgetting_waits_for_the_runs_that_need_it(world: World):
    world.follow(fetch=[world.fetch()])
    world.puller.arrive(world.manifest)
    world.book.take(world.run())
    world.follow(forget=[content_id(world.manifest)])
    assert content_id(world.manifest) in world.store.artifacts()
    world.book.cancel("r")
    world.follow(forget=[content_id(world.manifest)])
    assert world.store.artifacts() == {}
    world.follow(forget=[content_id(world.manifest)])  # again, after a crash
    assert make_pack() is not None
