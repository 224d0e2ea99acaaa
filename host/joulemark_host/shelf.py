"""The artifact shelf: models and task packs on the workstation, named by their content, ready to be pulled by agents.

    files/<first two digits>/<sha256>     the bytes, each file once however many artifacts have it
    artifacts/<artifact id>.json          canonical manifest, written last: an artifact that is listed is complete
    packs/<pack id>.json                  canonical task pack

Every file is written under a temporary name, flushed to the disk and renamed; nothing on the shelf is a link. Ids are
checked before they become paths. Not aware of HTTP, of records, or of what a device has. Sizes are in bytes.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Generator
from pathlib import Path

from pydantic import ValidationError

from joulemark import artifact, durable
from joulemark.errors import BadInput, DigestMismatch, NoSpace, NotFound
from joulemark.wire import FileEntry, Manifest, TaskPack, canonical_json, content_id

LOG = logging.getLogger(__name__)
BLOCK = 1 << 20
RESERVE_BYTES = 64 * 2**20
"""Left free on the disk, so that the record database can still grow."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Shelf:
    """The shelf in folder `root`, which is made if it is not there. Safe to use from several processes."""

    def __init__(self, root: Path) -> None:
        self._root = root
        for name in ("files", "artifacts", "packs"):
            (root / name).mkdir(parents=True, exist_ok=True)

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
        self._write(self._manifest_path(artifact_id), canonical_json(manifest))
        return artifact_id, manifest

    def publish_pack(self, pack: TaskPack) -> str:
        """Puts a rendered task onto the shelf and returns its pack id."""
        pack_id = content_id(pack)
        self._write(self._pack_path(pack_id), canonical_json(pack))
        return pack_id

    def artifacts(self) -> dict[str, Manifest]:
        """Everything that is complete, by artifact id, sorted by name; a damaged manifest is logged and left out."""
        found: dict[str, Manifest] = {}
        for path in (self._root / "artifacts").glob("*.json"):
            manifest = self._sound_manifest(path.stem)
            if manifest is not None:
                found[path.stem] = manifest
        return dict(sorted(found.items(), key=lambda item: (item[1].name, item[1].quantization, item[0])))

    def manifest(self, artifact_id: str) -> Manifest:
        """The manifest of an artifact. Raises NotFound, or DigestMismatch when its bytes are not what its id says."""
        path = self._manifest_path(artifact_id)
        body = _read(path, f"there is no artifact {artifact_id[:80]!r} on the shelf")
        try:
            manifest = Manifest.model_validate_json(body)
        except ValidationError as error:
            raise DigestMismatch(f"{path} is not a manifest", "delete it and publish the model again") from error
        if content_id(manifest) != artifact_id:
            raise DigestMismatch(
                f"{path} is not the manifest that its name says", "delete it and publish the model again"
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

    def file(self, sha256: str) -> Path:
        """Where the file with this digest lies. Raises NotFound."""
        path = self._file_path(sha256)
        if not path.is_file():
            raise NotFound(f"there is no file {sha256[:80]!r} on the shelf", "publish the model that has it")
        return path

    def pack_bytes(self, pack_id: str) -> bytes:
        """The canonical bytes of a pack, checked against their id. Raises NotFound, DigestMismatch."""
        path = self._pack_path(pack_id)
        body = _read(path, f"there is no task pack {pack_id[:80]!r} on the shelf")
        if hashlib.sha256(body).hexdigest() != pack_id:
            raise DigestMismatch(f"{path} is not the pack that its name says", "delete it and publish the task again")
        return body

    def _sound_manifest(self, artifact_id: str) -> Manifest | None:
        try:
            return self.manifest(artifact_id)
        except (DigestMismatch, NotFound) as error:
            LOG.warning("left out of the listing: %s", error)
            return None

    def _has(self, entry: FileEntry) -> bool:
        path = self._file_path(entry.sha256)
        return path.is_file() and path.stat().st_size == entry.size_bytes

    def _copy(self, source: Path, entry: FileEntry, progress: Callable[[int], None]) -> None:
        target = self._file_path(entry.sha256)
        free = shutil.disk_usage(self._root).free
        if free < entry.size_bytes + RESERVE_BYTES:
            raise NoSpace(
                f"{source.name} needs {entry.size_bytes} bytes on the shelf, {free} are free",
                "free some space or use --data",
            )
        durable.replace_file(target, _verified(source, entry, progress))

    def _write(self, path: Path, body: bytes) -> None:
        if not (path.is_file() and path.read_bytes() == body):
            durable.replace_file(path, [body])

    def _manifest_path(self, artifact_id: str) -> Path:
        return self._root / "artifacts" / f"{_checked(artifact_id)}.json"

    def _pack_path(self, pack_id: str) -> Path:
        return self._root / "packs" / f"{_checked(pack_id)}.json"

    def _file_path(self, sha256: str) -> Path:
        return self._root / "files" / _checked(sha256)[:2] / sha256


def _checked(name: str) -> str:
    """An id may become a path only if it is 64 hexadecimal digits."""
    if not _SHA256.fullmatch(name):
        raise NotFound(f"{name[:80]!r} is not a sha256", "ids are 64 hexadecimal digits")
    return name


def _read(path: Path, missing: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFound(missing, "`joulemark publish` puts models and tasks there") from None


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
