"""Tells the local network that this agent is here (multicast DNS), so that `joulemark discover` finds it; silent while a run is measured.

Answering the network's questions takes time of its own, so that the announcement is withdrawn before a run and made again after it. What
cannot be announced is logged and tried again: it never keeps an agent from its work. Times are seconds.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from joulemark.discovery import SERVICE, Announcement
from joulemark.errors import MissingExtra

if TYPE_CHECKING:
    from zeroconf import Zeroconf

LOOK_EVERY_S = 2.0
AGAIN_AFTER_S = 60.0
log = logging.getLogger(__name__)


class Announcer:
    """Announces an agent on `address`:`port`. Raises MissingExtra without the zeroconf library. Safe for several threads."""

    def __init__(self, what: Callable[[], Announcement], address: str, port: int, busy: Callable[[], bool]) -> None:
        if importlib.util.find_spec("zeroconf") is None:
            raise MissingExtra("announcing needs zeroconf", "pip install zeroconf, or say --no-announce")
        self._what = what
        self._address = address
        self._port = port
        self._busy = busy
        self._lock = threading.Lock()
        self._open: Zeroconf | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="announcing", daemon=True)

    def start(self) -> None:
        """Begins; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Withdraws the announcement for good."""
        self._stopping.set()
        self.be_quiet()

    def be_quiet(self) -> None:
        """Withdraws the announcement now; it is made again once nothing is measured."""
        with self._lock:
            if self._open is not None:
                self._open.close()  # says goodbye for the service
                self._open = None

    def _loop(self) -> None:
        wait_s = 0.0
        while not self._stopping.wait(wait_s):
            wait_s = LOOK_EVERY_S
            if self._open is None and not self._busy():
                from zeroconf import Error

                try:
                    self._announce()
                except (Error, OSError) as error:
                    log.warning("this agent cannot be announced on the network: %s", error)
                    wait_s = AGAIN_AFTER_S

    def _announce(self) -> None:
        from zeroconf import InterfaceChoice, ServiceInfo, Zeroconf

        said, everywhere = self._what(), ipaddress.ip_address(self._address).is_unspecified
        addresses = _own_addresses() if everywhere else [self._address]
        label = f"{said.name[:40]} ({said.device_id[-16:]})".replace(".", "-")
        info = ServiceInfo(
            SERVICE,
            f"{label}.{SERVICE}",
            port=self._port,
            parsed_addresses=addresses,
            properties=said.entries(),
            server=f"{said.device_id.lower()}.local.",
        )
        with self._lock:
            if self._stopping.is_set() or self._busy():
                return
            opened = Zeroconf(interfaces=InterfaceChoice.All if everywhere else [self._address])
            try:
                opened.register_service(info, allow_name_change=True)
            except BaseException:
                opened.close()
                raise
            self._open = opened


def _own_addresses() -> list[str]:
    """The machine's addresses that others may reach."""
    import psutil  # here: an agent that announces nothing does not pay for it

    found = [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET
    ]
    return [address for address in found if not ipaddress.ip_address(address).is_loopback]
