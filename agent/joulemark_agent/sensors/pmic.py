"""The supply rails inside a Raspberry Pi 5, measured by its power management chip, in watts.

Owns: asking `vcgencmd pmic_read_adc`, pairing currents with voltages, and the sum. Not aware of the 5 V pins and USB ports: what hangs
there is not measured, nor are the regulators' losses, so that the sum is a lower bound of what the wall gives.
Settings: `interval_s` between two readings (default 0.5: one takes about 10 ms of a core); `fit` = [factor, offset in W], off by default:
then `pmic.fitted` = factor × sum + offset is the total, labelled rail+fit. A published fit against a wall meter is [1.1451, 0.5879]
(github.com/jfikar/RPi5-power): it was made on other boards than yours.

The 12 rails' currents (`VDD_CORE_A current(7)=…A`) and voltages (`VDD_CORE_V volt(15)=…V`) carry unrelated numbers: they are paired by
name. EXT5V and BATT have no current and are no rails here. Needs membership in the group of /dev/vcio (video).
Truth: raspberrypi/documentation, `vcgencmd pmic_read_adc`; a whole listing is in jfikar/RPi5-power.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Annotated

from pydantic import Field

from joulemark.wire import Channel
from joulemark_agent.programs import ask
from joulemark_agent.sensors import NotPresent, Options, Sensor, SettingsModel, Values, identifier, settings_of
from joulemark_agent.sensors._polling import PolledSensor
from joulemark_agent.sysfs import Roots, Unreadable

_COMMAND = ("vcgencmd", "pmic_read_adc")
_LINE = re.compile(r"^\s*(\w+)_([AV])\s+(?:current|volt)\(\d+\)=([0-9.]+)[AV]\s*$", re.ASCII)
_TIMEOUT_S = 1.0
_PLAUSIBLE_W = 60.0
"""The board's supply gives 27 W."""


def rail_powers(text: str) -> dict[str, float]:
    """Watts by rail, of those with a current and a voltage. Empty when the text is none of vcgencmd's."""
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        matched = _LINE.match(line)
        if matched and matched[3].count(".") <= 1 and matched[3] != ".":
            found.setdefault(matched[1], {})[matched[2]] = float(matched[3])
    return {rail: pair["A"] * pair["V"] for rail, pair in found.items() if len(pair) == 2}


def _read(roots: Roots) -> dict[str, float] | Unreadable:
    text = ask(roots, _COMMAND, _TIMEOUT_S)
    if isinstance(text, Unreadable):
        return text
    powers = rail_powers(text)
    return powers or Unreadable(" ".join(_COMMAND), "failed", text[:120])


class _Settings(SettingsModel):
    interval_s: Annotated[float, Field(ge=0.1, le=60)] = 0.5
    fit: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None


def _values(roots: Roots, rails: Sequence[str], fit: tuple[float, float] | None) -> Values | Unreadable:
    """One value a rail, their sum, and the fitted sum where one is wanted."""
    powers = _read(roots)
    if isinstance(powers, Unreadable):
        return powers
    missing = [rail for rail in rails if rail not in powers]
    if missing:
        return Unreadable(" ".join(_COMMAND), "failed", f"no reading of {', '.join(missing)}")
    total_w = math.fsum(powers[rail] for rail in rails)
    if not total_w <= _PLAUSIBLE_W:
        return Unreadable(" ".join(_COMMAND), "failed", f"{total_w:g} W is beyond this board")
    fitted = () if fit is None else (fit[0] * total_w + fit[1],)
    return (*(powers[rail] for rail in rails), total_w, *fitted)


def _part(rail: str) -> Channel:
    source = f"PMIC {rail}: vcgencmd pmic_read_adc, current × voltage"
    return Channel(name=identifier("pmic", rail), quantity="power", unit="W", source=source, meaning="rail")


def _totals(count: int, fit: tuple[float, float] | None) -> list[Channel]:
    """The sum; it is the total unless a fit is wanted."""
    source = f"PMIC: sum of {count} rails of vcgencmd pmic_read_adc (not USB, not the 5 V pins)"
    found = [
        Channel(name="pmic.sum", quantity="power", unit="W", source=source, meaning="rail", total=fit is None),
    ]
    if fit is not None:
        source = f"{fit[0]:g} × pmic.sum + {fit[1]:g} W, the device profile's fit"
        found.append(
            Channel(name="pmic.fitted", quantity="power", unit="W", source=source, meaning="rail+fit", total=True)
        )
    return found


def probe(roots: Roots, options: Options) -> Sensor:
    """The rails that the chip reports. Raises NotPresent where vcgencmd does not give any (every Pi before the 5)."""
    settings = settings_of(_Settings, options, "pmic")
    powers = _read(roots)
    if isinstance(powers, Unreadable):
        permitted = "not permitted" in str(powers) or "VCHI" in str(powers) or "vcio" in str(powers)
        hint = "let the agent's user into the group of /dev/vcio: usermod -aG video joulemark" if permitted else ""
        raise NotPresent(f"no PMIC can be read: {powers}", hint)
    rails, fit = sorted(powers), (settings.fit[0], settings.fit[1]) if settings.fit else None
    channels = (*(_part(rail) for rail in rails), *_totals(len(rails), fit))
    read = partial(_values, roots, rails, fit)
    return PolledSensor(channels, read, settings.interval_s, options.clock, noted="pmic.sum")
