"""Artifacts: a model's files with a manifest that says what they are. The artifact's id is the sha256 of the canonical
manifest.

Owns describing a model file, publishing a folder so that it is whole or absent, and verifying one. Files are copied,
never hard-linked, and links are refused: what a name points to must not change behind the manifest. It is not aware of
where artifacts are kept or how they travel (host shelf, agent store).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from joulemark import durable, gguf_header
from joulemark.errors import BadInput, Conflict, DigestMismatch, NoSpace, NotFound
from joulemark.onnx_header import read_onnx
from joulemark.wire import FileEntry, Manifest, canonical_json, content_id

MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 20

_CHUNK_BYTES = 1 << 20
_MAX_NAME = 80


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """sha256 (hex) of the file; `progress` is called with the bytes done, at most once per MiB."""
    hasher = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            hasher.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done)
    return hasher.hexdigest()


def describe(
    path: Path,
    name: str | None = None,
    licence: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """The manifest of one GGUF file. `name` defaults to the file's stem, `licence` to what the file says.

    Raises NotFound when there is no such file and ModelRejected when its header cannot be accepted.
    """
    if not path.is_file():
        raise NotFound(f"there is no model file at {path}", "give the path of a .gguf file")
    header = gguf_header.read_header(path)
    entry = FileEntry(
        path=_identifier(path.stem, ".gguf"), size_bytes=path.stat().st_size, sha256=hash_file(path, progress)
    )
    template = header.chat_template
    stated = licence if licence is not None else header.licence
    return Manifest(
        name=_identifier(name if name is not None else path.stem),
        format="gguf",
        files=(entry,),
        architecture=header.architecture,
        quantization=header.quantization,
        parameters=header.parameters,
        weight_bytes=header.weight_bytes,
        bytes_per_token=header.bytes_per_token,
        context_tokens=header.context_tokens,
        chat_template_sha256=hashlib.sha256(template.encode()).hexdigest() if template is not None else None,
        tokenizer_sha256=header.tokenizer_sha256,
        licence=stated[:200] if stated is not None else None,
    )


def publish(folder: Path, manifest: Manifest, sources: Mapping[str, Path]) -> str:
    """Makes `folder` hold the manifest's files, copied from `sources` (by FileEntry.path), and returns the artifact's
    id.

    Everything is written to a temporary folder beside it, each file checked while it is copied and synchronised, the
    manifest last, then renamed: the folder is whole or not there. Publishing the same artifact again changes nothing.
    Raises BadInput (a file without a source), DigestMismatch, Conflict (another artifact is there), NoSpace.
    """
    missing = [entry.path for entry in manifest.files if entry.path not in sources]
    if missing:
        raise BadInput(f"no source was given for {', '.join(missing)}", "give a path for every file of the manifest")
    if folder.exists():
        return _already_there(folder, manifest)
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_space(folder.parent, sum(entry.size_bytes for entry in manifest.files))
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.part-", dir=folder.parent))
    try:
        for entry in manifest.files:
            _copy(sources[entry.path], temporary / entry.path, entry)
        durable.replace_file(temporary / MANIFEST_NAME, [canonical_json(manifest)])
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            return _already_there(folder, manifest)  # another process published it meanwhile
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    durable.synchronise_folder(folder.parent)
    return content_id(manifest)


def read_manifest(path: Path) -> Manifest:
    """The manifest in file `path`, or in the folder `path`. Raises NotFound or BadInput."""
    file = path / MANIFEST_NAME if path.is_dir() else path
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"there is no manifest at {file}", "publish or push the artifact first") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise BadInput(f"the manifest {file} is larger than {MAX_MANIFEST_BYTES} bytes", "publish the artifact again")
    try:
        return Manifest.model_validate_json(data)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInput(f"the manifest {file} cannot be read: {reason}", "publish the artifact again") from error


def verify(folder: Path, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """The manifest of `folder` after hashing every file; `progress(done, total)` counts bytes. Raises BadInput or
    DigestMismatch on anything missing, changed, added or linked, ModelRejected for a graph that points elsewhere."""
    manifest = read_manifest(folder)
    expected = {entry.path for entry in manifest.files} | {MANIFEST_NAME}
    found = {path.name for path in folder.iterdir()}
    if found != expected:
        difference = ", ".join(sorted(found ^ expected))
        raise BadInput(f"the artifact {folder} has missing or extra files: {difference}", "push or publish it again")
    total, before = sum(entry.size_bytes for entry in manifest.files), 0
    for entry in manifest.files:
        start = before

        def report(done: int, start: int = start) -> None:
            if progress is not None:
                progress(start + done, total)

        _verify_file(folder / entry.path, entry, report)
        before += entry.size_bytes
    if manifest.format == "onnx":
        read_onnx(folder / manifest.files[0].path, {entry.path: entry.size_bytes for entry in manifest.files})
    return manifest


def _verify_file(path: Path, entry: FileEntry, progress: Callable[[int], None]) -> None:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise BadInput(f"{path} is not a regular file", "links are not followed: copy the file itself")
    if status.st_size != entry.size_bytes:
        raise DigestMismatch(
            f"{path} has {status.st_size} bytes, expected {entry.size_bytes}", "fetch the artifact again"
        )
    sha256 = hash_file(path, progress)
    if sha256 != entry.sha256:
        raise DigestMismatch(f"{path} has sha256 {sha256}, expected {entry.sha256}", "fetch the artifact again")


def _already_there(folder: Path, manifest: Manifest) -> str:
    wanted, there = content_id(manifest), content_id(read_manifest(folder))
    if there != wanted:
        raise Conflict(f"{folder} holds the artifact {there}, not {wanted}", "choose another folder or remove that one")
    return wanted


def _copy(source: Path, target: Path, entry: FileEntry) -> None:
    hasher = hashlib.sha256()
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(_CHUNK_BYTES):
            hasher.update(chunk)
            writer.write(chunk)
        size = writer.tell()
        writer.flush()
        os.fsync(writer.fileno())
    if (size, hasher.hexdigest()) != (entry.size_bytes, entry.sha256):
        raise DigestMismatch(
            f"{source} has {size} bytes and sha256 {hasher.hexdigest()}, the manifest says {entry.size_bytes} bytes "
            f"and {entry.sha256}",
            "describe the file again: it changed since its manifest was made",
        )


def check_space(folder: Path, needed: int) -> None:
    """Raises NoSpace when the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NoSpace(
            f"the artifact needs {needed / 1e6:.0f} MB in {folder}, there are {free / 1e6:.0f} MB",
            "free some space and try again",
        )


def _identifier(text: str, ending: str = "") -> str:
    """`text` with everything that a name may not hold replaced by a hyphen, cut to fit `wire.Identifier`."""
    clean = re.sub(r"[^A-Za-z0-9._-]", "-", text).lstrip("._-")
    return (clean or "model")[: _MAX_NAME - len(ending)] + ending
