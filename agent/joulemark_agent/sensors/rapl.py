"""RAPL: the energy counters of x86 processors, through the kernel's powercap class (Intel and AMD name them alike).

Owns: which zones there are, which of them are the total, and turning a wrapping counter into a running sum of joules
that starts at 0 J at the first reading. Not aware of phases or of idle power.
Truth: Documentation/power/powercap/powercap.rst. energy_uj counts microjoules and starts again from 0 after
max_energy_range_uj. Since the fix for PLATYPUS (CVE-2020-8694) only root may read it.

- Package zones (`intel-rapl:N`, name package-…) are the total; their subzones (core, uncore, dram) are shown, never
  added. DRAM is a domain of its own on servers, so that a package total there leaves it out.
- A psys zone covers the whole platform and, where there is one, is the total instead of the packages.
- `intel-rapl-mmio:N` is a second way to the same package and is left out.

A step that would need more than a plausible power is a gap, not energy: the counter was reset, or wrapped more often than can be known. The
sum falls there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from joulemark.wire import Channel
from joulemark_agent.sensors import FALL_J, NotPresent, Options, Sensor, Values, distinct, identifier
from joulemark_agent.sysfs import KeptFile, Roots, Unreadable, entries, read_number, text_or_none

_ZONE = re.compile(r"intel-rapl:(\d+)(:\d+)?$")
_UNKNOWN_CAP_W = 10_000.0
_CAP_FACTOR = 4.0
"""Short boosts exceed the rated maximum (a 65 W part may take 200 W for seconds), but not four times of it."""
_COUNTER_STEP_S = 0.01
"""The counters move about once a millisecond: two reads closer than that can show a whole step."""


@dataclass(frozen=True)
class _Zone:
    folder: Path
    name: str
    package: str
    is_subzone: bool


class Counter:
    """One wrapping counter as a running sum: joules since its first reading."""

    def __init__(self, range_uj: float, cap_w: float) -> None:
        self.gaps = 0
        self._range_uj = range_uj
        self._cap_w = cap_w
        self._previous: tuple[float, float] | None = None
        self._sum_uj = 0.0

    def update(self, now_s: float, energy_uj: float) -> float:
        """The running sum in joules. Where the step since the last reading is not believable it falls by FALL_J: nobody knows the step."""
        previous, self._previous = self._previous, (now_s, energy_uj)
        if previous is None:
            return self._sum_uj / 1e6
        possible_uj = self._cap_w * (now_s - previous[0] + _COUNTER_STEP_S) * 1e6
        step_uj = energy_uj - previous[1]
        if step_uj < 0:
            step_uj += self._range_uj
        if step_uj < 0 or step_uj > possible_uj or possible_uj >= self._range_uj:
            self.gaps += 1
            step_uj = -FALL_J * 1e6
        self._sum_uj += step_uj
        return self._sum_uj / 1e6


def _zones(roots: Roots) -> list[_Zone]:
    """The zones of the MSR interface, packages first. Raises NotPresent when there are none."""
    found: list[_Zone] = []
    for folder in entries(roots.sys / "class" / "powercap"):
        matched = _ZONE.match(folder.name)
        name = text_or_none(folder / "name") if matched else None
        if matched and name:
            found.append(_Zone(folder, name, matched.group(1), matched.group(2) is not None))
    if not found:
        raise NotPresent(
            "the kernel offers no RAPL zone in /sys/class/powercap",
            "on a real x86 machine load the driver: modprobe intel_rapl_msr; virtual machines rarely have one",
        )
    return sorted(found, key=lambda zone: zone.is_subzone)


def _number(zone: _Zone, name: str) -> float:
    """A number that was there when the zone was examined. Raises NotPresent when it has gone since."""
    value = read_number(zone.folder / name)
    if isinstance(value, Unreadable):
        raise NotPresent(str(value))
    return value


def _cap_w(zone: _Zone) -> float:
    """The most power, in watts, that the zone's package can be believed to draw."""
    package = zone.folder.parent / f"intel-rapl:{zone.package}"
    rated_uw = read_number(package / "constraint_0_max_power_uw")
    if isinstance(rated_uw, Unreadable) or rated_uw <= 0:
        return _UNKNOWN_CAP_W
    return _CAP_FACTOR * rated_uw / 1e6


def _is_total(zone: _Zone, has_psys: bool) -> bool:
    if zone.is_subzone:
        return False
    return zone.name == "psys" if has_psys else zone.name.startswith("package")


def _channel(zone: _Zone, name: str, has_psys: bool) -> Channel:
    return Channel(
        name=name,
        quantity="energy",
        unit="J",
        source=f"RAPL {zone.name}: powercap/{zone.folder.name}/energy_uj",
        # psys is the platform's supply rail (Intel SDM vol. 3, RAPL domains), everything else is on the package
        meaning="rail" if zone.name == "psys" else "package",
        total=_is_total(zone, has_psys),
    )


def _names(zones: list[_Zone]) -> list[str]:
    parents = {zone.package: zone.name for zone in zones if not zone.is_subzone}
    return distinct(
        [
            identifier("rapl", parents.get(zone.package, zone.package), zone.name)
            if zone.is_subzone
            else identifier("rapl", zone.name)
            for zone in zones
        ]
    )


class _Rapl:
    def __init__(self, zones: list[_Zone], clock: Callable[[], float]) -> None:
        has_psys = any(zone.name == "psys" and not zone.is_subzone for zone in zones)
        names = _names(zones)
        self.channels = tuple(_channel(zone, name, has_psys) for zone, name in zip(zones, names, strict=True))
        self._clock = clock
        self._files = [KeptFile(zone.folder / "energy_uj") for zone in zones]
        self._counters = [Counter(_number(zone, "max_energy_range_uj"), _cap_w(zone)) for zone in zones]

    def read(self) -> Values:
        return tuple(self._one(file, counter) for file, counter in zip(self._files, self._counters, strict=True))

    def _one(self, file: KeptFile, counter: Counter) -> float | None:
        energy_uj = file.number()
        return None if energy_uj is None else counter.update(self._clock(), energy_uj)

    def notes(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for channel, file, counter in zip(self.channels, self._files, self._counters, strict=True):
            reasons = [file.explanation()] if file.last else []
            if counter.gaps:
                reasons.append(f"{counter.gaps} steps were beyond any plausible power and were not counted")
            if reasons:
                found[channel.name] = "; ".join(reason for reason in reasons if reason)
        return found

    def close(self) -> None:
        for file in self._files:
            file.close()


def _refusal(zone: _Zone) -> str | None:
    """Why the zone cannot be used: no number, or no word on where its counter wraps."""
    for name in ("energy_uj", "max_energy_range_uj"):
        value = read_number(zone.folder / name)
        if isinstance(value, Unreadable):
            return str(value)
        if name == "max_energy_range_uj" and value <= 0:
            return f"{zone.folder / name}: {value:g} is no range"
    return None


def probe(roots: Roots, options: Options) -> Sensor:
    """The zones that can be read. Raises NotPresent, with the way to permit it when they are closed to this user."""
    refusals = [(zone, _refusal(zone)) for zone in _zones(roots)]
    usable = [zone for zone, refusal in refusals if refusal is None]
    if not any(_is_total(zone, zone.name == "psys") for zone in usable):
        why = "; ".join(refusal for zone, refusal in refusals if refusal and not zone.is_subzone)
        raise NotPresent(
            f"no RAPL package can be read: {why or 'the kernel offers only parts of one'}",
            "run as root, or let the agent's group read energy_uj with a udev rule for the powercap subsystem "
            "(chmod o+r on the energy_uj files lasts until the next boot)"
            if "not permitted" in why
            else "",
        )
    return _Rapl(usable, options.clock)
