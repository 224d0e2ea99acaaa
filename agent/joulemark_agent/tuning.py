"""What somebody set on this machine that decides how fast it is and what it draws: power mode, clock limits.

Owns: where these are found. Not aware of runs. The governor is in machine.py.

- NVIDIA's nvpmodel writes the mode's number to /var/lib/nvpmodel/status (`pmode:0002 fmode:quiet`) and has the names in /etc/nvpmodel.conf
  (`< POWER_MODEL ID=2 NAME=MODE_15W_6CORE >`). The number says what was asked for: a mode that wants a restart is noted there and not in
  force, and mode 0 is the fastest on some boards and the 15 W mode on others. So the limits of the clocks stand beside it.
- Clock limits: cpufreq's scaling_min_freq and scaling_max_freq (kHz), devfreq's min_freq and max_freq (Hz). Where both are equal the clock
  is fixed, as jetson_clocks does it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from joulemark_agent.sysfs import Roots, Unreadable, entries, read_number, text_or_none

_STATUS = re.compile(r"\bpmode:(\d{1,4})\b", re.ASCII)
_MODE = re.compile(r"<\s*POWER_MODEL\s+ID=(\d{1,4})\s+NAME=([A-Za-z0-9_.+-]{1,60})\s*>", re.ASCII)


def power_modes(roots: Roots) -> dict[int, str]:
    """nvpmodel's modes by number; empty on machines without it."""
    text = text_or_none(roots.etc / "nvpmodel.conf") or ""
    return {int(number): name for number, name in _MODE.findall(text)}


def power_mode_number(roots: Roots) -> int | None:
    """The number of the mode that was chosen last, None where none was."""
    status = _STATUS.search(text_or_none(roots.var / "lib" / "nvpmodel" / "status") or "")
    return int(status[1]) if status is not None else None


def power_mode(roots: Roots) -> str | None:
    """The power mode as `NAME (number)`; "not set" where nvpmodel has modes and none was chosen; None without nvpmodel."""
    names, number = power_modes(roots), power_mode_number(roots)
    if number is None:
        return "not set" if names else None
    return f"{names.get(number, 'unknown mode')} ({number})"


def clock_limits(roots: Roots) -> str | None:
    """Between what frequencies each group of cores, graphics unit and memory may run; None where the kernel scales nothing."""
    found = list(dict.fromkeys((*_processor_limits(roots), *_device_limits(roots))))
    return ", ".join(found)[:200] or None


def _processor_limits(roots: Roots) -> Iterator[str]:
    for policy in entries(roots.sys / "devices" / "system" / "cpu" / "cpufreq"):
        limits = _limits(policy, "scaling_min_freq", "scaling_max_freq", 1e3)
        if policy.name.startswith("policy") and limits:
            yield f"cpu {limits}"


def _device_limits(roots: Roots) -> Iterator[str]:
    for device in entries(roots.sys / "class" / "devfreq"):
        if limits := _limits(device, "min_freq", "max_freq", 1.0):
            yield f"{device.name} {limits}"


def _limits(folder: Path, low: str, high: str, factor: float) -> str | None:
    least, most = read_number(folder / low), read_number(folder / high)
    if isinstance(least, Unreadable) or isinstance(most, Unreadable):
        return None
    ghz = (least * factor / 1e9, most * factor / 1e9)
    return f"fixed at {ghz[1]:.2f} GHz" if least == most else f"{ghz[0]:.2f} to {ghz[1]:.2f} GHz"
