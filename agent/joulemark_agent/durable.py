"""Files that are whole or not there, also after a power cut; and what a disk's refusal means in words.

Order, as ext4 and f2fs need it: write under a temporary name, fsync the file, rename, fsync the folder. Not aware of
what is written. Truth: fsync(2), rename(2); "crash consistency" of Pillai et al. (OSDI 2014).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from joulemark.errors import JoulemarkError, NoSpace

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


def storage_error(error: OSError, what: str) -> JoulemarkError:
    """The error of the tree for a disk's refusal; `what` says what was being done, with the path."""
    if error.errno in _FULL:
        return NoSpace(f"{what}: no space left ({error})", "free some space on this board, then try again")
    forbidden = error.errno in _FORBIDDEN
    refused = JoulemarkError(
        f"{what}: {error}",
        "check the folder's owner and whether its file system is mounted read-only"
        if forbidden
        else "check the disk or the card: the kernel's log says more",
    )
    refused.code = "not_permitted" if forbidden else "storage_failed"
    return refused


@contextmanager
def storage_errors(what: str) -> Generator[None, None, None]:
    """Turns every OSError inside into `storage_error(…, what)`; errors of the tree pass unchanged."""
    try:
        yield
    except JoulemarkError:
        raise
    except OSError as error:
        raise storage_error(error, what) from error


def sync_folder(folder: Path) -> None:
    """Makes the folder's entries (new names, renames, removals) durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replaces `path` by `data`, durably and at once: a reader sees the old bytes or the new ones.

    Raises NoSpace, or JoulemarkError with code not_permitted or storage_failed; then `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with storage_errors(f"cannot write {path}"):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            with suppress(OSError):  # the first error is the one to report
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
