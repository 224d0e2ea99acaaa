"""Request bodies on their way in: bounded in bytes, in time, and in memory; compressed ones are never unpacked.

A large body is spooled to a temporary file on the disk, so that many slow senders hold no memory, and is refused as soon as it is known to
be too large. Not aware of what a body means. Sizes are in bytes, times in seconds.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from typing import IO, TypeVar

import anyio
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from joulemark.errors import BadInput, TooLarge, Unavailable

Parsed = TypeVar("Parsed", bound=BaseModel)
SPOOL_IN_MEMORY = 256 * 1024
SMALL_BYTES = 256 * 1024
SMALL_TIMEOUT_S = 20.0
PAUSE_S = 60.0
"""The longest wait for the next piece of a file that is uploaded."""


class Unacceptable(BadInput):
    """A body in a form that is not taken, such as a compressed one."""

    code = "unsupported_media"


async def spool(request: Request, max_bytes: int, timeout_s: float) -> IO[bytes]:
    """The body as an open temporary file, at its beginning; closing it removes it.

    Raises TooLarge before reading when the announced length is over `max_bytes`, else as soon as more came; Unavailable when the body takes
    longer than `timeout_s`; Unacceptable for a compressed body.
    """
    _check(request, max_bytes)
    body = tempfile.SpooledTemporaryFile(max_size=SPOOL_IN_MEMORY)  # noqa: SIM115 — handed to the caller open
    try:
        with anyio.fail_after(timeout_s):
            async for chunk in _counted(request, max_bytes):
                await anyio.to_thread.run_sync(body.write, chunk)
    except TimeoutError as error:
        body.close()
        raise Unavailable(f"the body did not arrive within {timeout_s:g} s", "send it again") from error
    except BaseException:
        body.close()
        raise
    body.seek(0)
    return body


async def read_body(request: Request, max_bytes: int = SMALL_BYTES, timeout_s: float = SMALL_TIMEOUT_S) -> bytes:
    """A small body in memory. Raises TooLarge, Unavailable, Unacceptable."""
    with await spool(request, max_bytes, timeout_s) as body:
        return body.read()


async def read_model(request: Request, model: type[Parsed], max_bytes: int = SMALL_BYTES) -> Parsed:
    """A small JSON body as `model`. Raises BadInput naming the first field that does not fit, and what `read_body` raises."""
    body = await read_body(request, max_bytes)
    try:
        return model.model_validate_json(body)
    except (ValidationError, RecursionError) as error:
        first = error.errors(include_url=False, include_input=False)[0] if isinstance(error, ValidationError) else None
        where = ".".join(str(part) for part in first["loc"]) if first else ""
        why = f": {first['msg']}" if first else ""
        raise BadInput(
            f"this is no {model.__name__}: {(where or 'the body')[:200]} is wrong{why}",
            "compare `joulemark --version` on both sides",
        ) from error


async def arriving(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    """The pieces of a file that is uploaded, for whoever writes them down. Raises TooLarge, Unacceptable, Unavailable after a pause."""
    _check(request, max_bytes)
    pieces = _counted(request, max_bytes)
    while True:
        try:
            with anyio.fail_after(PAUSE_S):
                piece = await anext(pieces, None)
        except TimeoutError as error:
            raise Unavailable(f"nothing came for {PAUSE_S:g} s", "go on where HEAD says") from error
        if piece is None:
            return
        yield piece


def _check(request: Request, max_bytes: int) -> None:
    encoding = request.headers.get("content-encoding")
    if encoding not in (None, "", "identity"):
        raise Unacceptable(f"a body with Content-Encoding {encoding[:40]!r} is not taken", "send it uncompressed")
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced) > max_bytes:
        raise _too_large(max_bytes)


async def _counted(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    received = 0
    try:
        async for chunk in request.stream():
            received += len(chunk)
            if received > max_bytes:
                raise _too_large(max_bytes)
            if chunk:  # a body ends with an empty piece, which is nothing to write down
                yield chunk
    except ClientDisconnect as error:
        raise Unavailable("the sender went away in the middle of the body", "send it again") from error


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(
        f"the body has more than {max_bytes} bytes", "send less; of records: sample slower, or raise --max-record-bytes"
    )
