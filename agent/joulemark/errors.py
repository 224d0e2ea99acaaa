"""The error tree. Every error says what happened, where, and what to do next.

    JoulemarkError                    code          also a
    ├── BadInput                      bad_input     ValueError      what a person or a peer sent cannot be used
    │   ├── ModelRejected             model_rejected                a model file that must not reach an engine
    │   ├── PackRejected              pack_rejected                 a task pack that is malformed or does not match its id
    │   ├── TooLarge                  too_large                     more bytes than are taken
    │   ├── TooNew                    too_new                       a peer speaks a newer version than this program
    │   ├── DigestMismatch            digest_mismatch               bytes are not the bytes that were promised
    │   └── Untrusted                 untrusted                     a signature is missing, wrong, or not by a key that counts here
    ├── NotAuthenticated              not_authenticated PermissionError  nobody that is known here asks
    ├── Forbidden                     forbidden     PermissionError who asks is known, and may not do this
    ├── TooManyAttempts               too_many_attempts RuntimeError    a caller failed too often; later it may try again
    ├── NotFound                      not_found     LookupError     a named thing does not exist here
    ├── Conflict                      conflict      RuntimeError    it exists already, or something else is using it
    ├── MissingExtra                  missing_extra ImportError     an optional part of the distribution is not installed
    ├── NoSpace                       no_space      OSError         the disk or the memory cannot hold it
    ├── Unavailable                   unavailable   ConnectionError a peer does not answer now; trying again is sensible
    ├── ToolFailed                    tool_failed   RuntimeError    a program of somebody else's (compiler, ssh) ended with an error
    └── EngineFailed                  engine_failed RuntimeError    an engine refused, crashed, hung or ran out of memory

`code` is stable and machine-readable; `hint` is the next step for a person; `retryable` tells a program whether the
same call may succeed later. `to_problem` turns any exception into the wire form; it is the only place that knows
foreign exceptions, and it is called only where errors are caught broadly (runner, api, cli).
"""

from __future__ import annotations

import errno

from joulemark.wire import Problem

INTERRUPTED = 130
"""A command's exit status after Ctrl-C (128 + SIGINT, as shells have it): also what typer makes of it, without a word. A command that has
more to say says it and leaves with SystemExit."""


class JoulemarkError(Exception):
    """Root of the tree. `message` says what happened and where, `hint` what to do next."""

    code = "internal"
    retryable = False

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class BadInput(JoulemarkError, ValueError):
    """Input from outside that cannot be used as it is."""

    code = "bad_input"


class ModelRejected(BadInput):
    """A model file whose header is truncated, absurd or unsupported."""

    code = "model_rejected"


class PackRejected(BadInput):
    """A task pack that is malformed or is not the one its id names."""

    code = "pack_rejected"


class TooLarge(BadInput):
    """More bytes than are taken."""

    code = "too_large"


class TooNew(BadInput):
    """A peer speaks a newer version than this program knows."""

    code = "too_new"


class DigestMismatch(BadInput):
    """Bytes whose sha256 is not the promised one."""

    code = "digest_mismatch"
    retryable = True


class Untrusted(BadInput):
    """Something that had to be signed and is not, or not by a key that counts here, or not for this purpose."""

    code = "untrusted"


class NotAuthenticated(JoulemarkError, PermissionError):
    """No credential, or none that is known here. One message for all cases, so that it tells a stranger nothing."""

    code = "not_authenticated"


class Forbidden(JoulemarkError, PermissionError):
    """The caller is known and may not do this. `code` may be narrowed per instance."""

    code = "forbidden"

    def __init__(self, message: str, hint: str = "", code: str = "forbidden") -> None:
        super().__init__(message, hint)
        self.code = code


class TooManyAttempts(JoulemarkError, RuntimeError):
    """A caller that failed too often in a short time; `retry_after_s` says when it may try again."""

    code = "too_many_attempts"
    retryable = True

    def __init__(self, message: str, hint: str = "", retry_after_s: float = 60.0) -> None:
        super().__init__(message, hint)
        self.retry_after_s = retry_after_s


class NotFound(JoulemarkError, LookupError):
    """A named artifact, pack, run, task or plug-in that does not exist here."""

    code = "not_found"


class Conflict(JoulemarkError, RuntimeError):
    """It exists already with other content, or it is in use."""

    code = "conflict"


class MissingExtra(JoulemarkError, ImportError):
    """An optional dependency is absent; the hint carries the pip line."""

    code = "missing_extra"


class NoSpace(JoulemarkError, OSError):
    """Too little disk or memory for what was asked."""

    code = "no_space"
    retryable = True


class Unavailable(JoulemarkError, ConnectionError):
    """A peer that does not answer now."""

    code = "unavailable"
    retryable = True


class ToolFailed(JoulemarkError, RuntimeError):
    """Another program that was needed ended with an error; the message has its last words."""

    code = "tool_failed"


class EngineFailed(JoulemarkError, RuntimeError):
    """The engine refused, crashed, hung or ran out of memory. `code` may be narrowed per instance."""

    code = "engine_failed"

    def __init__(self, message: str, hint: str = "", code: str = "engine_failed") -> None:
        super().__init__(message, hint)
        self.code = code


def to_problem(error: BaseException) -> Problem:
    """The wire form of any exception; foreign ones keep their type's name in the message."""
    if isinstance(error, JoulemarkError):
        return Problem(code=error.code, message=error.message, hint=error.hint, retryable=error.retryable)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Problem(
            code="no_space", message=f"the disk is full: {error}", hint="free some space and try again", retryable=True
        )
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return Problem(
            code="no_space",
            message=f"the file system takes no file of this size: {error}",
            hint="FAT holds 4 GB a file: format the stick as exFAT or ext4",
        )
    if isinstance(error, OSError) and error.errno == errno.EIO:
        return Problem(
            code="storage_failed",
            message=f"the disk or the stick cannot be read or written: {error}",
            hint="was it pulled out? The kernel's log says more; what was finished is kept",
        )
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return Problem(
            code="not_permitted",
            message=f"cannot write or read: {error}",
            hint="check the folder's owner and whether its file system is mounted read-only",
        )
    if isinstance(error, MemoryError):
        return Problem(
            code="out_of_memory",
            message="the process ran out of memory",
            hint="use a smaller model, a shorter context or fewer sequences",
        )
    text = str(error) or "no message"
    return Problem(
        code="internal",
        message=f"{type(error).__name__}: {text}",
        hint="this is a defect in Joulemark: please report it with the log",
    )


def error_from(problem: Problem) -> JoulemarkError:
    """The error that a problem was before it travelled; an unknown code stays on a plain JoulemarkError."""
    kinds = {
        kind.code: kind for kind in globals().values() if isinstance(kind, type) and issubclass(kind, JoulemarkError)
    }
    error = kinds.get(problem.code, JoulemarkError)(problem.message, problem.hint)
    error.code = problem.code
    error.retryable = problem.retryable
    return error


_STATUSES = {
    "bad_input": 400,
    "not_authenticated": 401,
    "forbidden": 403,
    "pending_approval": 403,
    "untrusted": 403,
    "not_found": 404,
    "conflict": 409,
    "cloned": 409,
    "too_large": 413,
    "unsupported_media": 415,
    "too_new": 426,
    "model_rejected": 422,
    "pack_rejected": 422,
    "digest_mismatch": 422,
    "prompt_too_long": 422,
    "too_many_attempts": 429,
    "missing_extra": 501,
    "unavailable": 503,
    "no_space": 507,
}


def http_status(code: str) -> int:
    """The HTTP status of an error's code; what is not listed is the server's fault."""
    return _STATUSES.get(code, 500)
