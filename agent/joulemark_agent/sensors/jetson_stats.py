"""Power rails of a Jetson as jetson-stats reports them: an optional source beside ina3221, for boards whose kernel files are hidden.

Owns: the process that asks (sensors/_jtop_process.py; jetson-stats is AGPL and stays out of this one) and its lines. Not aware of what a
rail is. Settings: `interval_s` (default 0.5); `total` = true takes jetson-stats' own sum as the board's total (default false: it guesses
by label, and where there is no input rail it adds up rails that contain each other).
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from typing import Annotated, Any

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
from joulemark_agent.sensors._polling import PolledSensor
from joulemark_agent.sysfs import Roots, Unreadable, entries

_MOST_BYTES = 65_536
_FIRST_S = 8.0
"""How long the first line may take: jetson-stats connects and waits one interval."""


class _Process:
    """The child and its lines."""

    def __init__(self, interval_s: float) -> None:
        command = [sys.executable, "-m", "joulemark_agent.sensors._jtop_process", str(interval_s)]
        # Its own session: what jetson-stats starts is ended with it.
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        assert self._process.stdout is not None
        self._pipe = self._process.stdout.fileno()
        os.set_blocking(self._pipe, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._pipe, selectors.EVENT_READ)
        self._rest = b""

    def line(self, timeout_s: float) -> dict[str, float] | Unreadable:
        """The next line's rails in watts."""
        while b"\n" not in self._rest:
            if not self._selector.select(timeout_s):
                return Unreadable("jetson-stats", "no answer in time", f"{timeout_s:g} s")
            part = os.read(self._pipe, 4096)
            if not part:
                return Unreadable("jetson-stats", "failed", "its process ended")
            self._rest += part
            if len(self._rest) > _MOST_BYTES:
                return Unreadable("jetson-stats", "failed", f"a line of more than {_MOST_BYTES} bytes")
        text, _, self._rest = self._rest.partition(b"\n")
        try:
            said: Any = json.loads(text)
            if "error" in said:
                return Unreadable("jetson-stats", "failed", str(said["error"])[:200])
            return {str(name)[:60]: float(power_w) for name, power_w in said["rails"].items()}
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            return Unreadable("jetson-stats", "failed", f"{type(error).__name__}: {error}"[:200])

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._selector.close()
        if self._process.stdout is not None:
            self._process.stdout.close()


class _Settings(SettingsModel):
    interval_s: Annotated[float, Field(ge=0.1, le=60)] = 0.5
    total: bool = False


def _channels(rails: list[str], total: bool) -> tuple[Channel, ...]:
    names = distinct([identifier("jetson_stats", rail) for rail in rails])
    return tuple(
        Channel(
            name=name,
            quantity="power",
            unit="W",
            source=f"jetson-stats: {rail}"[:200],
            meaning="rail",
            total=total and rail == "total",
        )
        for name, rail in zip(names, rails, strict=True)
    )


def probe(roots: Roots, options: Options) -> Sensor:
    """The rails of the first line. Raises NotPresent where jetson-stats or its service is not there."""
    settings = settings_of(_Settings, options, "jetson_stats")
    if not entries(roots.sys / "bus" / "i2c" / "drivers" / "ina3221") and not (roots.etc / "nv_tegra_release").exists():
        raise NotPresent("this is no Jetson: jetson-stats is not started")
    process = _Process(settings.interval_s)
    first = process.line(_FIRST_S)
    if isinstance(first, Unreadable) or not first:
        process.close()
        hint = "optional: pip install jetson-stats, then `sudo jtop --install-service` (AGPL-3.0)"
        raise NotPresent(f"no rails from jetson-stats: {first or 'it names none'}", hint)
    rails = sorted(first)

    def values() -> Values | Unreadable:
        said = process.line(4 * settings.interval_s)
        return said if isinstance(said, Unreadable) else tuple(said.get(rail) for rail in rails)

    # The child sets the pace: each call waits for its next line.
    channels, pace_s = _channels(rails, settings.total), settings.interval_s / 2
    return PolledSensor(channels, values, pace_s, options.clock, release=process.close)
