"""The bandwidth's arithmetic with times known by hand, its bounds, and one short real measurement."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from joulemark.wire import Absent, Measure
from joulemark_agent import bandwidth
from joulemark_agent.bandwidth import Plan, figure, last_level_cache_bytes, parse_size, plan
from joulemark_agent.sysfs import Roots
from tests.fixtures.boards import BARE, plant

MIB = 1024 * 1024


def cache(cpu: int, index: int, level: int, kind: str, size: str, shared: str) -> dict[str, str]:
    base = f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
    return {
        f"{base}/level": f"{level}\n",
        f"{base}/type": f"{kind}\n",
        f"{base}/size": f"{size}\n",
        f"{base}/shared_cpu_list": f"{shared}\n",
    }


def meminfo(available_mib: int) -> dict[str, str]:
    return {"proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable: {available_mib * 1024} kB\n"}


def test_a_pass_takes_from_the_first_start_to_the_last_end() -> None:
    planned = Plan(cpus=(0, 1), bytes_each=500_000_000, cache_bytes=32 * MIB)
    first = [(0.0, 0.10), (1.0, 1.05), (2.0, 2.20)]
    second = [(0.05, 0.20), (1.01, 1.10), (2.0, 2.25)]
    measured = figure(planned, [first, second])
    assert measured.value == pytest.approx(10e9)  # 1 GB in 0.10 s
    assert measured.high == pytest.approx(10e9)
    assert measured.low == pytest.approx(4e9)  # 1 GB in 0.25 s
    assert measured.n == 3
    assert measured.unit == "By/s"
    assert "median 5.00 GB/s" in measured.source
    assert "2 cores" in measured.source
    assert "caches 32 MiB" in measured.source


def test_last_level_caches_are_added_up_once_each(tmp_path: Path) -> None:
    files: dict[str, str] = {}
    for cpu in range(4):
        half = "0-1" if cpu < 2 else "2-3"
        files |= cache(cpu, 0, 1, "Data", "32K", str(cpu))
        files |= cache(cpu, 1, 1, "Instruction", "64K", str(cpu))
        files |= cache(cpu, 2, 2, "Unified", "512K", str(cpu))
        files |= cache(cpu, 3, 3, "Unified", "16384K", half)
    roots = plant(tmp_path, files)
    assert last_level_cache_bytes(roots, (0, 1, 2, 3)) == 32 * MIB
    assert last_level_cache_bytes(roots, (0, 1)) == 16 * MIB
    assert last_level_cache_bytes(roots, (7,)) is None


@pytest.mark.parametrize(
    ("text", "size"), [("32768K", 32 * MIB), ("2M", 2 * MIB), ("64", 64), ("", None), ("K", None), ("-1K", None)]
)
def test_cache_sizes(text: str, size: int | None) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("llc", "available_mib", "all_mib"),
    [
        ("1024K", 8000, 256),  # small caches: long enough passes
        ("262144K", 8000, 1024),  # 256 MiB of cache: four times that
        ("1024K", 400, 100),  # a small board: a quarter of what is available
    ],
)
def test_how_much_is_read(tmp_path: Path, llc: str, available_mib: int, all_mib: int) -> None:
    files = {**BARE, **cache(0, 2, 2, "Unified", llc, "0-1"), **cache(1, 2, 2, "Unified", llc, "0-1")}
    planned = plan(plant(tmp_path, {**files, **meminfo(available_mib)}))
    assert isinstance(planned, Plan)
    assert planned.cpus == (0, 1)
    assert planned.bytes_all == all_mib * MIB


def test_too_little_memory_to_exceed_the_caches_is_absent(tmp_path: Path) -> None:
    files = {**BARE, **cache(0, 3, 3, "Unified", "32768K", "0-1"), **meminfo(500)}
    planned = plan(plant(tmp_path, files))
    assert isinstance(planned, Absent)
    assert "125 MiB may be taken" in planned.reason


def test_unknown_caches_and_little_memory_are_absent_too(tmp_path: Path) -> None:
    assert isinstance(plan(plant(tmp_path, {**BARE, **meminfo(100)})), Absent)
    assert isinstance(plan(plant(tmp_path / "none", {})), Absent)


def test_a_real_measurement_lies_in_the_range_of_real_memory() -> None:
    measured = bandwidth.measure(Roots(), passes=5)
    if isinstance(measured, Absent):
        pytest.skip(f"this machine cannot measure it: {measured.reason}")
    assert isinstance(measured, Measure)
    assert measured.low is not None
    assert 0.1e9 < measured.low <= measured.value == measured.high
    assert measured.value < 3000e9, "more than any memory: the pages were not real or came from a cache"
    assert measured.n == 5


def test_every_byte_is_written_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that nobody wrote are all one page of zeros in the cache: three times the real bandwidth was seen."""
    written: list[int] = []
    fill = ctypes.memset

    def spy(address: int, value: int, size: int) -> object:
        written.append(size)
        return fill(address, value, size)

    monkeypatch.setattr(bandwidth.ctypes, "memset", spy)
    planned = plan(Roots())
    if isinstance(planned, Absent) or isinstance(bandwidth.measure(Roots(), passes=5), Absent):
        pytest.skip("this machine cannot measure it")
    assert sum(written) == pytest.approx(planned.bytes_all, rel=0.05)  # the available memory moves between two plans


def test_memory_that_cannot_be_had_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(bandwidth.mmap, "mmap", refuse)
    measured = bandwidth.measure(Roots(), passes=5)
    assert isinstance(measured, Absent)
    assert "Cannot allocate memory" in measured.reason or "caches" in measured.reason
