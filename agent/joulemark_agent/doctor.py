"""What this machine has and what stands in the way of good numbers: cores, memory, bandwidth, engines, meters, clock,
contention.

Owns: the questions, the judgement on each, and the advice. Not aware of how findings are shown. Every question is
answered, by `unknown` where the machine does not say; nothing is changed and nothing is installed. Engines are examined
in a short child process, so that the doctor stays light and survives an engine that crashes while it is loaded. Takes a
few seconds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from joulemark import plugins
from joulemark.errors import JoulemarkError
from joulemark.wire import Absent, Channel
from joulemark_agent import bandwidth, machine
from joulemark_agent.sensors import NotPresent, Options, Sensor
from joulemark_agent.sysfs import Roots, read_text

Status = Literal["ok", "warning", "problem", "unknown"]

_GIB = 1024**3
_LEAST_FREE_BYTES = 2 * _GIB
_LEAST_AVAILABLE_BYTES = 512 * 1024**2
_BUSY_SHARE = 0.05
"""Others' share of the machine from which figures suffer: llama.cpp's threads wait for each other at every layer."""
_SAMPLE_S = 1.0
_ENGINE_PATIENCE_S = 60.0


@dataclass(frozen=True)
class _Engine:
    """`source` prints what is installed, as JSON; `opens` is what cannot be evaluated without it."""

    source: str
    package: str
    opens: str
    fix: str


_ENGINES = {
    "llama.cpp": _Engine(
        """
import json
from llama_cpp import __version__, llama_cpp
print(json.dumps({"version": __version__, "build": llama_cpp.llama_print_system_info().decode()}))
""",
        "llama-cpp-python",
        "GGUF files",
        "pip install 'joulemark[llama]', or `make install` in a checkout, which builds the engine once",
    ),
    "onnxruntime": _Engine(
        """
import json
import onnxruntime, tokenizers
print(json.dumps({"version": onnxruntime.__version__, "build": onnxruntime.get_build_info()}))
""",
        "onnxruntime",
        "ONNX artifacts",
        "pip install 'joulemark[onnx]'",
    ),
}


_CRASHING = re.compile(r"\bAMX_INT8 = 1\b")
"""In an engine's own words about its build."""


@dataclass(frozen=True)
class Finding:
    """One answer. `fix` is what to do about it, empty where there is nothing to do."""

    area: str
    status: Status
    text: str
    fix: str = ""


def to_json(findings: Sequence[Finding]) -> str:
    """The findings as an indented JSON array of objects."""
    return json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False)


def examine(
    roots: Roots,
    data_folder: Path,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    clock_state: Callable[[], int] = machine.kernel_clock_state,
    run_child: Callable[[str], str] | None = None,
) -> list[Finding]:
    """All findings, in a fixed order of areas. `run_child` runs Python source in a new process and gives its output."""
    return [
        *_cores(roots),
        *_memory(roots),
        *_bandwidth(roots),
        *_governor(roots),
        *_engines(run_child or python_child),
        *_meters(roots, clock),
        *_contention(roots, clock, sleep),
        *_pressure(roots),
        *_clock(roots, clock_state),
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
    listed = machine.parse_cpu_list(_text(roots.sys / "devices" / "system" / "cpu" / "online"))
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
    limited = f"; a cgroup limits this process to {_size(limit)}" if limit else ""
    text = f"{_size(available)} of {_size(total)} are available{limited}"
    if min(available, limit or available) < _LEAST_AVAILABLE_BYTES:
        yield Finding("memory", "problem", text, "end other programs, or raise the limit: few models fit")
    else:
        yield Finding("memory", "warning" if limit else "ok", text, "raise the limit to use all of it" if limit else "")
    yield _swap(roots)


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
            f"{_size(total - free)} of {_size(total)} swap are in use: times of a run may hold waits for the disk",
            "end other programs, then empty it: swapoff -a && swapon -a",
        )
    return Finding("swap", "ok", f"{_size(total)} swap, nearly unused")


def _bandwidth(roots: Roots) -> Iterator[Finding]:
    measured = bandwidth.measure(roots)
    if isinstance(measured, Absent):
        yield Finding("memory bandwidth", "unknown", measured.reason)
    else:
        yield Finding("memory bandwidth", "ok", f"{measured.value / 1e9:.2f} GB/s read ({measured.source})")


def _governor(roots: Roots) -> Iterator[Finding]:
    name = machine.governor(roots)
    if name is None:
        yield Finding("governor", "unknown", "the kernel does not scale frequencies here, or does not show it")
    elif name == "performance":
        yield Finding("governor", "ok", name)
    else:
        fix = "for repeatable times: cpupower frequency-set -g performance (a device measured as it is needs none)"
        yield Finding("governor", "warning", f"{name}: short measurements include the time of speeding up", fix)


# --- engines ----------------------------------------------------------------------------------------------------------
def python_child(source: str) -> str:
    """What `source` prints in a new interpreter. Raises OSError or subprocess.SubprocessError when it does not end
    well."""
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_ENGINE_PATIENCE_S,
        check=True,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
    )
    return done.stdout


def _engines(run_child: Callable[[str], str]) -> Iterator[Finding]:
    found = [_engine(f"engine {name}", engine, run_child) for name, engine in _ENGINES.items()]
    yield from found
    if all(finding.status != "ok" for finding in found):
        yield Finding("engines", "problem", "none can be used: nothing can be evaluated", found[0].fix)


def _engine(area: str, engine: _Engine, run_child: Callable[[str], str]) -> Finding:
    try:
        facts: Any = json.loads(run_child(engine.source).strip().rpartition("\n")[2])
        text = f"{engine.package} {facts['version']}; {' '.join(str(facts['build']).split())}"
    except subprocess.CalledProcessError as error:
        return _failed_engine(area, engine, error)
    except subprocess.TimeoutExpired:
        return Finding(
            area, "problem", f"it did not load within {_ENGINE_PATIENCE_S:g} s", "reinstall it: " + engine.fix
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        return Finding(area, "unknown", f"it could not be examined: {type(error).__name__}: {error}")
    if _CRASHING.search(text):
        fix = "build it without them: `make install` in a checkout, or pip with CFLAGS and CXXFLAGS=-U__AMX_INT8__"
        return Finding(area, "problem", f"its AMX kernels crash with some models (llama.cpp #20824): {text}", fix)
    return Finding(area, "ok", text)


def _failed_engine(area: str, engine: _Engine, error: subprocess.CalledProcessError) -> Finding:
    last = (error.stderr or "").strip().rpartition("\n")[2][:300]
    if error.returncode < 0:
        fix = "it was built for another processor: rebuild it on this machine, " + engine.fix
        return Finding(area, "problem", f"it ended with signal {-error.returncode} while it was loaded. {last}", fix)
    if "ModuleNotFoundError" in last:
        return Finding(area, "warning", f"it is not installed: {engine.opens} cannot be evaluated", engine.fix)
    return Finding(area, "problem", f"it cannot be loaded: {last}", "reinstall it: " + engine.fix)


# --- meters and neighbours --------------------------------------------------------------------------------------------
def _meters(roots: Roots, clock: Callable[[], float]) -> Iterator[Finding]:
    totals: list[Channel] = []
    for name in plugins.names("joulemark_agent.sensors"):
        area = f"sensor {name}"
        try:
            options = Options(worker_pid=os.getpid(), clock=clock)
            sensor: Sensor = plugins.load("joulemark_agent.sensors", name).probe(roots, options)
        except NotPresent as reason:
            yield Finding(area, "warning" if reason.hint else "unknown", reason.message, reason.hint)
        except OSError as error:
            yield Finding(area, "unknown", f"it could not be examined: {error}")
        else:
            totals += [channel for channel in sensor.channels if channel.total]
            yield _sensor(area, sensor)
            sensor.close()
    yield _energy(totals)


def _sensor(area: str, sensor: Sensor) -> Finding:
    values = sensor.read()
    shown = [f"{channel.name}{_shown(channel, value)}" for channel, value in zip(sensor.channels, values, strict=True)]
    notes = sensor.notes()
    text = ", ".join(shown) + ("".join(f"; {name}: {reason}" for name, reason in notes.items()))
    return Finding(area, "ok", text)


def _shown(channel: Channel, value: float | None) -> str:
    if value is None or channel.quantity in ("energy", "share", "count", "flag"):
        return ""
    if channel.quantity == "memory":
        return f" {_size(int(value))}"
    if channel.quantity == "frequency":
        return f" {value / 1e9:.2f} GHz"
    return f" {value:.1f} °C" if channel.quantity == "temperature" else f" {value:.2f} {channel.unit}"


def _energy(totals: Sequence[Channel]) -> Finding:
    if not totals:
        return Finding(
            "energy",
            "warning",
            "no meter for the whole machine: records will have no joules",
            "see the sensors above for what could be opened, or attach a meter and replay its recording",
        )
    meanings = ", ".join(f"{channel.name} ({channel.meaning})" for channel in totals)
    return Finding("energy", "ok", f"joules are counted by {meanings}")


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
        yield Finding("pressure stall information", "warning", str(text), "add psi=1 to the kernel's command line")


# --- clock and disk ---------------------------------------------------------------------------------------------------
def _clock(roots: Roots, clock_state: Callable[[], int]) -> Iterator[Finding]:
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
    text = f"{_size(free)} are free for {folder}"
    if not os.access(existing, os.W_OK):
        fix = "choose another folder, or check its owner and whether its file system is mounted read-only"
        yield Finding("disk", "problem", f"{existing} cannot be written", fix)
    elif free < _LEAST_FREE_BYTES:
        yield Finding("disk", "warning", text, "free some space: models and the journal go there")
    else:
        yield Finding("disk", "ok", text)


def _text(path: Path) -> str:
    text = read_text(path)
    return text if isinstance(text, str) else ""


def _size(size: int) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / 1024**2:.0f} MiB"
