"""Folders and object storage keep the same promises: whole or not there, ranges exact, trouble in words."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from joulemark.errors import BadInput, DigestMismatch, NotFound, Unavailable
from joulemark_host.api import create_app
from joulemark_host.records import Records
from joulemark_host.shelf import Shelf
from joulemark_host.storage import Storage, open_storage
from tests.fixtures.gguf_files import llama, whole
from tests.fixtures.object_storage import ObjectServer
from tests.fixtures.records import make_pack

BODY = bytes(range(256)) * 40_000  # ten megabytes: object storage gets it in parts
NAME = "files/aa/one"


@pytest.fixture(params=["folder", "object storage"])
def where(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "folder":
        return str(tmp_path / "shelf")
    server: ObjectServer = request.getfixturevalue("object_server")
    return server.new_bucket(monkeypatch)


@pytest.fixture
def storage(where: str) -> Storage:
    return open_storage(where)


def pieces(body: bytes = BODY, fault: Exception | None = None) -> Iterator[bytes]:
    for start in range(0, len(body), 1 << 20):
        yield body[start : start + (1 << 20)]
    if fault is not None:
        raise fault


def test_what_is_written_is_read_back_whole_and_in_every_range(storage: Storage):
    assert storage.size(NAME) is None and storage.names("files") == []
    with pytest.raises(FileNotFoundError):
        storage.read(NAME)
    storage.write(NAME, len(BODY), pieces())
    assert storage.size(NAME) == len(BODY) and storage.read(NAME) == BODY
    for start, end in ((0, len(BODY)), (1, 2), (len(BODY) - 1, len(BODY)), (5, 3_000_001), (7, 7)):
        assert b"".join(storage.blocks(NAME, start, end)) == BODY[start:end]


def test_what_breaks_off_leaves_nothing(storage: Storage, where: str, request: pytest.FixtureRequest):
    with pytest.raises(DigestMismatch):
        storage.write(NAME, len(BODY), pieces(fault=DigestMismatch("changed", "again")))
    assert storage.size(NAME) is None
    if where.startswith("s3:"):
        assert request.getfixturevalue("object_server").unfinished_uploads(where) == 0


def test_a_shelf_is_the_same_in_both(where: str, tmp_path: Path):
    model = tmp_path / "tiny.gguf"
    model.write_bytes(whole(llama()))
    shelf = Shelf(where)
    artifact_id, manifest = shelf.publish_model(model)
    pack_id = shelf.publish_pack(make_pack())
    again = Shelf(where)
    assert again.artifacts() == {artifact_id: manifest} and again.resolve("tiny") == artifact_id
    assert hashlib.sha256(again.pack_bytes(pack_id)).hexdigest() == pack_id
    assert b"".join(again.file(manifest.files[0].sha256).blocks()) == model.read_bytes()
    assert again.publish_model(model) == (artifact_id, manifest)
    with pytest.raises(NotFound):
        again.file("0" * 64)


RANGES = [
    (None, None, 200, slice(None)),
    ("bytes=0-", None, 206, slice(None)),
    ("bytes=10-", None, 206, slice(10, None)),
    ("bytes=10-19", None, 206, slice(10, 20)),
    ("bytes=10-19", "right", 206, slice(10, 20)),
    ("bytes=10-19", '"another"', 200, slice(None)),
    ("bytes=3-999999999", None, 206, slice(3, None)),
    ("bytes=999999999-", None, 416, slice(0, 0)),
]


@pytest.mark.parametrize(("asked", "tag", "status", "part"), RANGES)
def test_boards_get_the_ranges_that_they_ask_for(
    where: str, tmp_path: Path, asked: str | None, tag: str | None, status: int, part: slice
):
    model = tmp_path / "tiny.gguf"
    model.write_bytes(whole(llama()))
    shelf, records = Shelf(where), Records(f"sqlite:///{tmp_path / 'records.db'}")
    _, manifest = shelf.publish_model(model)
    sha256, body = manifest.files[0].sha256, model.read_bytes()
    headers = {"Range": asked} if asked is not None else {}
    if tag is not None:
        headers["If-Range"] = f'"{sha256}"' if tag == "right" else tag
    with TestClient(create_app(shelf, records), base_url="http://127.0.0.1") as http:
        answer = http.get(f"/api/files/{sha256}", headers=headers)
        assert answer.status_code == status
        if status == 416:
            assert answer.headers["content-range"] == f"bytes */{len(body)}"
        else:
            assert answer.content == body[part] and answer.headers["etag"] == f'"{sha256}"'
            assert int(answer.headers["content-length"]) == len(answer.content)
        if status == 206:
            start = part.start or 0
            assert answer.headers["content-range"] == f"bytes {start}-{start + len(answer.content) - 1}/{len(body)}"
        head = http.head(f"/api/files/{sha256}")
        assert head.headers["content-length"] == str(len(body)) and head.content == b""
        assert http.get(f"/api/files/{'0' * 64}").status_code == 404
    records.close()


def test_manifests_are_read_once_and_large_files_are_not_kept(
    object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch
):
    storage = open_storage(object_server.new_bucket(monkeypatch))
    for name, size in (("artifacts/a", 1000), ("packs/p", 300_000)):
        storage.write(name, size, [bytes(size)])
        assert storage.read(name) == bytes(size)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fetched: list[str] = []
    monkeypatch.setattr(storage, "_fetch", lambda name: fetched.append(name) or b"again")
    assert storage.read("artifacts/a") == bytes(1000) and storage.read("packs/p") == b"again"
    assert fetched == ["packs/p"]


def test_object_storage_that_cannot_be_used_is_said_so(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch):
    url = object_server.new_bucket(monkeypatch)
    storage = open_storage(url)
    with pytest.raises(BadInput, match="no object storage"):
        open_storage("what://is-this")
    monkeypatch.setattr("joulemark_host.storage.MAX_PACK_BYTES", 1000)
    storage.write("packs/big", 2000, [bytes(2000)])
    with pytest.raises(BadInput, match="too large"):
        storage.read("packs/big")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("joulemark_host.storage.RETRY_S", 1.0)
    with pytest.raises(Unavailable, match=r"does not answer.*") as raised:
        open_storage(url)
    assert "AWS_ENDPOINT_URL" in raised.value.hint and "invented" not in str(raised.value)
