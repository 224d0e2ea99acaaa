"""The sinks against every answer that a host, or something in its place, can give."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from joulemark import plugins
from joulemark.errors import BadInput, Conflict
from joulemark_agent.sinks import Options, SinkUnavailable, file, http

BODY = b'{"schema_number": 1}'


def answering(
    status: int, reply: object = None, headers: dict[str, str] | None = None
) -> tuple[list[httpx.Request], httpx.MockTransport]:
    """A host that always answers so, and the requests that it got."""
    seen: list[httpx.Request] = []
    content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(status, stream=httpx.ByteStream(content), headers=headers)

    return seen, httpx.MockTransport(handle)


def put(transport: httpx.BaseTransport, run_id: str = "run-1", target: str = "https://host:8080/") -> None:
    sink = http.open_sink(Options(target), transport)
    sink.put(run_id, BODY)
    sink.close()


def test_every_sink_keeps_the_contract() -> None:
    assert plugins.names("joulemark_agent.sinks") == ("file", "http")
    for name in plugins.names("joulemark_agent.sinks"):
        assert callable(plugins.load("joulemark_agent.sinks", name).open_sink)


# --- http -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("status", [200, 201])
def test_a_record_is_put_to_the_host(status: int) -> None:
    seen, transport = answering(status, {"run_id": "run-1", "stored": "created"})
    put(transport)
    (request,) = seen
    assert (request.method, str(request.url)) == ("PUT", "https://host:8080/api/records/run-1")
    assert request.headers["content-type"] == "application/json"
    assert request.content == BODY


def test_a_strange_run_id_stays_one_part_of_the_path() -> None:
    seen, transport = answering(201, {"run_id": "../a/b?c"})
    put(transport, "../a/b?c")
    assert seen[0].url.raw_path == b"/api/records/..%2Fa%2Fb%3Fc"


@pytest.mark.parametrize("reply", [b"<html>please log in</html>", b"", b"[]", b'{"run_id": "run-2"}', b"[" * 5000])
def test_success_from_something_that_is_no_host_is_no_delivery(reply: bytes) -> None:
    with pytest.raises(SinkUnavailable, match="no Joulemark host") as caught:
        put(answering(200, reply)[1])
    assert caught.value.answered


def test_another_record_of_the_run_is_a_conflict() -> None:
    with pytest.raises(Conflict, match="another record of run run-1: bodies differ"):
        put(answering(409, {"code": "conflict", "message": "bodies differ"})[1])


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_what_speaks_about_the_record_is_final(status: int) -> None:
    with pytest.raises(BadInput, match=rf"refuses the record of run run-1 \({status}\): too new"):
        put(answering(status, {"message": "too new"})[1])


@pytest.mark.parametrize("status", [301, 307, 401, 403, 404, 408, 429, 500, 502, 503, 507])
def test_what_speaks_about_the_host_is_tried_again(status: int) -> None:
    headers = {"location": "http://elsewhere/"}
    seen, transport = answering(status, {"message": "no"}, headers)
    with pytest.raises(SinkUnavailable, match=f"answered {status}: no") as caught:
        put(transport)
    assert caught.value.answered
    assert caught.value.retryable
    assert len(seen) == 1  # redirects are not followed


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"retry-after": "120"}, 120.0),
        ({"retry-after": " 0 "}, 0.0),
        ({"retry-after": "Sun, 22 Nov 2026 10:01:30 GMT", "date": "Sun, 22 Nov 2026 10:00:00 GMT"}, 90.0),
        ({"retry-after": "Sun, 22 Nov 2026 09:00:00 GMT", "date": "Sun, 22 Nov 2026 10:00:00 GMT"}, 0.0),
        ({"retry-after": "Sun, 22 Nov 2026 10:01:30 GMT"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "9" * 400}, 999999999999.0),
        ({}, None),
    ],
)
def test_retry_after(headers: dict[str, str], expected: float | None) -> None:
    with pytest.raises(SinkUnavailable) as caught:
        put(answering(503, {}, headers)[1])
    assert caught.value.retry_after_s == expected


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.RemoteProtocolError("nonsense")]
)
def test_no_answer_is_unavailable(error: httpx.HTTPError) -> None:
    def handle(_: httpx.Request) -> httpx.Response:
        raise error

    with pytest.raises(SinkUnavailable, match="cannot be reached") as caught:
        put(httpx.MockTransport(handle))
    assert not caught.value.answered


def test_of_an_endless_reply_little_is_read() -> None:
    given: list[int] = []

    class Endless(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            while True:
                given.append(1)
                yield b"x" * 65536

    def handle(_: httpx.Request) -> httpx.Response:
        return httpx.Response(500, stream=Endless())

    with pytest.raises(SinkUnavailable, match="answered 500") as caught:
        put(httpx.MockTransport(handle))
    assert caught.value.message.endswith(": " + "x" * 300)
    assert len(given) <= 2


def test_a_reply_cannot_write_to_the_terminal() -> None:
    with pytest.raises(BadInput) as caught:
        put(answering(400, {"message": "\x1b[2Jgone\r\nand\x07 more"})[1])
    assert caught.value.message.endswith("[2Jgone and more")


@pytest.mark.parametrize(
    "target",
    ["", "host:8080", "ftp://host/", "http://", "https://host/?x=1", "https://[::1", "http://192.168.1.10:8080"],
)
def test_what_is_no_host(target: str) -> None:
    with pytest.raises(BadInput, match=r"no address of a host|plain HTTP"):
        http.open_sink(Options(target))


def test_a_real_connection_without_the_environments_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    got: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            got[self.path] = self.rfile.read(int(self.headers["content-length"]))
            reply = json.dumps({"run_id": "run-1"}).encode()
            self.send_response(201)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, format: str, *args: object) -> None:
            return

    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        sink = http.open_sink(Options(f"http://127.0.0.1:{server.server_port}", timeout_s=5))
        sink.put("run-1", BODY * 1000)
        sink.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert got == {"/api/records/run-1": BODY * 1000}
    with pytest.raises(SinkUnavailable, match="cannot be reached"):  # nobody listens there now
        http.open_sink(Options(f"http://127.0.0.1:{server.server_port}", timeout_s=5)).put("run-1", BODY)


# --- file -------------------------------------------------------------------------------------------------------------
def test_a_record_becomes_a_file_once(tmp_path: Path) -> None:
    sink = file.open_sink(Options(str(tmp_path)))
    sink.put("run-1", BODY)
    sink.put("run-1", BODY)
    assert [path.name for path in tmp_path.iterdir()] == ["record_run-1.json"]
    assert (tmp_path / "record_run-1.json").read_bytes() == BODY
    with pytest.raises(Conflict, match="holds another record"):
        sink.put("run-1", BODY + b" ")
    assert (tmp_path / "record_run-1.json").read_bytes() == BODY
    sink.close()


@pytest.mark.parametrize("run_id", ["../outside", "", "a/b", ".hidden", "x" * 81, "a\n"])
def test_a_bad_run_id_never_becomes_a_path(tmp_path: Path, run_id: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(BadInput, match="no run id"):
        file.open_sink(Options(str(folder))).put(run_id, BODY)
    assert list(tmp_path.rglob("*")) == [folder]


def test_a_stick_that_is_not_plugged_in_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "stick"
    sink = file.open_sink(Options(str(folder)))
    with pytest.raises(SinkUnavailable, match="No such file"):
        sink.put("run-1", BODY)
    assert not folder.exists()
    folder.mkdir()
    sink.put("run-1", BODY)


def test_no_folder_is_refused() -> None:
    with pytest.raises(BadInput, match="no folder"):
        file.open_sink(Options(""))


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    sink = file.open_sink(Options(str(tmp_path)))
    fsync: Callable[[int], None] = os.fsync
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SinkUnavailable, match="no space left"):
        sink.put("run-1", BODY)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "fsync", fsync)
    sink.put("run-1", BODY)
