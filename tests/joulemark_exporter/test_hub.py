"""Hub ids against a hub on loopback: the real client, its cache and its revisions, without the network."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from joulemark import artifact
from tests.fixtures import hub_models

COMMIT = "5" * 40
RECIPE = """
[quantizer]
use = "rtn"
[probe]
text = "probe.txt"
windows = 1
tokens = 32
"""
NEVER = ("pytorch_model.bin", "modeling_evil.py")
"""What a repository may hold, and nobody here asks for."""


@dataclass
class Hub:
    """One repository, `someone/tiny`, at revision `main` and `v1`."""

    folder: Path
    asked: list[str] = field(default_factory=list[str])
    url: str = ""

    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            hub.asked.append(path)
            if path in (f"/api/models/someone/tiny/revision/{name}" for name in ("main", "v1", COMMIT)):
                siblings = [{"rfilename": name} for name in hub.files()]
                told = {"id": "someone/tiny", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
                self.give(json.dumps(told).encode(), "application/json", body)
            elif path.startswith(f"/api/models/someone/tiny/tree/{COMMIT}"):
                told = [
                    {"type": "file", "path": name, "size": (hub.folder / name).stat().st_size, "oid": "0" * 40}
                    for name in hub.files()
                ]
                self.give(json.dumps(told).encode(), "application/json", body)
            elif path.startswith(f"/someone/tiny/resolve/{COMMIT}/"):
                self.give((hub.folder / path.rpartition("/")[2]).read_bytes(), "application/octet-stream", body)
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def give(self, content: bytes, kind: str, body: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(content)

    return Handler


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    hub_models.write(tmp_path / "repository", "llama", shards=True)
    for name in NEVER:
        (tmp_path / "repository" / name).write_bytes(b"import os")
    hub = Hub(tmp_path / "repository")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


def export(hub: Hub, words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.toml").write_text(RECIPE)
    command = [sys.executable, "-m", "joulemark", "export", words, "--recipe", "recipe.toml", "--out", "out", "--json"]
    (folder / "probe.txt").write_text("Nothing that anybody was tested on, said again and again. " * 20)
    told = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "JOULEMARK_CACHE": str(folder / "cache")}
    return subprocess.run(command, cwd=folder, env=told, capture_output=True, text=True, check=False)


def test_a_hub_id_is_fetched_and_becomes_an_artifact(hub: Hub, tmp_path: Path) -> None:
    done = export(hub, "someone/tiny@v1", tmp_path / "work")
    assert done.returncode == 0, done.stderr
    by_hub = artifact.verify(tmp_path / "work" / "out")
    assert not [path for path in hub.asked if path.rpartition("/")[2] in NEVER]
    # The same as of the folder: where a model lay decides nothing.
    again = export(hub, str(hub.folder), tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["artifact_id"] == json.loads(done.stdout)["artifact_id"]
    assert artifact.verify(tmp_path / "again" / "out") == by_hub


@pytest.mark.parametrize("words", ["someone/other", "someone/tiny@v9"])
def test_what_the_hub_does_not_have_is_said(words: str, hub: Hub, tmp_path: Path) -> None:
    done = export(hub, words, tmp_path / "work")
    assert done.returncode != 0 and "could not be fetched from the Hugging Face hub" in done.stderr
    assert not (tmp_path / "work" / "out").exists()
