"""Serves the host's application on one socket, over TLS for everybody who is not on this machine."""

from __future__ import annotations

import ipaddress
import logging
import resource
import socket
import sys
from pathlib import Path
from typing import Any

import psutil
from fastapi import FastAPI

from joulemark.errors import BadInput
from joulemark_http import listening, serving

LOG = logging.getLogger(__name__)
CONNECTION_LIMIT = 4096
"""A thousand boards wait for orders, each on a connection of its own."""
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]", "::1")
_OPEN = BadInput(
    "{address} is reachable from other machines, and an open host lets anybody in",
    "listen on 127.0.0.1, or leave --open away after `joulemark host init`",
)


def bind(listen: str, known_callers: bool) -> socket.socket:
    """A listening socket. `known_callers`: every request has to show who asks; without that only loopback is allowed.

    Raises BadInput, Conflict.
    """
    return listening.bind(listen, CONNECTION_LIMIT, None if known_callers else _OPEN)


def serve(app: FastAPI, listener: socket.socket, certificate: Path | None = None) -> None:
    """Serves `app` on a bound socket until SIGINT or SIGTERM; with a `certificate` (and its key in the same file) over TLS 1.3."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    LOG.info("host serves on %s", listening.address_of(listener, "http" if certificate is None else "https"))
    _allow_connections()
    serving.serve(app, listener, CONNECTION_LIMIT, certificate, None)


def names_of(address: str) -> tuple[str, ...]:
    """The names under which a host on `address` may be asked for: on loopback only loopback's, against DNS rebinding."""
    return LOOPBACK_NAMES if ipaddress.ip_address(address).is_loopback else ("*",)


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


def _allow_connections() -> None:
    """Raises this process's own limit of open files as far as the system lets it: many systems begin at 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * CONNECTION_LIMIT
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
