"""Every sensor plug-in on fake boards, with figures known by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from joulemark import plugins
from joulemark.errors import BadInput
from joulemark_agent import sysfs
from joulemark_agent.sensors import (
    NotPresent,
    Options,
    Pace,
    Sensor,
    contention,
    cpu,
    distinct,
    identifier,
    memory,
    rapl,
    replay,
    thermal,
    throttle,
)
from joulemark_agent.statistics import counter_energy
from tests.fixtures.boards import BARE, LAPTOP, HandClock, cpufreq, plant, pressure, process, zone
from tests.fixtures.boards import thermal as thermal_files

SENSORS = plugins.names("joulemark_agent.sensors")
ON_A_LAPTOP = ("contention", "cpu", "memory", "rapl", "replay", "thermal", "throttle")
"""Those of other boards keep the same contract in test_boards.py, meters on a wire in test_meters.py."""


def value(sensor: Sensor, name: str) -> float | None:
    """One channel's value of one read."""
    return dict(zip([channel.name for channel in sensor.channels], sensor.read(), strict=True))[name]


def record(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "recording.csv"
    path.write_text("time_s,psu:power:wall:total\n0,1\n1,2\n")
    return {"path": str(path)}


# --- the contract -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SENSORS)
def test_every_sensor_is_absent_with_a_reason_on_an_empty_root(name: str, tmp_path: Path) -> None:
    with pytest.raises(NotPresent) as caught:
        plugins.load("joulemark_agent.sensors", name).probe(plant(tmp_path, {}), Options(worker_pid=42))
    assert len(caught.value.message) > 10


@pytest.mark.parametrize("name", ON_A_LAPTOP)
def test_every_sensor_keeps_its_contract(name: str, tmp_path: Path) -> None:
    roots = plant(tmp_path, {**LAPTOP, **process(42, 5, 5), **process(7, 1, 1)})
    options = Options(worker_pid=42, agent_pid=7, settings=record(tmp_path) if name == "replay" else {})
    sensor: Sensor = plugins.load("joulemark_agent.sensors", name).probe(roots, options)
    names = [channel.name for channel in sensor.channels]
    assert names
    assert len(set(names)) == len(names)
    for _ in range(3):
        assert len(sensor.read()) == len(names)
    assert all(isinstance(reason, str) and reason for reason in sensor.notes().values())
    assert all(c.meaning is not None for c in sensor.channels if c.quantity in ("power", "energy"))
    assert not any(c.total for c in sensor.channels if c.quantity not in ("power", "energy"))
    before = len(list(Path("/proc/self/fd").iterdir()))
    sensor.close()
    sensor.close()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


@pytest.mark.parametrize("name", [name for name in ON_A_LAPTOP if name != "replay"])
def test_every_sensor_gives_none_when_its_files_vanish(name: str, tmp_path: Path) -> None:
    files = {**LAPTOP, **process(42, 5, 5), **process(7, 1, 1)}
    roots = plant(tmp_path, files)
    clock = HandClock()
    options = Options(worker_pid=42, agent_pid=7, clock=clock)
    sensor: Sensor = plugins.load("joulemark_agent.sensors", name).probe(roots, options)
    sensor.read()
    clock.wait(2)
    assert any(v is not None for v in sensor.read())
    for path in files:
        (tmp_path / path).unlink()
    clock.wait(2)
    assert sensor.read() == (None,) * len(sensor.channels)
    assert any("not there" in reason for reason in sensor.notes().values())
    plant(tmp_path, files)
    clock.wait(2)
    sensor.read()
    clock.wait(2)
    assert any(v is not None for v in sensor.read()), "it comes back with its files"
    sensor.close()


def test_names_are_made_distinct_and_plain() -> None:
    assert distinct(["a", "b", "a", "a-2", "a"]) == ["a", "b", "a-2", "a-2-2", "a-3"]
    assert identifier("thermal", "INT3400 Thermal") == "thermal.INT3400_Thermal"


def test_pace_waits_for_its_interval_and_for_the_cost() -> None:
    clock = HandClock(0.0)
    pace = Pace(clock, 1.0, share=0.01)
    assert pace.read(lambda: 5.0) == 5.0
    clock.wait(0.9)
    assert pace.read(lambda: 6.0) is None
    clock.wait(0.1)

    def costly() -> float:
        clock.wait(0.05)
        return 7.0

    assert pace.read(costly) == 7.0  # 50 ms at 1 % of a core: due again 5 s after its start
    clock.wait(4.9)
    assert pace.read(lambda: 8.0) is None
    clock.wait(0.06)
    assert pace.read(lambda: 8.0) == 8.0


# --- rapl -------------------------------------------------------------------------------------------------------------
def set_energy(tmp_path: Path, energy_uj: int, folder: str = "intel-rapl:0") -> None:
    (tmp_path / f"sys/class/powercap/{folder}/energy_uj").write_text(f"{energy_uj}\n")


def test_rapl_counts_the_package_once_and_shows_its_parts(tmp_path: Path) -> None:
    sensor = rapl.probe(plant(tmp_path, LAPTOP), Options(clock=HandClock()))
    described = {channel.name: (channel.total, channel.meaning) for channel in sensor.channels}
    assert described == {
        "rapl.package-0": (True, "package"),
        "rapl.package-0.core": (False, "package"),
        "rapl.package-0.uncore": (False, "package"),
    }
    assert all(channel.quantity == "energy" and channel.unit == "J" for channel in sensor.channels)


def test_rapl_two_packages_are_both_totals(tmp_path: Path) -> None:
    files = {**zone("intel-rapl:0", "package-0", 0), **zone("intel-rapl:1", "package-1", 0)}
    sensor = rapl.probe(plant(tmp_path, files), Options(clock=HandClock()))
    assert [channel.total for channel in sensor.channels] == [True, True]


def test_rapl_psys_is_the_total_instead_of_the_packages(tmp_path: Path) -> None:
    files = {**LAPTOP, **zone("intel-rapl:1", "psys", 9_000_000)}
    sensor = rapl.probe(plant(tmp_path, files), Options(clock=HandClock()))
    assert {channel.name: channel.total for channel in sensor.channels} == {
        "rapl.package-0": False,
        "rapl.psys": True,
        "rapl.package-0.core": False,
        "rapl.package-0.uncore": False,
    }


def test_rapl_is_a_running_sum_across_the_wrap(tmp_path: Path) -> None:
    clock = HandClock()
    files = zone("intel-rapl:0", "package-0", 999_000_000, range_uj=1_000_000_000)
    sensor = rapl.probe(plant(tmp_path, files), Options(clock=clock))
    assert sensor.read() == (0.0,)
    clock.wait(0.1)
    set_energy(tmp_path, 999_500_000)
    assert sensor.read() == (pytest.approx(0.5),)
    clock.wait(0.1)
    set_energy(tmp_path, 2_500_000)  # 0.5 J to the top, 2.5 J from the bottom
    assert sensor.read() == (pytest.approx(3.5),)
    clock.wait(0.1)
    set_energy(tmp_path, 3_000_000)
    assert sensor.read() == (pytest.approx(4.0),)
    assert sensor.notes() == {}


def test_rapl_a_reset_is_a_gap_and_not_energy(tmp_path: Path) -> None:
    clock = HandClock()
    files = zone("intel-rapl:0", "package-0", 100_000_000_000)
    sensor = rapl.probe(plant(tmp_path, files), Options(clock=clock))
    sensor.read()
    clock.wait(0.1)
    set_energy(tmp_path, 5_000)  # as a wrap these were 162 kJ in 0.1 s
    assert sensor.read() == (-rapl.FALL_J,)
    clock.wait(0.1)
    set_energy(tmp_path, 1_005_000)
    assert sensor.read() == (pytest.approx(1.0 - rapl.FALL_J),)
    assert "1 steps were beyond any plausible power" in sensor.notes()["rapl.package-0"]


@pytest.mark.parametrize(
    ("cap_uw", "step_j", "expected"),
    [
        (15_000_000, 6.5, 6.5),  # 15 W rated: 60 W for 0.1 s and a counter step are 6.6 J
        (15_000_000, 6.7, None),
        (None, 1000.0, 1000.0),  # unknown: 10 kW
        (None, 1200.0, None),
        (0, 1000.0, 1000.0),  # some kernels say 0 for unknown
    ],
)
def test_rapl_plausible_power(tmp_path: Path, cap_uw: int | None, step_j: float, expected: float | None) -> None:
    clock = HandClock()
    sensor = rapl.probe(plant(tmp_path, zone("intel-rapl:0", "package-0", 0, cap_uw=cap_uw)), Options(clock=clock))
    sensor.read()
    clock.wait(0.1)
    set_energy(tmp_path, round(step_j * 1e6))
    got = sensor.read()[0]
    assert got == (-rapl.FALL_J if expected is None else pytest.approx(expected))


def test_what_could_not_be_counted_is_not_covered() -> None:
    """30 W and 10 W in turns, tick by tick, where 24 W are possible: what remains is half of the time, not 5 W in all of it."""
    counter, total_uj = rapl.Counter(range_uj=2.6e11, cap_w=24.0), 0.0
    times, sums = [], []
    for tick in range(601):
        total_uj += (30e6 if tick % 2 else 10e6) * 0.1
        times.append(tick * 0.1)
        sums.append(counter.update(tick * 0.1, total_uj))
    found = counter_energy(times, sums, 0.0, 60.0, 0.5)
    assert found.coverage == pytest.approx(0.5) and counter.gaps == 300
    assert found.mean_power_w == pytest.approx(10.0)


def test_rapl_a_pause_in_which_it_may_have_wrapped_twice_is_a_gap(tmp_path: Path) -> None:
    clock = HandClock()
    files = zone("intel-rapl:0", "package-0", 0, range_uj=60_000_000)  # 60 J: one second at four times 15 W
    sensor = rapl.probe(plant(tmp_path, files), Options(clock=clock))
    sensor.read()
    clock.wait(1.0)
    set_energy(tmp_path, 10_000_000)
    assert sensor.read() == (-rapl.FALL_J,)


def test_rapl_energy_read_after_a_failed_read_is_not_lost(tmp_path: Path) -> None:
    clock = HandClock()
    sensor = rapl.probe(plant(tmp_path, zone("intel-rapl:0", "package-0", 0)), Options(clock=clock))
    sensor.read()
    clock.wait(0.1)
    set_energy(tmp_path, 0)
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").write_text("")
    assert sensor.read() == (None,)
    clock.wait(0.1)
    set_energy(tmp_path, 2_000_000)
    assert sensor.read() == (pytest.approx(2.0),)


def test_rapl_without_permission_says_so_and_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = plant(tmp_path, LAPTOP)
    opened = Path.open

    def refuse(self: Path, *arguments: object, **named: object) -> object:
        if self.name == "energy_uj":  # chmod does not stop root, so the kernel's answer is imitated
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(sysfs.Path, "open", refuse)
    with pytest.raises(NotPresent) as caught:
        rapl.probe(roots, Options())
    assert "not permitted" in caught.value.message
    assert "udev" in caught.value.hint


def test_rapl_mmio_alone_is_no_meter(tmp_path: Path) -> None:
    with pytest.raises(NotPresent):
        rapl.probe(plant(tmp_path, zone("intel-rapl-mmio:0", "package-0", 5)), Options())


# --- thermal ----------------------------------------------------------------------------------------------------------
def test_thermal_celsius_equal_types_and_odd_names(tmp_path: Path) -> None:
    sensor = thermal.probe(plant(tmp_path, LAPTOP), Options())
    read = dict(zip([channel.name for channel in sensor.channels], sensor.read(), strict=True))
    assert read == {
        "thermal.acpitz": pytest.approx(27.8),
        "thermal.x86_pkg_temp": 61.0,
        "thermal.INT3400_Thermal": 20.0,
        "thermal.acpitz-2": pytest.approx(29.8),
    }


def test_thermal_no_reading_is_none_with_its_reason(tmp_path: Path) -> None:
    zones = [("off", "-256000\n"), ("garbage", "warm\n"), ("empty", ""), ("absurd", "99999999\n"), ("good", "-5000\n")]
    sensor = thermal.probe(plant(tmp_path, thermal_files(*zones)), Options())
    assert sensor.read() == (None, None, None, None, -5.0)
    notes = sensor.notes()
    assert "sentinel" in notes["thermal.off"]
    assert "not a number" in notes["thermal.garbage"]
    assert "empty" in notes["thermal.empty"]
    assert "outside" in notes["thermal.absurd"]
    assert "thermal.good" not in notes


# --- cpu --------------------------------------------------------------------------------------------------------------
def test_cpu_frequency_is_weighted_by_processors_and_in_hertz(tmp_path: Path) -> None:
    files = cpufreq(("0 1 2", 1_000_000, 2_000_000), ("3", 3_000_000, 3_000_000))
    sensor = cpu.probe(plant(tmp_path, files), Options())
    assert [channel.name for channel in sensor.channels] == ["cpu.frequency_mean", "cpu.frequency_max"]
    assert sensor.read() == (pytest.approx(1.5e9), pytest.approx(3.0e9))


# --- memory -----------------------------------------------------------------------------------------------------------
def test_memory_in_bytes_and_pss_once_a_second(tmp_path: Path) -> None:
    clock = HandClock()
    roots = plant(tmp_path, {**BARE, **process(42, 0, 0, rss_pages=1000, pss_kb=3000)})
    sensor = memory.probe(roots, Options(worker_pid=42, clock=clock))
    page = os.sysconf("SC_PAGE_SIZE")
    assert [channel.name for channel in sensor.channels] == [
        "memory.worker_pss",
        "memory.worker_rss",
        "memory.available",
    ]
    assert sensor.read() == (3000 * 1024, 1000 * page, 2_000_000 * 1024)
    plant(tmp_path, process(42, 0, 0, rss_pages=2000, pss_kb=4000))
    clock.wait(0.5)
    assert sensor.read() == (None, 2000 * page, None), "no old value stands in for one that was not read"
    clock.wait(0.6)
    assert sensor.read() == (4000 * 1024, 2000 * page, 2_000_000 * 1024)


def test_memory_without_a_worker_says_so(tmp_path: Path) -> None:
    sensor = memory.probe(plant(tmp_path, BARE), Options(worker_pid=None))
    assert [channel.name for channel in sensor.channels] == ["memory.available"]
    assert sensor.notes()["memory.worker_pss"] == "there is no worker process"


def test_memory_of_this_process_is_what_psutil_says() -> None:
    psutil = pytest.importorskip("psutil")
    sensor = memory.probe(sysfs.Roots(), Options(worker_pid=os.getpid()))
    pss, rss, available = sensor.read()
    info = psutil.Process().memory_full_info()
    assert pss == pytest.approx(info.pss, rel=0.05)
    assert rss == pytest.approx(info.rss, rel=0.05)
    assert available == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    sensor.close()


# --- contention -------------------------------------------------------------------------------------------------------
def stat(user: int, system: int, idle: int, iowait: int = 0, steal: int = 0, guest: int = 0) -> dict[str, str]:
    return {"proc/stat": f"cpu  {user} 0 {system} {idle} {iowait} 0 0 {steal} {guest} 0\ncpu0 1 1 1 1\n"}


def test_contention_from_two_snapshots(tmp_path: Path) -> None:
    clock = HandClock()
    first = {**stat(1000, 100, 5000, 50, 10), **process(42, 600, 50), **process(7, 20, 5), **pressure(1_000_000)}
    roots = plant(tmp_path, {**BARE, **first})
    sensor = contention.probe(roots, Options(worker_pid=42, agent_pid=7, clock=clock))
    assert value(sensor, "contention.load1") == 0.2
    # 200 ticks pass: 110 user, 20 system, 50 idle, 10 waiting for disks, 10 stolen; worker 80, agent 4
    second = {
        **stat(1110, 120, 5050, 60, 20),
        **process(42, 670, 60),
        **process(7, 23, 6),
        **pressure(1_300_000, 50_000),
    }
    plant(tmp_path, second)
    clock.wait(1.0)
    read = dict(zip([channel.name for channel in sensor.channels], sensor.read(), strict=True))
    assert read["contention.steal"] == pytest.approx(10 / 200)
    assert read["contention.busy"] == pytest.approx(130 / 200)
    assert read["contention.other_cpu"] == pytest.approx((130 - 84) / 200)
    assert read["contention.psi_cpu"] == pytest.approx(0.3)
    assert read["contention.psi_memory"] == pytest.approx(0.05)
    assert read["contention.psi_io"] == 0.0


def test_contention_has_no_share_at_its_first_reading_and_none_between(tmp_path: Path) -> None:
    clock = HandClock()
    roots = plant(tmp_path, {**BARE, **pressure(5), **process(7, 0, 0)})
    sensor = contention.probe(roots, Options(agent_pid=7, clock=clock))
    assert sensor.read() == (None,) * 6 + (0.2,)
    clock.wait(0.3)
    assert sensor.read() == (None,) * 7


def test_contention_guest_time_is_not_counted_twice(tmp_path: Path) -> None:
    clock = HandClock()
    roots = plant(tmp_path, {**BARE, **stat(0, 0, 100, guest=0), **process(7, 0, 0)})
    sensor = contention.probe(roots, Options(agent_pid=7, clock=clock))
    sensor.read()
    plant(tmp_path, stat(50, 0, 150, guest=50))
    clock.wait(1)
    assert value(sensor, "contention.busy") == pytest.approx(0.5)


def test_contention_negative_rests_are_carried_so_that_the_mean_is_right() -> None:
    shares = contention.CpuShares()
    shares.update(contention.Ticks(busy=0, steal=0, total=0), 0)
    others: list[float] = []
    # per 10 ticks the machine was busy for 5, 5, 5, 5 and we used 6, 4, 6, 2: others used 2 of 40
    for step, own in enumerate((6, 10, 16, 18), start=1):
        other = shares.update(contention.Ticks(busy=5 * step, steal=0, total=10 * step), own)[2]
        assert other is not None
        others.append(other)
    assert others == [0.0, 0.0, 0.0, pytest.approx(0.2)]
    assert sum(others) / 4 == pytest.approx(2 / 40)


def test_contention_without_the_worker_the_others_are_unknown(tmp_path: Path) -> None:
    clock = HandClock()
    roots = plant(tmp_path, {**BARE, **process(7, 0, 0), **process(42, 0, 0)})
    sensor = contention.probe(roots, Options(worker_pid=42, agent_pid=7, clock=clock))
    sensor.read()
    (tmp_path / "proc/42/stat").unlink()
    plant(tmp_path, stat(1100, 200, 8100))
    clock.wait(1)
    read = dict(zip([channel.name for channel in sensor.channels], sensor.read(), strict=True))
    assert read["contention.other_cpu"] is None
    assert read["contention.busy"] is not None


def test_contention_without_psi_says_how_to_get_it(tmp_path: Path) -> None:
    sensor = contention.probe(plant(tmp_path, {**BARE, **process(7, 0, 0)}), Options(agent_pid=7))
    assert not any("psi" in channel.name for channel in sensor.channels)
    assert "psi=1" in sensor.notes()["contention.psi_cpu"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"some avg10=1.00 avg60=0.00 avg300=0.00 total=42\nfull avg10=0.00 total=7\n", 42),
        (b"full avg10=0.00 avg60=0.00 avg300=0.00 total=7\n", None),
        (b"some avg10=1.00", None),
        (b"", None),
    ],
)
def test_contention_pressure_lines(content: bytes, expected: int | None) -> None:
    assert contention.parse_pressure_us(content) == expected


@pytest.mark.parametrize("content", [b"", b"cpu\n", b"cpu  1 2 x 4\n", b"intr 1 2 3 4 5\n"])
def test_contention_odd_stat_files_are_no_reading(content: bytes) -> None:
    assert contention.parse_stat(content) is None


# --- throttle ---------------------------------------------------------------------------------------------------------
def test_throttle_ignores_fans_and_settings_and_sees_processors(tmp_path: Path) -> None:
    clock = HandClock()
    sensor = throttle.probe(plant(tmp_path, LAPTOP), Options(clock=clock))
    assert value(sensor, "throttle.cooling") == 0.0, "a fan that runs and a TCC offset slow nothing down"
    (tmp_path / "sys/class/thermal/cooling_device0/cur_state").write_text("3\n")
    clock.wait(1)
    assert value(sensor, "throttle.cooling") == 1.0


@pytest.mark.parametrize(
    ("kind", "slows"),
    [
        ("thermal-cpufreq-0", True),
        ("cpufreq-cpu0", True),
        ("thermal-devfreq-0", True),
        ("intel_powerclamp", True),
        ("cpu-throttle-alert", True),
        ("pwm-fan", False),
        ("LCD", False),
        ("iwlwifi", False),
    ],
)
def test_throttle_kinds_of_cooling_devices(tmp_path: Path, kind: str, slows: bool) -> None:
    base = "sys/class/thermal/cooling_device0"
    roots = plant(tmp_path, {f"{base}/type": kind, f"{base}/cur_state": "1\n"})
    if slows:
        assert throttle.probe(roots, Options()).read() == (1.0,)
    else:
        with pytest.raises(NotPresent):
            throttle.probe(roots, Options())


def test_throttle_a_low_frequency_is_no_evidence_but_a_lowered_limit_is(tmp_path: Path) -> None:
    clock = HandClock()
    roots = plant(tmp_path, cpufreq(("0", 400_000, 3_000_000), ("1", 400_000, 3_000_000)))
    sensor = throttle.probe(roots, Options(clock=clock))
    assert value(sensor, "throttle.frequency_capped") == 0.0
    (tmp_path / "sys/devices/system/cpu/cpufreq/policy1/scaling_max_freq").write_text("1800000\n")
    clock.wait(1)
    assert value(sensor, "throttle.frequency_capped") == 1.0


def test_throttle_counts_new_events_once_per_core_and_package(tmp_path: Path) -> None:
    files: dict[str, str] = {}
    for number, core in enumerate((0, 0, 1)):
        base = f"sys/devices/system/cpu/cpu{number}"
        files |= {
            f"{base}/topology/physical_package_id": "0\n",
            f"{base}/topology/core_id": f"{core}\n",
            f"{base}/thermal_throttle/core_throttle_count": "100\n",
            f"{base}/thermal_throttle/package_throttle_count": "700\n",
        }
    clock = HandClock()
    sensor = throttle.probe(plant(tmp_path, files), Options(clock=clock))
    assert sensor.read() == (0.0,)
    for number in (0, 1):  # siblings of core 0
        (tmp_path / f"sys/devices/system/cpu/cpu{number}/thermal_throttle/core_throttle_count").write_text("103\n")
    for number in (0, 1, 2):
        (tmp_path / f"sys/devices/system/cpu/cpu{number}/thermal_throttle/package_throttle_count").write_text("705\n")
    clock.wait(0.5)
    assert sensor.read() == (None,)
    clock.wait(0.6)
    assert sensor.read() == (8.0,)


# --- replay -----------------------------------------------------------------------------------------------------------
def play(path: Path, clock: HandClock, **settings: object) -> Sensor:
    return replay.probe(sysfs.Roots(), Options(clock=clock, settings={"path": path, **settings}))


def test_replay_interpolates_keeps_gaps_and_ends(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.write_text("time_s,psu:power:wall:total,hot:flag\n50,1,0\n52,5,1\n53,,0\n54,7,0\n55,9,0\n")
    clock = HandClock()
    sensor = play(path, clock)
    assert [(c.name, c.unit, c.meaning, c.total, c.source) for c in sensor.channels] == [
        ("psu", "W", "wall", True, "replay:run.csv"),
        ("hot", "1", None, False, "replay:run.csv"),
    ]
    assert sensor.read() == (1.0, 0.0)
    clock.wait(0.5)
    assert sensor.read() == (2.0, 0.0)
    clock.wait(1.5)
    assert sensor.read() == (5.0, 1.0)
    clock.wait(0.5)
    assert sensor.read() == (None, 1.0)
    clock.wait(2.0)
    assert sensor.read() == (8.0, 0.0)
    clock.wait(1.0)
    assert sensor.read() == (None, None)
    assert "was over at 1 ticks" in sensor.notes()["replay"]


def test_replay_loop_keeps_an_energy_sum_rising(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    channel = {"name": "meter", "quantity": "energy", "unit": "J", "source": "bench", "meaning": "wall", "total": True}
    content = {"channels": [channel], "times_s": [0, 2], "values": [[100, 110]], "interval_s": 2}
    path.write_text(json.dumps(content))
    clock = HandClock(0.0)
    sensor = play(path, clock, loop=True)
    assert sensor.read() == (100.0,)
    clock.wait(3.0)
    assert sensor.read() == (115.0,)
    clock.wait(2.0)
    assert sensor.read() == (125.0,)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.csv", "t,x:power\n0,1\n", "time_s"),
        ("a.csv", "time_s,x:volume\n0,1\n", "NAME:QUANTITY"),
        ("a.csv", "time_s,x:power\n0,one\n", "not a number"),
        ("a.csv", "time_s,x:power\n0,1\n0,2\n", "rise strictly"),
        ("a.csv", "time_s,x:power\n0,1,2\n", "different lengths"),
        ("a.csv", "time_s,x:power\n0,nan\n", "malformed"),
        ("a.csv", "time_s,x:power\n", "empty"),
        ("a.csv", "", "time_s"),
        ("a.json", "{", "malformed"),
        ("a.json", "[" * 100_000, "malformed"),
        ("a.json", '{"channels": [], "times_s": [0], "values": []}', "empty"),
        ("a.json", b"\xff\xfe", "UTF-8"),
    ],
)
def test_replay_bad_recordings_are_refused(tmp_path: Path, name: str, content: str | bytes, fault: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput) as caught:
        play(path, HandClock())
    assert fault in caught.value.message
    assert name in caught.value.message


def test_replay_of_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotPresent, match="cannot be read"):
        play(tmp_path / "none.json", HandClock())
