"""Carrying out a stick's orders on this board, for boards without any network: the running agent is asked over its own interface.

The agent takes from a stick what it would take from its host: orders that its host signed for it, files and packs that are what their
digests say. Done again, it goes on where it stopped. Not aware of how the stick was written. Sizes are bytes, times seconds.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import ValidationError

from joulemark import tls
from joulemark.bundles import Bundle, Result
from joulemark.errors import BadInput, Conflict, JoulemarkError, NotFound, Unavailable
from joulemark.packs import MAX_PACK_BYTES
from joulemark.protocol import SIGNATURE_HEADER
from joulemark.statements import Envelope, FetchOrder, RunOrder, from_base64, read_envelope
from joulemark.wire import ENDED, FileEntry, RunSpec, RunState
from joulemark_agent.host_link import checked_url, exchange
from joulemark_agent.identity import Identity

LOOK_EVERY_S = 3.0
ANSWER_BYTES = 256 << 20
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Order:
    """One order of a stick, as far as it can be read without believing it."""

    number: int
    envelope: Envelope
    spec: RunSpec | None
    files: tuple[FileEntry, ...]


class LocalAgent:
    """The agent that runs on this board, at `url`, asked with the token in its folder. Use as a context."""

    def __init__(self, who: Identity, url: str, token: str) -> None:
        verify: ssl.SSLContext | bool = True
        if who.membership is not None and url.startswith("https:"):
            verify = tls.pinned(who.membership.host.authority_pem, tls.device_name(who.device_id))
        headers = {"Authorization": f"Bearer {token}"}
        url = checked_url(url)  # the token goes nowhere in the clear but to this machine
        self._http = httpx.Client(base_url=url, headers=headers, timeout=120, verify=verify, trust_env=False)
        self._url = url

    def __enter__(self) -> LocalAgent:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def ask(self, method: str, path: str, **arguments: Any) -> tuple[bytes, httpx.Headers]:
        """An answer's bytes and headers. Raises what the agent refuses with, Unavailable when there is none."""
        hint = "start it (`joulemark agent`), or say its address with --agent"
        body, response = exchange(self._http, method, path, ANSWER_BYTES, f"the agent {self._url}", hint, **arguments)
        return body, response.headers


def read_orders(bundle: Bundle, who: Identity) -> list[Order]:
    """The stick's orders by number. Raises BadInput for another board's stick, NotFound for one that has no orders."""
    facts = bundle.facts()
    if facts.device_id != who.device_id:
        raise BadInput(
            f"this stick is for the board {facts.device!r} ({facts.device_id})", f"this board is {who.device_id}"
        )
    found: list[Order] = []
    for number, envelope in bundle.orders():
        try:
            if envelope.payload_type == RunOrder.TYPE:
                spec = RunOrder.model_validate_json(envelope.body()).spec
                found.append(Order(number, envelope, spec, ()))
            else:
                files = FetchOrder.model_validate_json(envelope.body()).manifest.files
                found.append(Order(number, envelope, None, files))
        except ValueError as error:
            raise BadInput(f"order {number} on this stick cannot be read", "make the bundle anew") from error
    if not found:
        raise NotFound("there are no orders on this stick", "`joulemark export-bundle` writes them")
    return found


def bring(agent: LocalAgent, bundle: Bundle, orders: list[Order], progress: Progress) -> None:
    """Gives the agent the stick's packs, orders and files. `progress(done, total)` counts the files' bytes."""
    for pack_id in dict.fromkeys(order.spec.pack_id for order in orders if order.spec is not None):
        agent.ask("PUT", f"/api/packs/{pack_id}", content=bundle.read_pack(pack_id, MAX_PACK_BYTES))
    total = sum(entry.size_bytes for order in orders for entry in order.files)
    done = 0
    for order in orders:
        agent.ask("POST", "/api/orders", content=order.envelope.model_dump_json(by_alias=True))
        for entry in order.files:
            _bring_file(agent, bundle, entry, lambda sent, before=done: progress(before + sent, total))
            done += entry.size_bytes
            progress(done, total)


def collect(agent: LocalAgent, bundle: Bundle, orders: list[Order], watch: Callable[[str, str], None]) -> int:
    """Waits for the runs and puts each record on the stick as soon as it is there; how many are there then.

    `watch(run id, words)` hears how each run stands.
    """
    waiting = {order.number: order.spec.run_id for order in orders if order.spec is not None}
    there = len(waiting)
    while waiting:
        for number, run_id in tuple(waiting.items()):
            status = _status(agent, run_id)
            watch(run_id, status)
            if status in ENDED and _keep(agent, bundle, number, run_id):
                del waiting[number]
        if waiting:
            time.sleep(LOOK_EVERY_S)
    return there


def _status(agent: LocalAgent, run_id: str) -> str:
    try:
        return RunState.model_validate_json(agent.ask("GET", f"/api/runs/{run_id}")[0]).status
    except NotFound:
        return "waits for its model (if it never comes: export-bundle --with-models)"
    except ValidationError as error:
        raise Unavailable(
            "what answers is no agent of this version", "is --agent the address of this board's?"
        ) from error


def _keep(agent: LocalAgent, bundle: Bundle, number: int, run_id: str) -> bool:
    if bundle.has_result(number):
        return True
    body, headers = agent.ask("GET", f"/api/runs/{run_id}/record")
    signature = headers.get(SIGNATURE_HEADER)
    if signature is None:
        raise Unavailable("the agent did not sign the record", "is it the agent of this board, and enrolled?")
    bundle.write_result(Result(number, body, read_envelope(from_base64(signature))))
    return True


def _bring_file(agent: LocalAgent, bundle: Bundle, entry: FileEntry, progress: Callable[[int], None]) -> None:
    there = bundle.size(entry.sha256)
    if there != entry.size_bytes:
        raise BadInput(
            f"{bundle.file(entry.sha256)} has {there} bytes of {entry.size_bytes}: the copy was cut",
            "`joulemark export-bundle` once more, and let the stick finish before it is pulled out",
        )
    for _ in range(5):
        offset = int(agent.ask("HEAD", f"/api/files/{entry.sha256}")[1].get("Upload-Offset", "0"))
        if offset >= entry.size_bytes:
            return

        def pieces(offset: int = offset) -> Iterator[bytes]:
            done = offset
            for block in bundle.blocks(entry.sha256, offset):
                yield block
                done += len(block)
                progress(done)

        length = {"Content-Length": str(entry.size_bytes - offset)}
        try:
            agent.ask("PUT", f"/api/files/{entry.sha256}?offset={offset}", content=pieces(), headers=length)
        except Conflict:  # it came from elsewhere meanwhile
            continue
        return
    raise JoulemarkError(f"file {entry.sha256[:12]}… is not taken", "something else sends it too: try again later")
