"""The sampler: deadlines, missed ticks, gaps, hangs, chunks, its own cost; and joining the traces of a resumed run."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from joulemark.errors import BadInput, Conflict, NotFound
from joulemark.wire import Absent, Channel, Trace
from joulemark_agent.sampling import Row, Sampler, open_sensors
from joulemark_agent.sensors import Options, SensorUse, Values
from joulemark_agent.traces import join, merge
from tests.fixtures.boards import BARE, LAPTOP, HandClock, plant, process

WATTS = Channel(name="meter", quantity="power", unit="W", source="fake", meaning="wall", total=True)
HEAT = Channel(name="heat", quantity="temperature", unit="Cel", source="fake")


class Fake:
    """A sensor made of a function; it remembers whether it was closed."""

    def __init__(self, read: Callable[[], Values], channels: tuple[Channel, ...] = (WATTS,)) -> None:
        self.channels = channels
        self.closed = 0
        self._read = read

    def read(self) -> Values:
        return self._read()

    def notes(self) -> dict[str, str]:
        return {"fake": "a note"}

    def close(self) -> None:
        self.closed += 1


@dataclass
class Script:
    """A hand clock that stops the sampler after so many waits, and keeps the times of waking up."""

    clock: HandClock
    ticks: int
    late_s: float = 0.0
    waits: list[float] = field(default_factory=list)

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.clock.wait(seconds + self.late_s)
        return len(self.waits) >= self.ticks


def run(sensors: Sequence[Fake], script: Script, interval_s: float = 0.1, **named: object) -> Trace:
    sampler = Sampler(sensors, interval_s, script.clock, wait=script.wait, **named)  # type: ignore[arg-type]
    sampler.start()
    sampler._thread.join(10)  # the script ends it
    return sampler.stop()


# --- ticks ------------------------------------------------------------------------------------------------------------
def test_deadlines_are_absolute_so_late_wakeups_do_not_add_up() -> None:
    clock = HandClock(10.0)
    trace = run([Fake(lambda: (1.0,))], Script(clock, ticks=50, late_s=0.03))
    assert len(trace.times_s) == 51
    assert trace.missed_ticks == 0
    assert trace.times_s[0] == 10.0
    for tick, time_s in enumerate(trace.times_s[1:], start=1):
        assert time_s == pytest.approx(10.0 + tick * 0.1 + 0.03)


def test_slow_reads_miss_ticks_which_are_counted_and_not_made_up_for() -> None:
    clock = HandClock(0.0)
    script = Script(clock, ticks=4)

    def slow() -> Values:
        clock.wait(0.25)
        return (1.0,)

    trace = run([Fake(slow)], script)
    assert trace.times_s == pytest.approx((0.0, 0.3, 0.6, 0.9, 1.2))
    assert trace.missed_ticks == 8, "two between each pair of ticks"
    assert trace.read_times_s == pytest.approx((0.25,) * 5)


def test_a_read_of_exactly_one_interval_misses_its_deadline_only_once() -> None:
    clock = HandClock(0.0)

    def slow() -> Values:
        clock.wait(0.5)
        return (1.0,)

    trace = run([Fake(slow)], Script(clock, ticks=3), interval_s=0.5)
    assert trace.times_s == pytest.approx((0.0, 1.0, 2.0, 3.0))
    assert trace.missed_ticks == 3


def test_a_long_run_is_sampled_ever_more_slowly_so_that_its_trace_stays_small() -> None:
    found = run([Fake(lambda: (1.0,))], Script(HandClock(), 12), full_rate_ticks=5)
    start = found.times_s[0]
    expected = [0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.8, 2.2, 2.6]
    assert [time - start for time in found.times_s] == pytest.approx(expected)
    assert (found.interval_s, found.missed_ticks) == (0.1, 0)
    assert [time - start for time, _ in found.slowed] == pytest.approx([0.4, 1.4])
    assert [interval for _, interval in found.slowed] == pytest.approx([0.2, 0.4])
    # Two attempts: the second begins at the full rate again.
    later = found.model_copy(update={"times_s": tuple(time + 100 for time in found.times_s), "slowed": ()})
    assert merge([found, later]).slowed == ((start, 0.1), *found.slowed, (later.times_s[0], 0.1))
    assert run([Fake(lambda: (1.0,))], Script(HandClock(), 4), full_rate_ticks=5).slowed == ()


def test_on_the_real_clock_the_rate_is_kept() -> None:
    sampler = Sampler([Fake(lambda: (1.0,))], 0.02)
    sampler.start()
    time.sleep(1.0)
    trace = sampler.stop()
    assert len(trace.times_s) + trace.missed_ticks == pytest.approx(51, abs=4)
    assert trace.interval_s == 0.02
    assert 0 < trace.cpu_s < 0.5
    assert all(later > earlier for earlier, later in itertools.pairwise(trace.times_s))


def test_the_last_tick_is_at_the_stop() -> None:
    sampler = Sampler([Fake(lambda: (1.0,))], 10.0)
    sampler.start()
    time.sleep(0.1)
    before_s = time.monotonic()
    trace = sampler.stop()
    assert len(trace.times_s) == 2
    assert trace.times_s[1] == pytest.approx(before_s, abs=0.05)
    assert time.monotonic() - before_s < 1.0, "stop does not wait for the next tick"


# --- gaps -------------------------------------------------------------------------------------------------------------
def test_a_failing_read_is_a_gap_in_its_own_channels_and_is_counted() -> None:
    reads = iter(range(100))

    def flaky() -> Values:
        if next(reads) in (1, 3):
            raise OSError(5, "Input/output error")
        return (7.0,)

    good = Fake(lambda: (40.0,), (HEAT,))
    clock = HandClock()
    script = Script(clock, ticks=4)
    sampler = Sampler([Fake(flaky), good], 0.1, clock, wait=script.wait)
    sampler.start()
    sampler._thread.join(10)
    trace = sampler.stop()
    assert trace.values == ((7.0, None, 7.0, None, 7.0), (40.0,) * 5)
    assert sampler.failures == {"meter": 2}
    assert trace.absent["meter (read)"].reason.startswith("2 reads failed, the first at 100.100 s, the last: OSError")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), None])
def test_no_number_is_none_and_never_zero(bad: float | None) -> None:
    trace = run([Fake(lambda: (bad,))], Script(HandClock(), ticks=1))
    assert trace.values == ((None, None),)


def test_a_sensor_that_answers_with_too_few_values_is_a_gap() -> None:
    trace = run([Fake(lambda: (1.0,), (WATTS, HEAT))], Script(HandClock(), ticks=1))
    assert trace.values == ((None, None), (None, None))
    assert "1 values for 2 channels" in trace.absent["meter (read)"].reason


def test_a_sensor_vanishing_in_mid_run_leaves_gaps_and_comes_back(tmp_path: Path) -> None:
    roots = plant(tmp_path, {**LAPTOP, **process(42, 0, 0), **process(7, 0, 0)})
    clock = HandClock()
    uses = tuple(SensorUse(use=name) for name in ("rapl", "thermal"))
    sensors, _ = open_sensors(Profile(uses), roots, 42, Options(clock=clock, agent_pid=7))
    zone = tmp_path / "sys/class/thermal/thermal_zone1/temp"

    class Vanishing(Script):
        def wait(self, seconds: float) -> bool:
            if len(self.waits) == 1:
                zone.unlink()
            if len(self.waits) == 3:
                zone.write_text("63000\n")
            return super().wait(seconds)

    script = Vanishing(clock, ticks=5)
    sampler = Sampler(sensors, 0.6, clock, wait=script.wait)
    sampler.start()
    sampler._thread.join(10)
    trace = sampler.stop()
    names = [channel.name for channel in trace.channels]
    assert len(trace.times_s) == 6
    assert trace.values[names.index("thermal.x86_pkg_temp")] == (61.0, 61.0, None, None, 63.0, 63.0)
    assert trace.values[names.index("thermal.acpitz")] == pytest.approx((27.8,) * 6)
    assert "2 reads gave nothing" in trace.absent["thermal.x86_pkg_temp"].reason


# --- hangs and ends ---------------------------------------------------------------------------------------------------
def test_a_sensor_that_hangs_does_not_hang_the_stop() -> None:
    release = threading.Event()
    calls = iter(range(100))

    def hanging() -> Values:
        if next(calls) == 2:
            release.wait(30)
        return (1.0,)

    rows: list[Row] = []
    sampler = Sampler([Fake(hanging)], 0.02, on_chunk=rows.extend, patience_s=0.3)
    sampler.start()
    time.sleep(0.3)
    before_s = time.monotonic()
    trace = sampler.stop()
    assert time.monotonic() - before_s < 1.5
    assert len(trace.times_s) == 2, "what was read before is kept"
    assert trace.missed_ticks >= 10, "the ticks that the hang cost are counted"
    assert "meter did not answer within" in trace.absent["sampler"].reason
    release.set()
    sampler._thread.join(5)
    assert len(sampler.stop().times_s) == 2, "a late answer is not recorded"


def test_a_thread_that_dies_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def broken() -> Values:
        raise AssertionError("a defect in a sensor")

    sampler = Sampler([Fake(broken)], 0.02)
    sampler.start()
    sampler._thread.join(5)
    assert "ended early" in sampler.stop().absent["sampler"].reason


def test_sensors_are_closed_once_and_their_notes_kept() -> None:
    sensor = Fake(lambda: (1.0,))
    trace = run([sensor], Script(HandClock(), ticks=1), absent={"rapl": Absent(reason="not here")})
    assert sensor.closed == 1
    assert trace.absent == {"rapl": Absent(reason="not here"), "fake": Absent(reason="a note")}


def test_a_sampler_that_never_started_closes_its_sensors() -> None:
    sensor = Fake(lambda: (1.0,))
    trace = Sampler([sensor], 0.1).stop()
    assert sensor.closed == 1
    assert trace.times_s == ()
    assert trace.values == ((),)


def test_starting_twice_and_bad_intervals_are_refused() -> None:
    sampler = Sampler([], 0.02)
    sampler.start()
    with pytest.raises(Conflict):
        sampler.start()
    sampler.stop()
    with pytest.raises(BadInput):
        Sampler([], 0.0)


# --- chunks -----------------------------------------------------------------------------------------------------------
def test_chunks_hold_every_row_once_in_order() -> None:
    chunks: list[list[Row]] = []
    counter = iter(range(1000))
    trace = run(
        [Fake(lambda: (float(next(counter)),))], Script(HandClock(), ticks=25), on_chunk=chunks.append, chunk_s=1.0
    )
    rows = [row for chunk in chunks for row in chunk]
    assert len(chunks) == 3
    assert tuple(row.time_s for row in rows) == trace.times_s
    assert tuple(row.values for row in rows) == tuple((value,) for value in trace.values[0])
    assert tuple(row.read_time_s for row in rows) == trace.read_times_s


def test_a_slow_disk_costs_no_ticks_and_a_failing_one_is_reported() -> None:
    def store(_: list[Row]) -> None:
        time.sleep(0.2)
        raise OSError(28, "No space left on device")

    sampler = Sampler([Fake(lambda: (1.0,))], 0.02, on_chunk=store, chunk_s=0.1, patience_s=5.0)
    sampler.start()
    time.sleep(0.5)
    trace = sampler.stop()
    assert len(trace.times_s) >= 20
    assert "No space left" in trace.absent["sampler (chunks)"].reason


def test_the_parts_of_a_sampler_are_its_trace() -> None:
    """What an agent that was killed leaves: with running sums that go on, and the counts since the start, also where it slowed down."""
    clock, sums = HandClock(), iter(range(1000))
    fake = Fake(lambda: (float(next(sums)),))
    fake.channels = (ENERGY,)
    parts: list[Trace] = []
    sampler = Sampler(
        [fake], 0.1, clock, lambda rows: parts.append(sampler.part(rows)), wait=Script(clock, ticks=40, late_s=0.03).wait,
        chunk_s=1.0, full_rate_ticks=15, absent={"meter": Absent(reason="none")},
    )  # fmt: skip
    sampler.start()
    sampler._thread.join(10)
    trace = sampler.stop()
    assert len(parts) > 3 and trace.slowed
    joined = join(parts)
    for name in ("channels", "times_s", "values", "interval_s", "slowed", "missed_ticks", "read_times_s"):
        assert getattr(joined, name) == getattr(trace, name), name
    assert 0 < joined.cpu_s <= trace.cpu_s and "meter" in joined.absent
    with pytest.raises(BadInput):
        join([])


# --- which sensors ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Profile:
    sensors: tuple[SensorUse, ...]
    without_meter: str | None = None


def test_open_sensors_says_what_is_absent_and_reads_totals_first(tmp_path: Path) -> None:
    roots = plant(tmp_path, {**BARE, **process(42, 0, 0), **process(7, 0, 0)})
    recording = tmp_path / "r.csv"
    recording.write_text("time_s,psu:power:wall:total\n0,1\n9,1\n")
    uses = tuple(SensorUse(use=name) for name in ("memory", "rapl", "thermal"))
    extra = (SensorUse(use="replay", options={"path": str(recording)}),)
    sensors, absent = open_sensors(Profile(uses), roots, 42, Options(agent_pid=7), extra)
    assert [sensor.channels[0].name for sensor in sensors] == ["psu", "memory.worker_pss"]
    assert set(absent) == {"rapl", "thermal"}
    assert "modprobe" in absent["rapl"].reason
    for sensor in sensors:
        sensor.close()


def test_open_sensors_refuses_unknown_and_doubled_ones(tmp_path: Path) -> None:
    roots = plant(tmp_path, {**BARE})
    with pytest.raises(NotFound, match="unknown name 'nvml'"):
        open_sensors(Profile((SensorUse(use="nvml"),)), roots, None)
    with pytest.raises(BadInput, match=r"memory\.available"):
        open_sensors(Profile((SensorUse(use="memory"), SensorUse(use="memory"))), roots, None)


def test_replayed_power_gives_the_joules_known_by_hand(tmp_path: Path) -> None:
    """0 → 10 W in 2 s, 10 W for 3 s, back to 4 W in 1 s: 10 + 30 + 7 = 47 J, whatever the ticks."""
    recording = tmp_path / "r.csv"
    recording.write_text("time_s,psu:power:wall:total\n0,0\n2,10\n5,10\n6,4\n")
    clock = HandClock(500.0)
    use = SensorUse(use="replay", options={"path": str(recording)})
    sensors, _ = open_sensors(Profile((use,)), plant(tmp_path, {}), None, Options(clock=clock))
    script = Script(clock, ticks=60)
    sampler = Sampler(sensors, 0.1, clock, wait=script.wait)
    sampler.start()
    sampler._thread.join(10)
    trace = sampler.stop()
    pairs = [(t, v) for t, v in zip(trace.times_s, trace.values[0], strict=True) if v is not None]
    joules = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(pairs))
    assert joules == pytest.approx(47.0)
    assert len(pairs) == 61


# --- merging ----------------------------------------------------------------------------------------------------------
ENERGY = Channel(name="package", quantity="energy", unit="J", source="fake", meaning="package", total=True)


def trace(start_s: float, channels: tuple[Channel, ...], *columns: tuple[float | None, ...], **named: object) -> Trace:
    count = len(columns[0])
    given: dict[str, object] = {
        "channels": channels,
        "times_s": tuple(start_s + index for index in range(count)),
        "values": columns,
        "absent": {},
        "interval_s": 1.0,
        "missed_ticks": 1,
        "read_times_s": (0.001,) * count,
        "cpu_s": 0.5,
    }
    return Trace.model_validate({**given, **named})


def test_merge_joins_by_name_and_goes_on_with_running_sums() -> None:
    first = trace(10.0, (ENERGY, HEAT), (0.0, 5.0, None), (40.0, 41.0, 42.0), absent={"a": Absent(reason="x")})
    second = trace(100.0, (WATTS, ENERGY), (9.0, 8.0), (0.0, 3.0), absent={"b": Absent(reason="y")})
    merged = merge([second, first])
    assert merged.times_s == (10.0, 11.0, 12.0, 100.0, 101.0)
    assert [channel.name for channel in merged.channels] == ["package", "heat", "meter"]
    assert merged.values == (
        (0.0, 5.0, None, 5.0, 8.0),
        (40.0, 41.0, 42.0, None, None),
        (None, None, None, 9.0, 8.0),
    )
    assert merged.missed_ticks == 2
    assert merged.cpu_s == 1.0
    assert len(merged.read_times_s) == 5
    assert set(merged.absent) == {"a", "b"}


def test_merge_of_one_is_the_same_and_of_empty_ones_is_empty() -> None:
    one = trace(1.0, (ENERGY,), (0.0, 1.0))
    assert merge([one]) == one
    empty = trace(1.0, (ENERGY,), ())
    assert merge([empty, empty]) == empty
    assert merge([empty, one]) == one


@pytest.mark.parametrize(
    "second",
    [
        trace(11.0, (ENERGY,), (0.0, 1.0)),
        trace(50.0, (ENERGY,), (0.0, 1.0), interval_s=0.5),
        trace(50.0, (ENERGY.model_copy(update={"meaning": "wall"}),), (0.0, 1.0)),
    ],
    ids=["overlap", "interval", "meaning"],
)
def test_merge_refuses_traces_that_do_not_belong_together(second: Trace) -> None:
    with pytest.raises(BadInput):
        merge([trace(10.0, (ENERGY,), (0.0, 5.0)), second])


def test_merge_of_nothing_is_refused() -> None:
    with pytest.raises(BadInput):
        merge([])
