"""Request bodies on their way in: bounded in bytes, in time, and in memory.

A body is spooled to a temporary file on the disk, so that many slow senders hold no memory, and is refused as soon as
it is known to be too large. Not aware of what a body means. Sizes are in bytes, times in seconds.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from typing import IO, TypeVar

import anyio
from pydantic import BaseModel, ValidationError

from joulemark.errors import BadInput, Unavailable
from joulemark_host.records import TooLarge

Parsed = TypeVar("Parsed", bound=BaseModel)
SPOOL_IN_MEMORY = 256 * 1024
SMALL_BYTES = 256 * 1024
SMALL_TIMEOUT_S = 20.0


class Unacceptable(BadInput):
    """A body in a form that is not taken, such as a compressed one."""

    code = "unsupported_media"


async def spool(
    chunks: AsyncIterator[bytes], announced: str | None, encoding: str | None, max_bytes: int, timeout_s: float
) -> IO[bytes]:
    """The body as an open temporary file, at its beginning; closing it removes it.

    `announced` and `encoding` are the headers Content-Length and Content-Encoding. Raises TooLarge before reading when
    the announced length is over `max_bytes`, else as soon as more came; Unavailable when the body takes longer than
    `timeout_s`; Unacceptable for a compressed body, which is never unpacked.
    """
    if encoding not in (None, "", "identity"):
        raise Unacceptable(f"a body with Content-Encoding {encoding!r} is not taken", "send the record as plain JSON")
    if announced is not None and announced.isdigit() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    body = tempfile.SpooledTemporaryFile(max_size=SPOOL_IN_MEMORY)  # noqa: SIM115 — handed to the caller open
    try:
        with anyio.fail_after(timeout_s):
            received = 0
            async for chunk in chunks:
                received += len(chunk)
                if received > max_bytes:
                    raise _too_large(max_bytes)
                await anyio.to_thread.run_sync(body.write, chunk)
    except TimeoutError as error:
        body.close()
        raise Unavailable(f"the body did not arrive within {timeout_s:g} s", "send it again") from error
    except BaseException:
        body.close()
        raise
    body.seek(0)
    return body


async def small_body(chunks: AsyncIterator[bytes], announced: str | None) -> bytes:
    """A body of at most 256 KiB that arrives within 20 seconds, in memory. Raises TooLarge, Unavailable."""
    with await spool(chunks, announced, None, SMALL_BYTES, SMALL_TIMEOUT_S) as body:
        return body.read()


async def parsed_body(model: type[Parsed], chunks: AsyncIterator[bytes], announced: str | None) -> Parsed:
    """A small JSON body as a model. Raises TooLarge, Unavailable, BadInput."""
    body = await small_body(chunks, announced)
    try:
        return model.model_validate_json(body)
    except (ValidationError, RecursionError) as error:
        first = error.errors(include_url=False, include_input=False)[0] if isinstance(error, ValidationError) else None
        where = ".".join(str(part) for part in first["loc"]) if first else ""
        raise BadInput(
            f"this is no {model.__name__}: {where or 'the body'} is wrong",
            "compare `joulemark --version` on both sides",
        ) from error


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(
        f"the body has more than {max_bytes} bytes",
        "of records: raise --max-record-bytes on the host, or sample slower",
    )
