"""Files that are whole or not there, also after a power cut: temporary name, fsync, rename, fsync of the folder.

Owns that order, as ext4 and f2fs need it, and nothing else; it is not aware of what is written. Truth: fsync(2), rename(2);
"crash consistency" of Pillai et al. (OSDI 2014).
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

_SYNC_FILE_RANGE_WRITE = 2


def replace_file(path: Path, pieces: Iterable[bytes], mode: int = 0o644) -> None:
    """Writes `pieces` under a temporary name beside `path` and renames it; makes the folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(mode)  # mkstemp's 0600 would hide it from other users of a shared cache
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    synchronise_folder(path.parent)


def begin_to_store(descriptor: int) -> None:
    """Has the kernel begin to write out what is in an open file, without waiting, where it can (Linux: sync_file_range(2)).

    Nothing is durable by this: the fsync at the end is, and then has little left to do. Without it, that took a sixth of the time of a
    transfer on loopback.
    """
    start = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if start is not None:
        start(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)


def synchronise_folder(folder: Path) -> None:
    """Makes the names in `folder` durable: a rename alone may be lost in a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
