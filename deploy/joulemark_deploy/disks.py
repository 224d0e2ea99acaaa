"""Writing a whole disk, a card or a stick, and reading it back. The wrong disk is refused.

Owns: which block devices are refused and why, the order of writing (the beginning last, so that a card that was pulled out is no card), and
the comparison of what the disk gives back. Not aware of what is written. Truth: sysfs-block(5), proc(5); /sys and /proc are parameters.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from joulemark.errors import BadInput, Conflict, Forbidden, NotFound, ToolFailed

PIECE_BYTES = 4 << 20
_BLKFLSBUF = 0x1261
_SECTOR_BYTES = 512
_ESCAPED = re.compile(r"\\([0-7]{3})")
Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)"""


@dataclass(frozen=True)
class Disk:
    """A whole disk that may be written."""

    device: Path
    model: str
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.device}: {self.model or 'a disk without a name'}, {self.size_bytes / 1e9:.1f} GB"


def choose(device: Path, sysfs: Path = Path("/sys"), proc: Path = Path("/proc")) -> Disk:
    """The disk at this path. Raises NotFound, BadInput, Conflict with the reason why it is not written.

    Refused: what is no whole disk, what is mounted, swap, or part of something (LVM, RAID, encryption), built-in disks, locked cards.
    """
    number = _number(device)
    block = (sysfs / "dev" / "block" / number).resolve()
    if (block / "partition").exists():
        raise BadInput(f"{device} is a partition", f"give the whole disk: /dev/{block.parent.name}")
    if not (block / "size").exists():
        raise NotFound(f"the kernel says nothing about {device}", "lsblk lists the disks")
    _refuse_used(device, block, proc)
    if _text(block / "ro") == "1":
        raise BadInput(f"{device} is write-protected", "push the lock at the card's side up")
    if not _is_removable(block):
        raise BadInput(
            f"{device} is a built-in disk ({_text(block / 'device' / 'model') or 'unknown model'})",
            "cards and sticks are written, and loop devices; for another disk: make a file with --out and write that yourself",
        )
    size = int(_text(block / "size") or 0) * _SECTOR_BYTES
    if size == 0:
        raise NotFound(f"{device} has no card in it", "put the card into the reader")
    model = (
        _text(block / "device" / "model") or _text(block / "device" / "name") or _text(block / "loop" / "backing_file")
    )
    return Disk(device, model, size)


def write(disk: Disk, image: Path, progress: Progress) -> str:
    """Write the image to the disk; gives its SHA-256. Raises BadInput when it is too large, Conflict, ToolFailed when writing fails."""
    size = image.stat().st_size
    if size > disk.size_bytes:
        raise BadInput(
            f"the image ({size / 1e9:.2f} GB) is larger than {disk.device} ({disk.size_bytes / 1e9:.2f} GB)",
            "use a larger card",
        )
    digest = hashlib.sha256()
    with _opened(disk, os.O_WRONLY | os.O_EXCL) as target, image.open("rb") as source:
        try:
            first = source.read(PIECE_BYTES)
            digest.update(first)
            # Without a partition table nothing starts from a card whose writing was interrupted.
            _write_at(target, bytes(len(first)), 0)
            done = len(first)
            while piece := source.read(PIECE_BYTES):
                digest.update(piece)
                _write_at(target, piece, done)
                done += len(piece)
                # Else the bar shows what the memory took, and the end waits for minutes.
                if done % (16 * PIECE_BYTES) == 0:
                    os.fdatasync(target)
                progress(done, size)
            os.fsync(target)
            _write_at(target, first, 0)
            os.fsync(target)
            _forget_cached(target)
        except OSError as error:
            raise ToolFailed(f"{disk.device} could not be written: {error}", _UNPLUGGED) from error
    return digest.hexdigest()


def read_back(disk: Disk, image: Path, progress: Progress) -> None:
    """Compare what the disk gives with the image. Raises ToolFailed with the first place that differs."""
    size, done = image.stat().st_size, 0
    with _opened(disk, os.O_RDONLY) as target, image.open("rb") as source:
        _forget_cached(target)
        while wanted := source.read(PIECE_BYTES):
            try:
                found = _read_at(target, len(wanted), done)
            except OSError as error:
                raise ToolFailed(f"{disk.device} could not be read back: {error}", _UNPLUGGED) from error
            if found != wanted:
                raise ToolFailed(
                    f"{disk.device} does not give back what was written: it differs in the MiB at {done >> 20}",
                    "the card is worn out, smaller than it says, or the reader is bad: use another one",
                )
            done += len(wanted)
            progress(done, size)


_UNPLUGGED = "was the card pulled out? Put it in and write it again: as it is, it does not start"


def _number(device: Path) -> str:
    """The kernel's number of a block device, MAJOR:MINOR. Raises NotFound, BadInput."""
    try:
        found = device.stat()
    except FileNotFoundError as error:
        raise NotFound(f"{device} does not exist", "lsblk lists the disks; is the card in the reader?") from error
    if not stat.S_ISBLK(found.st_mode):
        raise BadInput(f"{device} is no disk", "for a file use --out; lsblk lists the disks")
    return f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"


def _refuse_used(device: Path, block: Path, proc: Path) -> None:
    """Raises Conflict for a disk of which any part is in use."""
    parts = [block, *(path.parent for path in block.glob("*/partition"))]
    numbers = {_text(part / "dev") for part in parts}
    for line in (proc / "self" / "mountinfo").read_text("utf-8", "replace").splitlines():
        fields = line.split(" ")
        if len(fields) > 4 and fields[2] in numbers:
            place = _ESCAPED.sub(lambda found: chr(int(found.group(1), 8)), fields[4])
            if place in ("/", "/boot", "/boot/efi", "/boot/firmware", "/usr", "/home"):
                raise Conflict(
                    f"{device} is this machine's own disk: {place} is on it", "lsblk shows which disk is the card"
                )
            raise Conflict(f"{device} is mounted at {place}", f"umount {place}")
    swaps = (proc / "swaps").read_text("utf-8", "replace").splitlines()[1:] if (proc / "swaps").exists() else []
    names = {f"/dev/{part.name}" for part in parts}
    for line in swaps:
        if line.split(" ", 1)[0].split("\t", 1)[0] in names:
            raise Conflict(f"{device} is this machine's swap space", "lsblk shows which disk is the card")
    for part in parts:
        for holder in (part / "holders").glob("*"):
            raise Conflict(
                f"{device} is part of {holder.name} (RAID, LVM or encryption)", "lsblk shows which disk is the card"
            )


def _is_removable(block: Path) -> bool:
    """What says so itself, cards in a slot, what hangs on USB; loop devices, which are files."""
    return (
        _text(block / "removable") == "1"
        or _text(block / "device" / "type") == "SD"
        or any(part.startswith("usb") for part in block.parts)
        or block.name.startswith("loop")
    )


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()[:200]
    except OSError:
        return ""


@contextlib.contextmanager
def _opened(disk: Disk, flags: int) -> Generator[int]:
    try:
        descriptor = os.open(disk.device, flags | os.O_CLOEXEC)
    except PermissionError as error:
        raise Forbidden(f"{disk.device} may not be opened by you", "run it with sudo") from error
    except OSError as error:
        raise Conflict(f"{disk.device} cannot be opened: {error}", "is it in use, or pulled out?") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_at(descriptor: int, piece: bytes, at: int) -> None:
    view = memoryview(piece)
    while view:
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written


def _read_at(descriptor: int, length: int, at: int) -> bytes:
    pieces = bytearray()
    while len(pieces) < length:
        piece = os.pread(descriptor, length - len(pieces), at + len(pieces))
        if not piece:
            break
        pieces += piece
    return bytes(pieces)


def _forget_cached(descriptor: int) -> None:
    """What is read next comes from the disk, not from this machine's memory."""
    if stat.S_ISBLK(os.fstat(descriptor).st_mode):
        with contextlib.suppress(PermissionError):
            fcntl.ioctl(descriptor, _BLKFLSBUF)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
