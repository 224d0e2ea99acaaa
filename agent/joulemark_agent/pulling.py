"""Fetches an artifact's missing files from the host in the background: Range requests, so a cut transfer goes on where it stopped.

The host's address is fixed when the agent starts and redirects are not followed, so a request can never send the agent elsewhere.
Not aware of what the files are; the store verifies them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import httpx

from joulemark.errors import BadInput, JoulemarkError, NotFound, Unavailable, to_problem
from joulemark.wire import Problem
from joulemark_agent.host_link import HostLink
from joulemark_agent.store import Store

CHUNK_BYTES = 256 * 1024
TRIES = 5
PAUSE_POLL_S = 1.0

log = logging.getLogger(__name__)


class Puller:
    """At most one transfer at a time; others wait. `paused` says when not to disturb (a run is measured)."""

    def __init__(self, store: Store, link: HostLink | None, paused: Callable[[], bool]) -> None:
        self._store = store
        self._link = link
        self._paused = paused
        self._problems: dict[str, Problem] = {}
        self._wanted: list[str] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, artifact_id: str) -> None:
        """Queue a pull. Raises NotFound for an artifact whose manifest is not here, BadInput without a host."""
        if self._link is None:
            raise BadInput("this agent has no host to pull from", "enrol it, or upload the files")
        self._store.manifest_of(artifact_id)
        with self._lock:
            self._problems.pop(artifact_id, None)
            if artifact_id not in self._wanted:
                self._wanted.append(artifact_id)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="puller", daemon=True)
                self._thread.start()

    def active(self, artifact_id: str) -> bool:
        """Whether this artifact is being fetched or waits for its turn."""
        with self._lock:
            return artifact_id in self._wanted

    def problem(self, artifact_id: str) -> Problem | None:
        """Why the last pull failed, if it did."""
        with self._lock:
            return self._problems.get(artifact_id)

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
            except (JoulemarkError, OSError) as error:
                log.warning("pull of %s failed: %s", artifact_id[:12], error)
                with self._lock:
                    self._problems[artifact_id] = to_problem(error)
            with self._lock:
                self._wanted.remove(artifact_id)

    def _pull(self, artifact_id: str) -> None:
        assert self._link is not None
        with self._link.client() as client:
            for attempt in range(TRIES):
                try:
                    self._store.pull(artifact_id, lambda sha256, offset: self._fetch(client, sha256, offset))
                    return
                except Unavailable:
                    if attempt == TRIES - 1 or self._stopping.wait(0.5 * 2**attempt):
                        raise

    def _fetch(self, client: httpx.Client, sha256: str, offset: int) -> Iterator[bytes]:
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        try:
            with client.stream("GET", f"/api/files/{sha256}", headers=headers) as response:
                if response.status_code == 404:
                    raise NotFound(
                        f"the host does not have file {sha256[:12]}…", "publish the artifact on the host again"
                    )
                if response.status_code != (206 if offset else 200):
                    raise Unavailable(
                        f"the host answered {response.status_code} for file {sha256[:12]}…", "look at the host's log"
                    )
                for chunk in response.iter_bytes(CHUNK_BYTES):
                    self._wait_while_paused()
                    yield chunk
        except httpx.HTTPError as error:
            raise Unavailable(f"the host cannot be reached: {error}", "the transfer resumes when it is back") from error

    def _wait_while_paused(self) -> None:
        while self._paused() and not self._stopping.wait(PAUSE_POLL_S):
            pass
        if self._stopping.is_set():
            raise Unavailable("the agent is stopping", "the transfer resumes at the next start")
