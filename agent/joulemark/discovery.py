"""What an agent tells the local network by multicast DNS, and what may be read out of it: hints, never trust.

Anybody on the network can announce anything: what is found is shown, with the fingerprint to compare, and nothing is done because of it.
The text entries are short and bounded. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from joulemark.plain_text import printable

SERVICE = "_joulemark._tcp.local."
_LONGEST = 80


@dataclass(frozen=True)
class Announcement:
    """What an agent says of itself. `host` is the beginning of its host's fingerprint, empty for an agent without a host."""

    device_id: str
    name: str
    version: str
    tls: bool
    host: str

    def entries(self) -> dict[str, str]:
        """As the service's text entries."""
        texts = {"id": self.device_id, "name": self.name, "version": self.version, "host": self.host}
        return {key: text.encode()[:_LONGEST].decode(errors="ignore") for key, text in texts.items()} | {
            "tls": "1" if self.tls else "0"
        }


def read_entries(entries: Mapping[bytes, bytes | None]) -> Announcement:
    """What somebody announced, made printable; what is missing or no text is empty."""

    def text(key: bytes) -> str:
        return printable((entries.get(key) or b"")[:_LONGEST].decode("utf-8", errors="replace"))

    return Announcement(
        device_id=text(b"id"), name=text(b"name"), version=text(b"version"), tls=text(b"tls") == "1", host=text(b"host")
    )
