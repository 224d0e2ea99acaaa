"""Temperatures of every thermal zone, in degrees Celsius.

Owns: the zones' names and which values are no readings. Not aware of limits or of throttling.
Truth: Documentation/driver-api/thermal/sysfs-api.rst: `temp` is in millidegrees; a zone that is powered down fails to
read or reports -256000. Zones are read twice a second, and more rarely where that is costly (ACPI runs firmware code).
Settings: `skip`, types of zones that are no sensors (PMIC-Die of Jetson Nano and Xavier says 100 °C whatever happens).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from joulemark.wire import Channel
from joulemark_agent.sensors import (
    NotPresent,
    Options,
    Pace,
    Sensor,
    SettingsModel,
    Values,
    distinct,
    identifier,
    settings_of,
)
from joulemark_agent.sysfs import NO_READING, KeptFile, Roots, entries, text_or_none

_INTERVAL_S = 0.5
_PLAUSIBLE_C = (-100.0, 250.0)
"""Outside the range of silicon and of the sensors in it: garbage, not a temperature."""


class _Zone:
    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        self._file = KeptFile(folder / "temp", sentinels=(NO_READING,))
        self._pace = Pace(clock)
        self._implausible = 0

    def read(self) -> float | None:
        return self._pace.read(self._celsius)

    def _celsius(self) -> float | None:
        millidegrees = self._file.number()
        if millidegrees is None:
            return None
        celsius = millidegrees / 1000
        if not _PLAUSIBLE_C[0] <= celsius <= _PLAUSIBLE_C[1]:
            self._implausible += 1
            return None
        return celsius

    def explanation(self) -> str | None:
        reasons = [self._file.explanation()] if self._file.last else []
        if self._implausible:
            reasons.append(f"{self._implausible} readings were outside {_PLAUSIBLE_C[0]:g} to {_PLAUSIBLE_C[1]:g} °C")
        return "; ".join(reason for reason in reasons if reason) or None

    def close(self) -> None:
        self._file.close()


class _Thermal:
    def __init__(self, folders: list[Path], types: list[str], clock: Callable[[], float]) -> None:
        names = distinct([identifier("thermal", kind) for kind in types])
        self.channels = tuple(
            Channel(
                name=name, quantity="temperature", unit="Cel", source=f"thermal zone {kind}: thermal/{folder.name}/temp"
            )
            for name, folder, kind in zip(names, folders, types, strict=True)
        )
        self._pace = Pace(clock, _INTERVAL_S)
        self._zones = [_Zone(folder, clock) for folder in folders]

    def read(self) -> Values:
        return self._pace.read(self._read_now) or (None,) * len(self._zones)

    def _read_now(self) -> Values:
        return tuple(zone.read() for zone in self._zones)

    def notes(self) -> dict[str, str]:
        explained = ((c.name, zone.explanation()) for c, zone in zip(self.channels, self._zones, strict=True))
        return {name: why for name, why in explained if why}

    def close(self) -> None:
        for zone in self._zones:
            zone.close()


class _Settings(SettingsModel):
    skip: list[str] = Field(default_factory=list[str])


def probe(roots: Roots, options: Options) -> Sensor:
    """All thermal zones, also those without a reading now: they may come back. Raises NotPresent when there is none."""
    folders = [f for f in entries(roots.sys / "class" / "thermal") if f.name.startswith("thermal_zone")]
    if not folders:
        raise NotPresent("the kernel offers no thermal zone in /sys/class/thermal")
    skipped = settings_of(_Settings, options, "thermal").skip
    named = [(folder, text_or_none(folder / "type") or folder.name) for folder in folders]
    kept = [(folder, kind) for folder, kind in named if kind not in skipped]
    if not kept:
        raise NotPresent(f"every thermal zone is one that the profile skips: {', '.join(sorted(skipped))}")
    return _Thermal([folder for folder, _ in kept], [kind for _, kind in kept], options.clock)
