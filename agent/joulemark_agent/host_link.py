"""The way to the host: its address, whom to trust there, and what to show. Everything that speaks to the host takes its client from here.

Plain HTTP is for loopback only; else TLS with the host's own authority pinned, so that neither the address nor a public authority matters.
No redirect is followed and no proxy of the environment used: a request goes to the host that was configured and nowhere else.
"""

from __future__ import annotations

import http.client
import ipaddress
import ssl
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import httpx
from pydantic import ValidationError

from joulemark import tls
from joulemark.errors import BadInput, JoulemarkError, Unavailable, error_from
from joulemark.packs import MAX_PACK_BYTES
from joulemark.protocol import INSTANCE_HEADER
from joulemark.wire import Problem, Sha256

CONNECT_TIMEOUT_S = 10.0
_MOST_QUOTED_BYTES = 200


@dataclass(frozen=True)
class HostLink:
    """See the module. Without `credential` it speaks to an open host (a trial on loopback)."""

    url: str
    credential: str | None = field(default=None, repr=False)
    instance_id: str = ""
    authority_pem: str | None = field(default=None, repr=False)

    def client(self, timeout_s: float = 30.0, transport: httpx.BaseTransport | None = None) -> httpx.Client:
        """A client for the host; `timeout_s` bounds each wait for the other side, not a whole transfer.
        `transport` replaces the network in tests."""
        return httpx.Client(
            base_url=self.url,
            headers=self.headers,
            timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
            verify=self._context if self.authority_pem is not None else True,
            follow_redirects=False,
            trust_env=False,
            transport=transport,
        )

    @property
    def headers(self) -> dict[str, str]:
        """What every request shows."""
        if self.credential is None:
            return {}
        return {"Authorization": f"Bearer {self.credential}", INSTANCE_HEADER: self.instance_id}

    @property
    def path(self) -> str:
        """What stands before every path, for a host behind another server; mostly empty."""
        return httpx.URL(self.url).path.rstrip("/")

    def bulk(self, timeout_s: float = 30.0) -> http.client.HTTPConnection:
        """A connection of the standard library for large bodies, with the same trust as `client`."""
        url = httpx.URL(self.url)
        if url.scheme == "http":
            return http.client.HTTPConnection(url.host, url.port or 80, timeout=timeout_s)
        context = self._context if self.authority_pem is not None else None
        return http.client.HTTPSConnection(url.host, url.port or 443, timeout=timeout_s, context=context)

    def pack(self, pack_id: Sha256) -> bytes:
        """A task pack's bytes, unchecked. Raises NotFound, Unavailable, BadInput for one that is too large."""
        with self.client() as client:
            answer, _ = exchange(client, "GET", f"/api/packs/{pack_id}", MAX_PACK_BYTES + 1)
        if len(answer) > MAX_PACK_BYTES:
            raise BadInput(f"pack {pack_id[:12]}… is larger than {MAX_PACK_BYTES} bytes", "publish a smaller one")
        return answer

    @cached_property
    def _context(self) -> ssl.SSLContext:
        assert self.authority_pem is not None
        return tls.pinned(self.authority_pem, tls.HOST_NAME)


def exchange(
    client: httpx.Client,
    method: str,
    path: str,
    limit: int,
    whom: str = "the host",
    hint: str = "it is tried again",
    **arguments: Any,
) -> tuple[bytes, httpx.Response]:
    """One request: at most `limit` bytes of its answer, and the answer's status and headers. Raises what was refused, Unavailable when
    nobody answers: then `whom` and `hint` tell people who, and what to do."""
    try:
        with client.stream(method, path, **arguments) as response:
            answer = bounded(response, limit)
    except httpx.HTTPError as error:
        raise Unavailable(f"{whom} cannot be reached: {tls.why_silent(error, str(client.base_url))}", hint) from error
    if not response.is_success:
        raise error_of(answer, response.status_code)
    return answer, response


def bounded(response: httpx.Response, limit: int) -> bytes:
    """At most `limit` bytes of an answer, undecoded: a small compressed body could unpack to a huge one."""
    kept = b""
    for chunk in response.iter_raw(min(limit, 65536)):
        kept += chunk
        if len(kept) >= limit:
            break
    return kept[:limit]


def error_of(answer: bytes, status: int) -> JoulemarkError:
    """What the host refused with, as the error that it was there."""
    try:
        return error_from(Problem.model_validate_json(answer))
    except ValidationError:
        said = " ".join(answer[:_MOST_QUOTED_BYTES].decode("ascii", "replace").split())
        quoted = f": {said}" if said.isprintable() and said and not said.startswith("<") else ""
        return Unavailable(f"the host answered {status}{quoted}", "is that the address of a Joulemark host?")


def checked_url(text: str) -> str:
    """A host's address without its trailing slash. Raises BadInput for anything else, and for plain HTTP beyond loopback."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise _no_host(text) from error
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise _no_host(text)
    if url.scheme == "http" and not _is_loopback(url.host):
        raise BadInput(
            f"{text[:200]!r} is plain HTTP to another machine", "a host beyond loopback speaks TLS: write https://"
        )
    return text.rstrip("/")


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _no_host(text: str) -> BadInput:
    return BadInput(f"{text[:200]!r} is no address of a host", "for example https://192.168.1.10:8443")
