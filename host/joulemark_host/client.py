"""What the host's commands say to an agent, over HTTP: push an artifact and packs, create a run, watch it, cancel it.

An agent's Problem becomes the matching error of `joulemark.errors`, a silent agent becomes Unavailable. The HTTP
client, the clock and the sleep are passed in. Not aware of the terminal: progress goes to callbacks. Sizes are bytes,
times are seconds.
"""

from __future__ import annotations

import getpass
import logging
import ssl
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from joulemark import errors, tls
from joulemark.errors import BadInput, JoulemarkError, Unavailable, Untrusted
from joulemark.protocol import Challenge, Entry
from joulemark.statements import TicketStatement, write_envelope
from joulemark.wire import ENDED, DeviceFacts, Manifest, Problem, RunSpec, RunState, Sha256, Wire, canonical_json

if TYPE_CHECKING:
    from joulemark_host.identity import HostIdentity
    from joulemark_host.shelf import StoredFile

LOG = logging.getLogger(__name__)
Parsed = TypeVar("Parsed", bound=BaseModel)
Progress = Callable[[int, int], None]
Sleep = Callable[[float], None]
SILENCE_S = 60.0
"""A run is watched on although the agent does not answer for so long: it may be restarting, and runs survive that."""


class _Announced(Wire):
    artifact_id: Sha256
    missing: tuple[Sha256, ...]


class _Health(Wire):
    signed: bool = False


class _FileTransfer(Wire):
    size_bytes: int
    received_bytes: int


class _Transfer(Wire):
    """How far a pull is: the answer to GET /api/artifacts/{id}."""

    complete: bool
    files: tuple[_FileTransfer, ...]
    problem: Problem | None = None


class AgentClient:
    """One agent at `url`, such as https://pi5.local:8090. `host` signs the tickets that let its people in."""

    def __init__(
        self,
        url: str,
        host: HostIdentity | None = None,
        http: httpx.Client | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Sleep = time.sleep,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise BadInput(f"{url!r} is not the address of an agent", "for example http://127.0.0.1:8090")
        self.url = url.rstrip("/")
        self._host = host
        self._token: str | None = None
        self._given = http
        self._http = http or _client(host, None)
        self._clock = clock
        self._sleep = sleep

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def wait_ready(self, timeout_s: float, alive: Callable[[], None] = lambda: None) -> None:
        """Returns once the agent answers, or raises Unavailable; `alive` is called between tries and may raise."""
        deadline = self._clock() + timeout_s
        while True:
            alive()
            try:
                self._ask("GET", "/healthz")
            except Unavailable:
                if self._clock() >= deadline:
                    raise
                self._sleep(0.1)
            else:
                return

    def device(self) -> DeviceFacts:
        """What the board is."""
        return _parsed(DeviceFacts, self._ask("GET", "/api/device").content)

    def push_artifact(
        self,
        artifact_id: str,
        manifest: Manifest,
        file: Callable[[str], StoredFile],
        progress: Progress | None = None,
        order: bytes | None = None,
        limit_rate: float | None = None,
    ) -> int:
        """Brings the artifact to the agent and returns how many of its files were missing there. `order` is the host's signed word for it,
        without which only an open agent takes it.

        The agent pulls from its own host where it has one; where that does not work the files are uploaded from
        `file(sha256)`, with at most `limit_rate` bytes a second. Both resume. Raises what the agent refuses with.
        """
        path, body = ("/api/orders", order) if order is not None else ("/api/artifacts", canonical_json(manifest))
        answer = self._ask("POST", path, content=body).content
        missing = _parsed(_Announced, answer).missing
        if missing and not self._pulled(artifact_id, progress):
            entries = {entry.sha256: entry for entry in manifest.files if entry.sha256 in missing}
            total = sum(entry.size_bytes for entry in entries.values())
            before = 0
            for entry in entries.values():
                self._upload(entry.sha256, file(entry.sha256), before, total, progress, limit_rate)
                before += entry.size_bytes
        return len(missing)

    def push_pack(self, pack_id: str, body: bytes) -> None:
        """Brings a task pack to the agent."""
        self._ask("PUT", f"/api/packs/{pack_id}", content=body)

    def start_run(self, spec: RunSpec, order: bytes | None = None) -> RunState:
        """Creates a run; the agent starts it when it is free. `order` is the host's signed word for it."""
        path, body = ("/api/orders", order) if order is not None else ("/api/runs", spec.model_dump_json().encode())
        return _parsed(RunState, self._ask("POST", path, content=body).content)

    def takes_orders_only(self) -> bool:
        """Whether the agent belongs to a host and takes nothing that its host has not signed."""
        return _parsed(_Health, self._ask("GET", "/healthz").content).signed

    def run_state(self, run_id: str) -> RunState:
        """How far the run is."""
        return _parsed(RunState, self._ask("GET", f"/api/runs/{quote(run_id)}").content)

    def cancel(self, run_id: str) -> None:
        """Asks the agent to stop the run; its record will say so."""
        self._ask("DELETE", f"/api/runs/{quote(run_id)}")

    def record(self, run_id: str) -> bytes:
        """The finished run's record, exactly as the agent reports it to its host."""
        return self._ask("GET", f"/api/runs/{quote(run_id)}/record").content

    def watch(self, run_id: str, on_state: Callable[[RunState], None], poll_s: float = 1.0) -> RunState:
        """Calls `on_state` about every `poll_s` until the run has ended; returns the last state."""
        heard = self._clock()
        while True:
            try:
                state = self.run_state(run_id)
            except Unavailable:
                if self._clock() - heard > SILENCE_S:
                    raise
            else:
                heard = self._clock()
                on_state(state)
                if state.status in ENDED:
                    return state
            self._sleep(poll_s)

    def _pulled(self, artifact_id: str, progress: Progress | None) -> bool:
        """Whether the agent could fetch everything from its host by itself."""
        try:
            self._ask("POST", f"/api/artifacts/{artifact_id}/pull")
        except BadInput:  # it has no host
            return False
        while True:
            status = _parsed(_Transfer, self._ask("GET", f"/api/artifacts/{artifact_id}").content)
            if progress is not None:
                progress(sum(f.received_bytes for f in status.files), sum(f.size_bytes for f in status.files))
            if status.complete:
                return True
            if status.problem is not None:
                LOG.info("the agent's pull failed, the files are uploaded instead: %s", status.problem.message)
                return False
            self._sleep(0.2)

    def _upload(
        self,
        sha256: str,
        file: StoredFile,
        before: int,
        total: int,
        progress: Progress | None,
        limit_rate: float | None,
    ) -> None:
        """Sends the bytes that the agent does not have yet."""
        said = self._ask("HEAD", f"/api/files/{sha256}").headers.get("Upload-Offset", "0")
        offset = int(said) if said.isascii() and said.isdigit() else 0

        def blocks() -> Iterator[bytes]:
            done, began = offset, self._clock()
            for block in file.blocks(offset):
                yield block
                done += len(block)
                if limit_rate is not None:
                    self._sleep(max(0.0, (done - offset) / limit_rate - (self._clock() - began)))
                if progress is not None:
                    progress(before + done, total)

        length = {"Content-Length": str(file.size_bytes - offset)}
        self._ask("PUT", f"/api/files/{sha256}?offset={offset}", content=blocks(), headers=length, timeout=600.0)

    def _enter(self, host: HostIdentity) -> None:
        """Gets a token from the agent for a ticket of the host; from then on the very board that it was for is spoken to."""
        challenge = _parsed(Challenge, self._send("POST", "/api/challenge").content)
        ticket = TicketStatement(
            device_id=challenge.device_id, nonce=challenge.nonce, role="operator", who=getpass.getuser()
        )
        if self._given is None:
            self._http.close()
            self._http = _client(host, challenge.device_id)
        body = write_envelope(host.key.sign(ticket))
        answer = self._send("POST", "/api/entry", content=body)
        if not answer.is_success:
            raise _error_of(answer, f"POST /api/entry at {self.url}")
        self._token = _parsed(Entry, answer.content).token

    def _ask(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        response = self._send(method, path, **arguments)
        if response.status_code == 401 and self._host is not None:
            self._enter(self._host)
            if not isinstance(arguments.get("content"), Iterator):  # a stream is used up: its sender begins again
                response = self._send(method, path, **arguments)
        if response.is_success:
            return response
        raise _error_of(response, f"{method} {path} at {self.url}")

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        headers = {**arguments.pop("headers", {})}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            return self._http.request(method, self.url + path, headers=headers, **arguments)
        except httpx.ConnectError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise Untrusted(
                    f"what answers at {self.url} is no board of this host",
                    "enrol it here first; if it was, somebody stands between",
                ) from error
            raise _silent(self.url, error) from error
        except httpx.TransportError as error:
            raise _silent(self.url, error) from error


def _client(host: HostIdentity | None, device_id: str | None) -> httpx.Client:
    """A client that trusts the host's authority alone: any board of it, or the one with this id."""
    verify: ssl.SSLContext | bool = True
    if host is not None:
        verify = tls.pinned(host.authority_pem, tls.device_name(device_id) if device_id is not None else None)
    timeout = httpx.Timeout(30.0, connect=5.0)
    return httpx.Client(timeout=timeout, follow_redirects=False, trust_env=False, verify=verify)


def _silent(url: str, error: Exception) -> Unavailable:
    why = tls.why_silent(error, url)
    return Unavailable(f"the agent at {url} does not answer: {why}", "is it running? `joulemark agent` starts one")


def _error_of(response: httpx.Response, request: str) -> JoulemarkError:
    try:
        return errors.error_from(Problem.model_validate_json(response.content))
    except ValidationError:
        return Unavailable(f"{request} was answered {response.status_code}", "is that the address of an agent?")


def _parsed(model: type[Parsed], body: bytes) -> Parsed:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise BadInput(
            f"the agent's answer is not a {model.__name__}: {error.error_count()} wrong field(s)",
            "agent and host must be of the same version: compare `joulemark --version` on both",
        ) from error
