"""Evidence that the machine slowed itself down: active cooling devices, a lowered frequency limit, throttle counters.

Owns: what counts as evidence. A frequency below its maximum does not: governors lower it when there is little to do.

- throttle.cooling: 1 while a cooling device that slows a processor is active (cur_state > 0). Fans, backlights, and
  radios are cooling devices too and do not count; nor does "TCC Offset", whose state is a setting. JetPack 4 slows down by
  "cpu-balanced", "gpu-balanced" and, near the end, "tegra-heavy" (thermal zones' cooling-maps in L4T's device trees).
- throttle.frequency_capped: 1 while a policy's `scaling_max_freq` is below what it was at the start: thermal pressure
  or a person lowered it during the run. A limit that was set before is a property of the device, not an event.
- throttle.governor_changed: 1 while a policy's `scaling_governor` is another than at the start: somebody changed it during the run.
- throttle.events: new events in x86's `core_throttle_count` and `package_throttle_count` since the start, read once a
  second (nothing is lost between, for the counters do not fall).

The flags are read twice a second. Truth: Documentation/driver-api/thermal/sysfs-api.rst and
Documentation/ABI/testing/sysfs-devices-system-cpu (thermal_throttle).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from joulemark.wire import Channel
from joulemark_agent.sensors import NotPresent, Options, Pace, Sensor, Values
from joulemark_agent.sensors._counting import NewEvents
from joulemark_agent.sysfs import KeptFile, Roots, Unreadable, entries, read_number, text_or_none

_SLOWS_A_PROCESSOR = re.compile(
    r"Processor$|(thermal-)?(cpufreq|cpuidle|devfreq)\b|intel_powerclamp$|.*throttle|(cpu|gpu|emergency|skin|tegra)-balanced$|tegra[-_]heavy$",
    re.ASCII,
)
_INTERVAL_S = 0.5
_EVENTS_INTERVAL_S = 1.0


class _Cooling:
    def __init__(self, files: list[KeptFile], clock: Callable[[], float]) -> None:
        self.files = files
        self._pace = Pace(clock, _INTERVAL_S)
        self.channel = Channel(
            name="throttle.cooling",
            quantity="flag",
            unit="1",
            source=f"thermal: cur_state > 0 of {len(files)} cooling devices that slow a processor",
        )

    def read(self) -> float | None:
        return self._pace.read(self._active)

    def _active(self) -> float | None:
        states = [state for file in self.files if (state := file.number()) is not None]
        return float(any(state > 0 for state in states)) if states else None


class _FrequencyCap:
    def __init__(self, limits: list[tuple[KeptFile, float]], clock: Callable[[], float]) -> None:
        self._pace = Pace(clock, _INTERVAL_S)
        self.files = [file for file, _ in limits]
        self._start_khz = [khz for _, khz in limits]
        self.channel = Channel(
            name="throttle.frequency_capped",
            quantity="flag",
            unit="1",
            source="cpufreq: scaling_max_freq of a policy below its value at the start",
        )

    def read(self) -> float | None:
        return self._pace.read(self._capped)

    def _capped(self) -> float | None:
        known = [(khz, start) for f, start in zip(self.files, self._start_khz, strict=True) if (khz := f.number())]
        return float(any(khz < start for khz, start in known)) if known else None


class _GovernorChanged:
    def __init__(self, governors: list[tuple[KeptFile, bytes]], clock: Callable[[], float]) -> None:
        self._pace = Pace(clock, _EVENTS_INTERVAL_S)
        self.files = [file for file, _ in governors]
        self._start = [name for _, name in governors]
        self.channel = Channel(
            name="throttle.governor_changed",
            quantity="flag",
            unit="1",
            source="cpufreq: scaling_governor of a policy is not what it was at the start",
        )

    def read(self) -> float | None:
        return self._pace.read(self._changed)

    def _changed(self) -> float | None:
        now = [(file.read(), start) for file, start in zip(self.files, self._start, strict=True)]
        known = [(name, start) for name, start in now if not isinstance(name, Unreadable)]
        return float(any(name != start for name, start in known)) if known else None


class _Events:
    def __init__(self, counters: list[tuple[KeptFile, float]], clock: Callable[[], float]) -> None:
        self._events = NewEvents(counters)
        self.files = self._events.files
        self._pace = Pace(clock, _EVENTS_INTERVAL_S)
        self.channel = Channel(
            name="throttle.events",
            quantity="count",
            unit="1",
            source="thermal_throttle: core and package throttle counts, new since the start",
        )

    def read(self) -> float | None:
        return self._pace.read(self._events.read)


_Part = _Cooling | _FrequencyCap | _GovernorChanged | _Events


class _Throttle:
    def __init__(self, parts: list[_Part], missing: dict[str, str]) -> None:
        self.channels = tuple(part.channel for part in parts)
        self._parts = parts
        self._missing = missing

    def read(self) -> Values:
        return tuple(part.read() for part in self._parts)

    def notes(self) -> dict[str, str]:
        failed = {part.channel.name: _explain(part.files) for part in self._parts if _explain(part.files)}
        return {**self._missing, **failed}

    def close(self) -> None:
        for part in self._parts:
            for file in part.files:
                file.close()


def _explain(files: list[KeptFile]) -> str:
    return "; ".join([why for file in files if (why := file.explanation())][:4])


def _cooling(roots: Roots) -> list[KeptFile]:
    devices = [d for d in entries(roots.sys / "class" / "thermal") if d.name.startswith("cooling_device")]
    slowing = [d for d in devices if _SLOWS_A_PROCESSOR.match(text_or_none(d / "type") or "")]
    return [KeptFile(device / "cur_state") for device in slowing]


def _limits(roots: Roots) -> list[tuple[KeptFile, float]]:
    folder = roots.sys / "devices" / "system" / "cpu" / "cpufreq"
    policies = [policy for policy in entries(folder) if policy.name.startswith("policy")]
    found = [(KeptFile(p / "scaling_max_freq"), read_number(p / "scaling_max_freq")) for p in policies]
    return [(file, khz) for file, khz in found if not isinstance(khz, Unreadable)]


def _governors(roots: Roots) -> list[tuple[KeptFile, bytes]]:
    folder = roots.sys / "devices" / "system" / "cpu" / "cpufreq"
    files = [KeptFile(p / "scaling_governor") for p in entries(folder) if (p / "scaling_governor").exists()]
    found = [(file, file.read()) for file in files]
    return [(file, name) for file, name in found if not isinstance(name, Unreadable)]


def _counters(roots: Roots) -> list[tuple[KeptFile, float]]:
    """One counter per core and per package: siblings repeat their core's, every processor repeats its package's."""
    seen: set[tuple[str, str, str]] = set()
    found: list[tuple[KeptFile, float]] = []
    for cpu in entries(roots.sys / "devices" / "system" / "cpu"):
        package = text_or_none(cpu / "topology" / "physical_package_id") or cpu.name
        core = text_or_none(cpu / "topology" / "core_id") or cpu.name
        for name, key in (("core_throttle_count", core), ("package_throttle_count", "")):
            count = read_number(cpu / "thermal_throttle" / name)
            if not isinstance(count, Unreadable) and (name, package, key) not in seen:
                seen.add((name, package, key))
                found.append((KeptFile(cpu / "thermal_throttle" / name), count))
    return found


def probe(roots: Roots, options: Options) -> Sensor:
    """What evidence this machine can give. Raises NotPresent when it can give none."""
    parts: list[_Part] = []
    missing: dict[str, str] = {}
    if cooling := _cooling(roots):
        parts.append(_Cooling(cooling, options.clock))
    else:
        missing["throttle.cooling"] = "no cooling device slows a processor here"
    if limits := _limits(roots):
        parts.append(_FrequencyCap(limits, options.clock))
    else:
        missing["throttle.frequency_capped"] = "the kernel offers no cpufreq policy"
    if governors := _governors(roots):
        parts.append(_GovernorChanged(governors, options.clock))
    if counters := _counters(roots):
        parts.append(_Events(counters, options.clock))
    else:
        missing["throttle.events"] = "the kernel counts no throttle events here (x86 with Intel's driver only)"
    if not parts:
        raise NotPresent("this machine cannot show throttling: " + "; ".join(missing.values()))
    return _Throttle(parts, missing)
