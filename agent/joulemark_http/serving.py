"""Serving an application with uvicorn: TLS 1.3, and no connection that costs its peer nothing and us a place.

uvicorn waits for ever for a request's headers, for the rest of a body that was refused, and for a peer that does not read its answer. Here
each of these has an end, and of the connections that ask nothing the oldest goes when they take more than half of the places. Times are
in seconds.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

HEADERS_S = 15.0
"""For the headers of a request to arrive, from the connection's beginning or the last answer's end."""
STALLED_S = 120.0
"""For a peer to take anything of its answer."""


class TellingServer(uvicorn.Server):
    """Calls `on_ready` once it takes connections."""

    on_ready: Callable[[], None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.on_ready is not None:
            self.on_ready()


def make_server(app: Any, connections: int, certificate: Path | None = None, key: Path | None = None) -> TellingServer:
    """A server of `app` for at most so many connections; with a `certificate` (whose key is in `key`, or in the same file) over TLS."""
    config = uvicorn.Config(
        app,
        http=BoundedProtocol.of_server(connections // 2),
        ws="none",
        log_level="warning",
        limit_concurrency=connections,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
        server_header=False,
        proxy_headers=False,  # X-Forwarded-For would let whoever is on this machine be somebody else
        ssl_certfile=certificate,
        ssl_keyfile=str(key) if key is not None else None,
    )
    config.load()
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    return TellingServer(config)


def serve(
    app: Any,
    listener: socket.socket,
    connections: int,
    certificate: Path | None,
    key: Path | None,
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM. An application that wants to know when it is ending asks its `state.stopping`."""
    server = make_server(app, connections, certificate, key)
    server.on_ready = on_ready
    app.state.stopping = lambda: server.should_exit
    server.run(sockets=[listener])


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol with deadlines, one for each connection; what a server's connections share is on its own subclass."""

    idle: OrderedDict[BoundedProtocol, asyncio.TimerHandle]
    """The connections that ask nothing, the longest idle first, each with the end of its patience."""
    most_idle: int
    _stall: asyncio.TimerHandle | None = None

    @classmethod
    def of_server(cls, most_idle: int) -> type[BoundedProtocol]:
        """The protocol of one server, of whose connections `most_idle` may ask nothing at the same time."""
        return type("ServersProtocol", (cls,), {"idle": OrderedDict(), "most_idle": most_idle})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_request()

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except UnicodeDecodeError:  # a target that is not ASCII
            self.send_400_response("Invalid HTTP request received.")
        if self._is_answering():
            self._request_is_here()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and not self._is_answering():
            self._wait_for_request()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_stall()

    def connection_lost(self, exc: Exception | None) -> None:
        self._request_is_here()
        self._cancel_stall()
        super().connection_lost(exc)

    def _is_answering(self) -> bool:
        cycle = cast("RequestResponseCycle | None", self.cycle)  # None before the first request, whatever its type says
        return cycle is not None and not cycle.response_complete

    def _wait_for_request(self) -> None:
        self._request_is_here()
        self.idle[self] = self.loop.call_later(HEADERS_S, self.transport.abort)
        if len(self.idle) > self.most_idle:
            oldest, timer = self.idle.popitem(last=False)
            timer.cancel()
            oldest.transport.abort()

    def _request_is_here(self) -> None:
        timer = self.idle.pop(self, None)
        if timer is not None:
            timer.cancel()

    def _watch_reader(self) -> None:
        """Looks again after a while whether the peer has taken anything of what waits for it."""
        waiting = self.transport.get_write_buffer_size()

        def look() -> None:
            if self.transport.get_write_buffer_size() < waiting:
                self._watch_reader()
            else:
                self.transport.abort()

        self._cancel_stall()
        self._stall = self.loop.call_later(STALLED_S, look)

    def _cancel_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
