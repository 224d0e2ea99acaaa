"""Transfers that are cut, stalled, altered and killed, at real sockets and processes: they go on where they stopped and end verified."""

from __future__ import annotations

import hashlib
import http.server
import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from joulemark.errors import JoulemarkError
from joulemark.wire import FileEntry, Manifest, content_id
from joulemark_agent.host_link import HostLink
from joulemark_agent.pulling import CHUNK_BYTES, Puller
from joulemark_agent.store import Store
from tests.fixtures.agent_process import AgentProcess
from tests.fixtures.fault_proxy import Fault, FaultProxy
from tests.fixtures.fleet import enrolled
from tests.fixtures.grids import SMOL_Q8
from tests.fixtures.host_process import HostProcess, wait_until

SIZE = 4_000_037
"""No multiple of anything."""


@dataclass
class Shelved:
    host: HostProcess
    manifest: Manifest
    entry: FileEntry
    body: bytes

    def link(self, url: str) -> HostLink:
        credential = self.host.shown("operator")["Authorization"].split()[1]
        return HostLink(url, credential, "test")

    @property
    def artifact_id(self) -> str:
        return content_id(self.manifest)


def shelve(host: HostProcess, size: int) -> Shelved:
    """A file of random bytes that the host serves as the only one of an artifact."""
    body = os.urandom(size)
    sha256 = hashlib.sha256(body).hexdigest()
    path = host.data / "shelf" / "files" / sha256[:2] / sha256
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    entry = FileEntry(path="model.gguf", size_bytes=size, sha256=sha256)
    return Shelved(host, SMOL_Q8.model_copy(update={"files": (entry,), "name": sha256[:8]}), entry, body)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelved]:
    host = HostProcess(tmp_path_factory.mktemp("plain") / "host", tls_on=False)
    yield shelve(host, SIZE)
    host.close()


def pull(store: Store, shelved: Shelved, url: str, timeout_s: float = 60, **options: float) -> Puller:
    """Pulls until it is done or given up."""
    puller = Puller(store, shelved.link(url), paused=lambda: False, **options)
    store.announce(shelved.manifest)
    puller.start(shelved.artifact_id)
    wait_until(lambda: not puller.active(shelved.artifact_id), timeout_s, 0.01)
    return puller


def whole(store: Store, shelved: Shelved) -> bool:
    return (
        shelved.artifact_id in store.artifacts() and store.file_path(shelved.entry.sha256).read_bytes() == shelved.body
    )


def test_a_transfer_that_is_cut_again_and_again_goes_on_where_it_was(plain: Shelved, tmp_path: Path):
    store = Store(tmp_path / "store")
    faults = [Fault("cut", 900_000), Fault("cut", 0), Fault("cut", 1_200_000), Fault("cut", 333)]
    with FaultProxy(plain.host.port, faults) as proxy:
        puller = pull(store, plain, proxy.url)
        assert puller.problem(plain.artifact_id) is None and whole(store, plain)
        assert proxy.connections == 5
        # Nothing that had come was sent twice, but for what a cut connection still had in its buffer.
        assert proxy.passed < SIZE + 5 * (CHUNK_BYTES + 2000)


@pytest.mark.parametrize("seed", range(12))
def test_cuts_at_random_bytes(plain: Shelved, tmp_path: Path, seed: int):
    dice = random.Random(seed)
    store = Store(tmp_path / "store")
    faults = [Fault("cut", dice.randrange(SIZE)) for _ in range(4)]
    with FaultProxy(plain.host.port, faults) as proxy:
        pull(store, plain, proxy.url)
    assert whole(store, plain)


def test_after_too_many_cuts_it_gives_up_in_words_and_a_later_pull_goes_on(plain: Shelved, tmp_path: Path):
    store = Store(tmp_path / "store")
    with FaultProxy(plain.host.port, [Fault("cut", 300_000)] * 5) as proxy:
        problem = pull(store, plain, proxy.url).problem(plain.artifact_id)
        assert problem is not None and problem.code == "unavailable" and problem.retryable
        here = store.offset(plain.entry.sha256)
        assert 0 < here < SIZE
        before = proxy.passed
        pull(store, plain, proxy.url)
        assert whole(store, plain) and proxy.passed - before < SIZE - here + 2 * CHUNK_BYTES


def test_an_altered_byte_is_found_put_aside_and_fetched_anew(plain: Shelved, tmp_path: Path):
    store = Store(tmp_path / "store")
    with FaultProxy(plain.host.port, [Fault("flip", 2_000_000)]) as proxy:
        problem = pull(store, plain, proxy.url).problem(plain.artifact_id)
        assert problem is not None and problem.code == "digest_mismatch"
        assert store.artifacts() == {} and store.offset(plain.entry.sha256) == 0
        assert [path.name for path in (tmp_path / "store" / "quarantine").iterdir()] == [plain.entry.sha256]
        pull(store, plain, proxy.url)
    assert whole(store, plain)


def test_a_silent_host_is_given_up_after_a_while(plain: Shelved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = Store(tmp_path / "store")
    bulk = HostLink.bulk
    monkeypatch.setattr(HostLink, "bulk", lambda link, _timeout_s=30.0: bulk(link, 1.0))
    with FaultProxy(plain.host.port, [Fault("stall", 500_000, 5.0)]) as proxy:
        begun = time.monotonic()
        pull(store, plain, proxy.url)
        assert whole(store, plain) and time.monotonic() - begun < 5


def test_another_file_behind_the_same_address_is_never_appended(plain: Shelved, tmp_path: Path):
    """If-Range: the host's file is not the one of the manifest, so it answers with the whole file, which is refused."""
    store = Store(tmp_path / "store")
    other = FileEntry(path="model.gguf", size_bytes=SIZE, sha256="f" * 64)
    wrong = Shelved(plain.host, SMOL_Q8.model_copy(update={"files": (other,)}), other, b"")
    shelf = plain.host.data / "shelf" / "files" / "ff"
    shelf.mkdir(parents=True, exist_ok=True)
    (shelf / other.sha256).write_bytes(os.urandom(SIZE))
    problem = pull(store, wrong, plain.host.url).problem(wrong.artifact_id)
    assert problem is not None and problem.code == "digest_mismatch" and store.artifacts() == {}


def test_a_server_whose_file_has_another_tag_is_not_asked_to_go_on(plain: Shelved, tmp_path: Path):
    """Half of the file is here; what answers now has another one under this address and honours If-Range, as RFC 9110 says."""
    store = Store(tmp_path / "store")
    store.announce(plain.manifest)
    store.append(plain.entry.sha256, 0, plain.body[:1_000_000])
    asked: list[str | None] = []

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["If-Range"])
            same = self.headers["If-Range"] in (None, '"another"')
            start = 1_000_000 if same and self.headers["Range"] else 0
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{SIZE - 1}/{SIZE}")
            self.send_header("Content-Length", str(SIZE - start))
            self.end_headers()
            self.wfile.write(bytes(SIZE - start))

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        problem = pull(store, plain, f"http://127.0.0.1:{server.server_port}").problem(plain.artifact_id)
    finally:
        server.shutdown()
        server.server_close()
    assert problem is not None and problem.code == "unavailable" and set(asked) == {f'"{plain.entry.sha256}"'}
    assert store.offset(plain.entry.sha256) == 1_000_000  # nothing of the other file was taken
    pull(store, plain, plain.host.url)
    assert whole(store, plain)


def test_two_artifacts_that_share_a_file_transfer_it_once(plain: Shelved, tmp_path: Path):
    store = Store(tmp_path / "store")
    twin = Shelved(plain.host, plain.manifest.model_copy(update={"name": "twin"}), plain.entry, plain.body)
    with FaultProxy(plain.host.port) as proxy:
        pull(store, plain, proxy.url)
        pull(store, twin, proxy.url)
        assert proxy.connections == 1
    assert whole(store, plain) and whole(store, twin)


def test_a_rate_limit_holds_and_a_transfer_can_be_cancelled(plain: Shelved, tmp_path: Path):
    store = Store(tmp_path / "store")
    begun = time.monotonic()
    pull(store, plain, plain.host.url, limit_rate=2_000_000.0)
    assert whole(store, plain) and 1.7 < time.monotonic() - begun < 4
    store = Store(tmp_path / "another")
    puller = Puller(store, plain.link(plain.host.url), paused=lambda: False, limit_rate=500_000.0)
    store.announce(plain.manifest)
    puller.start(plain.artifact_id)
    wait_until(lambda: store.offset(plain.entry.sha256) > 0)
    puller.cancel(plain.artifact_id)
    wait_until(lambda: not puller.active(plain.artifact_id), 5)
    assert 0 < store.offset(plain.entry.sha256) < SIZE
    problem = puller.problem(plain.artifact_id)
    assert problem is not None and problem.message == "the transfer was cancelled"
    pull(store, plain, plain.host.url)
    assert whole(store, plain)


def test_while_a_run_is_measured_nothing_is_fetched(plain: Shelved, tmp_path: Path):
    store, busy = Store(tmp_path / "store"), threading.Event()
    puller = Puller(store, plain.link(plain.host.url), paused=busy.is_set, limit_rate=1_500_000.0)
    store.announce(plain.manifest)
    puller.start(plain.artifact_id)
    wait_until(lambda: store.offset(plain.entry.sha256) > 0)
    busy.set()
    assert puller.settle(5.0)  # as the agent does before a run: from here on not a byte
    held = store.offset(plain.entry.sha256)
    time.sleep(1.0)
    assert store.offset(plain.entry.sha256) == held < SIZE
    busy.clear()
    wait_until(lambda: not puller.active(plain.artifact_id), 20)
    assert whole(store, plain)


def test_a_run_waits_for_the_read_that_is_in_flight(plain: Shelved, tmp_path: Path):
    """The network is slow: what was asked for before the run began may still arrive, and must have arrived before anything is measured."""
    store, busy = Store(tmp_path / "store"), threading.Event()
    with FaultProxy(plain.host.port, [Fault("pause", 1_000_000, 1.5)]) as proxy:
        puller = Puller(store, plain.link(proxy.url), paused=busy.is_set)
        store.announce(plain.manifest)
        puller.start(plain.artifact_id)
        wait_until(lambda: store.offset(plain.entry.sha256) > 800_000)
        busy.set()
        assert not puller.settle(0.2)
        assert puller.settle(5.0)
        held = store.offset(plain.entry.sha256)
        time.sleep(0.5)
        assert store.offset(plain.entry.sha256) == held < SIZE
        busy.clear()
        wait_until(lambda: not puller.active(plain.artifact_id), 20)
    assert whole(store, plain)


def test_a_transfer_that_is_asked_for_during_a_run_begins_after_it(plain: Shelved, tmp_path: Path):
    store, busy = Store(tmp_path / "store"), threading.Event()
    busy.set()
    with FaultProxy(plain.host.port) as proxy:
        puller = Puller(store, plain.link(proxy.url), paused=busy.is_set)
        store.announce(plain.manifest)
        puller.start(plain.artifact_id)
        time.sleep(1.0)
        assert proxy.connections == 0 and puller.active(plain.artifact_id) and puller.settle(1.0)
        busy.clear()
        wait_until(lambda: not puller.active(plain.artifact_id), 20)
    assert whole(store, plain)


def test_a_full_disk_is_an_error_with_its_reason_and_leaves_what_came(plain: Shelved, tmp_path: Path):
    store = Store(tmp_path / "store", free=lambda _: SIZE)
    with pytest.raises(JoulemarkError) as raised:
        store.announce(plain.manifest)
    assert raised.value.code == "no_space" and list((tmp_path / "store" / "incoming").iterdir()) == []


def test_an_agent_that_is_killed_in_mid_transfer_goes_on(tmp_path: Path):
    """Real processes: host with TLS, an agent that is killed at random moments while it fetches."""
    host = HostProcess(tmp_path / "host")
    try:
        shelved = shelve(host, 30_000_011)
        agent = enrolled(host, tmp_path / "board")
        try:
            stored = _kill_while_it_fetches(host, agent, shelved)
            assert hashlib.sha256(stored.read_bytes()).hexdigest() == shelved.entry.sha256
            assert [path.name for path in stored.parent.iterdir()] == [stored.name]  # no part of it is left
        finally:
            agent.stop()
    finally:
        host.close()


def _kill_while_it_fetches(host: HostProcess, agent: AgentProcess, shelved: Shelved) -> Path:
    """Kills the agent four times while it fetches, then lets it finish; the stored file."""
    dice = random.Random(7)
    device_id = host.registry.device("board").device_id
    part = agent.data / "store" / "files" / shelved.entry.sha256[:2] / f"{shelved.entry.sha256}.part"
    agent.kill()
    agent.start_options("--limit-rate", "4")
    host.dispatch.push(device_id, shelved.manifest)
    seen: list[int] = []
    for _ in range(4):
        wait_until(lambda: part.exists() and part.stat().st_size > (seen[-1] if seen else 0))
        time.sleep(dice.random())
        agent.kill()
        here = part.stat().st_size
        assert not seen or here >= seen[-1]  # nothing that had come was lost or fetched again
        seen.append(here)
        agent.start()
        assert shelved.artifact_id not in agent.client.get("/api/artifacts").json()
    wait_until(lambda: host.dispatch.targets(device_id)[0].state == "in_sync", 60)
    return part.with_suffix("")
