"""cloud-init with its seed on the boot partition: Raspberry Pi OS since trixie (late 2025), Ubuntu for Raspberry Pi.

Truth: cloud-init's NoCloud data source and network-config version 2; Raspberry Pi's `enable_ssh`. JSON is YAML, and quotes everything.
`bootcmd` runs at every boot and only starts our unit: `runcmd` runs once in a board's life, even when the power goes in the middle of it.
So do the modules that make the user, the ssh keys and the network, and none of them waits for the disk: after a power cut their files are
empty and they think themselves done. Until the unit has come to its end, each boot therefore has them run again. The unit waits until
cloud-init has ended, and switches it off when the agent is there: the settings that it made stay.

Raspberry Pi OS asks for a user's name at a screen (userconfig.service, before multi-user.target, which cloud-init's end waits for), even
where nobody sits: it is answered here. Its radio is off until a country is set; the hook that does so differs between its releases, so it
is set on the kernel's command line too. On some of them `enable_ssh` does nothing, and an empty file named ssh does.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from joulemark_deploy.card import FOLDER, GROUPS, UNIT, Card
from joulemark_deploy.card_formats import _pi_boot
from joulemark_deploy.disk_image import DiskImage

TITLE = "cloud-init (Raspberry Pi OS trixie, Ubuntu 24.04)"
_RUN_UNITS = "/run/systemd/system"
SEED = ("/user-data", "/meta-data", "/network-config")
_SSH = "/ssh"
_WIZARD = "userconfig.service"


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
    # Name, user and network are cloud-init's work, and it must not be switched off in the middle of it.
    folder = _pi_boot.put_folder(boot, root, card, release, _settings(card), "cloud-final.service")
    # cloud-init reads its seed anew when this is another machine than before.
    instance = f"joulemark-{secrets.token_hex(6)}"
    # first_boot.sh takes these away, and switches cloud-init off first.
    taken = (*SEED, _SSH) if card.ssh_keys else SEED
    boot.write(f"/{FOLDER}/cloud-init", "".join(f"{name}\n" for name in taken).encode())
    if card.ssh_keys:
        boot.write(_SSH, b"")
    boot.write("/meta-data", _yaml({"instance-id": instance, "local-hostname": card.hostname}))
    boot.write("/network-config", _yaml(_network(card)))
    boot.write("/user-data", b"#cloud-config\n" + _yaml(_user_data(card, folder)))
    country = [f"cfg80211.ieee80211_regdom={card.wifi.country}"] if card.wifi is not None else []
    _pi_boot.add_to_command_line(boot, f"ds=nocloud;i={instance}", *country)


def _yaml(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _settings(card: Card) -> str:
    """For good what bootcmd does for this start."""
    lines = [f"systemctl disable --quiet {_WIZARD} 2>/dev/null && systemctl enable --quiet getty@tty1.service || true"]
    if card.wifi is not None:
        lines += [
            "if command -v rfkill >/dev/null; then rfkill unblock wifi || true; fi",
            "if command -v nmcli >/dev/null; then nmcli radio wifi on || true; fi",
        ]
    return "\n".join(lines) + "\n"


def _user_data(card: Card, folder: str) -> dict[str, Any]:
    begin = [
        f"[ -e {folder}/{UNIT} ] || exit 0",
        "rm -f /var/lib/cloud/instance/sem/config_*",
        f"mkdir -p {_RUN_UNITS}",
        f"ln -sf /dev/null {_RUN_UNITS}/{_WIZARD}",
        f"cp {folder}/{UNIT} {_RUN_UNITS}/",
        "systemctl daemon-reload",
        # It may be asking already.
        f"systemctl stop --no-block {_WIZARD} 2>/dev/null",
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
