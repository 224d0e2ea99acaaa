"""This start of the agent as the host knows it: opens the session, again and again until the host lets the board take part.

`instance_id` is made anew at every start and lives in memory only, so that a copied card cannot have it. Nothing is said while a run is
timed. Deliveries and pulls wait until `ready`. Not aware of what is delivered or pulled.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable

import httpx
from pydantic import ValidationError

from joulemark.errors import JoulemarkError, Unavailable
from joulemark.protocol import Admission, SessionAnswer, SessionRequest
from joulemark_agent.host_link import HostLink, bounded, error_of

EVERY_S = 60.0
WAITING_EVERY_S = 10.0
LONGEST_DELAY_S = 600.0
ANSWER_BYTES = 64 * 1024

log = logging.getLogger(__name__)


def new_instance_id() -> str:
    """64 random bits for one start of the agent."""
    return f"i-{secrets.token_hex(8)}"


class Session:
    """See the module. `request` says what the board is now; `on_answer` gets the host's view of it."""

    def __init__(
        self,
        link: HostLink,
        request: Callable[[], SessionRequest],
        paused: Callable[[], bool],
        on_answer: Callable[[SessionAnswer], None] = lambda _: None,
    ) -> None:
        self._link = link
        self._request = request
        self._paused = paused
        self._on_answer = on_answer
        self._admission: Admission | None = None
        self._trouble: str | None = None
        self._failures = 0
        self._stopping = threading.Event()
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="session", daemon=True)

    def start(self) -> None:
        """Begins to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ends; a request in flight is not waited for."""
        self._stopping.set()
        self._changed.set()

    def ready(self) -> bool:
        """Whether the host lets this board take part."""
        return self._admission == "approved"

    def note(self) -> str | None:
        """Why it does not, for people."""
        return self._trouble

    def step(self) -> float:
        """Asks once; the seconds until the next time."""
        if self._paused():
            return WAITING_EVERY_S
        try:
            answer = self._ask()
        except JoulemarkError as error:
            self._failures += 1
            if not isinstance(error, Unavailable):  # the host answers, and refuses
                self._admission = None
            self._tell(f"the host does not let this board take part: {error.message}; {error.hint}")
            return min(WAITING_EVERY_S * 2 ** min(self._failures - 1, 10), LONGEST_DELAY_S)
        self._failures = 0
        self._admission = answer.admission
        self._on_answer(answer)
        waits = "this board waits for an operator: `joulemark devices approve` on the host"
        self._tell(None if answer.admission == "approved" else waits)
        return EVERY_S if answer.admission == "approved" else WAITING_EVERY_S

    def _tell(self, trouble: str | None) -> None:
        if trouble != self._trouble:
            log.info("%s", trouble or "the host lets this board take part")
        self._trouble = trouble

    def _ask(self) -> SessionAnswer:
        body = self._request().model_dump_json()
        headers = {"Content-Type": "application/json"}
        try:
            with (
                self._link.client() as client,
                client.stream("PUT", "/api/device/session", content=body, headers=headers) as response,
            ):
                answer = bounded(response, ANSWER_BYTES)
        except httpx.HTTPError as error:
            raise Unavailable(
                f"the host cannot be reached: {str(error) or type(error).__name__}", "it is tried again"
            ) from error
        if not response.is_success:
            raise error_of(answer, response.status_code)
        try:
            return SessionAnswer.model_validate_json(answer)
        except ValidationError as error:
            raise Unavailable("what answers is no Joulemark host", "check the host's address") from error

    def _work(self) -> None:
        while not self._stopping.is_set():
            wait_s = self.step()
            self._changed.wait(wait_s)
            self._changed.clear()
