"""Agents on the local network, as they announce themselves. Finding never trusts: what is shown is a claim until a certificate proves it.

Sends questions by multicast DNS and nothing else; a board of this host is then asked for its certificate, to which no secret is shown.
Times are seconds.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from joulemark import tls
from joulemark.discovery import SERVICE, Announcement, read_entries
from joulemark.errors import MissingExtra
from joulemark_host.identity import HostIdentity

MOST = 1000
MOST_ADDRESSES = 4
PROOF_S = 3.0
Standing = Literal["proven", "claims to be of this host", "of another host", "no host yet"]


@dataclass(frozen=True)
class Found:
    """One agent. `known_as` is the name of the board here that it says it is."""

    said: Announcement
    url: str
    standing: Standing
    known_as: str | None

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return vars(self.said) | {"url": self.url, "standing": self.standing, "known_as": self.known_as}


def discover(
    seconds: float,
    identity: HostIdentity | None,
    names: dict[str, str],
    interfaces: Sequence[str] | None = None,
    heard: Callable[[int], None] = lambda _: None,
) -> list[Found]:
    """What answers within so many seconds, by name. `names` are the names of this host's boards by id; `interfaces` are addresses of this
    machine (default: all). Raises MissingExtra."""
    try:
        from zeroconf import DNSQuestionType, InterfaceChoice, ServiceBrowser, ServiceStateChange, Zeroconf
    except ModuleNotFoundError as error:
        raise MissingExtra("finding boards needs zeroconf", "pip install zeroconf") from error
    seen: set[str] = set()
    lock = threading.Lock()

    def changed(zeroconf: Any, service_type: str, name: str, state_change: Any) -> None:
        with lock:
            if state_change is ServiceStateChange.Removed:
                seen.discard(name)
            elif len(seen) < MOST:
                seen.add(name)
            heard(len(seen))

    asked = Zeroconf(interfaces=list(interfaces) if interfaces else InterfaceChoice.All)
    try:
        # An answer for this socket alone would reach any of those here that share its port (an agent's, avahi's): it is to go to all.
        ServiceBrowser(asked, SERVICE, handlers=[changed], question_type=DNSQuestionType.QM)
        time.sleep(seconds)
        with lock:
            labels = sorted(seen)
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(partial(_look, asked, identity=identity, names=names), labels))
    finally:
        asked.close()
    return sorted((one for one in found if one is not None), key=lambda one: (one.said.name, one.url))


def _look(asked: Any, name: str, identity: HostIdentity | None, names: dict[str, str]) -> Found | None:
    from zeroconf import DNSQuestionType

    info = asked.get_service_info(SERVICE, name, timeout=1500, question_type=DNSQuestionType.QM)
    if info is None or not info.port:
        return None
    addresses = info.parsed_addresses()
    if not addresses:
        return None
    said = read_entries(info.properties)
    address, standing = _standing(said, addresses, info.port, identity)
    shown = f"[{address}]" if ":" in address else address
    url = f"{'https' if said.tls else 'http'}://{shown}:{info.port}"
    return Found(said, url, standing, names.get(said.device_id))


def _standing(
    said: Announcement, addresses: Sequence[str], port: int, identity: HostIdentity | None
) -> tuple[str, Standing]:
    """Which of the addresses to show, and how the agent stands. Only the very address that proved itself is called proven: whoever
    announces may name several, also somebody else's."""
    first = addresses[0]
    if not said.host:
        return first, "no host yet"
    if identity is None or not identity.fingerprint.startswith(said.host):
        return first, "of another host"
    for address in addresses[:MOST_ADDRESSES] if said.tls else ():
        if _proves(address, port, said.device_id, identity):
            return address, "proven"
    return first, "claims to be of this host"


def _proves(address: str, port: int, device_id: str, identity: HostIdentity) -> bool:
    """Whether what listens there has this board's certificate by this host's authority, and its key."""
    context = tls.pinned(identity.authority_pem, tls.device_name(device_id))
    try:
        with socket.create_connection((address, port), timeout=PROOF_S) as connection:
            connection.settimeout(PROOF_S)
            with context.wrap_socket(connection):
                return True
    except (OSError, ssl.SSLError, ValueError):
        return False
