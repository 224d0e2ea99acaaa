"""Over-current and under-voltage events of a Jetson: the module slows itself down for each of them.

Owns: throttle.overcurrent, how many new events all counters together had since the start. Truth: NVIDIA's Jetson Linux Developer Guide,
"Over-Current and Under-Voltage": hwmon `soctherm_oc` with `oc1_event_cnt` (under-voltage), `oc2_…` (average) and `oc3_…` (instantaneous
over-current); JetPack 5 and 6. Counters are read once a second: they do not fall, so that nothing is lost in between.
"""

from __future__ import annotations

import re

from joulemark.wire import Channel
from joulemark_agent.sensors import NotPresent, Options, Pace, Sensor, Values
from joulemark_agent.sensors._counting import NewEvents
from joulemark_agent.sysfs import KeptFile, Roots, Unreadable, entries, hwmon_devices, read_number

_COUNTER = re.compile(r"oc\d{1,2}_event_cnt$", re.ASCII)
_INTERVAL_S = 1.0


class _Overcurrent:
    def __init__(self, counters: list[tuple[KeptFile, float]], options: Options) -> None:
        self._events = NewEvents(counters)
        self._pace = Pace(options.clock, _INTERVAL_S)
        names = ", ".join(file.path.name for file in self._events.files)
        source = f"hwmon soctherm_oc: {names}, new since the start"
        self.channels = (Channel(name="throttle.overcurrent", quantity="count", unit="1", source=source[:200]),)

    def read(self) -> Values:
        return (self._pace.read(self._events.read),)

    def notes(self) -> dict[str, str]:
        reasons = [why for file in self._events.files if (why := file.explanation())]
        return {"throttle.overcurrent": "; ".join(reasons)} if reasons else {}

    def close(self) -> None:
        for file in self._events.files:
            file.close()


def probe(roots: Roots, options: Options) -> Sensor:
    """All counters. Raises NotPresent where the kernel counts no such events."""
    found: list[tuple[KeptFile, float]] = []
    for device in hwmon_devices(roots):
        for path in entries(device):
            count = read_number(path) if _COUNTER.match(path.name) else None
            if count is not None and not isinstance(count, Unreadable):
                found.append((KeptFile(path), count))
    if not found:
        raise NotPresent("the kernel counts no over-current events (Jetson with JetPack 5 or 6 does)")
    return _Overcurrent(found, options)
