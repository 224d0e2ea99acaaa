"""Raspberry Pi OS bookworm: a script on the boot partition that systemd runs once instead of the usual boot.

Truth: raspberrypi-sys-mods (imager_custom, the fix-up for /boot/firstrun.sh, which is not needed for a path that is right) and userconf-pi.
The first start of such an image grows the root partition and restarts; then comes this script, which restarts too. `custom.toml`, the
other way of the same images, can set a name and a network and cannot run anything: one way is enough.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from joulemark_deploy.card import UNIT, Card
from joulemark_deploy.card_formats import _pi_boot
from joulemark_deploy.disk_image import DiskImage

TITLE = "firstrun.sh (Raspberry Pi OS bookworm)"
_HELPER = "/usr/lib/raspberrypi-sys-mods/imager_custom"
_USER_HELPER = "/usr/lib/userconf-pi/userconf"
_NAME = "firstrun.sh"


def recognizes(image: DiskImage) -> bool:
    """Whether the system has Raspberry Pi's helpers and no cloud-init, which would ignore the script's settings."""
    found = _pi_boot.both(image)
    return found is not None and found[1].exists(_HELPER) and not found[1].exists("/etc/cloud/cloud.cfg")


def prepare(image: DiskImage, card: Card, release: Path) -> None:
    """Raises what DiskImage raises."""
    found = _pi_boot.both(image)
    assert found is not None
    boot, root = found
    folder = _pi_boot.put_folder(boot, root, card, release)
    place = _pi_boot.mount_point(root)
    boot.write(f"/{_NAME}", _script(card, folder, place).encode())
    _pi_boot.add_to_command_line(
        boot,
        f"systemd.run={place}/{_NAME}",
        "systemd.run_success_action=reboot",
        "systemd.run_failure_action=reboot",
        "systemd.unit=kernel-command-line.target",
    )


def _script(card: Card, folder: str, place: str) -> str:
    """Each step counts even when one before it failed: a board without Wi-Fi can still be reached by cable."""
    units = "/etc/systemd/system"
    lines = ["#!/bin/sh", "# Written by joulemark flash. Run again after a power cut, it ends the same.", "set -u"]
    lines.append(shlex.join([_HELPER, "set_hostname", card.hostname]))
    if card.ssh_keys:
        # No password fits this one; the key opens.
        lines.append(shlex.join([_USER_HELPER, card.user, "*"]))
        lines.append(shlex.join([_HELPER, "enable_ssh", "-k", *card.ssh_keys]))
    if card.wifi is not None:
        hidden = ["-h"] if card.wifi.hidden else []
        lines.append(shlex.join([_HELPER, "set_wlan", *hidden, card.wifi.name, card.wifi.key, card.wifi.country]))
    lines += [
        f"cp {folder}/{UNIT} {units}/",
        f"mkdir -p {units}/multi-user.target.wants",
        f"ln -sf ../{UNIT} {units}/multi-user.target.wants/{UNIT}",
        "sync",
        rf"sed -i 's| systemd\.[^ ]*||g' {place}{_pi_boot.COMMAND_LINE}",
        f"rm -f {place}/{_NAME}",
        "sync",
        "exit 0",
    ]
    return "\n".join(lines) + "\n"
