"""Which artifacts give way when a store is full: the least recently used first, and never more than is needed. Pure.

Files that artifacts share are freed only with the last artifact that has them. Sizes are in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from joulemark.wire import Manifest


def to_evict(
    least_recent_first: Sequence[str], manifests: Mapping[str, Manifest], needed: Iterable[Manifest], missing_bytes: int
) -> list[str] | None:
    """The artifacts to remove so that at least `missing_bytes` become free; None when even all of them are not enough.

    `least_recent_first` are those that may go; `needed` the manifests of everything that stays or is on its way.
    """
    staying = {entry.sha256 for manifest in needed for entry in manifest.files}
    holders: dict[str, int] = {}
    for artifact_id in least_recent_first:
        for sha256 in _files(manifests[artifact_id]):
            holders[sha256] = holders.get(sha256, 0) + 1
    chosen: list[str] = []
    freed = 0
    for artifact_id in least_recent_first:
        if freed >= missing_bytes:
            break
        files = _files(manifests[artifact_id])
        if set(files) <= staying:
            continue  # removing it would free nothing
        chosen.append(artifact_id)
        for sha256, size_bytes in files.items():
            holders[sha256] -= 1
            if not holders[sha256] and sha256 not in staying:
                freed += size_bytes
    return chosen if freed >= missing_bytes else None


def _files(manifest: Manifest) -> dict[str, int]:
    return {entry.sha256: entry.size_bytes for entry in manifest.files}
