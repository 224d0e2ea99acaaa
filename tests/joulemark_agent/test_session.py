"""A board at its host: a session first, then orders and reports; silent while a run is timed; patient and honest when it is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from joulemark.errors import Conflict, Unavailable
from joulemark.protocol import Orders, Report, SessionRequest
from joulemark.wire import RunSpec, RunState
from joulemark_agent import session as module
from joulemark_agent.session import LOOK_EVERY_S, WAITING_EVERY_S, Session
from tests.fixtures.grids import PI

SPEC = RunSpec(run_id="r", artifact_id="a" * 64, pack_id="b" * 64, report_every_s=60.0)


class FakeBook:
    def __init__(self) -> None:
        self.news: Report | None = None
        self.followed: list[int] = []
        self.cancelled: list[str] = []
        self.worked = 0

    def follow(self, orders: Orders) -> None:
        self.followed.append(orders.revision)

    def work(self) -> None:
        self.worked += 1

    def report(self) -> Report | None:
        return self.news

    def told(self, _: Report) -> None:
        self.news = None

    def forget_told(self) -> None: ...

    def cancel(self, run_id: str) -> None:
        self.cancelled.append(run_id)


def _plain(status: int, body: object) -> httpx.Response:
    """An answer that is not read yet, as one from a socket."""
    return httpx.Response(status, stream=httpx.ByteStream(json.dumps(body).encode() if body is not None else b""))


@dataclass
class Scene:
    """A session whose host is a function; `asked` is what it was asked."""

    asked: list[str] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)
    running: tuple[RunSpec, RunState] | None = None
    book: FakeBook = field(default_factory=FakeBook)
    now: float = 1000.0

    def __post_init__(self) -> None:
        self.session = Session(self, self.book, self._presentation, lambda: self.running)  # type: ignore[arg-type]

    def client(self, _: float = 30.0) -> httpx.Client:
        return httpx.Client(base_url="http://host", transport=httpx.MockTransport(self._answer))

    def _presentation(self) -> SessionRequest:
        return SessionRequest(instance_id="i-1", boot_id="b", hardware=None, facts=PI)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        self.asked.append(f"{request.method} {path}")
        given = self.answers.get(path)
        if isinstance(given, Exception):
            raise given
        if given is not None:
            status, body = given
            return _plain(status, body)
        if path.endswith("session"):
            return _plain(200, {"name": "pi", "admission": "approved", "host_time": 1.0})
        if path.endswith("report"):
            return _plain(200, {"cancel": ["x"], "host_time": 1.0})
        return _plain(204, None)

    def at(self, phase: str | None, done: int = 1) -> None:
        self.running = (SPEC, RunState(run_id="r", status="running", phase=phase, items_done=done))


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    made = Scene()
    monkeypatch.setattr(module.time, "monotonic", lambda: made.now)
    yield made
    made.session.stop()


def test_a_session_comes_first_then_orders(scene: Scene):
    assert not scene.session.ready()
    assert scene.session._orders_step() == 0.0
    assert scene.session.ready() and scene.session.note() is None
    scene.session._orders_step()
    scene.answers["/api/device/orders"] = (200, {"revision": 7, "host_time": 5.0})
    scene.session._orders_step()
    assert scene.asked == ["PUT /api/device/session", "GET /api/device/orders", "GET /api/device/orders"]
    assert scene.book.followed == [7]


def test_a_board_that_is_not_approved_asks_now_and_then_and_says_so(scene: Scene):
    scene.answers["/api/device/session"] = (200, {"name": "pi", "admission": "pending", "host_time": 1.0})
    assert scene.session._orders_step() == WAITING_EVERY_S
    assert not scene.session.ready() and "waits for an operator" in str(scene.session.note())
    assert scene.session._reports_step() == LOOK_EVERY_S
    assert scene.asked == ["PUT /api/device/session"]


def test_reports_are_rare_and_carry_cancellations(scene: Scene):
    scene.session._orders_step()
    scene.book.news = Report(runs=(RunState(run_id="r", status="queued"),))
    scene.session._reports_step()
    assert scene.asked[1:] == ["POST /api/device/report"] and scene.book.cancelled == ["x"]
    scene.book.news = Report(runs=(RunState(run_id="r", status="running"),))
    scene.session._reports_step()  # too soon
    assert len(scene.asked) == 2
    scene.now += 2.0
    scene.session._reports_step()
    scene.now += 2.0
    scene.session._reports_step()  # no news
    assert len(scene.asked) == 3 and scene.book.worked == 4


@pytest.mark.parametrize("phase", [None, "idle", "load", "warmup", "latency", "cooldown"])
def test_nothing_is_said_while_a_run_is_timed(scene: Scene, phase: str | None):
    scene.session._orders_step()
    scene.at(phase)
    scene.book.news = Report(runs=(RunState(run_id="r", status="running"),))
    for _ in range(100):
        scene.now += 60.0
        assert scene.session._orders_step() == scene.session._reports_step() == LOOK_EVERY_S
    assert len(scene.asked) == 1 and scene.book.worked == 0


def test_in_the_accuracy_phase_it_says_as_often_as_the_spec_allows_how_far_it_is(scene: Scene):
    scene.session._orders_step()
    scene.at("accuracy", done=5)
    for _ in range(1200):  # ten minutes in half seconds
        scene.session._orders_step()
        scene.session._reports_step()
        scene.now += 0.5
    assert scene.asked.count("POST /api/device/report") == 10 and "GET /api/device/orders" not in scene.asked


def test_an_agent_that_starts_in_the_middle_of_a_run_renews_its_lease(scene: Scene):
    scene.at("load")
    scene.session._orders_step()
    assert scene.asked == []
    scene.at("accuracy")
    scene.session._orders_step()
    scene.session._reports_step()
    assert scene.asked == ["PUT /api/device/session", "POST /api/device/report"]


def test_a_refusal_ends_the_session_and_silence_does_not(scene: Scene):
    scene.session._orders_step()
    scene.answers["/api/device/orders"] = httpx.ConnectError("no route")
    with pytest.raises(Unavailable):
        scene.session._orders_step()
    assert scene.session.ready()
    refusal = {"code": "conflict", "message": "this agent has no session", "hint": "open one", "retryable": False}
    scene.answers["/api/device/orders"] = (409, refusal)
    with pytest.raises(Conflict):
        scene.session._orders_step()
    assert not scene.session.ready()
    scene.session._orders_step()
    assert scene.session.ready()


def test_waits_grow_and_are_not_the_same_for_all(scene: Scene):
    waits = [scene.session._failed(Unavailable("away", "")) for _ in range(14)]
    assert waits[0] <= 2.0 and 150.0 <= max(waits) <= 300.0
    assert all(later > 0 for later in waits) and len(set(waits)) == 14
    assert "away" in str(scene.session.note())


def test_a_report_that_arrives_ends_the_waiting(scene: Scene):
    """Else the failures of a whole long run would add up to five minutes of silence, and its lease would end."""
    scene.session._orders_step()
    scene.at("accuracy")
    for _ in range(12):
        scene.session._failed(Unavailable("away", ""))
        scene.now += 60.0
        scene.session._reports_step()
    assert scene.session._failed(Unavailable("away", "")) <= 2.0


def test_a_captive_portal_is_no_host(scene: Scene):
    scene.answers["/api/device/session"] = (200, {"welcome": "log in"})
    with pytest.raises(Unavailable):
        scene.session._orders_step()
    assert json.dumps(scene.asked) == '["PUT /api/device/session"]'
