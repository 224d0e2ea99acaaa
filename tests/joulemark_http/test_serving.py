"""Clients that are slow, endless, silent or lie: each has an end, and others are served meanwhile. Real sockets, real server."""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from joulemark.errors import BadInput, Conflict, JoulemarkError
from joulemark_http import bodies, listening, serving
from joulemark_http.answers import answer_error
from joulemark_http.bodies import arriving, read_body
from tests.fixtures.host_process import wait_until

PLACES = 64
MUCH = 64 * 2**20
HEAD = b"HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@dataclass
class Running:
    port: int
    server: Any
    seen: list[str]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def get(self, path: str = "/hello", **arguments: Any) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=10, trust_env=False, **arguments)


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr(serving, "HEADERS_S", 1.0)
    monkeypatch.setattr(serving, "STALLED_S", 1.0)
    monkeypatch.setattr(bodies, "PAUSE_S", 1.0)
    monkeypatch.setattr(bodies, "SMALL_TIMEOUT_S", 1.0)
    seen: list[str] = []
    app = FastAPI()
    for kind in (JoulemarkError, Exception):
        app.add_exception_handler(kind, answer_error)

    @app.get("/hello")
    def hello(request: Request) -> str:
        seen.append(request.client.host if request.client is not None else "nobody")
        return "hello"

    @app.get("/much")
    def much() -> Response:
        return Response(bytes(MUCH))

    @app.get("/defect")
    def defect() -> None:
        raise ValueError("secret: /home/ann")

    @app.put("/small")
    async def small(request: Request) -> int:
        return len(await read_body(request, 1000, 1.0))

    @app.put("/file")
    async def file(request: Request) -> int:
        return sum([len(piece) async for piece in arriving(request, 1 << 20)])

    with listening.bind("127.0.0.1:0", 256, None) as listener:
        server = serving.make_server(app, PLACES)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Running(listener.getsockname()[1], server, seen)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def ends_within(connection: socket.socket, seconds: float, feed: Callable[[], None] = lambda: None) -> bytes:
    """What came until the other side closed; fails when it does not close in time."""
    connection.settimeout(0.1)
    got, deadline = b"", time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            feed()
            piece = connection.recv(65536)
        except TimeoutError:
            continue
        except OSError:
            return got
        if not piece:
            return got
        got += piece
    raise AssertionError(f"the connection is still open after {seconds} s; it said {got[:200]!r}")


@pytest.mark.parametrize(
    "sent", [b"", b"GET /hello HTTP/1.1\r\nHost: x\r\nX-", b"GET "], ids=["nothing", "headers", "line"]
)
def test_who_does_not_finish_a_request_is_sent_away(running: Running, sent: bytes):
    with running.connect() as connection:
        connection.sendall(sent)
        assert ends_within(connection, 4) == b""


def test_headers_that_trickle_do_not_extend_the_deadline(running: Running):
    with running.connect() as connection:
        connection.sendall(b"GET /hello " + HEAD)
        assert ends_within(connection, 4, lambda: connection.sendall(b"X-A: b\r\n")) == b""


def test_a_second_request_on_the_same_connection_has_the_same_deadline(running: Running):
    with running.connect() as connection:
        connection.sendall(b"GET /hello " + HEAD + b"\r\n")
        assert b"200 OK" in connection.recv(65536)
        assert b"200" not in ends_within(connection, 4, lambda: connection.sendall(b"G"))


def test_two_hundred_that_dawdle_do_not_keep_one_honest_client_waiting(running: Running):
    dawdlers = [running.connect() for _ in range(200)]
    try:
        for connection in dawdlers:
            connection.sendall(b"GET /hello HTTP/1.1\r\n")
        began = time.monotonic()
        for _ in range(5):
            assert running.get().status_code == 200
        assert time.monotonic() - began < 1.0
    finally:
        for connection in dawdlers:
            connection.close()


def test_a_body_that_pauses_or_is_refused_and_goes_on_has_an_end(running: Running):
    with running.connect() as connection:
        connection.sendall(b"PUT /file " + HEAD + b"Content-Length: 100\r\n\r\nabc")
        assert b"503" in ends_within(connection, 5)
    with running.connect() as connection:
        connection.sendall(b"PUT /small " + HEAD + b"Content-Length: 100\r\n\r\nabc")
        assert b"503" in ends_within(connection, 5)
    with running.connect() as connection:  # answered at once; what follows is not read for ever
        connection.sendall(b"PUT /small " + HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        assert b"413" in ends_within(connection, 6, lambda: connection.sendall(b"800\r\n" + bytes(0x800) + b"\r\n"))
    assert running.get().status_code == 200


def test_who_does_not_read_the_answer_is_sent_away(running: Running):
    with running.connect() as connection:
        connection.sendall(b"GET /much " + HEAD + b"\r\n")
        wait_until(lambda: len(running.server.server_state.connections) == 1)
        wait_until(lambda: not running.server.server_state.connections, 5)
    assert running.get().status_code == 200


def test_who_reads_slowly_gets_everything(running: Running):
    with running.connect() as connection:
        connection.sendall(b"GET /much " + HEAD + b"Connection: close\r\n\r\n")
        got, began = 0, time.monotonic()
        while piece := connection.recv(1 << 18):
            got += len(piece)
            if time.monotonic() - began < 3.5:  # several times the patience
                time.sleep(0.1)
        assert got > MUCH


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /\xff\xfe " + HEAD + b"\r\n",
        b"NONSENSE\r\n\r\n",
        b"GET /hello HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /hello " + HEAD + b"X: " + b"a" * 1_000_000 + b"\r\n\r\n",
        b"PUT /small " + HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"PUT /small " + HEAD + b"Content-Length: -1\r\n\r\n",
        b"GET /hello " + HEAD + b"X-A: b\x00c\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    ],
    ids=["target", "line", "hosts", "header size", "lengths", "length", "NUL", "TLS"],
)
def test_what_is_no_http_is_refused_without_a_traceback(running: Running, request_: bytes):
    with running.connect() as connection:
        connection.sendall(request_)
        said = ends_within(connection, 5)
    assert said.startswith(b"HTTP/1.1 400") and b"Traceback" not in said
    assert running.get().status_code == 200


def test_two_lengths_smuggle_nothing(running: Running):
    with running.connect() as connection:
        smuggled = b"GET /hello " + HEAD + b"\r\n"
        both = b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        connection.sendall(b"PUT /small " + HEAD + both + smuggled)
        ends_within(connection, 5)
    assert len(running.seen) <= 1  # the second request was one of its own, not part of a body that another server saw


def test_an_answer_on_a_kept_connection_does_not_wait_for_an_acknowledgement(running: Running):
    """Nagle's algorithm and delayed acknowledgements together cost 40 ms for every request."""
    with httpx.Client(base_url=f"http://127.0.0.1:{running.port}", trust_env=False) as client:
        client.get("/hello")
        took: list[float] = []
        for _ in range(20):
            began = time.monotonic()
            client.get("/hello")
            took.append(time.monotonic() - began)
    assert statistics.median(took) < 0.02


def test_nobody_says_who_he_is_in_a_header(running: Running):
    running.get(headers={"X-Forwarded-For": "192.0.2.1", "Forwarded": "for=192.0.2.1"})
    assert running.seen == ["127.0.0.1"]


def test_a_defect_shows_nothing_of_itself(running: Running, caplog: pytest.LogCaptureFixture):
    answer = running.get("/defect")
    assert answer.status_code == 500 and answer.json()["code"] == "internal" and answer.json()["hint"]
    assert "secret" not in answer.text and "secret" in caplog.text


def test_only_loopback_without_leave_and_a_taken_port_is_said(running: Running):
    refusal = BadInput("{address} is open to all", "listen on 127.0.0.1")
    for address in ("0.0.0.0:0", "192.0.2.1:0", "[::]:0"):
        with pytest.raises(BadInput, match="is open to all"):
            listening.bind(address, 1, refusal)
    with pytest.raises(Conflict):
        listening.bind(f"127.0.0.1:{running.port}", 1, refusal)
    for wrong in ("nowhere:80", "127.0.0.1:99999", "127.0.0.1:-1", "127.0.0.1"):
        with pytest.raises(BadInput, match="not an address"):
            listening.bind(wrong, 1, refusal)
    with listening.bind("[::1]:0", 1, refusal) as listener:
        assert listening.address_of(listener, "https").startswith("https://[::1]:")
        assert listening.is_loopback(listener)
