"""What makes this very board: a digest of numbers that a copied card does not carry along.

A card copied to a second board brings keys and identity with it, so that the host compares this digest. The first that there is counts: the
board's serial number (Raspberry Pi, Jetson: /proc/device-tree), the addresses of its built-in network ports, the mainboard's UUID (root
only). The digest is salted with the board's own key: it tells nobody the serial number. /etc/machine-id is on the card and says nothing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from joulemark.statements import PublicKey
from joulemark_agent.sysfs import Roots, Unreadable, read_text

_NO_SERIAL = {"", "0", "none", "not specified", "to be filled by o.e.m.", "default string"}


def digest(roots: Roots, public_key: PublicKey) -> str | None:
    """sha256 (hex) of what was found and the salt; None where nothing tells boards apart (containers, some virtual machines)."""
    found = _serial(roots) or _built_in_ports(roots) or _mainboard(roots)
    return hashlib.sha256(f"{public_key} {found}".encode()).hexdigest() if found else None


def _serial(roots: Roots) -> str | None:
    return _stated(roots.proc / "device-tree" / "serial-number")


def _built_in_ports(roots: Roots) -> str | None:
    """Hardware addresses of ports that are soldered on: those of USB sticks come and go."""
    addresses: list[str] = []
    for port in sorted((roots.sys / "class" / "net").glob("*")):
        device = port / "device"
        if not device.exists() or "/usb" in str(device.resolve()):
            continue
        assigned = read_text(port / "addr_assign_type")
        # "0": the address is the hardware's own, neither random nor set by somebody; old kernels do not say
        if (isinstance(assigned, Unreadable) or assigned == "0") and (address := _stated(port / "address")):
            addresses.append(address)
    return " ".join(addresses) or None


def _mainboard(roots: Roots) -> str | None:
    return _stated(roots.sys / "class" / "dmi" / "id" / "product_uuid")


def _stated(path: Path) -> str | None:
    text = read_text(path)
    if isinstance(text, Unreadable):
        return None
    clean = text.strip().strip("\0")
    return None if clean.lower() in _NO_SERIAL else clean
