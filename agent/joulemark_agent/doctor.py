"""What this machine has and what stands in the way of good numbers: cores, memory, bandwidth, engines, meters, clock,
contention.

Owns: the questions, the judgement on each, and the advice. Not aware of how findings are shown. Every question is
answered, by `unknown` where the machine does not say; nothing is changed and nothing is installed. Engines are examined
in a short child process, so that the doctor stays light and survives an engine that crashes while it is loaded. Takes a
few seconds.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from joulemark import plugins
from joulemark.errors import JoulemarkError
from joulemark.wire import Absent
from joulemark_agent import bandwidth, board_findings, machine
from joulemark_agent.engine_findings import engines, python_child
from joulemark_agent.findings import Finding, in_units
from joulemark_agent.profiles import DeviceProfile
from joulemark_agent.sensors import NotPresent, Options, Sensor
from joulemark_agent.sysfs import Roots, read_text

_GIB = 1024**3
_LEAST_FREE_BYTES = 2 * _GIB
_LEAST_AVAILABLE_BYTES = 512 * 1024**2
_BUSY_SHARE = 0.05
"""Others' share of the machine from which figures suffer: llama.cpp's threads wait for each other at every layer."""
_SAMPLE_S = 1.0
_EARLIEST_S = 1_767_225_600.0
"""2026-01-01: this program is younger."""


def examine(
    roots: Roots,
    data_folder: Path,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    clock_state: Callable[[], int] = machine.kernel_clock_state,
    wall: Callable[[], float] = time.time,
    run_child: Callable[[str], str] | None = None,
) -> list[Finding]:
    """All findings, in a fixed order of areas. `run_child` runs Python source in a new process and gives its output."""
    profile = board_findings.chosen_profile(roots)
    return [
        *_cores(roots),
        board_findings.profile(profile),
        *_memory(roots),
        *_bandwidth(roots, profile),
        *_governor(roots),
        *board_findings.power_mode(roots),
        *board_findings.supply(roots),
        *board_findings.memory_control(roots),
        *board_findings.desktop(roots),
        *engines(run_child or python_child),
        *board_findings.meters(profile, roots, clock, sleep),
        *_contention(roots, clock, sleep),
        *_pressure(roots),
        *_clock(roots, clock_state, wall),
        *_disk(data_folder),
    ]


# --- the machine ------------------------------------------------------------------------------------------------------
def _cores(roots: Roots) -> Iterator[Finding]:
    name = machine.model_name(roots)
    yield Finding("machine", "ok", f"{name + ', ' if name else ''}{machine.cpu_model(roots)}, {roots.arch}")
    try:
        allowed, cores, quota = machine.usable_cpus(roots), machine.usable_cores(roots), machine.cpu_quota(roots)
    except JoulemarkError as error:
        yield Finding("cores", "unknown", error.message, error.hint)
        return
    listed = machine.online_cpus(roots)
    text = f"{cores} cores can be used"
    if quota is not None and quota < len(allowed):
        fix = "raise the limit (systemd CPUQuota=, docker --cpus) or measure with fewer threads"
        yield Finding("cores", "warning", f"{text}: a cgroup limits this process to {quota:g} of {len(allowed)}", fix)
    elif listed and len(allowed) < len(listed):
        fix = "start without taskset or cpuset limits to use them all"
        yield Finding("cores", "warning", f"{text} of {len(listed)}: the others are not allowed to this process", fix)
    else:
        yield Finding("cores", "ok", text)


def _memory(roots: Roots) -> Iterator[Finding]:
    total, available = (machine.memory_field_bytes(roots, name) for name in ("MemTotal", "MemAvailable"))
    if total is None or available is None:
        yield Finding(
            "memory", "unknown", f"{roots.proc / 'meminfo'} does not give total and available memory", "mount /proc"
        )
        return
    limit = machine.memory_limit_bytes(roots)
    limited = f"; a cgroup limits this process to {in_units(limit)}" if limit else ""
    text = f"{in_units(available)} of {in_units(total)} are available{limited}"
    if min(available, limit or available) < _LEAST_AVAILABLE_BYTES:
        yield Finding("memory", "problem", text, "end other programs, or raise the limit: few models fit")
    else:
        yield Finding("memory", "warning" if limit else "ok", text, "raise the limit to use all of it" if limit else "")
    yield _swap(roots)
    yield from board_findings.swap_on_card(roots)


def _swap(roots: Roots) -> Finding:
    total, free = (machine.memory_field_bytes(roots, name) for name in ("SwapTotal", "SwapFree"))
    if total is None or free is None:
        return Finding("swap", "unknown", "the kernel does not say whether there is swap")
    if not total:
        return Finding("swap", "ok", "no swap: a model that does not fit fails instead of crawling")
    if total - free > 0.1 * total:
        return Finding(
            "swap",
            "warning",
            f"{in_units(total - free)} of {in_units(total)} swap are in use: times of a run may hold waits for the disk",
            "end other programs, then empty it: swapoff -a && swapon -a",
        )
    return Finding("swap", "ok", f"{in_units(total)} swap, nearly unused")


def _bandwidth(roots: Roots, profile: DeviceProfile | JoulemarkError) -> Iterator[Finding]:
    measured = bandwidth.measure(roots)
    if isinstance(measured, Absent):
        yield Finding("memory bandwidth", "unknown", measured.reason)
        return
    stated = None if isinstance(profile, JoulemarkError) else profile.memory_bandwidth
    text = f"{measured.value / 1e9:.2f} GB/s read ({measured.source})"
    if stated is not None and measured.value > stated:
        text += f", more than the {stated / 1e9:g} GB/s that the maker gives: caches were measured, or the profile is another board's"
        yield Finding("memory bandwidth", "warning", text, "`joulemark profile check` says whether the profile fits")
    else:
        yield Finding("memory bandwidth", "ok", text)


def _governor(roots: Roots) -> Iterator[Finding]:
    name = machine.governor(roots)
    if name is None:
        yield Finding("governor", "unknown", "the kernel does not scale frequencies here, or does not show it")
    elif name == "performance":
        yield Finding("governor", "ok", name)
    else:
        fix = "for repeatable times: cpupower frequency-set -g performance (a device measured as it is needs none)"
        yield Finding("governor", "warning", f"{name}: short measurements include the time of speeding up", fix)


# --- meters and neighbours --------------------------------------------------------------------------------------------
def _contention(roots: Roots, clock: Callable[[], float], sleep: Callable[[float], None]) -> Iterator[Finding]:
    try:
        probe = plugins.load("joulemark_agent.sensors", "contention").probe
        sensor: Sensor = probe(roots, Options(clock=clock))
    except NotPresent as reason:
        yield Finding("contention", "unknown", reason.message, reason.hint)
        return
    sensor.read()
    sleep(_SAMPLE_S)
    read = dict(zip([channel.name for channel in sensor.channels], sensor.read(), strict=True))
    sensor.close()
    other, steal = read["contention.other_cpu"], read["contention.steal"]
    if other is None or steal is None:
        yield Finding("contention", "unknown", "processor times did not move or could not be read")
        return
    text = f"in the last second others used {other:.1%} of the machine, the hypervisor took {steal:.1%}"
    if other + steal > _BUSY_SHARE:
        yield Finding(
            "contention", "warning", text, "end other programs before measuring: one neighbour can cost half the speed"
        )
    else:
        yield Finding("contention", "ok", text)


def _pressure(roots: Roots) -> Iterator[Finding]:
    text = read_text(roots.proc / "pressure" / "cpu")
    if isinstance(text, str):
        yield Finding("pressure stall information", "ok", "the kernel counts waiting for processor, memory and disk")
    else:
        yield Finding(
            "pressure stall information",
            "warning",
            str(text),
            "Linux has it since 4.20: add psi=1 to the kernel's command line",
        )


# --- clock and disk ---------------------------------------------------------------------------------------------------
def _clock(roots: Roots, clock_state: Callable[[], int], wall: Callable[[], float]) -> Iterator[Finding]:
    if (now_s := wall()) < _EARLIEST_S:
        day = time.strftime("%Y-%m-%d", time.gmtime(now_s))
        fix = "a board without a battery clock needs a time service: timedatectl set-ntp true, and a network that lets NTP through"
        yield Finding("date", "warning", f"the wall clock says {day}: it was never set since the board started", fix)
    synchronised = machine.clock_synchronised(roots, clock_state)
    if isinstance(synchronised, Absent):
        yield Finding("clock", "unknown", synchronised.reason)
    elif synchronised:
        yield Finding("clock", "ok", "the wall clock follows a time source")
    else:
        fix = "turn on a time service: timedatectl set-ntp true (durations do not depend on it, dates in records do)"
        yield Finding("clock", "warning", "the wall clock is not synchronised", fix)
    boot = machine.boot_id(roots)
    if isinstance(boot, Absent):
        fix = "mount /proc: without it a resumed run cannot tell a restart"
        yield Finding("boot", "warning", f"the boot has no name: {boot.reason}", fix)


def _disk(folder: Path) -> Iterator[Finding]:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        free = shutil.disk_usage(existing).free
    except OSError as error:
        yield Finding("disk", "unknown", f"{folder}: {error}")
        return
    text = f"{in_units(free)} are free for {folder}"
    if not os.access(existing, os.W_OK):
        fix = "choose another folder, or check its owner and whether its file system is mounted read-only"
        yield Finding("disk", "problem", f"{existing} cannot be written", fix)
    elif free < _LEAST_FREE_BYTES:
        yield Finding("disk", "warning", text, "free some space: models and the journal go there")
    else:
        yield Finding("disk", "ok", text)
