"""The power rails of a Jetson, measured by its INA3221 chips, in watts.

Owns: both of the kernel's layouts and which channels are rails. Which rail, or sum of rails, is the board's total is not guessed: the
device profile names it. Not aware of GPU or CPU.
Settings: `total`, the labels of the rails that together are the module (one of them absent: no total at all).

- JetPack 4 (iio): `ina3221x/6-0040/iio:device0/` with `rail_name_N` and `in_powerN_input` in milliwatts.
- JetPack 5 and 6 (hwmon): `ina3221/1-0040/hwmon/hwmonN/` with `inN_label`, `inN_input` in millivolts and `currN_input` in milliamperes.
  There is no power file: power is their product. `in4` to `in6` are shunt voltages, `in7` their sum: no rails. Published code that reads
  `in1_input` as milliwatts is wrong.

A channel labelled NC is not connected. Every rail stands behind a regulator of the carrier or the module: the sum is a lower bound of
what the wall gives. Truth: Documentation/hwmon/ina3221.rst; NVIDIA's Jetson Linux Developer Guide, "Software-Based Power Consumption
Modeling".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from joulemark.wire import Channel
from joulemark_agent.sensors import (
    NotPresent,
    Options,
    Sensor,
    SettingsModel,
    Values,
    distinct,
    identifier,
    settings_of,
)
from joulemark_agent.sysfs import KeptFile, Roots, entries, text_or_none

_PLAUSIBLE_W = (-1.0, 500.0)
"""Small negative powers are the chip's offset; 500 W is beyond every Jetson."""
_RAILS = range(1, 4)


@dataclass(frozen=True)
class _Rail:
    """One measured rail: `factors` are files whose product, times `scale`, is its power in watts."""

    label: str
    factors: tuple[KeptFile, ...]
    scale: float
    source: str


def _iio_rails(roots: Roots) -> list[_Rail]:
    found: list[_Rail] = []
    for chip in entries(roots.sys / "bus" / "i2c" / "drivers" / "ina3221x"):
        for device in entries(chip):
            if not device.name.startswith("iio:device"):
                continue
            for number in range(3):
                label, power = text_or_none(device / f"rail_name_{number}"), device / f"in_power{number}_input"
                if label and power.exists():
                    source = f"INA3221 {chip.name} {label}: in_power{number}_input"
                    found.append(_Rail(label, (KeptFile(power),), 1e-3, source))
    return found


def _hwmon_rails(roots: Roots) -> list[_Rail]:
    found: list[_Rail] = []
    for chip in entries(roots.sys / "bus" / "i2c" / "drivers" / "ina3221"):
        for device in entries(chip / "hwmon"):
            for number in _RAILS:
                voltage, current = device / f"in{number}_input", device / f"curr{number}_input"
                label = text_or_none(device / f"in{number}_label")
                if label and voltage.exists() and current.exists():
                    source = f"INA3221 {chip.name} {label}: in{number}_input × curr{number}_input"
                    found.append(_Rail(label, (KeptFile(voltage), KeptFile(current)), 1e-6, source))
    return found


class _Ina3221:
    def __init__(self, rails: Sequence[_Rail], total: Sequence[str]) -> None:
        names = distinct([identifier("ina3221", rail.label) for rail in rails])
        self.channels = tuple(
            Channel(
                name=name,
                quantity="power",
                unit="W",
                source=rail.source[:200],
                meaning="rail",
                total=rail.label in total,
            )
            for name, rail in zip(names, rails, strict=True)
        )
        self._rails = rails
        self._implausible = [0] * len(rails)

    def read(self) -> Values:
        return tuple(self._power_w(index, rail) for index, rail in enumerate(self._rails))

    def _power_w(self, index: int, rail: _Rail) -> float | None:
        power_w = rail.scale
        for file in rail.factors:
            value = file.number()
            if value is None:
                return None
            power_w *= value
        if not _PLAUSIBLE_W[0] <= power_w <= _PLAUSIBLE_W[1]:
            self._implausible[index] += 1
            return None
        return power_w

    def notes(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for channel, rail, implausible in zip(self.channels, self._rails, self._implausible, strict=True):
            reasons = [why for file in rail.factors if (why := file.explanation())]
            if implausible:
                reasons.append(f"{implausible} readings were outside {_PLAUSIBLE_W[0]:g} to {_PLAUSIBLE_W[1]:g} W")
            if reasons:
                found[channel.name] = "; ".join(reasons)
        return found

    def close(self) -> None:
        for rail in self._rails:
            for file in rail.factors:
                file.close()


class _Settings(SettingsModel):
    total: list[str] = Field(default_factory=list[str])


def probe(roots: Roots, options: Options) -> Sensor:
    """All connected rails. Raises NotPresent without the chip, or without a rail that the profile's total needs."""
    wanted = settings_of(_Settings, options, "ina3221").total
    rails = [rail for rail in (*_iio_rails(roots), *_hwmon_rails(roots)) if rail.label.upper() != "NC"]
    if not rails:
        raise NotPresent("the kernel offers no INA3221 (Jetson boards have them)")
    missing = [label for label in wanted if label not in [rail.label for rail in rails]]
    if missing:
        raise NotPresent(
            f"the INA3221 has no rail {', '.join(missing)}; it has {', '.join(rail.label for rail in rails)}",
            "the device profile is not this board's: see `joulemark profile check`",
        )
    return _Ina3221(rails, wanted)
