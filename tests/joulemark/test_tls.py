"""Who speaks TLS to one that does not, or the other way round, is told so by both sides that people start by hand."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from joulemark.errors import Unavailable
from joulemark_agent.host_link import exchange
from joulemark_host import identity
from joulemark_host.client import AgentClient


@contextmanager
def serving(context: ssl.SSLContext | None) -> Iterator[int]:
    """A server on a free loopback port, with TLS if there is a context, on an event loop as ours are."""
    loop = asyncio.new_event_loop()
    started = asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    server = loop.run_until_complete(started)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.run_until_complete(server.wait_closed())
        loop.close()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readline()
    writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
    writer.close()


def host_context(folder: Path) -> ssl.SSLContext:
    who = identity.create(folder / "identity")
    identity.certify_server(who, ["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(who.server_file)
    return context


@pytest.mark.parametrize(
    ("encrypted", "scheme", "told"), [(False, "https", "say http:// instead"), (True, "http", "it may want https://")]
)
def test_the_wrong_scheme_is_named(tmp_path: Path, encrypted: bool, scheme: str, told: str):
    with serving(host_context(tmp_path) if encrypted else None) as port:
        url = f"{scheme}://127.0.0.1:{port}"
        with httpx.Client(base_url=url, trust_env=False) as client, pytest.raises(Unavailable, match=told):
            exchange(client, "GET", "/api/identity", 1000)
        agent = AgentClient(url, None)
        with pytest.raises(Unavailable, match=told):
            agent.device()
        agent.close()


def test_other_reasons_stay_as_they_are(tmp_path: Path):
    with serving(None) as port:
        pass  # nobody listens there now
    with (
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client,
        pytest.raises(Unavailable, match="refused"),
    ):
        exchange(client, "GET", "/api/identity", 1000)
