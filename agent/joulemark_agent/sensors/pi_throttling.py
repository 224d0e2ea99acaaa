"""What a Raspberry Pi's firmware says about low voltage and slowing down, as flags.

Owns: asking `vcgencmd get_throttled` and what its bits mean for a run. Not aware of temperatures or limits.
Bits 0 to 3 say what is now, bits 16 to 19 that it was since the boot; those never clear. So a flag is up while its "now" bit is set, and
once when its "since the boot" bit appears: something happened between two readings. What happened before the run stays out.

    bit 0/16  throttle.undervoltage       the supply is below 4.63 V: use a better supply or cable
    bit 1/17  throttle.arm_capped         the processor's frequency is held down
    bit 2/18  throttle.throttled          the processor is slowed down
    bit 3/19  throttle.soft_temperature   the soft temperature limit is reached (Pi 3 B+ at 60 °C)

A board without a detector of its supply's voltage has no throttle.undervoltage. Truth: raspberrypi/documentation, `vcgencmd
get_throttled`. Where the program fails it says `error=1 …` with exit status 0.
"""

from __future__ import annotations

import re

from joulemark.wire import Channel
from joulemark_agent.programs import ask
from joulemark_agent.sensors import NotPresent, Options, Sensor, Values
from joulemark_agent.sensors._polling import PolledSensor
from joulemark_agent.sensors._raspberry_pi import has_voltage_detector
from joulemark_agent.sysfs import Roots, Unreadable

_COMMAND = ("vcgencmd", "get_throttled")
_ANSWER = re.compile(r"^throttled=0x([0-9a-fA-F]{1,8})$", re.ASCII)
_NAMES = ("undervoltage", "arm_capped", "throttled", "soft_temperature")
_INTERVAL_S = 1.0
_TIMEOUT_S = 1.0


def flags_now(roots: Roots) -> int | Unreadable:
    """The firmware's bits, or why there are none."""
    text = ask(roots, _COMMAND, _TIMEOUT_S)
    if isinstance(text, Unreadable):
        return text
    matched = _ANSWER.match(text)
    return int(matched[1], 16) if matched else Unreadable(" ".join(_COMMAND), "failed", text[:120])


def raised(bits: int, before: int) -> tuple[bool, ...]:
    """The four flags: set now, or "since the boot" set now and not at the reading before."""
    risen = bits & ~before
    return tuple(bool((bits | risen >> 16) & 1 << bit) for bit in range(len(_NAMES)))


_CHANNELS = tuple(
    Channel(
        name=f"throttle.{name}",
        quantity="flag",
        unit="1",
        source=f"vcgencmd get_throttled: bit {bit} now, or bit {bit + 16} newly set",
    )
    for bit, name in enumerate(_NAMES)
)


class _Flags:
    """Those from the bit `first` on."""

    def __init__(self, roots: Roots, before: int, first: int) -> None:
        self._roots = roots
        self._before = before
        self._first = first

    def values(self) -> Values | Unreadable:
        """The flags now."""
        bits = flags_now(self._roots)
        if isinstance(bits, Unreadable):
            return bits
        flags, self._before = raised(bits, self._before), bits
        return tuple(float(flag) for flag in flags[self._first :])


def probe(roots: Roots, options: Options) -> Sensor:
    """The flags. Raises NotPresent where the firmware cannot be asked."""
    bits = flags_now(roots)
    if isinstance(bits, Unreadable):
        hint = (
            "" if bits.reason == "not there" else "let the agent's user into the group of /dev/vcio: usermod -aG video"
        )
        raise NotPresent(f"the Raspberry Pi's firmware cannot be asked: {bits}", hint)
    first = 0 if has_voltage_detector(roots) else 1
    return PolledSensor(_CHANNELS[first:], _Flags(roots, bits, first).values, _INTERVAL_S, options.clock)
