"""Hardware monitors of the kernel: power and energy meters on the board, fans.

Owns: reading any hwmon chip's `powerN_input` (µW), `energyN_input` (µJ), and, where voltage and current bear the same label, their product
(equal numbers alone say nothing: of a battery in0 and curr1 belong together); fans as turns per second and their drive. Temperatures are
thermal.py's, Jetson rails are ina3221.py's. What a chip's power means and whether it is the whole board nobody can guess: without a word in
the profile it is shown as a part of unknown meaning.
Settings: `total` = ["CHIP" or "CHIP.LABEL", …] and `meaning` (wall, rail, package; default rail): these channels together are the board.

hwmonN changes from boot to boot: chips are found by their `name`. Truth: Documentation/hwmon/sysfs-interface.rst.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from joulemark.errors import BadInput
from joulemark.wire import Channel
from joulemark_agent.sensors import (
    FALL_J,
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
from joulemark_agent.sysfs import KeptFile, Roots, entries, hwmon_devices, text_or_none

Meaning = Literal["wall", "rail", "package"]
_FILE = re.compile(r"(power|energy|curr|fan|pwm)(\d{1,3})(?:_input|_average)?$", re.ASCII)
_OWNED_ELSEWHERE = frozenset({"ina3221", "rpi_volt", "soctherm_oc"})
_FAN_INTERVAL_S = 1.0


@dataclass(frozen=True)
class _Quantity:
    """One channel: `files` multiplied and scaled; `slow` values are read once a second."""

    chip: str
    label: str
    kind: Literal["power", "energy", "frequency", "share"]
    files: tuple[KeptFile, ...]
    scale: float
    slow: bool

    @property
    def key(self) -> str:
        return f"{self.chip}.{self.label}"


def _quantities(device: Path, chip: str) -> list[_Quantity]:
    found: dict[tuple[str, str], _Quantity] = {}
    for path in entries(device):
        matched = _FILE.match(path.name)
        if not matched:
            continue
        kind, number = matched[1], matched[2]
        label = text_or_none(device / f"{kind}{number}_label") or f"{kind}{number}"
        if kind == "power":  # input before average: entries are sorted, so average comes first and is replaced
            found[kind, number] = _Quantity(chip, label, "power", (KeptFile(path),), 1e-6, False)
        elif kind == "energy":
            found[kind, number] = _Quantity(chip, label, "energy", (KeptFile(path),), 1e-6, False)
        elif kind == "curr" and (shared := _same_label(device, number)) is not None:
            files = (KeptFile(device / f"in{number}_input"), KeptFile(path))
            found["power", number] = _Quantity(chip, shared, "power", files, 1e-6, False)
        elif kind == "fan":
            found[kind, number] = _Quantity(chip, label, "frequency", (KeptFile(path),), 1 / 60, True)
        elif kind == "pwm":
            found[kind, number] = _Quantity(chip, label, "share", (KeptFile(path),), 1 / 255, True)
    return list(found.values())


def _same_label(device: Path, number: str) -> str | None:
    """The label that voltage and current of this number share, None when they do not."""
    voltage, current = text_or_none(device / f"in{number}_label"), text_or_none(device / f"curr{number}_label")
    return voltage if voltage == current and (device / f"in{number}_input").exists() else None


class _Hwmon:
    def __init__(self, found: list[_Quantity], total: tuple[str, ...], meaning: Meaning, options: Options) -> None:
        names = distinct([identifier("hwmon", quantity.key) for quantity in found])
        self.channels = tuple(
            _channel(name, quantity, quantity.key in total or quantity.chip in total, meaning)
            for name, quantity in zip(names, found, strict=True)
        )
        self._quantities = found
        self._pace = Pace(options.clock, _FAN_INTERVAL_S)
        self._energy: dict[int, tuple[float, float]] = {}

    def read(self) -> Values:
        slow = self._pace.read(lambda: True) or False
        return tuple(
            None if quantity.slow and not slow else self._one(index, quantity)
            for index, quantity in enumerate(self._quantities)
        )

    def _one(self, index: int, quantity: _Quantity) -> float | None:
        value = quantity.scale
        for file in quantity.files:
            read = file.number()
            if read is None:
                return None
            value *= read
        return self._running_sum(index, value) if quantity.kind == "energy" else value

    def _running_sum(self, index: int, energy_j: float) -> float:
        """Joules since the first reading. A counter that fell was reset: what was used is unknown, and the sum falls by FALL_J."""
        last_j, sum_j = self._energy.get(index, (energy_j, 0.0))
        self._energy[index] = (energy_j, sum_j + (energy_j - last_j if energy_j >= last_j else -FALL_J))
        return self._energy[index][1]

    def notes(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for channel, quantity in zip(self.channels, self._quantities, strict=True):
            reasons = [why for file in quantity.files if (why := file.explanation())]
            if reasons:
                found[channel.name] = "; ".join(reasons)
        return found

    def close(self) -> None:
        for quantity in self._quantities:
            for file in quantity.files:
                file.close()


def _channel(name: str, quantity: _Quantity, total: bool, meaning: Meaning) -> Channel:
    units: dict[str, Literal["W", "J", "Hz", "1"]] = {"power": "W", "energy": "J", "frequency": "Hz", "share": "1"}
    metered = quantity.kind in ("power", "energy")
    files = " × ".join(file.path.name for file in quantity.files)
    return Channel(
        name=name,
        quantity=quantity.kind,
        unit=units[quantity.kind],
        source=f"hwmon {quantity.chip} {quantity.label}: {files}"[:200],
        meaning=(meaning if total else "unknown") if metered else None,
        total=total and metered,
    )


class _Settings(SettingsModel):
    total: list[str] = Field(default_factory=list[str])
    meaning: Meaning = "rail"


def _refuse_both(found: list[_Quantity], total: tuple[str, ...]) -> None:
    """A chip's power and its energy are the same joules."""
    chosen = [quantity for quantity in found if quantity.key in total or quantity.chip in total]
    for chip in {quantity.chip for quantity in chosen}:
        both = {quantity.kind: quantity.key for quantity in chosen if quantity.chip == chip}
        if "power" in both and "energy" in both:
            raise BadInput(
                f"the total has both {both['power']} and {both['energy']}: their joules would be counted twice",
                "name one of them as CHIP.LABEL in the device profile",
            )


def probe(roots: Roots, options: Options) -> Sensor:
    """Meters and fans of all chips. Raises NotPresent when there is none, or not the one that the profile's total needs; BadInput."""
    settings = settings_of(_Settings, options, "hwmon")
    total, meaning = tuple(settings.total), settings.meaning
    found: list[_Quantity] = []
    for device in hwmon_devices(roots):
        chip = text_or_none(device / "name") or device.name
        if chip not in _OWNED_ELSEWHERE:
            found.extend(_quantities(device, chip))
    known = {name for quantity in found for name in (quantity.key, quantity.chip)}
    missing = [name for name in total if name not in known]
    if missing:
        raise NotPresent(
            f"no hardware monitor is called {', '.join(missing)}; there are: {', '.join(sorted(known)) or 'none'}",
            "correct the sensor's total in the device profile",
        )
    _refuse_both(found, total)
    if not found:
        raise NotPresent("no hardware monitor of the kernel has a power meter or a fan")
    return _Hwmon(found, total, meaning, options)
