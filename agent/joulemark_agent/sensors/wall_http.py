"""A socket between the board's power supply and the wall that tells its power over HTTP: watts of the wall.

Owns: asking it, and finding power and energy in its answer. Not aware of who makes it.
Settings: `url`; either `kind` = "shelly" (Gen 2 and later: …/rpc/Switch.GetStatus?id=0), "shelly1" (…/meter/0) or "tasmota"
(…/cm?cmnd=Status%208), or `power`, a JSON pointer (RFC 6901) to watts; `interval_s` (default 1: such sockets measure about once a second)
and `timeout_s` (default 2). What it tells is about the last second, so that a phase of a few seconds is blurred by one. A socket that
rounds to whole watts (Tasmota until `PowerRes 3`) makes coarse joules.

The answer is bounded to 64 KiB, redirects are not followed, and what it says beyond the one number is not looked at.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import httpx
from pydantic import Field

from joulemark.errors import BadInput
from joulemark.wire import Channel
from joulemark_agent.sensors import NotPresent, Options, Sensor, SettingsModel, Values, settings_of
from joulemark_agent.sensors._polling import PolledSensor
from joulemark_agent.sysfs import Roots, Unreadable

_MOST_BYTES = 65_536
_PLAUSIBLE_W = (-1.0, 4000.0)
"""A 16 A circuit of 230 V gives 3.7 kW."""
_POINTERS = {"shelly": "/apower", "shelly1": "/power", "tasmota": "/StatusSNS/ENERGY/Power"}


class _Settings(SettingsModel):
    url: Annotated[str, Field(pattern=r"^https?://[^\s]{1,400}$")]
    kind: Literal["shelly", "shelly1", "tasmota"] | None = None
    power: Annotated[str, Field(pattern=r"^/.{1,200}$")] | None = None
    interval_s: Annotated[float, Field(ge=0.1, le=60)] = 1.0
    timeout_s: Annotated[float, Field(ge=0.1, le=30)] = 2.0

    @property
    def pointer(self) -> str:
        """Where the watts are."""
        return self.power or _POINTERS[self.kind or "shelly"]


def find(document: object, pointer: str) -> float | None:
    """The number at a JSON pointer, None when there is none."""
    place: Any = document
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(place, dict) and key in place:
            place = place[key]
        elif isinstance(place, list) and key.isdecimal() and len(key) < 6 and int(key) < len(place):
            place = place[int(key)]
        else:
            return None
    return float(place) if isinstance(place, int | float) and not isinstance(place, bool) else None


class _Socket:
    def __init__(self, settings: _Settings) -> None:
        self.settings = settings
        host = urlsplit(settings.url).hostname or settings.url
        source = f"wall socket {host}: {settings.pointer}"
        self.channel = Channel(
            name="wall.power", quantity="power", unit="W", source=source[:200], meaning="wall", total=True
        )
        # No proxy of the environment: the socket is on the local network.
        self.client = httpx.Client(timeout=settings.timeout_s, follow_redirects=False, trust_env=False)

    def ask(self) -> Values | Unreadable:
        """One reading, or why there is none."""
        place = self.settings.url
        try:
            with self.client.stream("GET", place) as answer:
                if answer.status_code != 200:
                    return Unreadable(place, "failed", f"HTTP status {answer.status_code}")
                body = b""
                for part in answer.iter_bytes(4096):
                    body += part
                    if len(body) > _MOST_BYTES:
                        return Unreadable(place, "failed", f"more than {_MOST_BYTES} bytes")
            power_w = find(json.loads(body), self.settings.pointer)
        except httpx.TimeoutException:
            return Unreadable(place, "no answer in time", f"{self.settings.timeout_s:g} s")
        except (httpx.HTTPError, ValueError, RecursionError) as error:
            return Unreadable(place, "failed", f"{type(error).__name__}: {error}"[:200])
        if power_w is None:
            return Unreadable(place, "not a number", self.settings.pointer)
        if not _PLAUSIBLE_W[0] <= power_w <= _PLAUSIBLE_W[1]:
            return Unreadable(place, "failed", f"{power_w:g} W is implausible")
        return (power_w,)


def _settings(options: Options) -> _Settings:
    if not options.settings:
        raise NotPresent("no wall socket is named", 'say url and kind = "shelly" in the device profile')
    settings = settings_of(_Settings, options, "wall_http")
    if (settings.kind is None) == (settings.power is None):
        raise BadInput("sensor wall_http: it needs either kind or power", "correct the device profile")
    return settings


def probe(roots: Roots, options: Options) -> Sensor:
    """The socket, when it answers with a number now. Raises NotPresent with what it said instead."""
    socket = _Socket(_settings(options))
    first = socket.ask()
    if isinstance(first, Unreadable):
        socket.client.close()
        raise NotPresent(
            f"the wall socket gives no power: {first}", "open its address in a browser; check kind or power"
        )
    interval_s, release = socket.settings.interval_s, socket.client.close
    return PolledSensor((socket.channel,), socket.ask, interval_s, options.clock, release=release)
