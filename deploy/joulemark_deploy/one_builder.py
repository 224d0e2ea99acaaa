"""One process at a time builds a thing in the cache; another that wants the same waits, and then finds it there."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Generator
from pathlib import Path


@contextlib.contextmanager
def one_builder(thing: Path) -> Generator[None]:
    """Within it nobody else builds `thing`, a file or a folder in the cache. What a killed builder held is free again (flock)."""
    thing.parent.mkdir(parents=True, exist_ok=True)
    with (thing.parent / f".{thing.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
