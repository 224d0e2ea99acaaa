"""What a push takes beside curl: the same file from the same host over loopback, plain as loopback is by default, and over TLS.

Ours is the whole way to a verified, durable artifact in a board's store: announced, read, hashed while written, synchronised, manifest;
curl writes the bytes to a file and does nothing else.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from joulemark.wire import FileEntry, content_id
from joulemark_agent.host_link import HostLink
from joulemark_agent.pulling import Puller
from joulemark_agent.store import Store
from tests.bench.pairs import Figure, take_turns
from tests.fixtures.grids import SMOL_Q8
from tests.fixtures.host_process import HostProcess

SIZE_BYTES = 512 << 20
PAIRS = 12


def measure_push(say: Callable[[str], None]) -> Iterator[Figure]:
    """Push ÷ curl, twice."""
    if shutil.which("curl") is None:
        raise RuntimeError("this part needs curl: apt-get install curl")
    for scheme, tls_on in (("http, loopback's default", False), ("https", True)):
        with tempfile.TemporaryDirectory(prefix="joulemark-bench-") as name:
            yield _compare(Path(name), scheme, tls_on, say)


def _compare(folder: Path, scheme: str, tls_on: bool, say: Callable[[str], None]) -> Figure:
    host = HostProcess(folder / "host", tls_on=tls_on)
    try:
        entry = _lay_on_shelf(host, folder / "file")
        shown = host.shown("operator")["Authorization"]
        authority = host.identity.authority_pem if tls_on else None
        link = HostLink(host.url, shown.split()[1], "bench", authority)
        manifest = SMOL_Q8.model_copy(update={"files": (entry,)})

        def push() -> float:
            store_folder = Path(tempfile.mkdtemp(dir=folder))
            store = Store(store_folder)
            puller = Puller(store, link, paused=lambda: False)
            begun = time.perf_counter()
            artifact_id, _ = store.announce(manifest)
            puller.start(artifact_id)
            while puller.active(artifact_id):
                time.sleep(0.005)
            took = time.perf_counter() - begun
            assert puller.problem(artifact_id) is None and content_id(manifest) in store.artifacts()
            shutil.rmtree(store_folder)
            return SIZE_BYTES / took

        def curl() -> float:
            target = folder / "curl.out"
            url = f"{host.url}/api/files/{entry.sha256}"
            begun = time.perf_counter()
            subprocess.run(["curl", "-skf", "-H", f"Authorization: {shown}", "-o", str(target), url], check=True)
            took = time.perf_counter() - begun
            assert target.stat().st_size == SIZE_BYTES
            target.unlink()
            return SIZE_BYTES / took

        pairs = take_turns(push, curl, PAIRS)
    finally:
        host.close()
    ours, theirs = pairs.rates()
    say(f"  {scheme}: pushed at {ours / 1e6:.0f} MB/s, curl {theirs / 1e6:.0f} MB/s")
    return pairs.figure(f"push of {SIZE_BYTES >> 20} MiB ÷ curl of the same file, {scheme}", 0.9)


def _lay_on_shelf(host: HostProcess, path: Path) -> FileEntry:
    """A file of random bytes where the host serves it from; it only has to be large, no engine reads it."""
    block, digest = os.urandom(1 << 20), hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(SIZE_BYTES >> 20):
            file.write(block)
            digest.update(block)
    sha256 = digest.hexdigest()
    shelved = host.data / "shelf" / "files" / sha256[:2] / sha256
    shelved.parent.mkdir(parents=True, exist_ok=True)
    path.rename(shelved)
    return FileEntry(path="model.gguf", size_bytes=SIZE_BYTES, sha256=sha256)
