"""Telling systemd that the agent is ready: only then does `systemctl restart` say that it started, and an update that does not is undone.

Does nothing where no service manager asks. Truth: sd_notify(3).
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

log = logging.getLogger(__name__)


def ready(status: str, environment: Mapping[str, str] = os.environ) -> None:
    """Say READY=1, with words that `systemctl status` shows."""
    place = environment.get("NOTIFY_SOCKET", "")
    if not place:
        return
    # A name that begins with @ is not a file: the kernel wants a zero byte there.
    address = "\0" + place[1:] if place.startswith("@") else place
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.sendto(f"READY=1\nSTATUS={status}".encode(), address)
    except OSError as error:
        log.warning("the service manager cannot be told that the agent is ready: %s", error)
