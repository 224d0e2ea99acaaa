"""A power meter or bench supply that speaks SCPI over a serial line, USB, or TCP: the power that it measures, in watts.

Owns: asking and parsing one number. Not aware of the instrument's other functions: set range, averaging and mode on it beforehand.
Settings: `port`, a device (/dev/ttyUSB0) or pyserial URL (socket://192.168.1.20:5025); `query` (default ":MEAS:POW?"; Yokogawa WT300:
":NUM:NORM:VAL? 3", for the third item of its first preset is the power, after U and I: ":NUM:NORM?" says what yours are), `baud` (default
9600), `interval_s` (default 0.5), `timeout_s` (default 1), `meaning` = "wall" (default) or "supply" (it feeds the board directly). Needs
the extra `meters` (pyserial) and, for a device, its group (dialout).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from joulemark.wire import Channel
from joulemark_agent.sensors import NotPresent, Options, Sensor, SettingsModel, Values, settings_of
from joulemark_agent.sensors._polling import PolledSensor
from joulemark_agent.sysfs import Roots, Unreadable, parse_number

_MOST_BYTES = 256
_PLAUSIBLE_W = (-1.0, 4000.0)
_OVERFLOW = 9.9e37
"""SCPI's number for "over range"."""


class _Settings(SettingsModel):
    port: Annotated[str, Field(pattern=r"^(/dev/[A-Za-z0-9/_.:+-]{1,200}|socket://[A-Za-z0-9._:\[\]-]{1,200})$")]
    query: Annotated[str, Field(pattern=r"^[ -~]{1,80}$")] = ":MEAS:POW?"
    baud: Annotated[int, Field(ge=300, le=4_000_000)] = 9600
    interval_s: Annotated[float, Field(ge=0.05, le=60)] = 0.5
    timeout_s: Annotated[float, Field(ge=0.1, le=30)] = 1.0
    meaning: Literal["wall", "supply"] = "wall"


class _Line(Protocol):
    def write(self, data: bytes, /) -> int | None: ...
    def read_until(self, expected: bytes = ..., size: int | None = ...) -> bytes: ...
    def reset_input_buffer(self) -> None: ...
    def close(self) -> None: ...


def _open(settings: _Settings) -> _Line:
    try:
        import serial
    except ImportError as error:
        raise NotPresent("pyserial is not installed", "pip install 'joulemark[meters]'") from error
    try:
        opened: Any = serial.serial_for_url(
            settings.port, baudrate=settings.baud, timeout=settings.timeout_s, write_timeout=settings.timeout_s
        )
    except (serial.SerialException, OSError, ValueError) as error:
        hint = "check the cable and the port; a device needs its group: usermod -aG dialout joulemark"
        raise NotPresent(f"the meter at {settings.port} cannot be opened: {error}", hint) from error
    return opened


class _Instrument:
    def __init__(self, settings: _Settings, line: _Line) -> None:
        self.settings = settings
        self.line = line
        source = f"SCPI meter at {settings.port}: {settings.query}"
        self.channel = Channel(
            name="meter.power", quantity="power", unit="W", source=source[:200], meaning=settings.meaning, total=True
        )

    def ask(self) -> Values | Unreadable:
        """One reading, or why there is none. An answer that came too late is thrown away before the next question."""
        self.line.reset_input_buffer()
        self.line.write(self.settings.query.encode("ascii") + b"\n")
        answer = self.line.read_until(b"\n", _MOST_BYTES)
        if not answer.endswith(b"\n"):
            return Unreadable(self.settings.port, "no answer in time", f"{self.settings.timeout_s:g} s")
        power_w = parse_number(self.settings.port, answer.split(b",")[0].strip())
        if isinstance(power_w, Unreadable):
            return power_w
        if abs(power_w) >= _OVERFLOW:
            return Unreadable(self.settings.port, "sentinel", "over range")
        if not _PLAUSIBLE_W[0] <= power_w <= _PLAUSIBLE_W[1]:
            return Unreadable(self.settings.port, "failed", f"{power_w:g} W is implausible")
        return (power_w,)


def _settings(options: Options) -> _Settings:
    if not options.settings:
        raise NotPresent("no SCPI meter is named", 'say port = "/dev/ttyUSB0" in the device profile')
    return settings_of(_Settings, options, "wall_scpi")


def probe(roots: Roots, options: Options) -> Sensor:
    """The meter, when it answers with a number now. Raises NotPresent with what it said instead."""
    settings = _settings(options)
    instrument = _Instrument(settings, _open(settings))
    try:
        first = instrument.ask()
    except OSError as error:
        first = Unreadable(settings.port, "read error", str(error))
    if isinstance(first, Unreadable):
        instrument.line.close()
        raise NotPresent(f"the meter gives no power: {first}", "check query, baud rate and the meter's mode")
    release = instrument.line.close
    return PolledSensor((instrument.channel,), instrument.ask, settings.interval_s, options.clock, release=release)
