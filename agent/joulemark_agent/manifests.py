"""The manifests that a store knows: of complete artifacts and of announced ones whose files are still arriving.

Owns the folders artifacts/ and incoming/ and a copy in memory, read once: only this process writes them.
A manifest moves between the two by a rename, so that it is in exactly one after a power cut. How recently an artifact was used is the time
of its manifest's file, as a number that counts up: clocks of boards jump. Not aware of the files.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from joulemark.artifact import read_manifest
from joulemark.durable import synchronise_folder
from joulemark.errors import BadInput, DigestMismatch
from joulemark.wire import FileEntry, Manifest, canonical_json, content_id
from joulemark_agent.refusals import storage_errors, write_file

log = logging.getLogger(__name__)
_FIRST_REAL_TIME_S = 100_000_000
"""Early 1973: no count of uses gets there, and no clock stays before it."""


class Manifests:
    """See the module. Not locked: the store serialises the changes. The dictionaries are replaced, never changed."""

    def __init__(self, complete: Path, incoming: Path) -> None:
        self._complete_folder = complete
        self._incoming_folder = incoming
        self.complete = _load(complete)
        self.incoming = _load(incoming)
        self._uses = {artifact_id: _uses(complete / f"{artifact_id}.json") for artifact_id in self.complete}

    def entries(self) -> dict[str, FileEntry]:
        """Every file that a known artifact has, by sha256."""
        known = [*self.incoming.values(), *self.complete.values()]
        return {entry.sha256: entry for manifest in known for entry in manifest.files}

    def add(self, artifact_id: str, manifest: Manifest) -> None:
        """Writes an announced manifest, durably."""
        write_file(self._incoming_folder / f"{artifact_id}.json", canonical_json(manifest))
        self.incoming = {**self.incoming, artifact_id: manifest}

    def promote(self, artifact_id: str) -> None:
        """From incoming to complete: the last step of an artifact's arrival."""
        self._move(artifact_id, self._incoming_folder, self._complete_folder)
        self.complete = {**self.complete, artifact_id: self.incoming[artifact_id]}
        self.incoming = _without(self.incoming, artifact_id)
        self.use(artifact_id)

    def use(self, artifact_id: str) -> None:
        """Notes that a complete artifact is used now. What a full or read-only disk refuses to note holds until the next start."""
        count = max(self._uses.values(), default=0) + 1
        self._uses[artifact_id] = count
        try:
            os.utime(self._complete_folder / f"{artifact_id}.json", (count, count))
        except OSError as error:
            log.warning("the use of artifact %s… is not noted: %s", artifact_id[:12], error)

    def least_recent(self) -> list[str]:
        """The complete artifacts, the least recently used first."""
        return sorted(self.complete, key=lambda artifact_id: (self._uses.get(artifact_id, 0), artifact_id))

    def demote(self, artifact_id: str) -> None:
        """From complete to incoming: a file of it is no longer what it was."""
        self._move(artifact_id, self._complete_folder, self._incoming_folder)
        self.incoming = {**self.incoming, artifact_id: self.complete[artifact_id]}
        self.complete = _without(self.complete, artifact_id)

    def remove(self, artifact_id: str) -> None:
        """Forgets a manifest, durably."""
        with storage_errors(f"cannot delete artifact {artifact_id[:12]}…"):
            for folder in (self._complete_folder, self._incoming_folder):
                (folder / f"{artifact_id}.json").unlink(missing_ok=True)
                synchronise_folder(folder)
        self.complete = _without(self.complete, artifact_id)
        self.incoming = _without(self.incoming, artifact_id)

    def _move(self, artifact_id: str, source: Path, target: Path) -> None:
        name = f"{artifact_id}.json"
        with storage_errors(f"cannot move the manifest of artifact {artifact_id[:12]}…"):
            (source / name).replace(target / name)
            synchronise_folder(target)
            synchronise_folder(source)


def _uses(path: Path) -> int:
    """The count that `use` left; the real time of a file that an older version wrote counts as the beginning."""
    found = int(path.stat().st_mtime)
    return found if found < _FIRST_REAL_TIME_S else 0


def _without(manifests: dict[str, Manifest], artifact_id: str) -> dict[str, Manifest]:
    return {known: manifest for known, manifest in manifests.items() if known != artifact_id}


def _load(folder: Path) -> dict[str, Manifest]:
    """The folder's manifests; a damaged one is left out, with a warning that says which."""
    found: dict[str, Manifest] = {}
    for path in sorted(folder.glob("[0-9a-f]*.json")):
        try:
            manifest = read_manifest(path)
            if content_id(manifest) != path.stem:
                raise DigestMismatch(f"{path} is not the manifest that its name says", "push the artifact again")
        except BadInput as error:
            log.warning("a manifest is left out: %s", error)
            continue
        found[path.stem] = manifest
    return found
