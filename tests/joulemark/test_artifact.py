"""Artifacts: describing a model file, publishing a folder whole or not at all, verifying it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from joulemark import artifact
from joulemark.errors import BadInput, Conflict, DigestMismatch, ModelRejected, NoSpace, NotFound
from joulemark.wire import Manifest, canonical_json, content_id
from tests.fixtures import gguf_files


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return gguf_files.write_tiny(tmp_path / "tiny model (1).gguf")


@pytest.fixture
def manifest(model: Path) -> Manifest:
    return artifact.describe(model)


def test_hash_file_and_its_progress(tmp_path: Path) -> None:
    data = os.urandom((2 << 20) + 7)
    path = tmp_path / "data"
    path.write_bytes(data)
    seen: list[int] = []
    assert artifact.hash_file(path, seen.append) == hashlib.sha256(data).hexdigest()
    assert seen == [1 << 20, 2 << 20, (2 << 20) + 7]


def test_describe_says_what_the_file_is(model: Path, manifest: Manifest) -> None:
    data = model.read_bytes()
    assert manifest.name == "tiny-model--1-"
    (entry,) = manifest.files
    assert (entry.path, entry.size_bytes) == ("tiny-model--1-.gguf", len(data))
    assert entry.sha256 == hashlib.sha256(data).hexdigest()
    assert (manifest.architecture, manifest.quantization, manifest.context_tokens) == ("llama", "Q8_0", 128)
    assert manifest.chat_template_sha256 == hashlib.sha256(b"{{ messages[0]['content'] }}").hexdigest()
    assert manifest.licence == "apache-2.0"
    assert manifest.bits_per_weight == 8 * manifest.weight_bytes / manifest.parameters


def test_describe_takes_a_name_and_a_licence(model: Path) -> None:
    named = artifact.describe(model, name="smol", licence="mit")
    assert (named.name, named.licence) == ("smol", "mit")
    assert artifact.describe(model, name="../../etc").name == "etc"
    assert len(artifact.describe(model, name="x" * 300).name) == 80


def test_describe_refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        artifact.describe(tmp_path / "none.gguf")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGML")
    with pytest.raises(ModelRejected):
        artifact.describe(bad)


def publish(folder: Path, manifest: Manifest, model: Path) -> str:
    return artifact.publish(folder, manifest, {manifest.files[0].path: model})


def test_publish_and_verify(tmp_path: Path, model: Path, manifest: Manifest) -> None:
    folder = tmp_path / "shelf" / "tiny"
    artifact_id = publish(folder, manifest, model)
    assert artifact_id == content_id(manifest) == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert artifact.verify(folder) == artifact.read_manifest(folder) == manifest
    assert artifact.read_manifest(folder / "manifest.json") == manifest
    assert (folder / manifest.files[0].path).stat().st_nlink == 1
    assert publish(folder, manifest, model) == artifact_id
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_another_artifact_in_the_same_folder_is_a_conflict(tmp_path: Path, model: Path, manifest: Manifest) -> None:
    publish(tmp_path / "a", manifest, model)
    with pytest.raises(Conflict):
        publish(tmp_path / "a", manifest.model_copy(update={"name": "other"}), model)


def test_a_changed_source_is_refused_and_nothing_is_left(tmp_path: Path, model: Path, manifest: Manifest) -> None:
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    shelf = tmp_path / "shelf"
    with pytest.raises(DigestMismatch):
        publish(shelf / "tiny", manifest, model)
    assert list(shelf.iterdir()) == []


def test_a_failure_half_way_leaves_nothing(
    tmp_path: Path, model: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    calls: list[int] = []

    def fail(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:  # the model is written, the manifest is not yet safe
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        publish(tmp_path / "shelf" / "tiny", manifest, model)
    assert list((tmp_path / "shelf").iterdir()) == []


def test_a_missing_source_and_too_little_space(tmp_path: Path, model: Path, manifest: Manifest) -> None:
    with pytest.raises(BadInput, match="no source"):
        artifact.publish(tmp_path / "a", manifest, {})
    entry = manifest.files[0].model_copy(update={"size_bytes": 10**18})
    with pytest.raises(NoSpace):
        publish(tmp_path / "a", manifest.model_copy(update={"files": (entry,)}), model)


def test_verify_finds_every_kind_of_damage(tmp_path: Path, model: Path, manifest: Manifest) -> None:
    folder = tmp_path / "tiny"
    publish(folder, manifest, model)
    file = folder / manifest.files[0].path
    data = file.read_bytes()

    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DigestMismatch, match="sha256"):
        artifact.verify(folder)
    file.write_bytes(data[:-1])
    with pytest.raises(DigestMismatch, match="bytes"):
        artifact.verify(folder)
    file.unlink()
    with pytest.raises(BadInput, match="missing"):
        artifact.verify(folder)
    file.symlink_to(model)
    with pytest.raises(BadInput, match="regular"):
        artifact.verify(folder)
    file.unlink()
    file.write_bytes(data)
    (folder / "extra").touch()
    with pytest.raises(BadInput, match="extra"):
        artifact.verify(folder)
    (folder / "extra").unlink()
    assert artifact.verify(folder) == manifest


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"\xff", b"[" * 100_000, b" " * (artifact.MAX_MANIFEST_BYTES + 1), b'{"name": "../x"}']
)
def test_bad_manifests_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(BadInput):
        artifact.read_manifest(tmp_path)


def test_a_manifest_cannot_name_a_file_outside(manifest: Manifest, tmp_path: Path) -> None:
    data = canonical_json(manifest).replace(manifest.files[0].path.encode(), b"../secret")
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(BadInput):
        artifact.read_manifest(tmp_path)
    with pytest.raises(NotFound):
        artifact.read_manifest(tmp_path / "none")


def test_two_files_of_a_manifest_have_two_names(manifest: Manifest, tmp_path: Path) -> None:
    twice = manifest.model_dump()
    twice["files"] = (*twice["files"], {**twice["files"][0], "sha256": "0" * 64})
    (tmp_path / "manifest.json").write_bytes(canonical_json(twice))
    with pytest.raises(BadInput, match="same name"):
        artifact.read_manifest(tmp_path)
