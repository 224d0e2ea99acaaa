"""An INA219 or INA226 on the board's I²C bus, in its supply line: the power that flows into the board, in watts.

Owns: the two chips' registers, and their setting while a run lasts (averaging over 68 ms, so that ten readings a second leave little out);
what was set before is put back. Not aware of what the shunt is made of: its resistance is the owner's word.
Settings: `chip` = "ina219" or "ina226", `shunt_ohm` (both required), `bus` (default 1, Raspberry Pi's header), `address` (default 0x40),
`meaning` = "supply" (default: in the board's own supply line) or "wall" (in front of its power supply).

Power is bus voltage × shunt voltage ÷ shunt resistance, without the chip's calibration register. Full scale of the shunt voltage is 320 mV
(INA219) and 81.92 mV (INA226): a reading there is no reading, nor is one below -1 W. Words on the wire are big-endian, SMBus words
little-endian. A chip that the kernel's own driver holds is read through sensor hwmon. Needs the group of /dev/i2c-N (i2c) and the extra
`pi` (smbus2).
Truth: TI SBOS448 (INA219) and SBOS547 (INA226).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from pydantic import Field

from joulemark.wire import Channel
from joulemark_agent.sensors import NotPresent, Options, Sensor, SettingsModel, Values, settings_of
from joulemark_agent.sysfs import Roots

_CONFIGURATION, _SHUNT, _BUS, _MAKER, _DIE = 0x00, 0x01, 0x02, 0xFE, 0xFF
_LEAST_W = -1.0
"""A little may flow back for a moment. More than that, and the shunt is wired the other way round."""


@dataclass(frozen=True)
class _Chip:
    """`configuration`: continuous, averaging over 68 ms. Bus voltage is (word >> bus_shift) × bus_lsb_v."""

    configuration: int
    shunt_lsb_v: float
    shunt_full: int
    bus_shift: int
    bus_lsb_v: float
    identity: tuple[int, int] | None


_CHIPS = {
    # 32 V and 320 mV ranges, 128 samples of 532 µs of each, shunt and bus continuous
    "ina219": _Chip(0x3FFF, 10e-6, 32_000, 3, 4e-3, None),
    # 16 samples, 2.116 ms for each of shunt and bus, continuous
    "ina226": _Chip(0x456F, 2.5e-6, 32_767, 0, 1.25e-3, (0x5449, 0x2260)),
}


class _Settings(SettingsModel):
    chip: Literal["ina219", "ina226"]
    shunt_ohm: Annotated[float, Field(gt=1e-5, le=10)]
    bus: Annotated[int, Field(ge=0, le=255)] = 1
    address: Annotated[int, Field(ge=0x08, le=0x77)] = 0x40
    meaning: Literal["supply", "wall"] = "supply"


class _Bus(Protocol):
    def read_word_data(self, i2c_addr: int, register: int) -> int: ...
    def write_word_data(self, i2c_addr: int, register: int, value: int) -> None: ...
    def close(self) -> None: ...


def _swapped(word: int) -> int:
    return (word & 0xFF) << 8 | word >> 8 & 0xFF


def _signed(word: int) -> int:
    return word - 0x10000 if word & 0x8000 else word


def _open_bus(number: int) -> _Bus:
    """Raises NotPresent where the library, the device or the permission is missing."""
    try:
        from smbus2 import SMBus
    except ImportError as error:
        raise NotPresent("smbus2 is not installed", "pip install 'joulemark[pi]'") from error
    try:
        return SMBus(number)
    except FileNotFoundError as error:
        hint = "turn the bus on: `sudo raspi-config nonint do_i2c 0` on Raspberry Pi OS, or load the module i2c-dev"
        raise NotPresent(f"/dev/i2c-{number} is not there", hint) from error
    except PermissionError as error:
        raise NotPresent(f"/dev/i2c-{number} is not permitted", "usermod -aG i2c joulemark") from error


class _Ina2xx:
    def __init__(self, bus: _Bus, settings: _Settings) -> None:
        self._bus: _Bus | None = bus
        self._settings = settings
        self._chip = _CHIPS[settings.chip]
        self._failures = 0
        self._saturated = 0
        self._reversed = 0
        self._last = ""
        place = f"/dev/i2c-{settings.bus} 0x{settings.address:02x}, shunt {settings.shunt_ohm:g} Ω"
        self.channels = (
            Channel(
                name="ina2xx.power",
                quantity="power",
                unit="W",
                source=f"{settings.chip.upper()} on {place}",
                meaning=settings.meaning,
                total=True,
            ),
        )
        self._before: int | None = None

    def _word(self, register: int) -> int:
        assert self._bus is not None
        return _swapped(self._bus.read_word_data(self._settings.address, register))

    def _put(self, register: int, value: int) -> None:
        assert self._bus is not None
        self._bus.write_word_data(self._settings.address, register, _swapped(value))

    def set_up(self) -> None:
        """Set the chip to averaging. Raises NotPresent when what answers is not the chip that was named.

        An INA226 says who it is before anything is written; an INA219 has no such word and shows itself by keeping its setting.
        """
        expected = self._chip.identity
        known = expected is None or (self._word(_MAKER), self._word(_DIE)) == expected
        if known:
            self._before = self._word(_CONFIGURATION)
            self._put(_CONFIGURATION, self._chip.configuration)
        if not known or self._word(_CONFIGURATION) != self._chip.configuration:
            raise NotPresent(
                f"what answers at 0x{self._settings.address:02x} is no {self._settings.chip.upper()}",
                "correct `chip` and `address` in the device profile; `i2cdetect -y BUS` shows the addresses",
            )

    def read(self) -> Values:
        try:
            shunt, bus = _signed(self._word(_SHUNT)), self._word(_BUS)
        except OSError as error:
            self._failures += 1
            self._last = errno.errorcode.get(error.errno or 0, str(error))
            return (None,)
        if abs(shunt) >= self._chip.shunt_full:
            self._saturated += 1
            return (None,)
        voltage_v = (bus >> self._chip.bus_shift) * self._chip.bus_lsb_v
        power_w = voltage_v * shunt * self._chip.shunt_lsb_v / self._settings.shunt_ohm
        if power_w < _LEAST_W:
            self._reversed += 1
            return (None,)
        return (power_w,)

    def notes(self) -> dict[str, str]:
        reasons: list[str] = []
        if self._failures:
            reasons.append(f"{self._failures} reads failed, the last with {self._last}")
        if self._saturated:
            reasons.append(f"{self._saturated} readings were at the end of the chip's range: take a smaller shunt")
        if self._reversed:
            reasons.append(f"{self._reversed} readings were below {_LEAST_W:g} W: exchange IN+ and IN-")
        return {"ina2xx.power": "; ".join(reasons)} if reasons else {}

    def close(self) -> None:
        if self._bus is None:
            return
        try:
            if self._before is not None:
                self._put(_CONFIGURATION, self._before)
        except OSError as error:
            self._failures += 1
            self._last = f"{errno.errorcode.get(error.errno or 0, str(error))} while the setting was put back"
        self._bus.close()
        self._bus = None


def _settings(options: Options) -> _Settings:
    if not options.settings:
        raise NotPresent("no chip is named", 'say chip = "ina226" and shunt_ohm in the device profile')
    return settings_of(_Settings, options, "ina2xx")


def probe(roots: Roots, options: Options) -> Sensor:
    """The named chip. Raises NotPresent when nothing, something else, or the kernel's driver is at its address."""
    settings = _settings(options)
    sensor = _Ina2xx(_open_bus(settings.bus), settings)
    try:
        sensor.set_up()
    except OSError as error:
        sensor.close()
        if error.errno == errno.EBUSY:
            hint = "name it in sensor hwmon's `total` instead, or unbind the driver"
            raise NotPresent(f"a driver of the kernel holds 0x{settings.address:02x}", hint) from error
        why = errno.errorcode.get(error.errno or 0, str(error))
        raise NotPresent(
            f"nothing answers at 0x{settings.address:02x} of /dev/i2c-{settings.bus} ({why})",
            "check the wiring; `i2cdetect -y BUS` shows what answers",
        ) from error
    except NotPresent:
        sensor.close()
        raise
    return sensor
