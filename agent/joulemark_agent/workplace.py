"""What runs and completions work with: where models and packs come from, and the machine, which one of them has at a time.

Owns: these two words. Not aware of who works there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from joulemark.wire import DeviceFacts, Manifest, Metric
from joulemark_agent.profiles import DeviceProfile
from joulemark_agent.sysfs import Roots


class Library(Protocol):
    """Where the models and packs of runs come from: the agent's store, or the files of a single command."""

    def manifest(self, artifact_id: str) -> Manifest:
        """Raises NotFound."""
        ...

    def model_path(self, artifact_id: str) -> Path:
        """The artifact's first file, with the others beside it under the manifest's names. Raises NotFound when one is not here."""
        ...

    def manifest_of(self, artifact_id: str) -> Manifest:
        """The manifest also of an artifact that lost a file (a damaged one). Raises NotFound."""
        ...

    def pack_path(self, pack_id: str) -> Path:
        """Raises NotFound."""
        ...


@dataclass(frozen=True)
class Machine:
    """What runs need to know of the machine; `bandwidth` measures the memory's read bandwidth when called."""

    profile: DeviceProfile
    roots: Roots
    facts: Callable[[Metric], DeviceFacts]
    bandwidth: Callable[[], Metric]
    replay: Path | None = None
    note: Path | None = None
    """Where it is written down how the machine was set before a run that wants it otherwise."""
    lock: threading.Lock = field(default_factory=threading.Lock)
