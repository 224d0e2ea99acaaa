"""The agent's store: model files by their sha256, manifests of complete artifacts, and task packs.

    files/<aa>/<sha256>         a whole, verified file, read-only     files/<aa>/<sha256>.part   one that is arriving
    artifacts/<id>.json         the manifest of a complete artifact, written last
    incoming/<id>.json          the manifest of an announced artifact whose files are not all here
    packs/<id>.json             a task pack; its id is its sha256
    opened/<id>/<name>          an artifact's files under its manifest's names (the same inodes), for engines that want them side by side
    quarantine/<sha256>         bytes that were not what they should be: never used, given up when space is needed

Names from outside never become paths: ids are 64 hex digits or are refused. A cut of power or a kill leaves every
artifact complete or incoming; both survive, and an upload goes on where it stopped. Files that artifacts share are kept
once. What is not needed gives way to what is announced, the least recently used first: the times of the manifests'
files count up with every use, whatever the clock says. Not aware of HTTP or of who may send.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from joulemark import packs
from joulemark.artifact import hash_file
from joulemark.durable import synchronise_folder
from joulemark.errors import BadInput, Conflict, DigestMismatch, NoSpace, NotFound, Unavailable
from joulemark.wire import FileEntry, Manifest, Wire, content_id
from joulemark_agent.incoming import IncomingFile
from joulemark_agent.manifests import Manifests
from joulemark_agent.refusals import storage_errors, write_file
from joulemark_agent.room import to_evict

RESERVE_BYTES = 128 * 1024 * 1024
"""Left free for the journal, the outbox and the system when an artifact is accepted."""
ABANDONED_S = 3600.0
"""An upload that nobody has continued for so long, while the agent ran, yields when its place is needed."""
_FOLDERS = ("files", "artifacts", "incoming", "packs", "quarantine", "opened")
_ID = re.compile(r"[0-9a-f]{64}")


class FileProgress(Wire):
    """How much of one file is here."""

    path: str
    sha256: str
    size_bytes: int
    received_bytes: int
    complete: bool


class Progress(Wire):
    """How much of an artifact is here."""

    artifact_id: str
    complete: bool
    files: tuple[FileProgress, ...]


def free_bytes(folder: Path) -> int:
    """What an unprivileged process may still write on the folder's file system."""
    return shutil.disk_usage(folder).free


class Store:
    """See the module. Safe for several threads. `free` tells the free bytes of a folder's file system; `clock` is monotonic.

    `limit_bytes` is what complete and announced artifacts may take together (None: what the disk holds). `needed` says whether a complete
    artifact has to stay, `ordered` whether one that is arriving is fetched by this board itself; neither may wait for anybody. `on_evicted`
    hears of one that gave way.

    Raises NoSpace when the disk is full and JoulemarkError (not_permitted, storage_failed) when it refuses. An existing
    store on a file system that became read-only can still be read.
    """

    def __init__(
        self,
        root: Path,
        reserve_bytes: int = RESERVE_BYTES,
        free: Callable[[Path], int] = free_bytes,
        limit_bytes: int | None = None,
        needed: Callable[[str], bool] = lambda _: True,
        ordered: Callable[[str], bool] = lambda _: False,
        clock: Callable[[], float] = time.monotonic,
        on_evicted: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._root = root
        self._limit_bytes = limit_bytes
        self._needed = needed
        self._ordered = ordered
        self._clock = clock
        self._opened_s = clock()
        self._touched: dict[str, float] = {}
        self._on_evicted = on_evicted
        self._reserve_bytes = reserve_bytes
        self._free = free
        self._lock = threading.RLock()
        self._arriving: dict[str, IncomingFile] = {}
        with storage_errors(f"cannot open the store at {root}"):
            for name in _FOLDERS:
                (root / name).mkdir(parents=True, exist_ok=True)
            self._manifests = Manifests(root / "artifacts", root / "incoming")
            wanted = self._manifests.entries()
            for part in (root / "files").glob("??/*.part"):
                if part.stem not in wanted:
                    part.unlink()
            for folder in (root / "opened").iterdir():
                if folder.name not in self._manifests.complete:
                    shutil.rmtree(folder)
        # A kill between the last file and its manifest leaves an artifact that only needs its manifest.
        self._promote()

    # --- artifacts ----------------------------------------------------------------------------------------------------
    def announce(self, manifest: Manifest) -> tuple[str, tuple[str, ...]]:
        """Makes room for an artifact; returns its id and the sha256 of the files to send. Announcing again is harmless.

        Raises NoSpace before anything is sent or removed, BadInput when another artifact states another size for the same file.
        """
        artifact_id = content_id(manifest)
        evicted: list[str] = []
        try:
            with self._lock:
                if artifact_id not in self._manifests.complete:
                    self._check_sizes(manifest)
                    self._make_room(manifest, evicted)
                    self._manifests.add(artifact_id, manifest)
                    self._promote()
                self._touched[artifact_id] = self._clock()
                return artifact_id, self.missing(manifest)
        finally:
            for gone in evicted:
                self._on_evicted(gone)

    def missing(self, manifest: Manifest) -> tuple[str, ...]:
        """sha256 of the manifest's files that are not (completely) here, each once."""
        wanted = dict.fromkeys(entry.sha256 for entry in manifest.files)
        return tuple(sha256 for sha256 in wanted if not self._file(sha256).exists())

    def artifacts(self) -> dict[str, Manifest]:
        """The complete artifacts by id."""
        return dict(self._manifests.complete)

    def manifest(self, artifact_id: str) -> Manifest:
        """The manifest of a complete artifact. Raises NotFound, saying so when it is still arriving."""
        found = self._manifests.complete.get(_checked(artifact_id))
        if found is not None:
            return found
        if artifact_id in self._manifests.incoming:
            raise NotFound(f"artifact {artifact_id[:12]}… is not complete yet", "wait for its files, or send them")
        raise NotFound(f"artifact {artifact_id[:12]}… is not on this board", "push it first")

    def manifest_of(self, artifact_id: str) -> Manifest:
        """The manifest of a complete or arriving artifact. Raises NotFound."""
        with self._lock:  # between the two looks it could change from the one to the other
            arriving = self._manifests.incoming.get(_checked(artifact_id))
            return arriving if arriving is not None else self.manifest(artifact_id)

    def progress(self, artifact_id: str) -> Progress:
        """How much of a complete or arriving artifact is here. Raises NotFound."""
        files = tuple(
            FileProgress(
                path=entry.path,
                sha256=entry.sha256,
                size_bytes=entry.size_bytes,
                received_bytes=self._received(entry),
                complete=self._file(entry.sha256).exists(),
            )
            for entry in self.manifest_of(artifact_id).files
        )
        return Progress(artifact_id=artifact_id, complete=artifact_id in self._manifests.complete, files=files)

    def delete(self, artifact_id: str) -> None:
        """Forgets an artifact, complete or arriving, and the files that no other one needs. Raises NotFound."""
        with self._lock:
            manifest = self.manifest_of(artifact_id)
            # The manifest goes first: an artifact whose files are gone must not be listed.
            self._manifests.remove(artifact_id)
            shutil.rmtree(self._root / "opened" / artifact_id, ignore_errors=True)
            needed = self._manifests.entries()
            with storage_errors(f"cannot delete the files of artifact {artifact_id[:12]}…"):
                for entry in manifest.files:
                    if entry.sha256 not in needed:
                        self._incoming(entry).discard()
                        self._arriving.pop(entry.sha256, None)
                        self._file(entry.sha256).unlink(missing_ok=True)

    # --- files --------------------------------------------------------------------------------------------------------
    def expected_size(self, sha256: str) -> int:
        """Announced bytes of a file. Raises NotFound when no artifact has such a file."""
        return self._entry(sha256).size_bytes

    def offset(self, sha256: str) -> int:
        """Bytes of an announced file that are here: where to go on. Raises NotFound for one that nobody announced."""
        return self._received(self._entry(sha256))

    def append(self, sha256: str, offset: int, chunk: bytes | memoryview) -> int:
        """Adds a piece of an announced file and returns the new offset.

        Raises Conflict when the file does not end at `offset` here (nothing is changed), BadInput when it would grow
        over its announced size, NotFound, NoSpace.
        """
        with self._lock:
            entry = self._entry(sha256)
            if self._file(sha256).exists():
                raise Conflict(f"file {sha256[:12]}… is complete here", "nothing is left to be sent")
            incoming = self._incoming(entry)
            self._touched[sha256] = self._clock()
        return incoming.append(offset, chunk)

    def finish(self, sha256: str) -> None:
        """Takes a file whose bytes are all here into the store, and every artifact that is complete now.

        Harmless when repeated. Raises Conflict when bytes are missing; DigestMismatch when they are the wrong ones:
        then they are put aside and the file is to be sent anew from offset 0.
        """
        with self._lock:
            incoming = self._incoming(self._entry(sha256))
        target = self._file(sha256)
        try:
            if not target.exists():
                incoming.take(target, self._root / "quarantine" / sha256)
        except Conflict:
            if not target.exists():  # else another thread finished it meanwhile
                raise
        except DigestMismatch:
            self._forget(sha256, incoming)
            raise
        self._forget(sha256, incoming)
        self._promote()

    def finish_if_complete(self, sha256: str) -> bool:
        """`finish` when all bytes are here; whether they are."""
        if self.offset(sha256) < self.expected_size(sha256):
            return False
        self.finish(sha256)
        return True

    def pull(self, artifact_id: str, fetch: Callable[[str, int], Iterator[bytes | memoryview]]) -> None:
        """Gets the missing files of an announced artifact: `fetch(sha256, offset)` gives the bytes from there on.

        What `fetch` raises passes through, and the next pull goes on from there. Raises Unavailable when the bytes end
        too early, NotFound for an artifact that was not announced, and what `append` and `finish` raise.
        """
        for sha256 in self.missing(self.manifest_of(artifact_id)):
            offset, size_bytes = self.offset(sha256), self.expected_size(sha256)
            if offset < size_bytes:
                for chunk in fetch(sha256, offset):
                    offset = self.append(sha256, offset, chunk)
            if offset < size_bytes:
                raise Unavailable(
                    f"file {sha256[:12]}… ended after {offset} of {size_bytes} bytes",
                    "pull again: it goes on from there",
                )
            self.finish(sha256)

    def file_path(self, sha256: str) -> Path:
        """Where a complete file is. Raises NotFound."""
        path = self._file(sha256)
        if not path.is_file() or path.is_symlink():
            raise NotFound(f"file {sha256[:12]}… is not (completely) on this board", "push its artifact first")
        return path

    def model_path(self, artifact_id: str) -> Path:
        """The artifact's first file, which its engine opens, with the others beside it under the manifest's names.

        Hard links, because ONNX Runtime follows no symbolic ones out of a folder; whoever loads the files hashes them first.
        Raises NotFound when a file is not here.
        """
        manifest = self.manifest(artifact_id)
        self._manifests.use(artifact_id)
        paths = {entry.path: self.file_path(entry.sha256) for entry in manifest.files}
        first = manifest.files[0].path
        if len(paths) == 1:
            return paths[first]
        folder = self._root / "opened" / artifact_id
        with self._lock, storage_errors(f"cannot lay out artifact {artifact_id[:12]}…"):
            folder.mkdir(exist_ok=True)
            for name, path in paths.items():
                link = folder / name
                if not (link.exists() and link.samefile(path)):
                    link.unlink(missing_ok=True)
                    link.hardlink_to(path)
        return folder / first

    def verify_file(self, sha256: str, progress: Callable[[int], None] | None = None) -> Path:
        """Reads the file again and compares its sha256; returns its path. Right before a load: bits rot.

        Raises DigestMismatch: then the file is put aside and its artifacts are arriving again, so that a push or a pull
        repairs them.
        """
        path = self.file_path(sha256)
        with storage_errors(f"cannot verify {path}"):
            found = hash_file(path, progress)
        if found == sha256:
            return path
        with self._lock, storage_errors(f"cannot put {path} aside"):
            for artifact_id, manifest in self._manifests.complete.items():
                if any(entry.sha256 == sha256 for entry in manifest.files):
                    self._manifests.demote(artifact_id)
                    shutil.rmtree(self._root / "opened" / artifact_id, ignore_errors=True)
            path.replace(self._root / "quarantine" / sha256)
            synchronise_folder(path.parent)
        raise DigestMismatch(
            f"the stored file {sha256[:12]}… is damaged: its sha256 is {found[:12]}…",
            "push the artifact again; if it happens twice, check the disk or the card",
        )

    # --- packs --------------------------------------------------------------------------------------------------------
    def put_pack(self, pack_id: str, data: bytes) -> None:
        """Keeps a task pack. Raises PackRejected when it is malformed or not the one that `pack_id` names."""
        path = self._root / "packs" / f"{_checked(pack_id)}.json"
        packs.parse(data, pack_id)
        if not path.exists():
            write_file(path, data, mode=0o444)

    def packs(self) -> tuple[str, ...]:
        """The ids of the packs that are here."""
        return tuple(sorted(path.stem for path in (self._root / "packs").glob("*.json") if _ID.fullmatch(path.stem)))

    def pack_path(self, pack_id: str) -> Path:
        """Where a pack is. Raises NotFound."""
        path = self._root / "packs" / f"{_checked(pack_id)}.json"
        if not path.is_file():
            raise NotFound(f"task pack {pack_id[:12]}… is not on this board", "push the pack first")
        return path

    def delete_pack(self, pack_id: str) -> None:
        """Forgets a pack. Raises NotFound."""
        path = self.pack_path(pack_id)
        with storage_errors(f"cannot delete {path}"):
            path.unlink(missing_ok=True)
            synchronise_folder(path.parent)

    # --- inside -------------------------------------------------------------------------------------------------------
    def _file(self, sha256: str) -> Path:
        return self._root / "files" / _checked(sha256)[:2] / sha256

    def _entry(self, sha256: str) -> FileEntry:
        entry = self._manifests.entries().get(_checked(sha256))
        if entry is None:
            raise NotFound(f"no announced artifact has a file {sha256[:12]}…", "announce the artifact first")
        return entry

    def _received(self, entry: FileEntry) -> int:
        return entry.size_bytes if self._file(entry.sha256).exists() else self._incoming(entry).offset

    def _incoming(self, entry: FileEntry) -> IncomingFile:
        with self._lock, storage_errors(f"cannot store file {entry.sha256[:12]}…"):
            if entry.sha256 not in self._arriving:
                path = self._file(entry.sha256).with_name(f"{entry.sha256}.part")
                path.parent.mkdir(exist_ok=True)
                self._arriving[entry.sha256] = IncomingFile(path, entry.sha256, entry.size_bytes)
            return self._arriving[entry.sha256]

    def _forget(self, sha256: str, incoming: IncomingFile) -> None:
        with self._lock:
            if self._arriving.get(sha256) is incoming:
                del self._arriving[sha256]
            self._touched.pop(sha256, None)

    def _check_sizes(self, manifest: Manifest) -> None:
        """One sha256 has one size."""
        known = {sha256: entry.size_bytes for sha256, entry in self._manifests.entries().items()}
        for entry in manifest.files:
            size = known.setdefault(entry.sha256, entry.size_bytes)
            if size != entry.size_bytes:
                raise BadInput(
                    f"file {entry.sha256[:12]}… is announced with {entry.size_bytes} bytes, and elsewhere with {size}",
                    "one of the manifests is wrong: describe the file again",
                )

    def _make_room(self, manifest: Manifest, evicted: list[str]) -> None:
        """Everything that is announced and not here must fit, within the limit and with the disk's reserve. The quarantine yields, then
        artifacts that nobody needs now: they are added to `evicted`."""
        wanted = {entry.sha256: entry for known in self._manifests.incoming.values() for entry in known.files}
        wanted.update({entry.sha256: entry for entry in manifest.files})
        coming = sum(entry.size_bytes - self._received(entry) for entry in wanted.values())
        if not coming:
            return
        with storage_errors(f"cannot look at the space of {self._root}"):
            over_disk = coming + self._reserve_bytes - self._free(self._root)
            if over_disk > 0:
                for path in (self._root / "quarantine").iterdir():
                    path.unlink()
                over_disk = coming + self._reserve_bytes - self._free(self._root)
        missing = max(over_disk, self._over_limit(manifest))
        if missing <= 0:
            return
        if self._drop_abandoned():
            self._make_room(manifest, evicted)
            return
        going = [artifact_id for artifact_id in self._manifests.least_recent() if not self._needed(artifact_id)]
        complete = self._manifests.complete
        staying = [complete[artifact_id] for artifact_id in complete if artifact_id not in going]
        staying += [manifest, *self._manifests.incoming.values()]
        chosen = to_evict(going, complete, staying, missing)
        if chosen is None:
            limit = f", {self._limit_bytes / 1e6:.0f} MB are allowed" if self._limit_bytes is not None else ""
            raise NoSpace(
                f"{coming / 1e6:.0f} MB are to come, {missing / 1e6:.0f} MB are missing{limit}"
                f" ({self._reserve_bytes / 1e6:.0f} MB of the disk are kept in reserve)",
                "remove an artifact that is needed no more (joulemark artifacts --forget), raise --store-limit, or use a larger disk",
            )
        for artifact_id in chosen:
            self.delete(artifact_id)
            evicted.append(artifact_id)

    def _drop_abandoned(self) -> bool:
        """Forgets artifacts that somebody began to send and nobody has continued for long; whether there were any."""
        abandoned: list[str] = []
        for artifact_id, manifest in self._manifests.incoming.items():
            places = (artifact_id, *(entry.sha256 for entry in manifest.files))
            touched = max(self._touched.get(place, self._opened_s) for place in places)
            if self._clock() - touched >= ABANDONED_S and not self._ordered(artifact_id):
                abandoned.append(artifact_id)
        for artifact_id in abandoned:
            self.delete(artifact_id)
            self._touched.pop(artifact_id, None)
        return bool(abandoned)

    def _over_limit(self, manifest: Manifest) -> int:
        """By how many bytes what is here and announced, with `manifest`, goes over the limit."""
        if self._limit_bytes is None:
            return 0
        files = self._manifests.entries() | {entry.sha256: entry for entry in manifest.files}
        return sum(entry.size_bytes for entry in files.values()) - self._limit_bytes

    def _promote(self) -> None:
        """Turns every incoming artifact whose files are all here into a complete one."""
        with self._lock:
            for artifact_id, manifest in self._manifests.incoming.items():
                if not self.missing(manifest):
                    self._manifests.promote(artifact_id)


def _checked(identifier: str) -> str:
    if not _ID.fullmatch(identifier):
        raise BadInput(f"{identifier[:80]!r} is no id: ids are 64 lower-case hex digits", "use the id that was given")
    return identifier
