"""Every board's kernel layout: its profile, its sensors, and figures known by hand from the recorded trees."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from joulemark import plugins
from joulemark.errors import BadInput
from joulemark.wire import Absent, Channel
from joulemark_agent import board_findings, machine, tuning
from joulemark_agent.profiles import DeviceProfile, load_profiles, match
from joulemark_agent.sampling import open_sensors
from joulemark_agent.sensors import (
    FALL_J,
    NotPresent,
    Options,
    Sensor,
    SensorUse,
    cpu,
    devfreq,
    hwmon,
    ina3221,
    overcurrent,
    pi_throttling,
    pmic,
    thermal,
    throttle,
    undervoltage,
)
from joulemark_agent.sysfs import Roots
from tests.fixtures import trees
from tests.fixtures.boards import HandClock, process

NEED_MORE = {"ina2xx", "jetson_stats", "replay", "wall_http", "wall_scpi"}
"""Sensors that read no kernel file: tested with their own counterpart in test_meters.py and test_sensors.py."""


def opened(roots: Roots, profile: DeviceProfile, clock: Callable[[], float] = time.monotonic):
    return open_sensors(profile, roots, 42, Options(agent_pid=7, clock=clock))


def readings(sensor: Sensor, patience_s: float = 5.0) -> dict[str, float | None]:
    """One read; of a sensor that is read by a thread of its own, the first that it hands over."""
    names = [channel.name for channel in sensor.channels]
    for _ in range(round(patience_s / 0.01)):
        values = sensor.read()
        if any(value is not None for value in values):
            return dict(zip(names, values, strict=True))
        time.sleep(0.01)
    raise AssertionError(f"no reading within {patience_s} s: {sensor.notes()}")


def board(name: str, tmp_path: Path) -> Roots:
    roots = trees.board(name, tmp_path)
    for path, content in {**process(42, 5, 5), **process(7, 1, 1)}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    return roots


def put(tmp_path: Path, path: str, content: str) -> None:
    assert (tmp_path / path).exists(), path
    (tmp_path / path).write_text(content)


# --- all boards -------------------------------------------------------------------------------------------------------
def test_every_tree_has_its_profile_and_every_board_profile_a_tree() -> None:
    assert set(trees.PROFILES) == set(trees.NAMES)
    assert set(trees.PROFILES.values()) == {profile.id for profile in load_profiles()} - {"generic"}


@pytest.mark.parametrize("name", trees.NAMES)
def test_a_board_gets_its_profile_and_its_sensors_keep_their_contract(name: str, tmp_path: Path) -> None:
    roots = board(name, tmp_path)
    profile = match(load_profiles(), roots)
    assert profile.id == trees.PROFILES[name]
    sensors, absent = opened(roots, profile)
    channels = [channel for sensor in sensors for channel in sensor.channels]
    assert len({channel.name for channel in channels}) == len(channels)
    for sensor in sensors:
        for _ in range(3):
            assert len(sensor.read()) == len(sensor.channels)
        sensor.close()
        sensor.close()
    assert all(channel.meaning is not None for channel in channels if channel.quantity in ("power", "energy"))
    has_total = any(channel.total for channel in channels)
    assert has_total or absent.get("meter") or absent.get("rapl"), "a board without a meter says why"
    assert not (has_total and "meter" in absent)


def test_every_kernel_sensor_is_on_some_board(tmp_path: Path) -> None:
    found: set[str] = set()
    for name in trees.NAMES:
        roots = board(name, tmp_path / name)
        profile = match(load_profiles(), roots)
        sensors, absent = opened(roots, profile)
        for sensor in sensors:
            sensor.close()
        found |= {use.use for use in profile.sensors} - set(absent)
    assert found == set(plugins.names("joulemark_agent.sensors")) - NEED_MORE


VANISHING = {
    "cpu": "raspberry-pi-5-bookworm",
    "devfreq": "jetson-nano-jetpack4",
    "hwmon": "raspberry-pi-5-bookworm",
    "ina3221": "jetson-nano-jetpack4",
    "overcurrent": "jetson-orin-nano-jetpack6",
    "pi_throttling": "raspberry-pi-4-bookworm",
    "pmic": "raspberry-pi-5-bookworm",
    "undervoltage": "raspberry-pi-4-bookworm",
}


@pytest.mark.parametrize("name", sorted(VANISHING))
def test_a_sensor_whose_files_vanish_gives_none_and_comes_back(name: str, tmp_path: Path) -> None:
    roots = board(VANISHING[name], tmp_path)
    clock = HandClock()
    sensor: Sensor = plugins.load("joulemark_agent.sensors", name).probe(roots, Options(clock=clock))
    readings(sensor)
    for root in (roots.sys, roots.bin or roots.sys):
        shutil.rmtree(root)
    deadline = time.monotonic() + 10
    while not sensor.notes():
        assert time.monotonic() < deadline
        clock.wait(2)
        assert all(value is None for value in sensor.read()) or name in ("pmic", "pi_throttling")
        time.sleep(0.05)
    clock.wait(2)
    assert sensor.read() == (None,) * len(sensor.channels)
    assert any("not there" in reason for reason in sensor.notes().values())
    board(VANISHING[name], tmp_path)
    clock.wait(2)
    readings(sensor)
    sensor.close()


TOTALS = {
    "jetson-nano-jetpack4": ("rail", 3.096),  # milliwatts, and not 5096 mV × 608 mA = 3.098 W
    "jetson-xavier-nx-jetpack4": ("rail", 3.5),
    "jetson-xavier-nx-jetpack5": ("rail", 5.0 * 0.8),
    "jetson-orin-nano-jetpack5": ("rail", 5.04 * 0.9),
    "jetson-orin-nano-jetpack6": ("rail", 5.04 * 1.0),
    "jetson-orin-nx-jetpack6": ("rail", 19.0 * 0.3),
    # the memory's rail lies inside VIN_SYS_5V0 and is not counted twice
    "jetson-agx-orin-jetpack6": ("rail", 19.0 * 0.2 + 19.0 * 0.05 + 5.0 * 0.6),
    "raspberry-pi-5-bookworm": (
        "rail",
        0.06245952 * 3.3 + 0.1610285 * 1.8 + 0.00780744 * 1.1 + 0.1756674 * 1.1 + 0.3279125 * 0.8 + 2.0 * 0.9
        + (0.0003663 + 0.00042735) * 3.3 + 0.00579975 * 0.8 + 0.0136752 * 5.07,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TOTALS))
def test_the_whole_boards_power_in_watts(name: str, tmp_path: Path) -> None:
    roots = board(name, tmp_path)
    sensors, _ = opened(roots, match(load_profiles(), roots))
    meaning, expected_w = TOTALS[name]
    meters = [sensor for sensor in sensors if any(channel.total for channel in sensor.channels)]
    assert len(meters) == 1
    totals = [channel for channel in meters[0].channels if channel.total]
    read = readings(meters[0])
    assert sum(read[channel.name] or 0.0 for channel in totals) == pytest.approx(expected_w, rel=1e-9)
    assert {channel.meaning for channel in totals} == {meaning}
    for sensor in sensors:
        sensor.close()


@pytest.mark.parametrize(
    "name", [name for name, profile in trees.PROFILES.items() if profile in ("raspberry-pi-3", "raspberry-pi-4")]
)
def test_a_pi_before_the_5_says_that_it_has_no_meter_and_what_to_attach(name: str, tmp_path: Path) -> None:
    roots = board(name, tmp_path)
    sensors, absent = opened(roots, match(load_profiles(), roots))
    assert "cannot measure its own power" in absent["meter"].reason
    assert "INA226" in absent["meter"].reason
    for sensor in sensors:
        sensor.close()


def test_an_attached_meter_takes_the_place_of_the_missing_one(tmp_path: Path) -> None:
    roots = board("raspberry-pi-4-bookworm", tmp_path)
    recording = tmp_path / "wall.csv"
    recording.write_text("time_s,socket:power:wall:total\n0,5\n9,5\n")
    profile = match(load_profiles(), roots)
    sensors, absent = open_sensors(profile, roots, 42, Options(agent_pid=7), [replayed(recording)])
    assert "meter" not in absent
    for sensor in sensors:
        sensor.close()


def replayed(path: Path) -> SensorUse:
    return SensorUse("replay", {"path": str(path)})


def test_two_meters_of_the_same_place_are_refused_and_not_added_up(tmp_path: Path) -> None:
    roots = board("jetson-nano-jetpack4", tmp_path)
    recording = tmp_path / "second.csv"
    recording.write_text("time_s,second:power:rail:total\n0,5\n9,5\n")
    with pytest.raises(BadInput, match="both claim to be the whole board"):
        open_sensors(match(load_profiles(), roots), roots, 42, Options(agent_pid=7), [replayed(recording)])


# --- INA3221 ----------------------------------------------------------------------------------------------------------
def test_ina3221_rails_that_are_not_connected_and_the_sum_of_shunts_are_no_rails(tmp_path: Path) -> None:
    sensor = ina3221.probe(board("jetson-agx-orin-jetpack6", tmp_path), Options())
    assert {channel.name: channel.total for channel in sensor.channels} == {
        "ina3221.VDD_GPU_SOC": False,
        "ina3221.VDD_CPU_CV": False,
        "ina3221.VIN_SYS_5V0": False,
        "ina3221.VDDQ_VDD2_1V8AO": False,
    }, "and no rail is the total unless the profile says so"
    assert readings(sensor)["ina3221.VDDQ_VDD2_1V8AO"] == pytest.approx(4.968 * 0.08)


def test_ina3221_without_the_profiles_total_rail_is_no_meter(tmp_path: Path) -> None:
    with pytest.raises(NotPresent, match="no rail VDD_IN; it has POM_5V_IN, POM_5V_GPU, POM_5V_CPU"):
        ina3221.probe(board("jetson-nano-jetpack4", tmp_path), Options(settings={"total": ["VDD_IN"]}))


@pytest.mark.parametrize("settings", [{"total": "VDD_IN"}, {"total": [1]}, {"rails": []}])
def test_ina3221_refuses_other_settings(settings: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="ina3221"):
        ina3221.probe(board("jetson-nano-jetpack4", tmp_path), Options(settings=settings))


HWMON = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"


@pytest.mark.parametrize(
    ("file", "content", "word"),
    [
        ("in1_input", "", "empty"),
        ("curr1_input", "none\n", "not a number"),
        ("curr1_input", "nan\n", "not a number"),
        ("in1_input", "9e99\n", "outside"),
        ("curr1_input", "-256000\n", "outside"),
    ],
)
def test_ina3221_garbage_is_a_gap_with_its_reason(file: str, content: str, word: str, tmp_path: Path) -> None:
    sensor = ina3221.probe(board("jetson-orin-nano-jetpack6", tmp_path), Options(settings={"total": ["VDD_IN"]}))
    put(tmp_path, f"{HWMON}/{file}", content)
    read = readings(sensor)
    assert read["ina3221.VDD_IN"] is None
    assert read["ina3221.VDD_SOC"] is not None
    assert word in sensor.notes()["ina3221.VDD_IN"]
    assert "ina3221.VDD_SOC" not in sensor.notes()


def test_ina3221_vanishes_and_comes_back(tmp_path: Path) -> None:
    sensor = ina3221.probe(board("jetson-orin-nano-jetpack6", tmp_path), Options(settings={"total": ["VDD_IN"]}))
    for name in ("in1_input", "curr1_input"):
        (tmp_path / HWMON / name).unlink()
    assert readings(sensor)["ina3221.VDD_IN"] is None
    assert "not there" in sensor.notes()["ina3221.VDD_IN"]
    (tmp_path / HWMON / "in1_input").write_text("5000\n")
    (tmp_path / HWMON / "curr1_input").write_text("2000\n")
    assert readings(sensor)["ina3221.VDD_IN"] == pytest.approx(10.0)


# --- Raspberry Pi: PMIC, flags ----------------------------------------------------------------------------------------
def test_pmic_pairs_by_name_and_shows_every_rail(tmp_path: Path) -> None:
    sensor = pmic.probe(board("raspberry-pi-5-bookworm", tmp_path), Options(settings={"interval_s": 0.1}))
    read = readings(sensor)
    assert len(read) == 13
    assert read["pmic.VDD_CORE"] == pytest.approx(1.8)
    assert read["pmic.HDMI"] == pytest.approx(0.0136752 * 5.07)
    assert not {"pmic.EXT5V", "pmic.BATT"} & set(read), "voltages without a current are no rails"
    assert [channel.name for channel in sensor.channels if channel.total] == ["pmic.sum"]
    assert "not USB" in next(channel.source for channel in sensor.channels if channel.total)
    sensor.close()


def test_pmic_with_a_fit_says_that_it_is_one(tmp_path: Path) -> None:
    options = Options(settings={"interval_s": 0.1, "fit": [1.1451, 0.5879]})
    sensor = pmic.probe(board("raspberry-pi-5-bookworm", tmp_path), options)
    read = readings(sensor)
    total = next(channel for channel in sensor.channels if channel.total)
    assert (total.name, total.meaning) == ("pmic.fitted", "rail+fit")
    assert read["pmic.fitted"] == pytest.approx(1.1451 * (read["pmic.sum"] or 0) + 0.5879)
    assert "1.1451 × pmic.sum + 0.5879 W" in total.source
    sensor.close()


@pytest.mark.parametrize(
    ("script", "word"),
    [
        ("exit 1", "exit status 1"),
        ("echo 'error=1 error_msg=\"Command not registered\"'", "Command not registered"),
        ("echo VCHI initialization failed; exit 255", "VCHI"),
        ("sleep 30", "no answer in time"),
        ("", "empty"),
    ],
)
def test_pmic_that_does_not_answer_is_absent_with_what_was_said(script: str, word: str, tmp_path: Path) -> None:
    roots = board("raspberry-pi-5-bookworm", tmp_path)
    trees.answer(roots, "vcgencmd", script)
    started = time.monotonic()
    with pytest.raises(NotPresent, match=word) as caught:
        pmic.probe(roots, Options())
    assert time.monotonic() - started < 5
    assert ("usermod" in caught.value.hint) == (word == "VCHI")


@pytest.mark.parametrize("settings", [{"fit": [1]}, {"fit": 3}, {"interval_s": 0}, {"rails": 3}, {"interval_s": "x"}])
def test_pmic_refuses_other_settings(settings: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="pmic"):
        pmic.probe(board("raspberry-pi-5-bookworm", tmp_path), Options(settings=settings))


def test_a_program_that_hangs_holds_no_tick_up_and_comes_back(tmp_path: Path) -> None:
    roots = board("raspberry-pi-5-bookworm", tmp_path)
    sensor = pmic.probe(roots, Options(settings={"interval_s": 0.1}))
    readings(sensor)
    good = (roots.bin / "vcgencmd").read_text() if roots.bin else ""
    trees.answer(roots, "vcgencmd", "sleep 30 & sleep 30")
    deadline = time.monotonic() + 3
    slowest_s = 0.0
    while time.monotonic() < deadline:
        started = time.monotonic()
        sensor.read()
        slowest_s = max(slowest_s, time.monotonic() - started)
        time.sleep(0.05)
    assert slowest_s < 0.1, "a tick waited for the program"
    assert sensor.read() == (None,) * 13, "an old value stood in for one that was not read"
    assert "no answer in time" in sensor.notes()["pmic.sum"]
    trees.answer(roots, "vcgencmd", good.removeprefix("#!/bin/sh\n"))
    assert readings(sensor)["pmic.VDD_CORE"] == pytest.approx(1.8)
    sensor.close()


@pytest.mark.parametrize(
    ("before", "bits", "expected"),
    [
        (0x50000, 0x50000, set()),  # history
        (0x00000, 0x50005, {"undervoltage", "throttled"}),
        (0x50000, 0x50001, {"undervoltage"}),
        (0x50000, 0xD0000, {"soft_temperature"}),  # came and went between two readings
        (0xD0000, 0xD0000, set()),
        (0xD0000, 0xF0006, {"arm_capped", "throttled"}),
        (0x0, 0xE0008, {"arm_capped", "throttled", "soft_temperature"}),
    ],
)
def test_pi_flags_show_what_is_now_and_what_is_new_but_not_history(before: int, bits: int, expected: set[str]) -> None:
    names = ("undervoltage", "arm_capped", "throttled", "soft_temperature")
    assert {name for name, up in zip(names, pi_throttling.raised(bits, before), strict=True) if up} == expected


def test_pi_flags_of_a_board_whose_supply_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pi_throttling, "_INTERVAL_S", 0.02)
    roots = board("raspberry-pi-4-bookworm", tmp_path)  # throttled=0x50000: it happened before this run
    sensor = pi_throttling.probe(roots, Options())
    assert set(readings(sensor).values()) == {0.0}
    trees.answer(roots, "vcgencmd", "echo throttled=0x50001")
    deadline = time.monotonic() + 5
    while not (read := readings(sensor))["throttle.undervoltage"]:
        assert time.monotonic() < deadline
    assert [name for name, value in read.items() if value] == ["throttle.undervoltage"]
    sensor.close()


def test_pi_flags_that_cannot_be_asked(tmp_path: Path) -> None:
    roots = board("raspberry-pi-4-bookworm", tmp_path)
    trees.answer(roots, "vcgencmd", "echo throttled=0x")
    with pytest.raises(NotPresent, match="throttled=0x"):
        pi_throttling.probe(roots, Options())


def test_a_board_that_does_not_look_at_its_supply_says_so(tmp_path: Path) -> None:
    """The Zero range: "never too low" would be no news of its supply."""
    roots = board("raspberry-pi-zero-2-w-bookworm", tmp_path)
    trees.answer(roots, "vcgencmd", "echo throttled=0x50005")
    sensor = pi_throttling.probe(roots, Options())
    assert [channel.name for channel in sensor.channels] == [
        "throttle.arm_capped", "throttle.throttled", "throttle.soft_temperature",
    ]  # fmt: skip
    deadline = time.monotonic() + 10
    while (read := readings(sensor))["throttle.throttled"] is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert read == {"throttle.arm_capped": 0.0, "throttle.throttled": 1.0, "throttle.soft_temperature": 0.0}
    sensor.close()
    with pytest.raises(NotPresent, match="no detector"):
        undervoltage.probe(roots, Options())
    found = [finding for finding in board_findings.supply(roots) if finding.area == "supply"]
    assert [finding.status for finding in found] == ["unknown"]
    assert "as the kernel asked for it" in cpu.probe(roots, Options()).channels[0].source


def test_undervoltage_of_the_kernel(tmp_path: Path) -> None:
    clock = HandClock()
    sensor = undervoltage.probe(board("raspberry-pi-4-bookworm", tmp_path), Options(clock=clock))
    assert sensor.read() == (0.0,)
    put(tmp_path, "sys/class/hwmon/hwmon1/in0_lcrit_alarm", "1\n")
    assert sensor.read() == (None,), "twice a second is enough"
    clock.wait(0.6)
    assert sensor.read() == (1.0,)


# --- Jetson: over-current, zones, modes -------------------------------------------------------------------------------
def test_overcurrent_counts_new_events_of_all_counters(tmp_path: Path) -> None:
    clock = HandClock()
    sensor = overcurrent.probe(board("jetson-orin-nano-jetpack6", tmp_path), Options(clock=clock))  # 0, 15, 37 before
    assert sensor.read() == (0.0,)
    put(tmp_path, "sys/class/hwmon/hwmon3/oc1_event_cnt", "2\n")
    put(tmp_path, "sys/class/hwmon/hwmon3/oc3_event_cnt", "40\n")
    clock.wait(1.1)
    assert sensor.read() == (5.0,)
    put(tmp_path, "sys/class/hwmon/hwmon3/oc3_event_cnt", "0\n")  # reset: what came in between is not known
    clock.wait(1.1)
    assert sensor.read() == (5.0,)
    put(tmp_path, "sys/class/hwmon/hwmon3/oc3_event_cnt", "1\n")
    clock.wait(1.1)
    assert sensor.read() == (6.0,)


def test_a_zone_that_always_says_100_degrees_is_no_temperature(tmp_path: Path) -> None:
    roots = board("jetson-nano-jetpack4", tmp_path)
    sensors, _ = opened(roots, match(load_profiles(), roots))
    zones = next(sensor for sensor in sensors if sensor.channels[0].name.startswith("thermal."))
    read = readings(zones)
    assert max(value for value in read.values() if value is not None) == 41.5
    assert "thermal.PMIC-Die" not in read
    for sensor in sensors:
        sensor.close()
    with pytest.raises(BadInput, match="skip"):
        thermal.probe(roots, Options(settings={"skip": "PMIC-Die"}))
    with pytest.raises(NotPresent, match="skips"):
        kinds = ["AO-therm", "CPU-therm", "GPU-therm", "PLL-therm", "PMIC-Die", "thermal-fan-est"]
        thermal.probe(roots, Options(settings={"skip": kinds}))


@pytest.mark.parametrize(
    ("name", "mode", "clocks"),
    [
        ("jetson-nano-jetpack4", "MAXN (0)", "cpu 0.10 to 1.48 GHz, 57000000.gpu 0.08 to 0.92 GHz"),
        ("jetson-xavier-nx-jetpack4", "MODE_15W_6CORE (2)", "cpu 0.12 to 1.42 GHz, 17000000.gv11b 0.11 to 1.11 GHz"),
        ("jetson-orin-nano-jetpack6", "MAXN_SUPER (2)", "cpu 0.73 to 1.73 GHz, 17000000.gpu 0.31 to 1.02 GHz"),
        ("jetson-orin-nano-jetpack5", "15W (0)", "cpu 0.12 to 1.51 GHz, 17000000.ga10b 0.31 to 0.62 GHz"),
        ("raspberry-pi-5-bookworm", None, "cpu 1.50 to 2.40 GHz"),
        ("arm64-virtual-machine", None, None),
    ],
)
def test_power_mode_and_clock_limits(name: str, mode: str | None, clocks: str | None, tmp_path: Path) -> None:
    roots = board(name, tmp_path)
    assert tuning.power_mode(roots) == mode
    assert tuning.clock_limits(roots) == clocks


def test_a_mode_that_is_not_set_not_known_or_locked(tmp_path: Path) -> None:
    roots = board("jetson-orin-nano-jetpack6", tmp_path)
    put(tmp_path, "var/lib/nvpmodel/status", "pmode:0009\n")
    assert tuning.power_mode(roots) == "unknown mode (9)"
    put(tmp_path, "var/lib/nvpmodel/status", "")
    assert tuning.power_mode(roots) == "not set"
    for policy in ("policy0", "policy4"):
        put(tmp_path, f"sys/devices/system/cpu/cpufreq/{policy}/scaling_min_freq", "1728000\n")
    assert tuning.clock_limits(roots) == "cpu fixed at 1.73 GHz, 17000000.gpu 0.31 to 1.02 GHz"


def test_devfreq_is_in_hertz(tmp_path: Path) -> None:
    sensor = devfreq.probe(board("jetson-orin-nano-jetpack6", tmp_path), Options())
    assert readings(sensor) == {"devfreq.17000000.gpu": 306e6}


def test_a_changed_governor_is_seen(tmp_path: Path) -> None:
    clock = HandClock()
    sensor = throttle.probe(board("raspberry-pi-5-bookworm", tmp_path), Options(clock=clock))
    assert readings(sensor)["throttle.governor_changed"] == 0.0
    put(tmp_path, "sys/devices/system/cpu/cpufreq/policy0/scaling_governor", "powersave\n")
    clock.wait(1.1)
    assert readings(sensor)["throttle.governor_changed"] == 1.0
    sensor.close()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("jetson-orin-nano-jetpack6", "gpu-throttle-alert"), ("jetson-orin-nano-jetpack6", "cpufreq-cpu0"),
        ("jetson-nano-jetpack4", "cpu-balanced"), ("jetson-nano-jetpack4", "gpu-balanced"),
    ],
)  # fmt: skip
def test_a_jetson_that_slows_itself_down_shows_it(name: str, kind: str, tmp_path: Path) -> None:
    roots = board(name, tmp_path)
    clock = HandClock()
    sensor = throttle.probe(roots, Options(clock=clock))
    assert readings(sensor)["throttle.cooling"] == 0.0, "a fan is no throttling"
    for device in (roots.sys / "class/thermal").glob("cooling_device*"):
        if (device / "type").read_text().strip() == kind:
            (device / "cur_state").write_text("1\n")
    clock.wait(1)
    assert readings(sensor)["throttle.cooling"] == 1.0
    sensor.close()


# --- hwmon ------------------------------------------------------------------------------------------------------------
CHIP = {
    "name": "ina226\n",
    "power1_input": "4250000\n",
    "power1_label": "VIN\n",
    "in1_input": "5000\n",
    "curr1_input": "840\n",
    "energy1_input": "7000000\n",
    "in2_input": "3300\n",
    "in2_label": "AUX\n",
    "curr2_input": "100\n",
    "curr2_label": "AUX\n",
    "in3_input": "12000\n",
    "in3_label": "VBUS\n",
    "curr3_input": "50\n",
    "curr3_label": "IOUT\n",
    "in4_input": "1000\n",
    "curr4_input": "1000\n",
    "fan1_input": "1800\n",
    "pwm1": "51\n",
}


def chip(tmp_path: Path, files: dict[str, str]) -> Roots:
    folder = tmp_path / "sys/class/hwmon/hwmon7"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content)
    return Roots(sys=tmp_path / "sys")


def described(channel: Channel) -> tuple[str, str, str | None, bool]:
    return channel.quantity, channel.unit, channel.meaning, channel.total


def test_hwmon_units_and_that_nobody_guesses_what_a_meter_means(tmp_path: Path) -> None:
    sensor = hwmon.probe(chip(tmp_path, CHIP), Options())
    assert {channel.name: described(channel) for channel in sensor.channels} == {
        "hwmon.ina226.VIN": ("power", "W", "unknown", False),
        "hwmon.ina226.AUX": ("power", "W", "unknown", False),
        "hwmon.ina226.energy1": ("energy", "J", "unknown", False),
        "hwmon.ina226.fan1": ("frequency", "Hz", None, False),
        "hwmon.ina226.pwm1": ("share", "1", None, False),
    }
    assert readings(sensor) == {
        "hwmon.ina226.VIN": pytest.approx(4.25),  # the chip's own power, not voltage × current
        "hwmon.ina226.AUX": pytest.approx(0.33),
        "hwmon.ina226.energy1": 0.0,
        "hwmon.ina226.fan1": pytest.approx(30.0),
        "hwmon.ina226.pwm1": pytest.approx(0.2),
    }


def test_hwmon_total_and_meaning_are_the_profiles_word(tmp_path: Path) -> None:
    settings = {"total": ["ina226.VIN"], "meaning": "wall"}
    sensor = hwmon.probe(chip(tmp_path, CHIP), Options(settings=settings))
    assert [channel.name for channel in sensor.channels if channel.total] == ["hwmon.ina226.VIN"]
    assert next(channel.meaning for channel in sensor.channels if channel.total) == "wall"
    with pytest.raises(NotPresent, match=r"no hardware monitor is called ina226\.GPU"):
        hwmon.probe(Roots(sys=tmp_path / "sys"), Options(settings={"total": ["ina226.GPU"]}))
    with pytest.raises(BadInput, match="hwmon"):
        hwmon.probe(Roots(sys=tmp_path / "sys"), Options(settings={"total": ["ina226"], "meaning": "guess"}))


def test_hwmon_power_and_energy_of_one_chip_are_not_added_up(tmp_path: Path) -> None:
    files = {"name": "ltc2947\n", "power1_input": "5000000\n", "energy1_input": "7000000\n"}
    roots = chip(tmp_path, files)
    for both in (["ltc2947"], ["ltc2947.power1", "ltc2947.energy1"]):
        with pytest.raises(BadInput, match="counted twice") as caught:
            hwmon.probe(roots, Options(settings={"total": both}))
        assert "CHIP.LABEL" in caught.value.hint
    sensor = hwmon.probe(roots, Options(settings={"total": ["ltc2947.energy1"]}))
    assert [channel.name for channel in sensor.channels if channel.total] == ["hwmon.ltc2947.energy1"]


def test_hwmon_energy_is_a_running_sum_and_a_reset_is_a_gap(tmp_path: Path) -> None:
    sensor = hwmon.probe(chip(tmp_path, {"name": "x\n", "energy1_input": "5000000\n"}), Options())
    file = "sys/class/hwmon/hwmon7/energy1_input"
    seen: list[float | None] = []
    for value in ("5000000", "6500000", "100000", "600000"):
        put(tmp_path, file, value)
        seen.append(sensor.read()[0])
    assert seen == [0.0, pytest.approx(1.5), pytest.approx(1.5 - FALL_J), pytest.approx(2.0)]
    assert seen[2] < seen[1]  # type: ignore[operator]


def test_facts_of_a_board(tmp_path: Path) -> None:
    roots = board("jetson-agx-orin-jetpack6", tmp_path)
    assert machine.model_name(roots) == "NVIDIA Jetson AGX Orin Developer Kit"
    assert machine.cpu_model(roots) == "12 × Cortex-A78AE"
    assert not isinstance(machine.boot_id(roots), Absent)
