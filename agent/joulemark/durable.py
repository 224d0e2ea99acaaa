"""Files that are whole or not there, also after a power cut: temporary name, fsync, rename, fsync of the folder.

Owns that order, as ext4 and f2fs need it, and nothing else; it is not aware of what is written. Truth: fsync(2), rename(2);
"crash consistency" of Pillai et al. (OSDI 2014).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

_SYNC_FILE_RANGE_WRITE = 2
_LOCKED_AFTER_S = 10.0
"""A temporary file that is younger may belong to a writer that has not locked it yet."""


def replace_file(path: Path, pieces: Iterable[bytes], mode: int = 0o644) -> None:
    """Writes `pieces` under a temporary name beside `path` and renames it; makes the folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            with contextlib.suppress(OSError):  # a file system without locks: then what a kill leaves stays
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
            with contextlib.suppress(PermissionError):  # a stick's file system keeps no modes
                Path(temporary).chmod(mode)  # mkstemp's 0600 would hide it from other users of a shared cache
            Path(temporary).replace(path)  # before the lock goes with the open file
    finally:
        Path(temporary).unlink(missing_ok=True)
    synchronise_folder(path.parent)


def _remove_leftovers(path: Path) -> None:
    """Removes what killed writers of this file have left: gigabytes, under a name that nobody sees. A living writer holds its lock."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        with contextlib.suppress(OSError), _opened(left) as file:
            if time.time() - os.fstat(file.fileno()).st_mtime > _LOCKED_AFTER_S:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()


def _opened(path: Path) -> BinaryIO:
    """A file of a stick, which may as well be a pipe that never answers, or a link to something else."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")


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
