"""Reading the kernel's small text files under /sys and /proc: cheaply, again and again, and never inventing a number.

Owns: the roots (tests and fake boards pass their own), the reasons why a file gives no value, and files that are kept
open. Not aware of: what a file means, its unit, or who asks; callers scale. The truth about reading an attribute
again with pread at offset 0 is the kernel's seq_file: position 0 produces the text anew
(Documentation/filesystems/seq_file.rst).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Reason = Literal[
    "not there", "not permitted", "read error", "empty", "not a number", "sentinel", "failed", "no answer in time"
]

NO_READING = -256_000.0
"""What thermal drivers report, in millidegrees, for a sensor that is powered down."""

_READ_BYTES = 65_536
_KEPT_READ_BYTES = 4096
_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO, errno.ESRCH})
_NOT_PERMITTED = frozenset({errno.EACCES, errno.EPERM})


def _machine() -> str:
    return os.uname().machine


@dataclass(frozen=True)
class Roots:
    """Where the kernel's and the system's files are, and the architecture's name as `uname -m` gives it.

    `bin` is the one folder in which programs are looked for (a recorded board's answers); None: where the system has them.
    """

    sys: Path = Path("/sys")
    proc: Path = Path("/proc")
    etc: Path = Path("/etc")
    run: Path = Path("/run")
    var: Path = Path("/var")
    bin: Path | None = None
    arch: str = field(default_factory=_machine)


@dataclass(frozen=True)
class Unreadable:
    """Why a file gave no value. `detail` is the errno's name or the text that was found."""

    path: str
    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


def _from_error(path: Path | str, error: OSError) -> Unreadable:
    name = errno.errorcode.get(error.errno or 0, "no errno")
    if error.errno in _NOT_THERE:
        return Unreadable(str(path), "not there", name)
    if error.errno in _NOT_PERMITTED:
        return Unreadable(str(path), "not permitted", name)
    return Unreadable(str(path), "read error", name)


def read_text(path: Path) -> str | Unreadable:
    """The file's text without white space at its ends, or why there is none. Reads at most 64 KiB."""
    try:
        with path.open("rb", buffering=0) as file:
            text = (file.read(_READ_BYTES) or b"").decode("utf-8", "replace").strip(" \t\r\n\0")
    except OSError as error:
        return _from_error(path, error)
    return text if text else Unreadable(str(path), "empty")


def parse_number(path: Path | str, text: str | bytes, sentinels: tuple[float, ...] = ()) -> float | Unreadable:
    """The finite number that `text` holds, or why it is none; a value among `sentinels` stands for no reading."""
    try:
        value = float(text)
    except ValueError:
        shown = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return Unreadable(str(path), "not a number" if shown.strip() else "empty", shown.strip()[:40])
    if value != value or value in (float("inf"), float("-inf")):
        return Unreadable(str(path), "not a number", str(value))
    return Unreadable(str(path), "sentinel", f"{value:g}") if value in sentinels else value


def read_number(path: Path, sentinels: tuple[float, ...] = ()) -> float | Unreadable:
    """The number in a file, in the file's own unit, or why there is none."""
    text = read_text(path)
    return text if isinstance(text, Unreadable) else parse_number(path, text, sentinels)


def text_or_none(path: Path) -> str | None:
    """The file's text, None for every reason not to have it: for facts that are simply left out when unknown."""
    text = read_text(path)
    return None if isinstance(text, Unreadable) else text


def entries(folder: Path) -> list[Path]:
    """The folder's entries, with numbers inside their names in numeric order; empty when it cannot be listed."""
    try:
        return sorted(folder.iterdir(), key=_natural)
    except OSError:
        return []


def hwmon_devices(roots: Roots, name: str | None = None) -> list[Path]:
    """The hardware monitors' folders, of that name or all: their numbers change from boot to boot."""
    found = entries(roots.sys / "class" / "hwmon")
    return found if name is None else [device for device in found if text_or_none(device / "name") == name]


def _natural(path: Path) -> tuple[tuple[int, int, str], ...]:
    return tuple(_pieces(path.name))


def _pieces(name: str) -> Iterator[tuple[int, int, str]]:
    start = 0
    for end in range(1, len(name) + 1):
        if end == len(name) or name[end].isdigit() != name[start].isdigit():
            piece = name[start:end]
            # str.isdigit is also true of ², which int refuses
            yield (0, int(piece), "") if piece.isdecimal() else (1, 0, piece)
            start = end


class KeptFile:
    """A file that is opened once and read many times; counts the reads that gave nothing, and keeps the last reason.

    A file that is not there, or has gone, is opened anew at the next read. Not safe for use from two threads at once.
    """

    def __init__(self, path: Path, sentinels: tuple[float, ...] = ()) -> None:
        self.path = path
        self.failures = 0
        self.last: Unreadable | None = None
        self._sentinels = sentinels
        self._descriptor = -1
        self._plain = False

    def read(self) -> bytes | Unreadable:
        """The file's first bytes now (4 KiB at most), or why there are none."""
        try:
            if self._descriptor < 0:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                # the kernel's own files take no blocks, and answer ENODEV or ESRCH when their device or process goes;
                # a plain file would go on reading as before when it is deleted
                self._plain = os.fstat(self._descriptor).st_blocks > 0
            content = os.pread(self._descriptor, _KEPT_READ_BYTES, 0)
            if self._plain and os.fstat(self._descriptor).st_nlink == 0:
                raise FileNotFoundError(errno.ENOENT, "deleted")
        except OSError as error:
            self.close()
            return self._failed(_from_error(self.path, error))
        return content if content else self._failed(Unreadable(str(self.path), "empty"))

    def number(self) -> float | None:
        """The number in the file in its own unit, None when there is none (see `failures` and `last`)."""
        content = self.read()
        if isinstance(content, Unreadable):
            return None
        value = parse_number(self.path, content, self._sentinels)
        if isinstance(value, Unreadable):
            self._failed(value)
            return None
        return value

    def _failed(self, why: Unreadable) -> Unreadable:
        self.failures += 1
        self.last = why
        return why

    def explanation(self) -> str | None:
        """How many reads gave nothing and the last reason; None when every read gave something."""
        return f"{self.failures} reads gave nothing, the last because {self.last}" if self.last else None

    def close(self) -> None:
        """Closes the descriptor; a later read opens it again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
