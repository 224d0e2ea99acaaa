"""What a disk's refusal means in words, for everything that the agent stores. Not aware of what is stored."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from joulemark.durable import replace_file
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


def write_file(path: Path, data: bytes, mode: int = 0o644) -> None:
    """`replace_file` with the tree's errors: NoSpace, or JoulemarkError with code not_permitted or storage_failed.

    The folder must be there: made anew, it would stand in for a stick that is not plugged in.
    """
    with storage_errors(f"cannot write {path}"):
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
        replace_file(path, [data], mode)
