"""The contract of a sensor plug-in: one file in this folder, one function `probe`.

    def probe(roots: Roots, options: Options) -> Sensor        or raise NotPresent(reason, fix)

A sensor names its columns once (`channels`) and then gives one value per column at every tick (`read`), in the same
order. None means that there is no reading at this tick: it failed, it was implausible, it was not due (a costly file
is read more rarely than the sampler ticks, and is never filled with an older value), or it is a share whose first
interval has not passed yet. `notes` says at the end what was not there or had gaps, and why: channel or part →
reason. Units are SI, as `joulemark.wire.Channel` says. Sensors read the kernel's files directly; what is slow (a board's
own programs, the network, serial lines) is read by a thread of its own (`_polling`). No numpy. A plug-in may import
this package's `__init__`, its private modules, `joulemark_agent.sysfs` and `.programs`, never another plug-in.

Names that the rest of the agent relies on:
    power or energy with total=True                               what the joules of a run are made of
    thermal.* (≤ 2/s)                                             degrees Celsius, one per zone
    cpu.frequency_mean, cpu.frequency_max (≤ 2/s)                 Hz, over the cpufreq policies
    memory.worker_pss, memory.available (≤ 1/s), memory.worker_rss  bytes
    contention.steal, .busy, .other_cpu (≤ 2/s)                   shares of the machine since the last reading
    contention.psi_cpu, .psi_memory, .psi_io (≤ 2/s)              shares of that time in which some task waited
    contention.load1                                              the kernel's load average over one minute (≤ 2/s)
    throttle.cooling, throttle.frequency_capped (≤ 2/s)           flags: 1 while the machine slows itself down
    throttle.events                                               count of new throttle events since the start (≤ 1/s)
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from joulemark.errors import BadInput, JoulemarkError
from joulemark.wire import Channel, Identifier

Values = tuple[float | None, ...]
Reading = TypeVar("Reading")
Settings = TypeVar("Settings", bound="SettingsModel")


class SettingsModel(BaseModel):
    """What a sensor's settings have in common: types are not guessed, unknown names are faults."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


FALL_J = 1e-6
"""By this an energy sum falls where a step could not be counted. The sum does not say how much that was, and so nobody integrates over it
(statistics.counter_energy): a missing reading would be bridged instead, as if nothing had been used."""


class NotPresent(JoulemarkError):
    """This machine does not offer that sensor: `message` says why, `hint` what would make it available, if anything."""

    code = "not_present"


@dataclass(frozen=True)
class Options:
    """What a sensor is told: whom to watch, the sampler's clock, and its own settings from the device profile."""

    worker_pid: int | None = None
    agent_pid: int = field(default_factory=os.getpid)
    clock: Callable[[], float] = time.monotonic
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class SensorUse:
    """A device profile's line: which plug-in, with which settings."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    use: Identifier
    options: dict[str, Any] = field(default_factory=dict[str, Any])


class Sensor(Protocol):
    """A probed sensor. It is read by one thread only."""

    @property
    def channels(self) -> tuple[Channel, ...]:
        """The columns, fixed for the sensor's life."""
        ...

    def read(self) -> Values:
        """One value per channel, None where there is no reading now."""
        ...

    def notes(self) -> dict[str, str]:
        """What is not there or had gaps, and why: channel or part → reason."""
        ...

    def close(self) -> None:
        """Releases files; no read follows."""
        ...


class Pace:
    """When a costly read is due: not before `interval_s`, and so rarely that it takes at most `share` of one core."""

    def __init__(self, clock: Callable[[], float], interval_s: float = 0.0, share: float = 0.001) -> None:
        self._clock = clock
        self._interval_s = interval_s
        self._share = share
        self._due_s = float("-inf")

    def read(self, reader: Callable[[], Reading]) -> Reading | None:
        """`reader()` when it is due, else None; its duration decides when it is due again."""
        started_s = self._clock()
        if started_s < self._due_s:
            return None
        value = reader()
        cost_s = self._clock() - started_s
        self._due_s = started_s + max(self._interval_s, cost_s / self._share)
        return value


def settings_of(kind: type[Settings], options: Options, sensor: str) -> Settings:
    """The sensor's settings from the device profile. Raises BadInput naming the sensor and the setting."""
    try:
        return kind.model_validate(dict(options.settings))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in fault["loc"]) or "its settings"
        hint = f"correct the device profile; the settings stand in joulemark_agent/sensors/{sensor}.py"
        raise BadInput(f"sensor {sensor}: {where}: {fault['msg']}", hint) from error


def identifier(*parts: str) -> str:
    """A channel name made of kernel names, which may hold spaces: other characters become underscores."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", ".".join(part.strip() for part in parts))[:80]


def distinct(names: list[str]) -> list[str]:
    """The same names, later equal ones with -2, -3 … behind them."""
    taken: set[str] = set()
    result: list[str] = []
    for name in names:
        candidate, number = name, 1
        while candidate in taken:
            number += 1
            candidate = f"{name[:75]}-{number}"
        taken.add(candidate)
        result.append(candidate)
    return result
