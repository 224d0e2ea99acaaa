"""One file that is arriving in pieces: appended at a known offset, hashed while it is written, resumed after a break.

Owns the `.part` file. Not aware of manifests, or of who sends. The offset is the part file's size, so that it is true
after the agent was killed; after a power cut the tail may hold what the disk never got, which the sha256 over the whole
finds out.
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

from joulemark.durable import begin_to_store, synchronise_folder
from joulemark.errors import BadInput, Conflict, DigestMismatch
from joulemark_agent.refusals import storage_errors

_CHUNK_BYTES = 1 << 20
_STORE_EVERY_BYTES = 8 << 20


class IncomingFile:
    """A part file with its running hash. Safe for several threads; of two that append at the same offset one wins."""

    def __init__(self, path: Path, sha256: str, size_bytes: int) -> None:
        self._path = path
        self._sha256 = sha256
        self._size_bytes = size_bytes
        self._lock = threading.Lock()
        self._hashed = 0
        self._hasher = hashlib.sha256()
        self._closed = False

    @property
    def offset(self) -> int:
        """Bytes that are here."""
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0

    def append(self, offset: int, chunk: bytes | memoryview) -> int:
        """Writes `chunk` at `offset` and returns the new offset.

        Raises Conflict when the file does not end at `offset`, BadInput when it would grow over its announced size,
        NoSpace; then the file is as it was.
        """
        with self._lock, storage_errors(f"cannot store {self._label}"):
            here = self.offset
            if self._closed or offset != here:
                raise Conflict(
                    f"{self._label} has {here} bytes here, a piece for offset {offset} does not fit",
                    "ask for the offset (HEAD) and go on from there",
                )
            if here + len(chunk) > self._size_bytes:
                raise BadInput(
                    f"{self._label} was announced with {self._size_bytes} bytes, {here + len(chunk)} were sent",
                    "announce the artifact again with the right sizes",
                )
            self._catch_up(here)
            self._write(here, chunk)
            self._hasher.update(chunk)
            self._hashed = here + len(chunk)
            return self._hashed

    def take(self, target: Path, quarantine: Path) -> None:
        """Makes the whole, verified file durable and moves it to `target`, read-only; nothing can be appended then.

        Raises Conflict when bytes are missing; DigestMismatch when they are wrong: then they are moved to `quarantine`.
        """
        with self._lock, storage_errors(f"cannot finish {self._label}"):
            here = self.offset
            if self._closed or here != self._size_bytes:
                raise Conflict(
                    f"{self._label} has {here} of {self._size_bytes} bytes here", "send the rest, then finish"
                )
            self._catch_up(here)
            found = self._hasher.hexdigest()
            self._closed = True
            if found != self._sha256:
                self._path.replace(quarantine)
                raise DigestMismatch(
                    f"{self._label} arrived damaged: its sha256 is {found[:12]}…",
                    "send it again from the beginning; what came was put aside",
                )
            with self._path.open("rb+") as file:
                os.fsync(file.fileno())
            self._path.chmod(0o444)
            self._path.replace(target)
            synchronise_folder(target.parent)

    def discard(self) -> None:
        """Gives up what is here; nothing can be appended then."""
        with self._lock, storage_errors(f"cannot remove {self._label}"):
            self._closed = True
            self._path.unlink(missing_ok=True)

    @property
    def _label(self) -> str:
        return f"file {self._sha256[:12]}…"

    def _catch_up(self, here: int) -> None:
        """After a restart the hash of what is here already is made anew."""
        if self._hashed == here:
            return
        hasher, done = hashlib.sha256(), 0
        with self._path.open("rb") as file:
            while piece := file.read(_CHUNK_BYTES):
                hasher.update(piece)
                done += len(piece)
        self._hasher, self._hashed = hasher, done

    def _write(self, here: int, chunk: bytes | memoryview) -> None:
        with self._path.open("ab", buffering=0) as file:
            try:
                written = 0
                while written < len(chunk):
                    written += file.write(memoryview(chunk)[written:]) or 0
                if (here + len(chunk)) // _STORE_EVERY_BYTES > here // _STORE_EVERY_BYTES:
                    begin_to_store(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), here)
                raise
