"""From a published image to a card that reports in by itself: unpack, find out how it starts, put the card's things in, write, read back.

Owns: the order, and what is removed when something fails. The image that came is never changed. Not aware of options or of how progress is
shown.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from joulemark import plugins
from joulemark.errors import BadInput, Conflict
from joulemark_deploy import disks, release, unpacking
from joulemark_deploy.card import Card
from joulemark_deploy.disk_image import DiskImage
from joulemark_deploy.targets import Target

FORMATS = "joulemark_deploy.card_formats"
_WORKPLACE, _LOCK = ".joulemark-flash-", "lock"
_LOCKED_AFTER_S = 10.0
"""A younger folder may belong to somebody who has not locked it yet."""
Tell = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Source:
    """The image as it came; `published` is the SHA-256 that its maker names for this file."""

    path: Path
    published: str | None = None


def refuse_release(path: Path, target: Target) -> None:
    """Raises BadInput when the board's processor lacks what the release's engine uses."""
    made = release.read(path)
    if made.hwcap & ~target.instructions.hwcap:
        raise BadInput(
            f"{path} ({made.instruction_set}) is not for {target.title}",
            f"joulemark release build --target {target.name}",
        )


def to_file(source: Source, out: Path, card: Card, packed: Path, tell: Tell, progress: Progress) -> str:
    """Make the prepared image `out`; it appears whole or not at all. Gives how its first boot is told. Raises Conflict when it is there."""
    if out.exists():
        raise Conflict(f"{out} is there already", "remove it, or choose another name with --out")
    with _workplace(out.parent) as folder:
        image = folder / "card.img"
        title = _prepare(source, image, card, packed, tell, progress)
        with image.open("rb") as file:
            os.fsync(file.fileno())
        # It has the network's key and the one-time key in it.
        image.chmod(0o600)
        image.rename(out)
    return title


def to_disk(source: Source, disk: disks.Disk, card: Card, packed: Path, tell: Tell, progress: Progress) -> str:
    """Write the prepared image to a disk and read it back. Gives how its first boot is told. Raises ToolFailed when it differs."""
    with _workplace(None) as folder:
        image = folder / "card.img"
        title = _prepare(source, image, card, packed, tell, progress)
        tell(f"writing {disk.device}")
        disks.write(disk, image, progress)
        tell(f"reading {disk.device} back")
        disks.read_back(disk, image, progress)
    return title


def way_of(image: DiskImage) -> ModuleType:
    """The one way to tell this image's first boot what to do. Raises BadInput for none: a wrong one would be ignored without a word."""
    ways = [plugins.load(FORMATS, name) for name in plugins.names(FORMATS)]
    found = [way for way in ways if way.recognizes(image)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(way.TITLE for way in ways)
    if found:
        raise BadInput(
            f"{image.path} looks like {' and '.join(way.TITLE for way in found)}",
            "report this image: which one is meant?",
        )
    raise BadInput(
        f"{image.path} starts in no way that is known: its first boot would ignore what is put there",
        f"known: {known}. Other systems: start them, then joulemark install user@board",
    )


def _prepare(source: Source, image: Path, card: Card, packed: Path, tell: Tell, progress: Progress) -> str:
    tell(f"unpacking {source.path.name}")
    unpacking.unpack(source.path, image, source.published, progress)
    tell("preparing the first boot")
    found = DiskImage(image)
    way = way_of(found)
    way.prepare(found, card, packed)
    return way.TITLE


@contextlib.contextmanager
def _workplace(parent: Path | None) -> Generator[Path]:
    """A folder for the image, which has secrets in it, gone afterwards; what a killed one has left goes first."""
    place = parent or Path(tempfile.gettempdir())
    _remove_leftovers(place)
    with tempfile.TemporaryDirectory(prefix=_WORKPLACE, dir=place) as folder, (Path(folder) / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(folder)


def _remove_leftovers(place: Path) -> None:
    """Gigabytes with a network's key in them, under a name that nobody sees. A living one holds its lock, and has it from its beginning."""
    for left in place.glob(f"{_WORKPLACE}*"):
        with contextlib.suppress(OSError):  # somebody else's, or held
            status = left.lstat()
            ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
            if not ours or time.time() - status.st_mtime < _LOCKED_AFTER_S:
                continue
            # A folder for all, like /tmp: what lies there under our name is not followed.
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with os.fdopen(os.open(left / _LOCK, flags, 0o600), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
