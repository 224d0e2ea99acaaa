"""What the ways of a Raspberry Pi's images share: the boot partition, where the running system has it, and the kernel's command line."""

from __future__ import annotations

import re
from pathlib import Path

from joulemark.errors import BadInput
from joulemark_deploy.card import FOLDER, Card
from joulemark_deploy.disk_image import DiskImage, ExtFiles, FatFiles

COMMAND_LINE = "/cmdline.txt"
_PLAIN_PATH = re.compile(r"(/[A-Za-z0-9_.-]{1,60}){1,4}", re.ASCII)


def both(image: DiskImage) -> tuple[FatFiles, ExtFiles] | None:
    """(boot, root) when the image is laid out as a Raspberry Pi starts it."""
    boot, root = image.boot(), image.root()
    if boot is None or root is None or boot.read(COMMAND_LINE) is None:
        return None
    return boot, root


def mount_point(root: ExtFiles) -> str:
    """Where the running system has the boot partition. Raises BadInput when its fstab does not say."""
    for line in (root.read("/etc/fstab") or b"").decode("utf-8", "replace").splitlines():
        words = line.split()
        if len(words) > 2 and not line.startswith("#") and words[2] == "vfat" and _PLAIN_PATH.fullmatch(words[1]):
            return words[1]
    raise BadInput("the image's fstab mounts no boot partition", "use an image as its maker published it")


def add_to_command_line(boot: FatFiles, *words: str) -> None:
    """Each word that is not there yet; the kernel reads one line. The memory cgroup is on too: Raspberry Pi OS leaves it off."""
    text = (boot.read(COMMAND_LINE) or b"").decode("utf-8", "replace").strip()
    present = text.split()
    wanted = [word for word in ("cgroup_enable=memory", *words) if word not in present]
    boot.write(COMMAND_LINE, (" ".join([" ".join(text.split("\n")), *wanted]) + "\n").encode())


def put_folder(boot: FatFiles, root: ExtFiles, card: Card, release: Path, settings: str = "", after: str = "") -> str:
    """The folder of the first boot (`Card.files`); gives its path on the running board."""
    folder = f"{mount_point(root)}/{FOLDER}"
    for name, content in card.files(folder, release, settings, after).items():
        boot.write(f"/{FOLDER}/{name}", content)
    return folder
