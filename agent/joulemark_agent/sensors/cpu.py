"""Current processor frequency in hertz: mean and maximum over the cpufreq policies, each weighted by its processors.

Owns: the two channels. Not aware of the governor (a fact of the device) or of why a frequency is low (throttle.py).
Truth: Documentation/admin-guide/pm/cpufreq.rst: `scaling_cur_freq` is in kilohertz; it is what the driver measured or set, not the
advertised clock. On a Raspberry Pi it is what the kernel asked for, also while the firmware holds the clock down (raspberrypi/
documentation, overclocking): the channels' source says so. /proc/cpuinfo's "cpu MHz" is not used: in virtual machines it is a constant.
The policies are read twice a second: a large machine has dozens of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from joulemark.wire import Channel
from joulemark_agent.sensors import NotPresent, Options, Pace, Sensor, Values
from joulemark_agent.sensors._raspberry_pi import is_raspberry_pi
from joulemark_agent.sysfs import KeptFile, Roots, entries, text_or_none

_INTERVAL_S = 0.5
_SOURCE = "cpufreq: scaling_cur_freq of every policy"


class _Cpu:
    def __init__(self, policies: list[Path], asked_for: bool, clock: Callable[[], float]) -> None:
        source = _SOURCE + (", as the kernel asked for it: the firmware may hold it down" if asked_for else "")
        self.channels = (
            Channel(name="cpu.frequency_mean", quantity="frequency", unit="Hz", source=source),
            Channel(name="cpu.frequency_max", quantity="frequency", unit="Hz", source=source),
        )
        self._pace = Pace(clock, _INTERVAL_S)
        self._weights = [len((text_or_none(policy / "affected_cpus") or "0").split()) for policy in policies]
        self._files = [KeptFile(policy / "scaling_cur_freq") for policy in policies]

    def read(self) -> Values:
        return self._pace.read(self._read_now) or (None, None)

    def _read_now(self) -> Values:
        total_khz, weight, highest_khz = 0.0, 0, 0.0
        for file, cpus in zip(self._files, self._weights, strict=True):
            khz = file.number()
            if khz is not None and khz > 0:
                total_khz += khz * cpus
                weight += cpus
                highest_khz = max(highest_khz, khz)
        return (total_khz / weight * 1000, highest_khz * 1000) if weight else (None, None)

    def notes(self) -> dict[str, str]:
        failed = [why for file in self._files if (why := file.explanation())]
        return {"cpu.frequency_mean": "; ".join(failed[:4])} if failed else {}

    def close(self) -> None:
        for file in self._files:
            file.close()


def probe(roots: Roots, options: Options) -> Sensor:
    """The policies' frequencies. Raises NotPresent when the kernel does not scale frequencies here."""
    folder = roots.sys / "devices" / "system" / "cpu" / "cpufreq"
    policies = [p for p in entries(folder) if p.name.startswith("policy") and (p / "scaling_cur_freq").exists()]
    if not policies:
        raise NotPresent(
            "the kernel offers no cpufreq policy: this machine's clock is not visible (usual in virtual machines)"
        )
    return _Cpu(policies, is_raspberry_pi(roots), options.clock)
