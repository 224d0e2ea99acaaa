"""Measured memory read bandwidth of all usable cores, in bytes per second, with nothing but the standard library.

Owns: how much is read, by whom, and how it is timed. Not aware of models. Every core searches a buffer of its own for a
byte that is not in it with the C library's memchr: it reads every byte, uses vector instructions, and ctypes lets go of
the interpreter's lock meanwhile. The buffers together are several times as large as the last-level caches, so that they
come from memory, and are written first by the thread that reads them, so that they lie near its core and are real
pages.

The value is the fastest pass, as STREAM does it (McCalpin 1995): disturbance only ever slows a pass down. `low` is the
slowest pass, `high` the fastest; the median is in `source`. It is what software can read here, below the memory's data
sheet.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from joulemark.errors import NotFound
from joulemark.wire import Absent, Measure, Metric
from joulemark_agent import machine
from joulemark_agent.sysfs import Roots, entries, text_or_none

_CACHE_MULTIPLE = 4
_LEAST_BYTES = 256 * 1024 * 1024
"""One pass should take tens of milliseconds, so that starting threads does not show."""
_AVAILABLE_SHARE = 4
"""At most a quarter of the available memory is taken, so that nothing is pushed out to swap."""
_PASSES = 15
_FILL, _SOUGHT = 0x5A, 0xA5
_PAGE_BYTES = 4096
_PATIENCE_S = 60.0
_UNITS = {"K": 1024, "M": 1024**2, "G": 1024**3}


@dataclass(frozen=True)
class Plan:
    """How a measurement is made: one buffer of `bytes_each` on each of `cpus`."""

    cpus: tuple[int, ...]
    bytes_each: int
    cache_bytes: int | None

    @property
    def bytes_all(self) -> int:
        """What one pass reads."""
        return self.bytes_each * len(self.cpus)


def parse_size(text: str) -> int | None:
    """Bytes of a cache size as sysfs writes it (`32768K`), None when it is no size."""
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].upper() in _UNITS else (text, "")
    return int(number) * _UNITS.get(unit, 1) if number.isdecimal() and len(number) < 20 else None


def last_level_cache_bytes(roots: Roots, cpus: tuple[int, ...]) -> int | None:
    """All last-level caches that `cpus` use, added up; None when the kernel describes none."""
    found: dict[str, int] = {}
    for cpu in cpus:
        folder = roots.sys / "devices" / "system" / "cpu" / f"cpu{cpu}" / "cache"
        levels: list[tuple[int, int, str]] = []
        for index in entries(folder):
            level, size = text_or_none(index / "level"), parse_size(text_or_none(index / "size") or "")
            if level and level.isdecimal() and size and text_or_none(index / "type") != "Instruction":
                levels.append((int(level), size, text_or_none(index / "shared_cpu_list") or str(cpu)))
        if levels:
            _, size, shared = max(levels)
            found[shared] = size
    return sum(found.values()) or None


def plan(roots: Roots) -> Plan | Absent:
    """What to measure with here, or why it cannot be measured."""
    try:
        cpus = machine.usable_cpus(roots)[: machine.usable_cores(roots)]
    except NotFound as error:
        return Absent(reason=error.message)
    available = machine.available_bytes(roots)
    if not cpus or available is None:
        return Absent(reason="the usable processors or the available memory are not known")
    most = available // _AVAILABLE_SHARE
    cache = last_level_cache_bytes(roots, cpus)
    wanted = max(_CACHE_MULTIPLE * (cache or 0), _LEAST_BYTES)
    if most < wanted and (cache is None or most < _CACHE_MULTIPLE * cache):
        return Absent(reason=f"{wanted >> 20} MiB are needed to exceed the caches, {most >> 20} MiB may be taken")
    each = min(wanted, most) // len(cpus) // _PAGE_BYTES * _PAGE_BYTES
    return Plan(cpus, each, cache)


class _Reader:
    """One core's part: its own buffer, and (start, end) of every pass over it."""

    def __init__(self, cpu: int, size: int, clock: Callable[[], float], barrier: threading.Barrier) -> None:
        self.passes: list[tuple[float, float]] = []
        self.problem: str | None = None
        self._cpu = cpu
        self._size = size
        self._clock = clock
        self._barrier = barrier

    def run(self, passes: int) -> None:
        """Fills the buffer and passes over it `passes` times, all cores starting each pass together."""
        with suppress(OSError):  # unpinned is still a measurement, on whatever core the kernel chooses
            os.sched_setaffinity(0, {self._cpu})
        try:
            with mmap.mmap(-1, self._size) as memory:
                with suppress(OSError):  # a kernel without huge pages
                    memory.madvise(mmap.MADV_HUGEPAGE)
                view = (ctypes.c_char * self._size).from_buffer(memory)
                self._read(ctypes.addressof(view), passes)
                del view  # memory that is lent out cannot be unmapped
        except (OSError, MemoryError, BufferError, threading.BrokenBarrierError) as error:
            self.problem = f"{type(error).__name__}: {error}"
            self._barrier.abort()

    def _read(self, address: int, passes: int) -> None:
        search = ctypes.CDLL(None).memchr
        search.argtypes, search.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p
        ctypes.memset(address, _FILL, self._size)
        for _ in range(passes):
            self._barrier.wait(_PATIENCE_S)
            start_s = self._clock()
            found = search(address, _SOUGHT, self._size)
            end_s = self._clock()
            if found is not None:
                raise BufferError("memchr found a byte that is not there")
            self.passes.append((start_s, end_s))


def measure(roots: Roots, clock: Callable[[], float] = time.perf_counter, passes: int = _PASSES) -> Metric:
    """The read bandwidth now, in By/s: the fastest of `passes` passes (at least 5) after one that warms up. Takes about
    a second."""
    planned = plan(roots)
    if isinstance(planned, Absent):
        return planned
    barrier = threading.Barrier(len(planned.cpus))
    readers = [_Reader(cpu, planned.bytes_each, clock, barrier) for cpu in planned.cpus]
    threads = [threading.Thread(target=r.run, args=(max(passes, 5) + 1,), daemon=True) for r in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    problems = [reader.problem for reader in readers if reader.problem]
    if problems:
        return Absent(reason=f"the memory bandwidth could not be measured: {problems[0]}")
    return figure(planned, [reader.passes[1:] for reader in readers])


def figure(planned: Plan, passes: list[list[tuple[float, float]]]) -> Measure:
    """The measure of `passes[core][pass]` = (start, end): a pass takes from the first start to the last end."""
    spans = [(min(s for s, _ in together), max(e for _, e in together)) for together in zip(*passes, strict=True)]
    rates = [planned.bytes_all / (end - start) for start, end in spans]
    cache = f"caches {planned.cache_bytes >> 20} MiB" if planned.cache_bytes else "cache size not known"
    return Measure(
        value=max(rates),
        unit="By/s",
        n=len(rates),
        low=min(rates),
        high=max(rates),
        source=f"memchr over {planned.bytes_all >> 20} MiB by {len(planned.cpus)} cores ({cache}), best of {len(rates)}"
        f" passes, median {statistics.median(rates) / 1e9:.2f} GB/s",
    )
