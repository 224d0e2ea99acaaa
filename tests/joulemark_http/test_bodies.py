"""Bodies: bounded in bytes, time and memory; compressed ones never unpacked; what does not fit is said by its place."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import Request

from joulemark.errors import BadInput, TooLarge, Unavailable
from joulemark.wire import RunSpec
from joulemark_http.bodies import Unacceptable, arriving, read_model, spool


def request_of(
    *pieces: bytes, headers: dict[str, str] | None = None, more: Callable[[], bytes] | None = None
) -> Request:
    """A request whose body is `pieces`, then whatever `more` gives for ever."""
    left = list(pieces)

    async def receive() -> dict[str, Any]:
        if left:
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left) or more is not None}
        assert more is not None
        return {"type": "http.request", "body": more(), "more_body": True}

    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    return Request({"type": "http", "method": "PUT", "path": "/", "headers": raw}, receive)


def test_an_endless_body_is_cut_off_early_and_in_little_memory():
    sent = [0]

    def more() -> bytes:
        sent[0] += 65536
        return bytes(65536)

    tracemalloc.start()
    with pytest.raises(TooLarge):
        asyncio.run(spool(request_of(more=more), 32 * 2**20, 60.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sent[0] <= 32 * 2**20 + 65536
    assert peak < 4 * 2**20
    before = sent[0]
    with pytest.raises(TooLarge):  # not one byte is read when the length was announced
        asyncio.run(spool(request_of(headers={"Content-Length": str(33 * 2**20)}, more=more), 32 * 2**20, 60.0))
    assert sent[0] == before


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "zstd", "gzip, gzip", "x" * 500])
def test_compressed_bodies_are_not_unpacked(encoding: str):
    bomb = request_of(b"\x1f\x8b" + bytes(1000), headers={"Content-Encoding": encoding})
    with pytest.raises(Unacceptable) as raised:
        asyncio.run(spool(bomb, 1 << 20, 1.0))
    assert len(raised.value.message) < 200

    async def pieces() -> list[bytes]:
        return [piece async for piece in arriving(bomb, 1 << 20)]

    with pytest.raises(Unacceptable):
        asyncio.run(pieces())


@pytest.mark.parametrize("length", ["²", "٣", "-1", "1e9", "", " 5", "99999999999999999999999999"])
def test_a_strange_length_is_a_wrong_one_or_none(length: str):
    request = request_of(b"hello")
    request.scope["headers"] = [(b"content-length", length.encode("latin-1", "ignore"))]
    if length.strip().isdigit() and len(length) > 20:
        with pytest.raises(TooLarge):
            asyncio.run(spool(request, 10, 1.0))
    else:
        assert asyncio.run(spool(request, 10, 1.0)).read() == b"hello"


BAD = {
    "deep": b"[" * 200_000,
    "deep in a field": b'{"run_id":' + b'{"a":' * 50_000,
    "no JSON": b"\x80\x04\x95pickle",
    "huge number": b'{"run_id":"a","artifact_id":' + b"9" * 100_000 + b"}",
    "surrogate": b'{"run_id":"\\ud800"}',
    "twice": b'{"run_id":"a"}{"run_id":"b"}',
    "empty": b"",
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD.keys())
def test_what_is_no_model_is_refused_in_words_that_stay_short(body: bytes):
    with pytest.raises(BadInput) as raised:
        asyncio.run(read_model(request_of(body), RunSpec))
    assert "RunSpec" in raised.value.message and raised.value.hint
    assert len(raised.value.message) < 600


def test_a_long_field_name_does_not_make_a_long_answer():
    body = b'{"' + b"x" * 100_000 + b'": 1}'
    with pytest.raises(BadInput) as raised:
        asyncio.run(read_model(request_of(body), RunSpec))
    assert len(raised.value.message) < 600


def test_a_sender_that_goes_away_is_no_defect():
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    request = Request({"type": "http", "method": "PUT", "path": "/", "headers": []}, receive)
    with pytest.raises(Unavailable, match="went away"):
        asyncio.run(spool(request, 10, 1.0))
