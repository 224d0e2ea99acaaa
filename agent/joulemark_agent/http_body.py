"""Request bodies read with bounds: what is too large is refused before it is held, what does not parse is refused in words."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from joulemark.errors import BadInput

Parsed = TypeVar("Parsed", bound=BaseModel)


async def bounded_chunks(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body's chunks. Raises BadInput (code `too_large`) once more than `limit` bytes were announced or came."""
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limit:
        raise too_large(limit)
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > limit:
            raise too_large(limit)
        yield chunk


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, at most `limit` bytes."""
    return b"".join([chunk async for chunk in bounded_chunks(request, limit)])


async def read_model(request: Request, model: type[Parsed], limit: int) -> Parsed:
    """The body as `model`. Raises BadInput naming the first field that does not fit."""
    body = await read_body(request, limit)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise BadInput(
            f"the request does not fit at {where}: {first['msg']}", f"{error.error_count()} fields need correction"
        ) from error


def too_large(limit: int) -> BadInput:
    """A body over the limit."""
    error = BadInput(
        f"the request body is larger than {limit} bytes", "send less, or use the upload endpoint for files"
    )
    error.code = "too_large"
    return error
