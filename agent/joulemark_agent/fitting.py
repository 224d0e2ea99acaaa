"""Whether a model fits this board, with which backend, and how much memory its key-value cache may take. Pure, but for looking
which plug-ins are there and installed.

Bytes. Not aware of runs or of how memory is measured: the caller says what is available.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from types import ModuleType

from joulemark import plugins
from joulemark.errors import BadInput
from joulemark.wire import Manifest, Problem

# An allowance for the engine's buffers beside weights and key-value memory. The demo's worker peaked at 171 to 255 MiB (PSS) with 98 MB of
# weights and a key-value memory of a few tens of MB.
ENGINE_OVERHEAD_BYTES = 160 * 1024 * 1024


def misfit(available_bytes: int | None, manifest: Manifest) -> Problem | None:
    """Why the model cannot be loaded into what is available, None when it can or when that is not known."""
    needed = manifest.memory_of_weights + ENGINE_OVERHEAD_BYTES
    if available_bytes is None or available_bytes >= needed:
        return None
    return Problem(
        code="does_not_fit",
        message=f"{manifest.name} needs about {needed / 1e6:.0f} MB, {available_bytes / 1e6:.0f} MB are available",
        hint="use a smaller model or more bits off it, or stop other programs on the board",
    )


def cache_budget(available_bytes: int | None, manifest: Manifest) -> int:
    """What the key-value memory may take: half of what the weights and the engine leave of the available memory."""
    if available_bytes is None:
        return manifest.memory_of_weights
    return max(0, available_bytes - manifest.memory_of_weights - ENGINE_OVERHEAD_BYTES) // 2


def choose_backend(wanted: Sequence[str], artifact_format: str) -> str:
    """The first of `wanted` that opens the format and is installed; none installed: the first, whose error then says how to install it.
    Raises NotFound for an unknown backend, BadInput when none opens the format."""
    able = {name: backend for name in wanted if artifact_format in (backend := _backend(name)).FORMATS}
    if not able:
        raise BadInput(
            f"no backend of {', '.join(wanted)} opens a {artifact_format} artifact",
            "choose one with `backend`, or export the model in another format",
        )
    installed = [name for name, backend in able.items() if all(map(importlib.util.find_spec, backend.MODULES))]
    return (installed or [*able])[0]


def _backend(name: str) -> ModuleType:
    return plugins.load("joulemark_agent.backends", name)
