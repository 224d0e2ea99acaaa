"""cloud-init with its seed on the boot partition: Raspberry Pi OS since trixie (late 2025), Ubuntu for Raspberry Pi.

Truth: cloud-init's NoCloud data source and network-config version 2; Raspberry Pi's `enable_ssh`. JSON is YAML, and quotes everything.
`bootcmd` runs at every boot and only starts our unit: `runcmd` runs once in a board's life, even when the power goes in the middle of it.
So do the modules that make the user, the ssh keys and the network, and none of them waits for the disk: after a power cut their files are
empty and they think themselves done. Until the unit has come to its end, each boot therefore has them run again. The unit waits until
cloud-init has ended, and switches it off when the agent is there: the settings that it made stay.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from joulemark_deploy.card import FOLDER, GROUPS, UNIT, Card
from joulemark_deploy.card_formats import _pi_boot
from joulemark_deploy.disk_image import DiskImage

TITLE = "cloud-init (Raspberry Pi OS trixie, Ubuntu)"
_RUN_UNITS = "/run/systemd/system"
SEED = ("/user-data", "/meta-data", "/network-config")


def recognizes(image: DiskImage) -> bool:
    """Whether cloud-init is installed, and looks for its seed on the boot partition."""
    found = _pi_boot.both(image)
    if found is None:
        return False
    boot, root = found
    return root.exists("/etc/cloud/cloud.cfg") and any(boot.read(name) is not None for name in SEED)


def prepare(image: DiskImage, card: Card, release: Path) -> None:
    """Raises what DiskImage raises."""
    found = _pi_boot.both(image)
    assert found is not None
    boot, root = found
    folder = _pi_boot.put_folder(boot, root, card, release)
    # cloud-init reads its seed anew when this is another machine than before.
    instance = f"joulemark-{secrets.token_hex(6)}"
    # first_boot.sh takes these away, and switches cloud-init off first.
    boot.write(f"/{FOLDER}/cloud-init", "".join(f"{name}\n" for name in SEED).encode())
    boot.write("/meta-data", _yaml({"instance-id": instance, "local-hostname": card.hostname}))
    boot.write("/network-config", _yaml(_network(card)))
    boot.write("/user-data", b"#cloud-config\n" + _yaml(_user_data(card, folder)))
    _pi_boot.add_to_command_line(boot, f"ds=nocloud;i={instance}")


def _yaml(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _user_data(card: Card, folder: str) -> dict[str, Any]:
    begin = [
        f"[ -e {folder}/{UNIT} ] || exit 0",
        "rm -f /var/lib/cloud/instance/sem/config_*",
        f"mkdir -p {_RUN_UNITS}",
        f"cp {folder}/{UNIT} {_RUN_UNITS}/",
        "systemctl daemon-reload",
        f"systemctl start --no-block {UNIT}",
    ]
    content: dict[str, Any] = {
        "hostname": card.hostname,
        "manage_etc_hosts": True,
        "ssh_pwauth": False,
        "bootcmd": [["sh", "-c", "; ".join(begin)]],
    }
    if card.ssh_keys:
        content["enable_ssh"] = True
        content["users"] = [
            {
                "name": card.user,
                "groups": ",".join(GROUPS),
                "shell": "/bin/bash",
                "lock_passwd": True,
                "sudo": "ALL=(ALL) NOPASSWD:ALL",
                "ssh_authorized_keys": list(card.ssh_keys),
            }
        ]
    return content


def _network(card: Card) -> dict[str, Any]:
    # Waiting for a cable that is not there would hold up every boot.
    network: dict[str, Any] = {
        "version": 2,
        "ethernets": {"wired": {"match": {"name": "e*"}, "dhcp4": True, "optional": True}},
    }
    if card.wifi is not None:
        point: dict[str, Any] = {"password": card.wifi.key}
        if card.wifi.hidden:
            point["hidden"] = True
        network["wifis"] = {
            "wlan0": {
                "dhcp4": True,
                "optional": True,
                "regulatory-domain": card.wifi.country,
                "access-points": {card.wifi.name: point},
            }
        }
    return {"network": network}
