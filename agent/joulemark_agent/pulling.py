"""Fetches an artifact's missing files from the host in the background: Range requests, so a cut transfer goes on where it stopped.

The host's address is fixed when the agent starts and redirects are not followed, so a request can never send the agent elsewhere.
Bulk goes through the standard library's HTTP client, which reads into one buffer that stays in the processor's cache while it is hashed and
written (httpx makes a Python object of every 16 KiB of a TLS stream; a second thread that reads ahead was slower, on two cores).
Not aware of what the files are; the store verifies them while it writes. Rates are bytes per second.
"""

from __future__ import annotations

import http.client
import logging
import threading
import time
from collections.abc import Callable, Iterator

from joulemark.errors import BadInput, JoulemarkError, NotFound, Unavailable, to_problem
from joulemark.wire import Problem
from joulemark_agent.host_link import HostLink
from joulemark_agent.store import Store

CHUNK_BYTES = 128 * 1024
TRIES = 5
PAUSE_POLL_S = 1.0
LOOK_EVERY_S = 0.05
"""How often a transfer looks whether it is to pause: what `settle` waits for."""

log = logging.getLogger(__name__)


class Puller:
    """At most one transfer at a time; others wait. `paused` says when not to disturb (a run is measured). `limit_rate` leaves the network
    to others; None: as fast as it goes."""

    def __init__(
        self, store: Store, link: HostLink | None, paused: Callable[[], bool], limit_rate: float | None = None
    ) -> None:
        self._store = store
        self._link = link
        self._paused = paused
        self._limit_rate = limit_rate
        self._problems: dict[str, Problem] = {}
        self._wanted: list[str] = []
        self._cancelled: set[str] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._reading = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self, artifact_id: str) -> None:
        """Queue a pull. Raises NotFound for an artifact whose manifest is not here, BadInput without a host."""
        if self._link is None:
            raise BadInput("this agent has no host to pull from", "enrol it, or upload the files")
        self._store.manifest_of(artifact_id)
        with self._lock:
            self._problems.pop(artifact_id, None)
            self._cancelled.discard(artifact_id)
            if artifact_id not in self._wanted:
                self._wanted.append(artifact_id)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="puller", daemon=True)
                self._thread.start()

    def cancel(self, artifact_id: str) -> None:
        """Ends a transfer, or takes it off the queue; what has come stays until the artifact is forgotten."""
        with self._lock:
            if artifact_id in self._wanted:
                self._cancelled.add(artifact_id)

    def active(self, artifact_id: str) -> bool:
        """Whether this artifact is being fetched or waits for its turn."""
        with self._lock:
            return artifact_id in self._wanted

    def busy(self) -> bool:
        """Whether anything is being fetched or waits for its turn."""
        with self._lock:
            return bool(self._wanted)

    def problem(self, artifact_id: str) -> Problem | None:
        """Why the last pull failed, if it did."""
        with self._lock:
            return self._problems.get(artifact_id)

    def settle(self, timeout_s: float) -> bool:
        """Waits until nothing is being read: for callers that are about to measure and have set `paused`."""
        if self._reading.acquire(timeout=timeout_s):
            self._reading.release()
            return True
        return False

    def stop(self) -> None:
        """Give up; what came so far stays for the next start."""
        self._stopping.set()
        thread = self._thread
        if thread is not None:
            thread.join(timeout=5)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._wanted or self._stopping.is_set():
                    self._thread = None
                    return
                artifact_id = self._wanted[0]
            try:
                self._pull(artifact_id)
            # Whatever it is: the thread goes on with what others wait for, and the host is told.
            except Exception as error:
                foreseen = isinstance(error, (JoulemarkError, OSError))
                log.warning("pull of %s failed: %s", artifact_id[:12], error, exc_info=not foreseen)
                with self._lock:
                    self._problems[artifact_id] = to_problem(error)
            with self._lock:
                self._wanted.remove(artifact_id)

    def _pull(self, artifact_id: str) -> None:
        assert self._link is not None
        for attempt in range(TRIES):
            try:
                self._store.pull(artifact_id, lambda sha256, offset: self._fetch(artifact_id, sha256, offset))
                return
            except Unavailable:
                if attempt == TRIES - 1 or artifact_id in self._cancelled or self._stopping.wait(0.5 * 2**attempt):
                    raise

    def _fetch(self, artifact_id: str, sha256: str, offset: int) -> Iterator[memoryview]:
        """The file's bytes from `offset` on, in one buffer again and again: each piece is good until the next is asked for."""
        assert self._link is not None
        self._wait_while_paused(artifact_id)
        connection = self._link.bulk()
        try:
            # If-Range: a file's tag is its sha256, so that bytes of another file are never appended to these.
            headers = {**self._link.headers, "Range": f"bytes={offset}-", "If-Range": f'"{sha256}"'}
            connection.request("GET", f"{self._link.path}/api/files/{sha256}", headers=headers)
            answer = connection.getresponse()
            _check(answer, sha256, offset)
            yield from self._paced(artifact_id, answer)
        except JoulemarkError:
            raise
        except http.client.HTTPException as error:
            raise Unavailable(f"the host's answer broke off: {error!r}", "the transfer resumes") from error
        except OSError as error:
            raise Unavailable(f"the host cannot be reached: {error}", "the transfer resumes when it is back") from error
        finally:
            connection.close()

    def _paced(self, artifact_id: str, answer: http.client.HTTPResponse) -> Iterator[memoryview]:
        """The body in chunks, stopped when it must be and not faster than it may be."""
        limit = self._limit_rate
        view = memoryview(bytearray(CHUNK_BYTES if limit is None else int(min(CHUNK_BYTES, max(4096, limit / 4)))))
        begun = time.monotonic()
        received = 0
        while True:
            self._wait_while_paused(artifact_id)
            look_again_s = time.monotonic() + LOOK_EVERY_S
            with self._reading:
                while time.monotonic() < look_again_s:
                    size = answer.readinto(view)
                    if not size:
                        return
                    yield view[:size]
                    received += size
                    if limit is not None:
                        self._stopping.wait(max(0.0, begun + received / limit - time.monotonic()))

    def _wait_while_paused(self, artifact_id: str) -> None:
        while self._paused() and not self._stopping.wait(PAUSE_POLL_S):
            pass
        if self._stopping.is_set():
            raise Unavailable("the agent is stopping", "the transfer resumes at the next start")
        if artifact_id in self._cancelled:
            raise Unavailable("the transfer was cancelled", "push the artifact again to go on")


def _check(answer: http.client.HTTPResponse, sha256: str, offset: int) -> None:
    """Raises NotFound or Unavailable unless the answer is the file's bytes from `offset` on."""
    if answer.status == 404:
        raise NotFound(f"the host does not have file {sha256[:12]}…", "publish the artifact on the host again")
    if answer.status != 206 or not (answer.getheader("Content-Range") or "").startswith(f"bytes {offset}-"):
        raise Unavailable(
            f"the host answered {answer.status} for file {sha256[:12]}… from byte {offset}", "look at the host's log"
        )
    if answer.getheader("Content-Encoding") not in (None, "identity"):
        raise Unavailable("the host sent the file compressed", "is there a proxy in between?")
