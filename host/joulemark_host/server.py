"""Serves the host's application on one socket, bound before anything else, so that a port in use changes nothing."""

from __future__ import annotations

import ipaddress
import logging
import socket
import sys

import uvicorn
from fastapi import FastAPI

from joulemark.errors import BadInput, Conflict

LOG = logging.getLogger(__name__)
CONNECTION_LIMIT = 256
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]", "::1")


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serves `app` on a bound socket until SIGINT or SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    address, port = listener.getsockname()[:2]
    LOG.info("host serves on http://%s:%s", f"[{address}]" if ":" in address else address, port)
    config = uvicorn.Config(
        app, log_level="warning", limit_concurrency=CONNECTION_LIMIT, timeout_keep_alive=5, timeout_graceful_shutdown=5
    )
    uvicorn.Server(config).run(sockets=[listener])


def names_of(address: str) -> tuple[str, ...]:
    """The names under which a host on `address` may be asked for: on loopback only loopback's, against DNS rebinding."""
    return LOOPBACK_NAMES if ipaddress.ip_address(address).is_loopback else ("*",)


def bind(listen: str, allow_unauthenticated: bool) -> socket.socket:
    """A listening socket on `address:port`; port 0 takes a free one. Raises BadInput, Conflict."""
    address, _, port = listen.rpartition(":")
    try:
        parsed = ipaddress.ip_address(address.strip("[]") or "127.0.0.1")
        number = int(port)
        if not 0 <= number < 65536:
            raise ValueError
    except ValueError as error:
        raise BadInput(f"{listen!r} is not an address and a port", "for example --listen 127.0.0.1:8080") from error
    if not parsed.is_loopback and not allow_unauthenticated:
        raise BadInput(
            f"{parsed} is reachable from other machines and this host has no authentication yet",
            "listen on 127.0.0.1, or say --allow-unauthenticated on a network that you trust",
        )
    listener = socket.socket(socket.AF_INET6 if parsed.version == 6 else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((str(parsed), number))
        listener.listen(CONNECTION_LIMIT)
    except OSError as error:
        listener.close()
        raise Conflict(
            f"cannot listen on {listen}: {error.strerror}", "choose another port with --listen, or stop what uses it"
        ) from error
    return listener
