"""Memory in bytes: proportional and resident set size (PSS, RSS) of the worker process, and what the machine has left.

Owns: the three channels. Not aware of what the worker does. Truth: Documentation/filesystems/proc.rst. PSS shares out
pages that several processes map, so that a memory-mapped model counts once; the kernel walks all of the process's
page tables for it. It is therefore read at most once a second, more rarely for a large process, and is None at the
ticks between, as is the available memory; RSS is cheap and is read at every tick.
"""

from __future__ import annotations

import os

from joulemark.wire import Channel
from joulemark_agent.sensors import NotPresent, Options, Pace, Sensor, Values
from joulemark_agent.sysfs import KeptFile, Roots, Unreadable, read_text

_INTERVAL_S = 1.0
_PSS_SHARE = 0.0005
"""Of one core: the walk takes about 1 ms for a process of 150 MB, so that it is then read every 2 s."""


def _field_bytes(content: bytes, field: bytes) -> float | None:
    """The value of a line `field:  123 kB` in bytes, None when there is no such line."""
    start = 0 if content.startswith(field) else content.find(b"\n" + field) + 1
    if not content.startswith(field, start):
        return None
    words = content[start : content.find(b"\n", start)].split()
    return float(words[1]) * 1024 if len(words) >= 2 and words[1].isdigit() else None


class _Available:
    def __init__(self, roots: Roots, options: Options) -> None:
        self.channel = Channel(
            name="memory.available", quantity="memory", unit="By", source="/proc/meminfo MemAvailable, once a second"
        )
        self.file = KeptFile(roots.proc / "meminfo")
        self._pace = Pace(options.clock, _INTERVAL_S)

    def read(self) -> float | None:
        return self._pace.read(self._bytes)

    def _bytes(self) -> float | None:
        content = self.file.read()
        return None if isinstance(content, Unreadable) else _field_bytes(content, b"MemAvailable:")


class _Resident:
    def __init__(self, roots: Roots, pid: int) -> None:
        self.channel = Channel(
            name="memory.worker_rss", quantity="memory", unit="By", source="/proc/PID/statm of the worker"
        )
        self.file = KeptFile(roots.proc / str(pid) / "statm")
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")

    def read(self) -> float | None:
        content = self.file.read()
        if isinstance(content, Unreadable):
            return None
        words = content.split()
        return float(words[1]) * self._page_bytes if len(words) >= 2 and words[1].isdigit() else None


class _Proportional:
    def __init__(self, roots: Roots, pid: int, options: Options) -> None:
        self.channel = Channel(
            name="memory.worker_pss",
            quantity="memory",
            unit="By",
            source="/proc/PID/smaps_rollup of the worker, at most once a second",
        )
        self.file = KeptFile(roots.proc / str(pid) / "smaps_rollup")
        self._pace = Pace(options.clock, _INTERVAL_S, _PSS_SHARE)

    def read(self) -> float | None:
        return self._pace.read(self._bytes)

    def _bytes(self) -> float | None:
        content = self.file.read()
        return None if isinstance(content, Unreadable) else _field_bytes(content, b"Pss:")


class _Memory:
    def __init__(self, parts: list[_Available | _Resident | _Proportional], missing: dict[str, str]) -> None:
        self.channels = tuple(part.channel for part in parts)
        self._parts = parts
        self._missing = missing

    def read(self) -> Values:
        return tuple(part.read() for part in self._parts)

    def notes(self) -> dict[str, str]:
        failed = {part.channel.name: why for part in self._parts if (why := part.file.explanation())}
        return {**self._missing, **failed}

    def close(self) -> None:
        for part in self._parts:
            part.file.close()


def probe(roots: Roots, options: Options) -> Sensor:
    """What can be read of the worker and of the machine. Raises NotPresent when nothing can."""
    parts: list[_Available | _Resident | _Proportional] = []
    missing: dict[str, str] = {}
    candidates: list[_Available | _Resident | _Proportional] = [_Available(roots, options)]
    if options.worker_pid is None:
        missing["memory.worker_pss"] = missing["memory.worker_rss"] = "there is no worker process"
    else:
        candidates = [
            _Proportional(roots, options.worker_pid, options),
            _Resident(roots, options.worker_pid),
            *candidates,
        ]
    for part in candidates:
        text = read_text(part.file.path)
        if isinstance(text, Unreadable):
            missing[part.channel.name] = str(text)
        else:
            parts.append(part)
    if not parts:
        raise NotPresent("; ".join(sorted(set(missing.values()))))
    return _Memory(parts, missing)
