"""Serves the host's application on one socket, bound before anything else, so that a port in use changes nothing."""

from __future__ import annotations

import ipaddress
import logging
import resource
import socket
import ssl
import sys
from pathlib import Path
from typing import Any

import psutil
import uvicorn
from fastapi import FastAPI

from joulemark.errors import BadInput, Conflict

LOG = logging.getLogger(__name__)
CONNECTION_LIMIT = 4096
"""A thousand boards wait for orders, each on a connection of its own."""
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]", "::1")


def serve(app: FastAPI, listener: socket.socket, certificate: Path | None = None) -> None:
    """Serves `app` on a bound socket until SIGINT or SIGTERM; with a `certificate` (and its key in the same file) over TLS 1.3."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    address, port = listener.getsockname()[:2]
    scheme = "http" if certificate is None else "https"
    LOG.info("host serves on %s://%s:%s", scheme, f"[{address}]" if ":" in address else address, port)
    _allow_connections()
    config = uvicorn.Config(
        app,
        log_level="warning",
        limit_concurrency=CONNECTION_LIMIT,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
        server_header=False,
        ssl_certfile=certificate,
    )
    config.load()
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    server = uvicorn.Server(config)
    app.state.stopping = lambda: server.should_exit
    server.run(sockets=[listener])


def names_of(address: str) -> tuple[str, ...]:
    """The names under which a host on `address` may be asked for: on loopback only loopback's, against DNS rebinding."""
    return LOOPBACK_NAMES if ipaddress.ip_address(address).is_loopback else ("*",)


def _allow_connections() -> None:
    """Raises this process's own limit of open files as far as the system lets it: many systems begin at 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * CONNECTION_LIMIT
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine reaches the socket."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def own_names(listener: socket.socket) -> tuple[str, ...]:
    """The names and addresses under which browsers may ask for this socket: what its certificate has to hold."""
    address = listener.getsockname()[0]
    names = {"localhost", "127.0.0.1", "::1", socket.gethostname(), address}
    if ipaddress.ip_address(address).is_unspecified:
        names |= {
            str(entry.address) for entries in psutil.net_if_addrs().values() for entry in entries if _is_ip(entry)
        }
    return tuple(sorted(name for name in names if name not in ("0.0.0.0", "::")))


def _is_ip(entry: Any) -> bool:
    """An address that a certificate can hold: no hardware address, none with a zone (fe80::1%eth0)."""
    return entry.family in (socket.AF_INET, socket.AF_INET6) and "%" not in entry.address


def bind(listen: str, known_callers: bool) -> socket.socket:
    """A listening socket on `address:port`; port 0 takes a free one. Raises BadInput, Conflict.

    `known_callers`: every request has to show who asks. Without that only loopback is allowed.
    """
    address, _, port = listen.rpartition(":")
    try:
        parsed = ipaddress.ip_address(address.strip("[]") or "127.0.0.1")
        number = int(port)
        if not 0 <= number < 65536:
            raise ValueError
    except ValueError as error:
        raise BadInput(f"{listen!r} is not an address and a port", "for example --listen 127.0.0.1:8080") from error
    if not parsed.is_loopback and not known_callers:
        raise BadInput(
            f"{parsed} is reachable from other machines, and an open host lets anybody in",
            "listen on 127.0.0.1, or leave --open away after `joulemark host init`",
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
