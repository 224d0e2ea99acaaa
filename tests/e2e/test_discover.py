"""Agents announce themselves, `joulemark discover` finds them, and believes nothing but a certificate. Real multicast, on loopback only."""

from __future__ import annotations

import fcntl
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from zeroconf import ServiceInfo, Zeroconf

from joulemark import signing
from joulemark.discovery import SERVICE, Announcement, read_entries
from joulemark.wire import RunSpec
from joulemark_agent import identity as agent_identity
from joulemark_host import identity
from joulemark_host.discovering import Found, discover
from joulemark_host.identity import HostIdentity, certify_device
from tests.fixtures.agent_process import AgentProcess
from tests.fixtures.fleet import make_subject
from tests.fixtures.host_process import HostProcess, wait_until

HERE = ["127.0.0.1"]


@pytest.fixture(autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One of these tests at a time: they would hear each other. (pytest-xdist's groups have no effect with pytest 9.2.)"""
    with (tmp_path_factory.getbasetemp().parent / "multicast.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


@contextmanager
def announced(
    label: str, port: int, entries: dict[str | bytes, str | bytes | None], addresses: Sequence[str] = HERE
) -> Iterator[None]:
    """Somebody on the network says this."""
    opened = Zeroconf(interfaces=HERE)
    info = ServiceInfo(
        SERVICE,
        f"{label}.{SERVICE}",
        port=port,
        parsed_addresses=list(addresses),
        properties=entries,
        server=f"{label}.local.",
    )
    opened.register_service(info)
    try:
        yield
    finally:
        opened.close()


@contextmanager
def listening(certificate: str, key: Path) -> Iterator[int]:
    """A TLS server with this certificate and the key in this file."""
    chain = key.with_suffix(".pem")
    chain.write_text(certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                    with context.wrap_socket(connection, server_side=True) as secured:
                        secured.recv(1)
                except OSError:
                    if server.fileno() < 0:
                        return

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


def heard(port: int, identity: HostIdentity | None = None) -> Found:
    """The one that is announced with this port; other agents of this machine may be heard too. A busy machine may need a second try."""
    for _ in range(5):
        if found := [one for one in discover(1.5, identity, {"dev-1": "pi5"}, HERE) if one.url.endswith(f":{port}")]:
            (only,) = found
            return only
    raise AssertionError(f"nobody is heard with port {port}")


def find(host: HostProcess) -> dict[str, dict[str, object]]:
    command = ["discover", "--interface", "127.0.0.1", "--json", "--data", str(host.data)]
    done = subprocess.run([sys.executable, "-m", "joulemark", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {str(found["name"]): found for found in json.loads(done.stdout)}


def test_a_board_is_found_with_its_fingerprint_and_is_silent_while_it_measures(tmp_path: Path):
    host = HostProcess(tmp_path / "host")
    key = host.key_file(tmp_path / "board.key")
    options = ("--host-url", host.url, "--enrol-key-file", str(key), "--name", "pi5", "--announce")
    board = AgentProcess(tmp_path / "board", *options, open_to_all=False, JOULEMARK_FAKE_FAULT="slow:0.5")
    stranger = AgentProcess(tmp_path / "stranger", "--name", "new one", "--announce")
    try:
        who = agent_identity.load(tmp_path / "board" / "identity")
        wait_until(lambda: {"pi5", "new one"} <= set(find(host)), 30)
        found = find(host)
        assert found["pi5"]["device_id"] == who.device_id == host.registry.device("pi5").device_id
        assert (found["pi5"]["url"], found["pi5"]["known_as"]) == (board.url, "pi5")
        assert found["pi5"]["standing"] == "claims to be of this host"  # on loopback it has no TLS that could prove it
        assert (found["new one"]["standing"], found["new one"]["known_as"]) == ("no host yet", None)
        shown = [sys.executable, "-m", "joulemark", "discover", "--interface", "127.0.0.1"]
        text = subprocess.run([*shown, "--data", str(host.data)], capture_output=True, text=True, check=False).stdout
        assert "new one" in text and who.device_id.removeprefix("dev-") in text
        subject = make_subject(host, tmp_path / "files", 30)
        run = {
            "run_id": "r",
            "pack_id": subject.packs["arc_challenge"],
            "backend": "fake",
            "idle_s": 0.5,
            "cooldown_s": 0.0,
        }
        spec = RunSpec.model_validate({**run, "artifact_id": subject.artifact_id})
        host.dispatch.queue(host.registry.device("pi5").device_id, spec, subject.manifest)
        wait_until(lambda: board.client.get("/api/health").json()["busy"], 60)
        assert set(find(host)) == {"new one"}
        wait_until(lambda: not board.client.get("/api/health").json()["busy"], 60)
        wait_until(lambda: "pi5" in find(host), 20)
    finally:
        board.stop()
        stranger.stop()
        host.close()


def test_one_of_several_on_this_machine_is_heard_at_once():
    """All of them share a port: an answer to one socket alone reaches another, and nobody was heard before the second question."""
    with announced("one", 11, {"name": "one"}), announced("two", 12, {"name": "two"}):
        for _ in range(5):  # a busy machine may need another try; answers to one socket are never there in time
            time.sleep(2)  # an answer is not repeated within a second
            urls = {found.url for found in discover(0.9, None, {}, HERE)}
            if urls >= {"http://127.0.0.1:11", "http://127.0.0.1:12"}:
                return
    raise AssertionError(f"only {urls} within 0.9 s, five times")


def test_only_a_certificate_proves_who_somebody_is(tmp_path: Path):
    here, elsewhere = identity.create(tmp_path / "here"), identity.create(tmp_path / "elsewhere")
    key_file = tmp_path / "tls.key"
    key = signing.create_key(key_file)
    mark = here.fingerprint[:16]

    def standing(certificate: str, entries: dict[str | bytes, str | bytes | None]) -> str:
        with (
            listening(certificate, key_file) as port,
            announced(f"x{port}", port, {"name": "x", "tls": "1", **entries}),
        ):
            return heard(port, here).standing

    mine = certify_device(here, "dev-1", key.public)
    assert standing(mine, {"id": "dev-1", "host": mark}) == "proven"
    assert standing(mine, {"id": "dev-2", "host": mark}) == "claims to be of this host"  # another board's certificate
    assert (
        standing(certify_device(elsewhere, "dev-1", key.public), {"id": "dev-1", "host": mark})
        == "claims to be of this host"
    )
    assert standing(mine, {"id": "dev-1", "host": elsewhere.fingerprint[:16]}) == "of another host"
    assert standing(mine, {"id": "dev-1"}) == "no host yet"


def test_an_address_is_not_proven_by_another_ones_certificate(tmp_path: Path):
    """Whoever announces a board's true address beside his own is not taken for the board."""
    here = identity.create(tmp_path / "here")
    key_file = tmp_path / "tls.key"
    mine = certify_device(here, "dev-1", signing.create_key(key_file).public)
    said = {"name": "x", "tls": "1", "id": "dev-1", "host": here.fingerprint[:16]}
    with listening(mine, key_file) as port, announced("two", port, said, ["127.0.0.2", "127.0.0.1"]):  # type: ignore[arg-type]
        found = heard(port, here)
    assert (found.url, found.standing) == (f"https://127.0.0.1:{port}", "proven")


def test_what_is_announced_is_hostile_text(tmp_path: Path):
    evil = {
        "name": b"\x1b[31mred\xff\xfe\n<b>",
        "id": b"a" * 200,
        "version": None,
        "tls": b"maybe",
        "host": b"\x00" * 50,
    }
    with announced("evil", 9, evil):  # type: ignore[arg-type]
        found = heard(9)
    assert "\x1b" not in found.said.name and "\n" not in found.said.name and len(found.said.device_id) == 80
    assert (found.said.tls, found.url) == (False, "http://127.0.0.1:9")
    assert read_entries({}) == Announcement("", "", "", False, "")


@pytest.mark.parametrize("name", ["x" * 500, "ü" * 79, "\u202e../..", ""])
def test_every_name_can_be_announced(name: str):
    said = Announcement("dev-" + "1" * 16, name, "1", True, "f" * 16)
    assert all(len(text.encode()) <= 80 for text in said.entries().values())
    read = read_entries({key.encode(): text.encode() for key, text in said.entries().items()})
    assert read.device_id == said.device_id and read.tls
