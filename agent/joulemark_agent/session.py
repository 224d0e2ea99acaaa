"""This start of the agent at its host: opens a session, waits for orders, says what has changed.

`instance_id` is made anew at every start and lives in memory only, so that a copied card cannot have it. Orders come by a long poll, which
works behind NAT and costs nothing while there is no news. Reports are differences, at most one in REPORT_EVERY_S. While a run is going on
nothing is asked; how far it is is said as often as its spec allows, and not at all while the latency phase is timed. Not aware of what
orders mean. Times are monotonic seconds.
"""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from joulemark.errors import JoulemarkError, Unavailable, to_problem
from joulemark.protocol import Admission, Orders, Report, ReportAnswer, SessionAnswer, SessionRequest
from joulemark.wire import RunSpec, RunState
from joulemark_agent.host_link import HostLink, exchange
from joulemark_agent.orders import OrderBook

WAIT_S = 50.0
"""Each time a little shorter, by chance: boards that began together would ask together for ever."""
WAITING_EVERY_S = 5.0
FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 300.0
REPORT_EVERY_S = 2.0
LOOK_EVERY_S = 0.5
ANSWER_BYTES = 8 << 20
QUIET_PHASES = ("idle", "load", "warmup", "latency", "cooldown")

log = logging.getLogger(__name__)
Parsed = TypeVar("Parsed", bound=BaseModel)


def new_instance_id() -> str:
    """64 random bits for one start of the agent."""
    return f"i-{secrets.token_hex(8)}"


class Session:
    """See the module. `request` says what the board is now; `current` the run that is going on; `on_answer` gets the host's view."""

    def __init__(
        self,
        link: HostLink,
        book: OrderBook,
        request: Callable[[], SessionRequest],
        current: Callable[[], tuple[RunSpec, RunState] | None],
        on_answer: Callable[[SessionAnswer], None] = lambda _: None,
    ) -> None:
        self._link = link
        self._book = book
        self._request = request
        self._current = current
        self._on_answer = on_answer
        self._admission: Admission | None = None
        self._trouble: str | None = None
        self._failures = 0
        self._revision = -1
        self._reported_s = 0.0
        self._stopping = threading.Event()
        self._client = link.client(WAIT_S + 20)
        self._threads = [
            threading.Thread(target=self._loop, args=(step,), name=name, daemon=True)
            for name, step in (("orders", self._orders_step), ("reports", self._reports_step))
        ]

    def start(self) -> None:
        """Begins to ask."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends; a request in flight is cut."""
        self._stopping.set()
        self._client.close()

    def ready(self) -> bool:
        """Whether the host lets this board take part."""
        return self._admission == "approved"

    def note(self) -> str | None:
        """Why it does not, for people."""
        return self._trouble

    # --- the two threads ----------------------------------------------------------------------------------------------
    def _loop(self, step: Callable[[], float]) -> None:
        while not self._stopping.is_set():
            try:
                wait_s = step()
            except (JoulemarkError, OSError) as error:
                if self._stopping.is_set():
                    return
                wait_s = self._failed(error)
            self._stopping.wait(wait_s)

    def _orders_step(self) -> float:
        running = self._current()
        # Also in the middle of a run that an earlier start began: else nobody would renew its lease.
        if running is not None and (self._admission == "approved" or _is_quiet(running[1])):
            return LOOK_EVERY_S
        if self._admission != "approved":
            return self._open()
        wait_s = WAIT_S * random.uniform(0.8, 1.0)
        answer = self._ask("GET", f"/api/device/orders?after={self._revision}&wait_s={wait_s:.1f}")
        self._failures = 0
        if answer is not None:
            orders = _parsed(Orders, answer)
            self._book.follow(orders)
            self._revision = orders.revision
        return 0.0

    def _reports_step(self) -> float:
        if self._admission != "approved":
            return LOOK_EVERY_S
        now, running = time.monotonic(), self._current()
        if running is None:
            self._book.work()
            if now - self._reported_s < REPORT_EVERY_S:
                return LOOK_EVERY_S
            report = self._book.report()
        else:
            spec, state = running
            if _is_quiet(state) or now - self._reported_s < spec.report_every_s:
                return LOOK_EVERY_S
            report = Report(runs=(state,))
        if report is not None:
            self._say(report)
        return LOOK_EVERY_S

    # --- requests -----------------------------------------------------------------------------------------------------
    def _open(self) -> float:
        answer = _parsed(
            SessionAnswer, self._ask("PUT", "/api/device/session", self._request().model_dump_json()) or b""
        )
        self._failures = 0
        self._revision = -1
        self._book.forget_told()
        self._on_answer(answer)
        waits = "this board waits for an operator: `joulemark devices approve` on the host"
        self._tell(None if answer.admission == "approved" else waits)
        self._admission = answer.admission
        return 0.0 if answer.admission == "approved" else WAITING_EVERY_S

    def _say(self, report: Report) -> None:
        answer = _parsed(ReportAnswer, self._ask("POST", "/api/device/report", report.model_dump_json()) or b"")
        self._failures = 0
        self._reported_s = time.monotonic()
        self._book.told(report)
        for run_id in answer.cancel:
            self._book.cancel(run_id)

    def _ask(self, method: str, path: str, body: str | None = None) -> bytes | None:
        """The answer's bytes; None when there is no news (204)."""
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            answer, response = exchange(self._client, method, path, ANSWER_BYTES, content=body, headers=headers)
        except Unavailable:
            raise
        except JoulemarkError:  # the host answers, and refuses: begin again with a session
            self._admission = None
            raise
        except RuntimeError as error:  # the client was closed
            raise Unavailable("this agent stops", "the host hears from it again when it starts") from error
        return answer if response.status_code != 204 else None

    def _failed(self, error: JoulemarkError | OSError) -> float:
        """Tells people, and how long to wait: longer every time, and not all boards at the same moment."""
        self._failures += 1
        problem = to_problem(error)
        self._tell(f"this board does not take part just now: {problem.message}; {problem.hint}")
        longest = min(FIRST_DELAY_S * 2 ** min(self._failures, 12), LONGEST_DELAY_S)
        return longest * random.uniform(0.5, 1.0)

    def _tell(self, trouble: str | None) -> None:
        if trouble != self._trouble:
            log.info("%s", trouble or "the host lets this board take part")
        self._trouble = trouble


def _is_quiet(state: RunState) -> bool:
    """Whether the run is at something that nothing must disturb."""
    return state.phase is None or state.phase in QUIET_PHASES


def _parsed(model: type[Parsed], answer: bytes) -> Parsed:
    try:
        return model.model_validate_json(answer)
    except ValidationError as error:
        raise Unavailable("what answers is no Joulemark host", "check the host's address") from error
