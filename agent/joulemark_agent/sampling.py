"""Reads all sensors at a steady rate on one monotonic clock, and keeps what they gave in columns.

Owns: the ticks, the gaps, what sampling itself costs, and joining the traces of a run that was resumed. Not aware of
what the channels mean, of phases, or of the run. Times are seconds of the clock that is passed in.

Ticks have absolute deadlines, start + k × interval, so that they do not drift; a tick that comes too late is missed
and counted, never made up for. `times_s` is taken just before a tick's first read; sensors with a total channel are
read first, so that their time is the tick's. There is one tick at the start and one at the stop. Chunks are handed
over by a second thread, so that a slow disk does not cost ticks.

A run may last for days, and its trace must still fit into a board's memory and through its Wi-Fi. So the interval doubles
each time `FULL_RATE_TICKS` were taken at one rate: a day at 10 Hz makes 164,000 ticks instead of 864,000. The latency phase
stands at the beginning, and an energy counter loses nothing between ticks.
"""

from __future__ import annotations

import math
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from joulemark import plugins
from joulemark.errors import BadInput, Conflict
from joulemark.wire import Absent, Channel, Trace
from joulemark_agent.delivery import Delivery
from joulemark_agent.sensors import NotPresent, Options, Sensor, SensorUse, Values
from joulemark_agent.sysfs import Roots

FULL_RATE_TICKS = 36_000
"""An hour at 10 Hz."""
_SENSORS = "joulemark_agent.sensors"
_READ_ERRORS = (OSError, ValueError, ArithmeticError, LookupError, RuntimeError, TypeError)
"""What a sensor may raise in a read without ending the sampling."""


class NamesSensors(Protocol):
    """What is needed of a device profile here."""

    @property
    def sensors(self) -> Sequence[SensorUse]:
        """The plug-ins to probe, in order."""
        ...

    @property
    def without_meter(self) -> str | None:
        """Why this board has no meter of its own, and what to attach."""
        ...


class Row(NamedTuple):
    """One tick: when, what every channel gave, and how long the reads took."""

    time_s: float
    values: tuple[float | None, ...]
    read_time_s: float


@dataclass
class _Failures:
    count: int
    first_s: float
    last: str


def open_sensors(
    profile: NamesSensors,
    roots: Roots,
    pid: int | None,
    options: Options | None = None,
    extra: Sequence[SensorUse] = (),
) -> tuple[list[Sensor], dict[str, Absent]]:
    """The sensors of `profile` and `extra` (a replay for instance) that this machine offers, and why others are absent.

    `pid` is the worker's; `options` carries the clock. Sensors with total channels come first. Raises NotFound for a
    sensor that is no plug-in, BadInput when two sensors offer a channel of the same name or claim to measure the whole
    board at the same place, or when a setting is malformed.
    """
    opened: list[Sensor] = []
    absent: dict[str, Absent] = {}
    for use in (*profile.sensors, *extra):
        told = replace(options or Options(), worker_pid=pid, settings=use.options)
        try:
            opened.append(plugins.load(_SENSORS, use.use).probe(roots, told))
        except NotPresent as reason:
            absent[use.use] = Absent(reason=f"{reason.message}; {reason.hint}" if reason.hint else reason.message)
        except OSError as error:
            absent[use.use] = Absent(reason=f"could not be examined: {error}")
    _refuse_doubles(opened)
    if profile.without_meter and not any(channel.total for sensor in opened for channel in sensor.channels):
        absent["meter"] = Absent(reason=profile.without_meter)
    opened.sort(key=lambda sensor: not any(channel.total for channel in sensor.channels))
    return opened, absent


def _refuse_doubles(sensors: Sequence[Sensor]) -> None:
    names = [channel.name for sensor in sensors for channel in sensor.channels]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise BadInput(f"two sensors offer the channel {doubled[0]!r}", "name each sensor once in the device profile")
    claims: dict[str, str] = {}
    for sensor in sensors:
        for meaning, name in {
            channel.meaning or "": channel.name for channel in sensor.channels if channel.total
        }.items():
            if meaning in claims:
                raise BadInput(
                    f"{claims[meaning]} and {name} both claim to be the whole board ({meaning}): it would be counted twice",
                    "leave the `total` of one of them out in the device profile",
                )
            claims[meaning] = name


def _clean(value: float | None) -> float:
    """NaN stands for None in the arrays; infinities are no readings either."""
    return value if value is not None and math.isfinite(value) else math.nan


class Sampler:
    """One sampling thread over sensors that the caller opened; it closes them when it ends.

    `on_chunk` gets the rows of the last `chunk_s` seconds, in order and in a thread of its own. `wait` (seconds)
    returns
    True when the sampler is to stop; tests pass their own with their own clock.
    """

    def __init__(
        self,
        sensors: Sequence[Sensor],
        interval_s: float,
        clock: Callable[[], float] = time.monotonic,
        on_chunk: Callable[[list[Row]], None] | None = None,
        *,
        absent: Mapping[str, Absent] | None = None,
        chunk_s: float = 5.0,
        patience_s: float = 2.0,
        wait: Callable[[float], bool] | None = None,
        full_rate_ticks: int = FULL_RATE_TICKS,
    ) -> None:
        if not interval_s > 0:
            raise BadInput(f"the sampling interval is {interval_s} s", "it must be above 0")
        self._sensors = list(sensors)
        self._first_interval_s = interval_s
        self._interval_s = interval_s
        self._slowed: list[tuple[float, float]] = []
        self._full_rate_ticks = full_rate_ticks
        self._clock = clock
        self._absent = dict(absent or {})
        self._chunk_s = chunk_s
        self._patience_s = patience_s
        # a bare lock costs half of what Event.wait costs (40 against 75 µs of processor time a tick, measured)
        self._gate = threading.Lock()
        self._gate.acquire()
        self._wait = wait or self._wait_at_gate
        self._channels = tuple(channel for sensor in self._sensors for channel in sensor.channels)
        self._lock = threading.Lock()
        self._closed = False
        self._times = array("d")
        self._read_times = array("d")
        self._columns = [array("d") for _ in self._channels]
        self._missed = 0
        self._cpu_s = 0.0
        self._cpu_start_s = 0.0
        self._reading: tuple[str, float] | None = None
        self._failures: dict[str, _Failures] = {}
        self._notes: dict[str, str] = {}
        self._ended_well = False
        self._delivery = Delivery(on_chunk) if on_chunk else None
        self._thread = threading.Thread(target=self._run, name="joulemark-sampler", daemon=True)

    @property
    def channels(self) -> tuple[Channel, ...]:
        """The columns of every row and of the trace."""
        return self._channels

    @property
    def failures(self) -> dict[str, int]:
        """How many reads raised, by the name of the sensor's first channel."""
        return {name: failure.count for name, failure in self._failures.items()}

    def start(self) -> None:
        """Starts the thread; the first tick is at once. Raises Conflict when it was started before."""
        if self._thread.ident is not None:
            raise Conflict("this sampler was started before", "make a new one for each run")
        if self._delivery:
            self._delivery.start()
        self._thread.start()

    def stop(self) -> Trace:
        """Takes a last tick, stops and gives the trace. Returns within the patience even when a sensor hangs.

        A sensor that hangs is named in the trace's `absent`; its thread is left behind and records nothing more.
        """
        if self._gate.locked():
            self._gate.release()
        started = self._thread.ident is not None
        if started:
            self._thread.join(self._patience_s)
        elif not self._ended_well:
            self._finish()
        with self._lock:
            self._closed = True
            hung = self._reading if self._thread.is_alive() else None
        if hung:
            silent_s = self._clock() - hung[1]
            self._missed += int(silent_s / self._interval_s)
            self._notes["sampler"] = f"the sensor of {hung[0]} did not answer within {silent_s:.1f} s"
        elif not self._ended_well:
            self._notes["sampler"] = "the sampling thread ended early or did not end; the log has the error"
        if self._delivery and (problem := self._delivery.stop(self._patience_s)):
            self._notes["sampler (chunks)"] = problem
        return self._trace()

    def _trace(self) -> Trace:
        with self._lock:
            notes = {name: Absent(reason=reason[:4000]) for name, reason in self._notes.items()}
            for name, failure in self._failures.items():
                reason = f"{failure.count} reads failed, the first at {failure.first_s:.3f} s, the last: {failure.last}"
                notes.setdefault(f"{name} (read)", Absent(reason=reason[:4000]))
            values = tuple(tuple(None if v != v else v for v in column) for column in self._columns)
            return self._made(tuple(self._times), values, tuple(self._read_times), {**self._absent, **notes})

    def part(self, rows: Sequence[Row]) -> Trace:
        """These rows in the wire form, for `join`: missed ticks, processor time and slowing down are those since the sampler's start."""
        values = tuple(tuple(row.values[column] for row in rows) for column in range(len(self._channels)))
        with self._lock:
            return self._made(
                tuple(row.time_s for row in rows), values, tuple(row.read_time_s for row in rows), self._absent
            )

    def _made(
        self,
        times_s: tuple[float, ...],
        values: tuple[Values, ...],
        read_times_s: tuple[float, ...],
        absent: Mapping[str, Absent],
    ) -> Trace:
        """Whoever calls holds the lock."""
        return Trace(
            channels=self._channels,
            times_s=times_s,
            values=values,
            absent=dict(absent),
            interval_s=self._first_interval_s,
            slowed=tuple(self._slowed),
            missed_ticks=self._missed,
            read_times_s=read_times_s,
            cpu_s=self._cpu_s,
        )

    def _wait_at_gate(self, seconds: float) -> bool:
        return self._gate.acquire(timeout=seconds)

    # --- in the sampling thread ---------------------------------------------------------------------------------------
    def _run(self) -> None:
        self._cpu_start_s = time.thread_time()
        start_s = self._clock()
        tick, taken, chunk, chunk_start_s = 0, 0, list[Row](), start_s
        stopping = False
        while True:
            row = self._read_all()
            if row is None:
                return
            chunk.append(row)
            if self._delivery and (stopping or row.time_s - chunk_start_s >= self._chunk_s):
                self._delivery.put(chunk)
                chunk, chunk_start_s = [], row.time_s
            if stopping:
                break
            taken += 1
            if taken % self._full_rate_ticks == 0:
                start_s, tick = start_s + tick * self._interval_s, 0
                with self._lock:
                    self._interval_s *= 2
                    self._slowed.append((start_s, self._interval_s))
            tick = self._next_tick(start_s, tick)
            stopping = self._wait(max(0.0, start_s + tick * self._interval_s - self._clock()))
        self._finish()

    def _next_tick(self, start_s: float, tick: int) -> int:
        """The first tick that still lies ahead; those in between are missed."""
        following = max(tick + 1, math.floor((self._clock() - start_s) / self._interval_s) + 1)
        with self._lock:
            self._missed += following - tick - 1
        return following

    def _read_all(self) -> Row | None:
        """Reads every sensor once and records the row; None when the sampler was closed meanwhile."""
        time_s = self._clock()
        values: list[float] = []
        for sensor in self._sensors:
            values.extend(self._read_one(sensor))
        read_time_s = self._clock() - time_s
        with self._lock:
            self._reading = None
            if self._closed:
                return None
            self._times.append(time_s)
            self._read_times.append(read_time_s)
            self._cpu_s = time.thread_time() - self._cpu_start_s
            for column, value in zip(self._columns, values, strict=True):
                column.append(value)
        return Row(time_s, tuple(None if v != v else v for v in values), read_time_s)

    def _read_one(self, sensor: Sensor) -> list[float]:
        width = len(sensor.channels)
        name = sensor.channels[0].name if width else type(sensor).__name__
        now_s = self._clock()
        self._reading = (name, now_s)
        try:
            got: Values = sensor.read()
            if len(got) != width:
                raise ValueError(f"{len(got)} values for {width} channels")
            return [_clean(value) for value in got]
        except _READ_ERRORS as error:
            failure = self._failures.setdefault(name, _Failures(0, now_s, ""))
            failure.count += 1
            failure.last = f"{type(error).__name__}: {error}"
            return [math.nan] * width

    def _finish(self) -> None:
        for sensor in self._sensors:
            self._notes.update(_notes_and_close(sensor))
        self._ended_well = True


def _notes_and_close(sensor: Sensor) -> dict[str, str]:
    try:
        notes = dict(sensor.notes())
        sensor.close()
    except _READ_ERRORS as error:
        name = sensor.channels[0].name if sensor.channels else type(sensor).__name__
        return {f"{name} (close)": f"{type(error).__name__}: {error}"}
    return notes
