"""What people are told of errors of the system."""

from __future__ import annotations

import errno
import os

import pytest

from joulemark.errors import to_problem


@pytest.mark.parametrize(
    ("number", "code", "hint", "retryable"),
    [
        (errno.ENOSPC, "no_space", "free some space", True),
        (errno.EDQUOT, "no_space", "free some space", True),
        (errno.EFBIG, "no_space", "FAT holds 4 GB", False),
        (errno.EIO, "storage_failed", "pulled out", False),
        (errno.EROFS, "not_permitted", "read-only", False),
        (errno.EBADF, "internal", "defect in Joulemark", False),
    ],
)
def test_an_error_of_the_system_says_what_to_do(number: int, code: str, hint: str, retryable: bool):
    problem = to_problem(OSError(number, os.strerror(number), "/stick/files/abc"))
    assert (problem.code, problem.retryable) == (code, retryable)
    assert hint in problem.hint and "/stick/files/abc" in problem.message
