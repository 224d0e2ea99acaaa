"""NVIDIA's SD card images of Jetson boards: everything goes into the root file system, because there is no other that the system reads.

The trap: /etc/systemd/system/default.target points to nv-oem-config.target, and until somebody has answered its questions at a screen no
service of multi-user.target starts, ours and ssh's included. So the questions are answered here: the link goes to multi-user.target, and
the user is made at the first boot. The first question is NVIDIA's licence, which a person has to accept: --accept-license. Growing the root
partition belongs to those questions too: NVIDIA's own script does it at the first boot.

Truth: NVIDIA's scripts as other projects quote them (design note boards.md, 2d). Never tried on a real image: none could be had.
"""

from __future__ import annotations

import re
import shlex
import uuid
from pathlib import Path

from joulemark.errors import BadInput
from joulemark_deploy.card import GROUPS, KEY_FILE, UNIT, Card, Wifi
from joulemark_deploy.disk_image import DiskImage

TITLE = "Jetson (NVIDIA's SD card images)"
FOLDER = "/var/lib/joulemark-card"
_DEFAULT = "/etc/systemd/system/default.target"
_UNITS = "/etc/systemd/system"
_RESIZE = "/usr/lib/nvidia/resizefs/nvresizefs.sh"
_LAST_RELEASE = 36
"""Jetson Linux of JetPack 6."""


def recognizes(image: DiskImage) -> bool:
    """Whether the root file system is one of NVIDIA's."""
    root = image.root()
    return root is not None and root.exists("/etc/nv_tegra_release")


def prepare(image: DiskImage, card: Card, release: Path) -> None:
    """Raises BadInput when the licence was not accepted, and what DiskImage raises."""
    root = image.root()
    assert root is not None
    _check_version(root.read("/etc/nv_tegra_release") or b"")
    asks = "oem-config" in (root.link(_DEFAULT) or "")
    if asks and not card.licence_accepted:
        raise BadInput(
            "this image asks questions at its first start, at a screen, and nothing else starts before they are answered",
            "the first is NVIDIA's licence: when you accept it, say --accept-license; the rest is answered for you",
        )
    files = card.files(FOLDER, release, _settings(card), "")
    for name, content in files.items():
        root.write(f"{FOLDER}/{name}", content, 0o600 if name == KEY_FILE else 0o644)
    root.write("/etc/hostname", f"{card.hostname}\n".encode())
    root.write(
        "/etc/hosts",
        f"127.0.0.1 localhost\n127.0.1.1 {card.hostname}\n::1 localhost ip6-localhost ip6-loopback\n".encode(),
    )
    if card.wifi is not None:
        place = "/etc/NetworkManager/system-connections/joulemark.nmconnection"
        root.write(place, _connection(card.wifi).encode(), 0o600)
    root.write(f"{_UNITS}/{UNIT}", files[UNIT])
    root.make_link(f"{_UNITS}/multi-user.target.wants/{UNIT}", f"../{UNIT}")
    if asks:
        root.make_link(_DEFAULT, "/lib/systemd/system/multi-user.target")


def _check_version(text: bytes) -> None:
    """Raises BadInput for JetPack 7 and later, which start in another way (cloud-init)."""
    found = re.match(rb"# R(\d{1,3})\b", text)
    if found is not None and int(found[1]) > _LAST_RELEASE:
        raise BadInput(
            f"this image is of Jetson Linux {int(found[1])}, whose first start is not known here",
            "set it up as NVIDIA says, and then: joulemark install USER@BOARD",
        )


def _settings(card: Card) -> str:
    """Run as root at the first boot, before the agent is installed; again does no harm."""
    lines = [f"if [ -x {_RESIZE} ]; then {_RESIZE} || true; fi"]
    if card.ssh_keys:
        lines += _person(card)
    return "\n".join(lines) + "\n"


def _person(card: Card) -> list[str]:
    home, user = f"/home/{card.user}", shlex.quote(card.user)
    return [
        f"getent passwd {user} >/dev/null || useradd --create-home --shell /bin/bash {user}",
        f"for group in {' '.join(GROUPS)}; do",
        f'    if getent group "$group" >/dev/null; then usermod --append --groups "$group" {user}; fi',
        "done",
        f"install -d -m 0700 -o {user} -g {user} {home}/.ssh",
        f"printf '%s\\n' {shlex.join(card.ssh_keys)} >{home}/.ssh/authorized_keys",
        f"chown {user}: {home}/.ssh/authorized_keys && chmod 0600 {home}/.ssh/authorized_keys",
        f"printf '%s ALL=(ALL) NOPASSWD:ALL\\n' {user} >/etc/sudoers.d/010_{card.user}",
        f"chmod 0440 /etc/sudoers.d/010_{card.user}",
        "ssh-keygen -A",
        "systemctl enable --quiet --now ssh.service || true",
    ]


def _connection(wifi: Wifi) -> str:
    """NetworkManager's own file format, in which a semicolon ends an item and a backslash begins an escape."""
    name = "".join(f"{byte};" for byte in wifi.name.encode())
    return "\n".join(
        [
            "[connection]", "id=joulemark", f"uuid={uuid.uuid4()}", "type=wifi", "",
            "[wifi]", "mode=infrastructure", f"ssid={name}", f"hidden={'true' if wifi.hidden else 'false'}", "",
            "[wifi-security]", "key-mgmt=wpa-psk", f"psk={wifi.key}", "",
            "[ipv4]", "method=auto", "", "[ipv6]", "method=auto", "",
        ]
    )  # fmt: skip
