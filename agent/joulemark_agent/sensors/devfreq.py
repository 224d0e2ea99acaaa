"""Current frequency in hertz of what is not a processor core: graphics unit and memory controller, where the kernel scales them.

Owns: one channel per devfreq device, named after it (`devfreq.17000000.gpu`). Not aware of limits or governors.
Truth: Documentation/ABI/testing/sysfs-class-devfreq: `cur_freq` is in hertz (cpufreq's files are in kilohertz).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from joulemark.wire import Channel
from joulemark_agent.sensors import NotPresent, Options, Pace, Sensor, Values, distinct, identifier
from joulemark_agent.sysfs import KeptFile, Roots, entries

_INTERVAL_S = 0.5


class _Devfreq:
    def __init__(self, devices: Sequence[Path], options: Options) -> None:
        names = distinct([identifier("devfreq", device.name) for device in devices])
        self.channels = tuple(
            Channel(name=name, quantity="frequency", unit="Hz", source=f"devfreq: {device.name}/cur_freq"[:200])
            for name, device in zip(names, devices, strict=True)
        )
        self._files = [KeptFile(device / "cur_freq") for device in devices]
        self._pace = Pace(options.clock, _INTERVAL_S)

    def read(self) -> Values:
        return self._pace.read(self._now) or (None,) * len(self.channels)

    def _now(self) -> Values:
        return tuple(file.number() for file in self._files)

    def notes(self) -> dict[str, str]:
        pairs = zip(self.channels, self._files, strict=True)
        return {channel.name: why for channel, file in pairs if (why := file.explanation())}

    def close(self) -> None:
        for file in self._files:
            file.close()


def probe(roots: Roots, options: Options) -> Sensor:
    """All devices. Raises NotPresent when the kernel scales none."""
    devices = [device for device in entries(roots.sys / "class" / "devfreq") if (device / "cur_freq").exists()]
    if not devices:
        raise NotPresent("the kernel scales no graphics unit or memory controller (class devfreq is empty)")
    return _Devfreq(devices, options)
