"""The host as a sink: PUT {host}/api/records/{run_id} with the record as JSON.

No redirect is followed and no proxy of the environment is used, so that a record goes to the host that was configured
and nowhere else; of a reply at most 64 KiB are read. A record counts as delivered only when the reply names its run: a
captive portal or another program on that port also answers 200, and a record must not be lost to it. Not aware of
queues.

Statuses that speak about the record itself end its attempts; all others (not found, not authorised, too many requests)
speak about the host or the way to it, which a person may put right: the record is kept and tried again.
"""

from __future__ import annotations

import json
import urllib.parse
from email.utils import parsedate_to_datetime

import httpx

from joulemark.errors import BadInput, Conflict
from joulemark.protocol import SIGNATURE_HEADER
from joulemark.statements import to_base64, write_envelope
from joulemark_agent.host_link import HostLink, bounded, checked_url
from joulemark_agent.sinks import Options, Sink, SinkUnavailable, Vouch

REPLY_BYTES = 64 * 1024
REFUSED = frozenset({400, 413, 415, 422})
"""Malformed, too large, not JSON, not a record."""


class _HttpSink:
    def __init__(self, client: httpx.Client, host: str, vouch: Vouch | None) -> None:
        self._client = client
        self._host = host
        self._vouch = vouch

    def put(self, run_id: str, body: bytes) -> None:
        path = f"/api/records/{urllib.parse.quote(run_id, safe='')}"
        headers = {"Content-Type": "application/json"}
        if self._vouch is not None:
            headers[SIGNATURE_HEADER] = to_base64(write_envelope(self._vouch(run_id, body)))
        try:
            with self._client.stream("PUT", f"{self._host}{path}", content=body, headers=headers) as response:
                reply = bounded(response, REPLY_BYTES)
        except httpx.HTTPError as error:
            raise SinkUnavailable(
                f"the host {self._host} cannot be reached: {str(error) or type(error).__name__}",
                "records are kept and sent when it is back",
            ) from error
        self._judge(run_id, response, reply)

    def _judge(self, run_id: str, response: httpx.Response, reply: bytes) -> None:
        status, said = response.status_code, _message(reply)
        if response.is_success:
            if _field(reply, "run_id") != run_id:
                raise SinkUnavailable(
                    f"{self._host} answered {status} but is no Joulemark host: {said}",
                    "check --host-url and what listens there",
                    answered=True,
                )
            return
        if status == 409 and _field(reply, "code") in (None, Conflict.code):
            raise Conflict(f"the host has another record of run {run_id}: {said}", "a run has one record: look at both")
        if status in REFUSED:
            raise BadInput(f"the host refuses the record of run {run_id} ({status}): {said}", "update host and agent")
        raise SinkUnavailable(
            f"the host {self._host} answered {status}: {said}",
            "look at the host's log, and check --host-url",
            retry_after_s=_retry_after(response),
            answered=True,
        )

    def close(self) -> None:
        self._client.close()


def open_sink(options: Options, transport: httpx.BaseTransport | None = None) -> Sink:
    """A sink for the host at `options.target` (http or https). `transport` replaces the network in tests."""
    target = checked_url(options.target)
    link = options.link or HostLink(target)
    return _HttpSink(link.client(options.timeout_s, transport), target, options.vouch)


def _field(reply: bytes, name: str) -> object:
    try:
        parsed = json.loads(reply)
    except (ValueError, RecursionError):
        return None
    return parsed.get(name) if isinstance(parsed, dict) else None


def _message(reply: bytes) -> str:
    """What the host said, on one line: its Problem's message, or the beginning of its reply."""
    message = _field(reply, "message")
    text = message if isinstance(message, str) else reply.decode("utf-8", "replace")
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split())[:300] or "no text"


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds of Retry-After: a number, or a date against the reply's own Date (a board's clock may be years off)."""
    value = response.headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:12])
    try:
        wait = parsedate_to_datetime(value) - parsedate_to_datetime(response.headers["date"])
    except (KeyError, TypeError, ValueError):
        return None
    return max(0.0, wait.total_seconds())
