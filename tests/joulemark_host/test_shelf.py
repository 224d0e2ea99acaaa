"""The shelf names files by content, publishes whole or not at all, and never leaves its folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

from joulemark.errors import BadInput, DigestMismatch, ModelRejected, NoSpace, NotFound
from joulemark.wire import FileEntry, canonical_json, content_id
from joulemark_host import shelf as module
from joulemark_host.shelf import Shelf
from tests.fixtures.gguf_files import llama, whole
from tests.fixtures.records import make_manifest, make_pack


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny model.gguf"
    path.write_bytes(whole(llama()))
    return path


def test_a_published_model_is_whole_named_by_content_and_no_link(tmp_path: Path, model: Path):
    shelf = Shelf(tmp_path / "shelf")
    seen: list[tuple[int, int]] = []
    artifact_id, manifest = shelf.publish_model(model, progress=lambda done, total: seen.append((done, total)))
    entry = manifest.files[0]
    stored = shelf.file(entry.sha256).path
    assert stored is not None and stored == tmp_path / "shelf" / "files" / entry.sha256[:2] / entry.sha256
    assert (
        hashlib.sha256(stored.read_bytes()).hexdigest()
        == entry.sha256
        == hashlib.sha256(model.read_bytes()).hexdigest()
    )
    status = stored.lstat()
    assert stat.S_ISREG(status.st_mode)
    assert status.st_nlink == 1
    assert status.st_ino != model.stat().st_ino
    assert artifact_id == content_id(manifest)
    assert shelf.artifacts() == {artifact_id: manifest}
    assert shelf.manifest(artifact_id) == manifest
    assert seen[-1] == (2 * model.stat().st_size, 2 * model.stat().st_size)
    assert shelf.publish_model(model) == (artifact_id, manifest)
    assert not [path for path in (tmp_path / "shelf").rglob("*") if path.name.endswith(".part")]


def test_a_link_is_copied_not_kept(tmp_path: Path, model: Path):
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    shelf = Shelf(tmp_path / "shelf")
    _, manifest = shelf.publish_model(link)
    model.unlink()
    assert b"".join(shelf.file(manifest.files[0].sha256).blocks()) == whole(llama())


def test_nothing_is_listed_before_every_byte_is_on_the_disk(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    """The order of events, and a stop after each of them: an artifact that is listed has its file."""
    events: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(handle: int) -> None:
        events.append("flush folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "flush file")
        real_fsync(handle)

    def replace(self: Path, target: Path) -> Path:
        events.append(f"rename into {target.parent.parent.name if target.suffix != '.json' else target.parent.name}")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    Shelf(tmp_path / "shelf").publish_model(model)
    assert events == [
        "flush file",
        "rename into files",
        "flush folder",
        "flush file",
        "rename into artifacts",
        "flush folder",
    ]

    class Killed(BaseException):
        pass

    for last in range(len(events)):
        root = tmp_path / f"shelf{last}"
        shelf = Shelf(root)
        count = [0]

        def stop(*_: Any, count: list[int] = count, last: int = last) -> None:
            count[0] += 1
            if count[0] > last:
                raise Killed

        def fsync_or_stop(handle: int, stop: Any = stop) -> None:
            stop()
            real_fsync(handle)

        def replace_or_stop(self: Path, target: Path, stop: Any = stop) -> Path:
            stop()
            return real_replace(self, target)

        monkeypatch.setattr(os, "fsync", fsync_or_stop)
        monkeypatch.setattr(Path, "replace", replace_or_stop)
        with pytest.raises(Killed):
            shelf.publish_model(model)
        monkeypatch.setattr(os, "fsync", real_fsync)
        monkeypatch.setattr(Path, "replace", real_replace)
        for manifest in Shelf(root).artifacts().values():
            assert shelf.file(manifest.files[0].sha256).size_bytes == manifest.files[0].size_bytes
        assert len(Shelf(root).artifacts()) == (1 if last == 5 else 0)
        Shelf(root).publish_model(model)
        assert len(Shelf(root).artifacts()) == 1


def test_a_file_that_changes_while_it_is_copied_is_not_published(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    real = module.artifact.describe

    def describe_then_change(*arguments: Any, **named: Any) -> Any:
        manifest = real(*arguments, **named)
        body = bytearray(model.read_bytes())
        body[-1] ^= 1
        model.write_bytes(body)
        return manifest

    monkeypatch.setattr(module.artifact, "describe", describe_then_change)
    shelf = Shelf(tmp_path / "shelf")
    with pytest.raises(DigestMismatch, match="changed"):
        shelf.publish_model(model)
    assert shelf.artifacts() == {}
    assert not [path for path in (tmp_path / "shelf" / "files").rglob("*") if path.is_file()]


def test_what_is_no_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path):
    shelf = Shelf(tmp_path / "shelf")
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"MZ" + bytes(1000))
    with pytest.raises(ModelRejected):
        shelf.publish_model(wrong)
    with pytest.raises(NotFound):
        shelf.publish_model(tmp_path / "missing.gguf")
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(NoSpace, match="1000 are free"):
        shelf.publish_model(model)
    assert shelf.artifacts() == {}


def test_a_graph_whose_weights_lie_elsewhere_is_not_published(tmp_path: Path):
    def publish(location: str) -> str:
        weights = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
        weights.ClearField("float_data")
        weights.data_location = TensorProto.EXTERNAL
        weights.external_data.add(key="location", value=location)
        value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
        graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [value], [weights])
        folder = tmp_path / f"artifact-{len(location)}"
        folder.mkdir()
        (folder / "model.onnx").write_bytes(helper.make_model(graph).SerializeToString())
        (folder / "model.onnx.data").write_bytes(bytes(4))
        files = tuple(
            FileEntry(
                path=path.name, size_bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest()
            )
            for path in sorted(folder.iterdir())
        )
        (folder / "manifest.json").write_bytes(canonical_json(make_manifest(format="onnx", files=files)))
        return Shelf(tmp_path / "shelf").publish_folder(folder)[0]

    assert publish("model.onnx.data")
    with pytest.raises(ModelRejected, match="no file of this artifact"):
        publish("../../etc/shadow")
    assert len(Shelf(tmp_path / "shelf").artifacts()) == 1


def test_packs_are_kept_as_their_canonical_bytes(tmp_path: Path):
    shelf = Shelf(tmp_path)
    pack = make_pack()
    pack_id = shelf.publish_pack(pack)
    assert shelf.pack_bytes(pack_id) == canonical_json(pack)
    assert hashlib.sha256(shelf.pack_bytes(pack_id)).hexdigest() == pack_id == content_id(pack)
    (tmp_path / "packs" / f"{pack_id}.json").write_bytes(canonical_json(pack)[:-1] + b" ")
    with pytest.raises(DigestMismatch):
        shelf.pack_bytes(pack_id)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..", "", "A" * 64, "a" * 63, "a" * 64 + "\n", "%2e%2e", "\x00" * 64, "/etc/passwd"]
)
def test_only_a_digest_becomes_a_path(tmp_path: Path, name: str):
    shelf = Shelf(tmp_path / "shelf")
    for ask in (shelf.file, shelf.manifest, shelf.pack_bytes):
        with pytest.raises(NotFound):
            ask(name)


def test_a_damaged_manifest_is_left_out_and_named_when_asked_for(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
):
    shelf = Shelf(tmp_path / "shelf")
    artifact_id, manifest = shelf.publish_model(model)
    other = manifest.model_copy(update={"name": "other"})
    (tmp_path / "shelf" / "artifacts" / f"{artifact_id}.json").write_bytes(canonical_json(other))
    assert shelf.artifacts() == {}
    assert artifact_id in caplog.text
    with pytest.raises(DigestMismatch):
        shelf.manifest(artifact_id)


def test_models_are_found_by_name_and_ambiguity_is_said(tmp_path: Path, model: Path):
    shelf = Shelf(tmp_path / "shelf")
    first, manifest = shelf.publish_model(model, "tiny")
    assert shelf.resolve("tiny") == shelf.resolve(f"tiny:{manifest.quantization}") == shelf.resolve(first[:8]) == first
    model.write_bytes(whole(llama(), data=4096 + 32))
    second, _ = shelf.publish_model(model, "tiny")
    assert second != first
    with pytest.raises(BadInput, match="means 2 models"):
        shelf.resolve("tiny")
    with pytest.raises(NotFound, match="no model 'big'"):
        shelf.resolve("big")
