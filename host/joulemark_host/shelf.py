"""The artifact shelf: models and task packs on the workstation, named by their content, ready to be pulled by agents.

    files/<first two digits>/<sha256>     the bytes, each file once however many artifacts have it
    artifacts/<artifact id>.json          canonical manifest, written last: an artifact that is listed is complete
    packs/<pack id>.json                  canonical task pack

Where that is (a folder, object storage) is `storage`'s affair. Ids are checked before they become names. Not aware of HTTP, of records, or
of what a device has. Sizes are in bytes.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from joulemark import artifact
from joulemark.errors import BadInput, DigestMismatch, NotFound
from joulemark.wire import FileEntry, Manifest, TaskPack, canonical_json, content_id
from joulemark_host.storage import BLOCK, Storage, open_storage

LOG = logging.getLogger(__name__)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredFile:
    """A file on the shelf: its bytes, wherever they lie."""

    storage: Storage
    name: str
    size_bytes: int

    @property
    def path(self) -> Path | None:
        """Where it lies on this machine; None for what lies elsewhere."""
        return self.storage.path(self.name)

    def blocks(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Its bytes from `start` to before `end`."""
        return self.storage.blocks(self.name, start, self.size_bytes if end is None else end)


class Shelf:
    """The shelf at `where`: a folder, made if it is not there, or the URL of object storage. Safe to use from several processes."""

    def __init__(self, where: str | Path) -> None:
        self._storage = open_storage(where)

    def publish_model(
        self,
        path: Path,
        name: str | None = None,
        licence: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[str, Manifest]:
        """Copies a model file onto the shelf and returns its artifact id and manifest; a second time changes nothing.

        `progress(done, total)` counts hashed and copied bytes. Raises ModelRejected, DigestMismatch (the file changed
        meanwhile), NotFound, NoSpace.
        """
        if not path.is_file():
            raise NotFound(f"there is no file {path}", "give the path of a .gguf file")
        size = path.stat().st_size

        def report(done: int) -> None:
            if progress is not None:
                progress(done, 2 * size)

        manifest = artifact.describe(path, name, licence, report)
        entry = manifest.files[0]
        if not self._has(entry):
            self._copy(path, entry, lambda done: report(size + done))
        report(2 * size)
        return self._list(manifest)

    def publish_folder(self, folder: Path, progress: Callable[[int, int], None] | None = None) -> tuple[str, Manifest]:
        """Copies an exported artifact onto the shelf; its id stays what it was, and a second time changes nothing.

        `progress(done, total)` counts hashed and copied bytes. Raises NotFound for a folder without a manifest, BadInput or
        DigestMismatch for files that are not what it says, NoSpace.
        """

        def report(done: int, total: int) -> None:
            if progress is not None:
                progress(done, 2 * total)

        manifest = artifact.verify(folder, report)
        size = done = sum(entry.size_bytes for entry in manifest.files)
        for entry in manifest.files:
            if not self._has(entry):
                before = done
                self._copy(folder / entry.path, entry, lambda copied, before=before: report(before + copied, size))
            done += entry.size_bytes
            report(done, size)
        return self._list(manifest)

    def _list(self, manifest: Manifest) -> tuple[str, Manifest]:
        """The last step: an artifact that is listed is complete."""
        artifact_id = content_id(manifest)
        self._write(_manifest_name(artifact_id), canonical_json(manifest))
        return artifact_id, manifest

    def publish_pack(self, pack: TaskPack) -> str:
        """Puts a rendered task onto the shelf and returns its pack id."""
        pack_id = content_id(pack)
        self._write(_pack_name(pack_id), canonical_json(pack))
        return pack_id

    def artifacts(self) -> dict[str, Manifest]:
        """Everything that is complete, by artifact id, sorted by name; a damaged manifest is logged and left out."""
        found: dict[str, Manifest] = {}
        for name in self._storage.names("artifacts"):
            artifact_id, dot, kind = name.partition(".")
            if (dot, kind) != (".", "json"):
                continue
            manifest = self._sound_manifest(artifact_id)
            if manifest is not None:
                found[artifact_id] = manifest
        return dict(sorted(found.items(), key=lambda item: (item[1].name, item[1].quantization, item[0])))

    def manifest(self, artifact_id: str) -> Manifest:
        """The manifest of an artifact. Raises NotFound, or DigestMismatch when its bytes are not what its id says."""
        name = _manifest_name(artifact_id)
        body = self._read(name, f"there is no artifact {artifact_id[:80]!r} on the shelf")
        try:
            manifest = Manifest.model_validate_json(body)
        except ValidationError as error:
            raise DigestMismatch(f"{name} is not a manifest", "delete it and publish the model again") from error
        if content_id(manifest) != artifact_id:
            raise DigestMismatch(
                f"{name} is not the manifest that its name says", "delete it and publish the model again"
            )
        return manifest

    def resolve(self, text: str) -> str:
        """The artifact id that `text` means: an id, the start of one, a name, or name:quantization.

        Raises NotFound, or BadInput when it means several.
        """
        shelf = self.artifacts()
        matches = [
            artifact_id
            for artifact_id, manifest in shelf.items()
            if text in (manifest.name, f"{manifest.name}:{manifest.quantization}")
            or (len(text) >= 6 and artifact_id.startswith(text))
        ]
        if len(matches) == 1:
            return matches[0]
        known = ", ".join(f"{m.name}:{m.quantization}" for m in shelf.values()) or "nothing"
        if not matches:
            raise NotFound(f"there is no model {text!r} on the shelf", f"there is: {known}")
        raise BadInput(f"{text!r} means {len(matches)} models", f"say name:quantization or an id; there is: {known}")

    def file(self, sha256: str) -> StoredFile:
        """The file with this digest. Raises NotFound."""
        name = _file_name(sha256)
        size = self._storage.size(name)
        if size is None:
            raise NotFound(f"there is no file {sha256[:80]!r} on the shelf", "publish the model that has it")
        return StoredFile(self._storage, name, size)

    def pack_bytes(self, pack_id: str) -> bytes:
        """The canonical bytes of a pack, checked against their id. Raises NotFound, DigestMismatch."""
        name = _pack_name(pack_id)
        body = self._read(name, f"there is no task pack {pack_id[:80]!r} on the shelf")
        if hashlib.sha256(body).hexdigest() != pack_id:
            raise DigestMismatch(f"{name} is not the pack that its name says", "delete it and publish the task again")
        return body

    def _sound_manifest(self, artifact_id: str) -> Manifest | None:
        try:
            return self.manifest(artifact_id)
        except (DigestMismatch, NotFound) as error:
            LOG.warning("left out of the listing: %s", error)
            return None

    def _has(self, entry: FileEntry) -> bool:
        return self._storage.size(_file_name(entry.sha256)) == entry.size_bytes

    def _copy(self, source: Path, entry: FileEntry, progress: Callable[[int], None]) -> None:
        pieces = _verified(source, entry, progress)
        self._storage.write(_file_name(entry.sha256), entry.size_bytes, pieces)

    def _write(self, name: str, body: bytes) -> None:
        try:
            known = self._storage.read(name)
        except FileNotFoundError:
            known = None
        if known != body:
            self._storage.write(name, len(body), [body])

    def _read(self, name: str, missing: str) -> bytes:
        try:
            return self._storage.read(name)
        except FileNotFoundError:
            raise NotFound(missing, "`joulemark publish` puts models and tasks there") from None


def _manifest_name(artifact_id: str) -> str:
    return f"artifacts/{_checked(artifact_id)}.json"


def _pack_name(pack_id: str) -> str:
    return f"packs/{_checked(pack_id)}.json"


def _file_name(sha256: str) -> str:
    return f"files/{_checked(sha256)[:2]}/{sha256}"


def _checked(name: str) -> str:
    """An id may become a path only if it is 64 hexadecimal digits."""
    if not _SHA256.fullmatch(name):
        raise NotFound(f"{name[:80]!r} is not a sha256", "ids are 64 hexadecimal digits")
    return name


def _verified(source: Path, entry: FileEntry, progress: Callable[[int], None]) -> Generator[bytes, None, None]:
    """The bytes of `source`; raises DigestMismatch at the end, before they have a name, if they differ."""
    digest = hashlib.sha256()
    done = 0
    with source.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            yield block
            done += len(block)
            progress(done)
    if digest.hexdigest() != entry.sha256:
        raise DigestMismatch(f"{source} changed while it was copied", "publish it again when nothing writes to it")
