"""The doctor on fake boards: every area is answered, problems have advice, nothing is invented."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from joulemark.wire import Absent, Measure
from joulemark_agent import bandwidth, doctor
from joulemark_agent.doctor import examine
from joulemark_agent.engine_findings import python_child
from joulemark_agent.findings import Finding, to_json
from joulemark_agent.sysfs import Roots
from tests.fixtures import trees
from tests.fixtures.boards import BARE, LAPTOP, HandClock, plant, pressure, process


@pytest.fixture(autouse=True)
def quick_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measure(value=12.5e9, unit="By/s", n=5, low=1e9, high=12.5e9, source="made up")
    monkeypatch.setattr(bandwidth, "measure", lambda _: measured)


def good_engine(_: str) -> str:
    return 'noise\n{"version": "0.3.36", "build": "CPU : AVX2 = 1 |   REPACK = 1 | "}\n'


def ask(
    roots: Roots,
    data: Path,
    *,
    sleep: Callable[[float], None] | None = None,
    clock_state: Callable[[], int] = lambda: 0,
    run_child: Callable[[str], str] = good_engine,
) -> dict[str, Finding]:
    clock = HandClock()

    def pause(seconds: float) -> None:
        clock.wait(seconds)
        if sleep:
            sleep(seconds)

    findings = examine(roots, data, clock=clock, sleep=pause, clock_state=clock_state, run_child=run_child)
    assert len({finding.area for finding in findings}) == len(findings)
    return {finding.area: finding for finding in findings}


def test_an_engine_whose_kernels_crash_is_a_problem_and_says_how_to_build_it(tmp_path: Path) -> None:
    built = '{"version": "0.3.36", "build": "CPU : AVX512 = 1 | AMX_INT8 = 1 | "}'
    found = ask(plant(tmp_path, BARE, "x86_64"), tmp_path, run_child=lambda _: built)["engine llama.cpp"]
    assert found.status == "problem" and "AMX" in found.text and "-U__AMX_INT8__" in found.fix
    other = ask(
        plant(tmp_path / "other", BARE, "x86_64"), tmp_path, run_child=lambda _: built.replace("INT8 = 1", "INT8 = 0")
    )
    assert other["engine llama.cpp"].status == "ok"


AREAS = {
    "machine", "cores", "memory", "swap", "memory bandwidth", "governor", "engine llama.cpp", "engine xllamacpp",
    "engine onnxruntime", "sensor contention",
    "sensor cpu", "sensor memory", "sensor thermal", "sensor throttle", "energy",
    "contention", "pressure stall information", "clock", "disk",
}  # fmt: skip


def test_a_bare_board_is_answered_in_every_area(tmp_path: Path) -> None:
    found = ask(plant(tmp_path, BARE, "aarch64"), tmp_path)
    assert set(found) >= AREAS
    assert found["profile"].status == "warning" and "joulemark profile new" in found["profile"].fix
    assert {area: found[area].status for area in AREAS} == {
        "machine": "ok",
        "cores": "ok",
        "memory": "ok",
        "swap": "ok",
        "memory bandwidth": "ok",
        "governor": "unknown",
        "engine llama.cpp": "ok",
        "engine xllamacpp": "ok",
        "engine onnxruntime": "ok",
        "sensor contention": "ok",
        "sensor cpu": "unknown",
        "sensor memory": "ok",
        "sensor thermal": "unknown",
        "sensor throttle": "unknown",
        "energy": "warning",
        "contention": "unknown",
        "pressure stall information": "warning",
        "clock": "ok",
        "disk": "ok",
    }
    assert found["cores"].text == "2 cores can be used"
    assert found["memory"].text == "1.9 GiB of 3.8 GiB are available"
    assert found["memory bandwidth"].text.startswith("12.50 GB/s")
    assert found["engine llama.cpp"].text == "llama-cpp-python 0.3.36; CPU : AVX2 = 1 | REPACK = 1 |"
    assert "psi=1" in found["pressure stall information"].fix


def test_an_empty_root_gives_unknown_and_never_a_figure(tmp_path: Path) -> None:
    found = ask(plant(tmp_path, {}), tmp_path)
    for area in ("cores", "memory", "governor", "contention", "sensor memory"):
        assert found[area].status == "unknown", area
    assert found["sensor contention"].fix == "mount /proc"
    assert found["boot"].status == "warning"


def test_every_warning_and_problem_has_advice(tmp_path: Path) -> None:
    for files in (BARE, LAPTOP, {}):
        found = ask(plant(tmp_path / str(len(files)), files), tmp_path, clock_state=lambda: 5)
        assert all(f.fix for f in found.values() if f.status in ("warning", "problem"))


def test_a_laptop_shows_its_meters_and_its_governor(tmp_path: Path) -> None:
    found = ask(plant(tmp_path, LAPTOP), tmp_path)
    assert found["energy"].status == "ok"
    assert found["energy"].text == "joules are counted by rapl.package-0 (package)"
    assert found["sensor thermal"].text.startswith("thermal.acpitz 27.8 °C, thermal.x86_pkg_temp 61.0 °C")
    assert "cpu.frequency_mean 2.00 GHz, cpu.frequency_max 3.20 GHz" in found["sensor cpu"].text
    assert found["governor"].status == "warning"
    assert found["machine"].text.startswith("LENOVO 20L5CTO1WW, Intel(R) Core(TM) i5-8250U")
    assert found["pressure stall information"].status == "ok"


@pytest.mark.parametrize(("user", "steal", "status"), [(4, 0, "ok"), (30, 0, "warning"), (0, 20, "warning")])
def test_contention_of_the_last_second(tmp_path: Path, user: int, steal: int, status: str) -> None:
    base = {**BARE, **pressure(0), **process(os.getpid(), 0, 0)}
    roots = plant(tmp_path, {**base, "proc/stat": "cpu  1000 0 0 1000 0 0 0 0 0 0\n"})

    def pass_time(_: float) -> None:
        line = f"cpu  {1000 + user} 0 0 {1200 - user - steal} 0 0 0 {steal} 0 0\n"
        (tmp_path / "proc/stat").write_text(line)

    found = ask(roots, tmp_path, sleep=pass_time)["contention"]
    assert found.status == status
    assert f"others used {user / 200:.1%} of the machine, the hypervisor took {steal / 200:.1%}" in found.text


@pytest.mark.parametrize(
    ("files", "area", "status", "words"),
    [
        (
            {"proc/self/status": "Cpus_allowed_list:\t0\n", "sys/devices/system/cpu/online": "0-3\n"},
            "cores",
            "warning",
            "1 cores can be used of 4",
        ),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "100000 100000\n"}, "cores", "warning", "1 of 2"),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "268435456\n"}, "memory", "problem", "256 MiB"),
        ({"proc/meminfo": "MemTotal: 4000000 kB\nMemAvailable: 100000 kB\n"}, "memory", "problem", "98 MiB of 3.8 GiB"),
        ({"proc/meminfo": "MemTotal: 4000000 kB\nMemAvailable: 3000000 kB\n"}, "swap", "unknown", "does not say"),
        (
            {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 9 kB\nSwapTotal: 2097152 kB\nSwapFree: 1048576 kB\n"},
            "swap",
            "warning",
            "1.0 GiB of 2.0 GiB swap are in use",
        ),
    ],
)
def test_limits(tmp_path: Path, files: dict[str, str], area: str, status: str, words: str) -> None:
    found = ask(plant(tmp_path, {**BARE, **files}), tmp_path)[area]
    assert found.status == status
    assert words in found.text


# --- engines ----------------------------------------------------------------------------------------------------------
def raising(error: Exception) -> Callable[[str], str]:
    def run(_: str) -> str:
        raise error

    return run


@pytest.mark.parametrize(
    ("run_child", "status", "words"),
    [
        (
            raising(
                subprocess.CalledProcessError(1, "python", stderr="x\nModuleNotFoundError: No module named 'llama_cpp'")
            ),
            "warning",
            "not installed",
        ),
        (raising(subprocess.CalledProcessError(-4, "python", stderr="")), "problem", "signal 4"),
        (raising(subprocess.CalledProcessError(1, "python", stderr="OSError: GLIBC_2.38")), "problem", "GLIBC_2.38"),
        (
            raising(
                subprocess.CalledProcessError(1, "python", stderr="x\nMissingExtra: no libgomp.so.1\n  hint: apt-get")
            ),
            "problem",
            "MissingExtra: no libgomp.so.1; hint: apt-get",
        ),
        (raising(subprocess.TimeoutExpired("python", 60)), "problem", "did not load within"),
        (raising(FileNotFoundError(2, "No such file")), "unknown", "could not be examined"),
        (lambda _: "", "unknown", "could not be examined"),
        (lambda _: "[]", "unknown", "could not be examined"),
        (lambda _: '{"version": "1"}', "unknown", "could not be examined"),
    ],
)
def test_engines_that_do_not_answer_well(
    tmp_path: Path, run_child: Callable[[str], str], status: str, words: str
) -> None:
    found = ask(plant(tmp_path, BARE), tmp_path, run_child=run_child)
    for engine in ("engine llama.cpp", "engine onnxruntime"):
        assert found[engine].status == status
        assert words in found[engine].text
    assert found["engines"].status == "problem"


def without(*packages: str) -> Callable[[str], str]:
    def run(source: str) -> str:
        for package in packages:
            if f"import {package}" in source or f", {package}" in source or f"from {package} " in source:
                raise subprocess.CalledProcessError(
                    1, "python", stderr=f"ModuleNotFoundError: No module named '{package}'"
                )
        return good_engine(source)

    return run


def test_an_engine_is_missed_only_where_no_other_opens_the_same_files(tmp_path: Path) -> None:
    def engines(*missing: str) -> dict[str, Finding]:
        found = ask(plant(tmp_path, BARE), tmp_path, run_child=without(*missing))
        return {area: finding for area, finding in found.items() if area.startswith("engine")}

    both = {"engine llama.cpp": "ok", "engine xllamacpp": "ok", "engine onnxruntime": "ok"}
    assert {area: finding.status for area, finding in engines().items()} == both
    assert [*engines("llama_cpp")] == ["engine xllamacpp", "engine onnxruntime"]
    assert [*engines("xllamacpp")] == ["engine llama.cpp", "engine onnxruntime"]
    neither = engines("llama_cpp", "xllamacpp")
    assert neither["engine llama.cpp"].text == "it is not installed: GGUF files cannot be evaluated"
    assert "joulemark[xllamacpp]" in (neither["engine llama.cpp"].fix or "")
    assert "engine xllamacpp" not in neither and "engines" not in neither


def test_a_real_child_gives_its_output_or_its_end() -> None:
    assert python_child("print(6 * 7)").strip() == "42"
    with pytest.raises(subprocess.CalledProcessError) as caught:
        python_child("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    assert caught.value.returncode == -4
    with pytest.raises(subprocess.CalledProcessError) as caught:
        python_child("import a_module_that_is_not_there")
    assert "ModuleNotFoundError" in caught.value.stderr


# --- clock, disk, bandwidth, JSON -------------------------------------------------------------------------------------
def test_clock(tmp_path: Path) -> None:
    def refused() -> int:
        raise PermissionError(1, "Operation not permitted")

    roots = plant(tmp_path, BARE)
    assert ask(roots, tmp_path, clock_state=lambda: 5)["clock"].status == "warning"
    assert ask(roots, tmp_path, clock_state=refused)["clock"].status == "unknown"


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = plant(tmp_path, BARE)
    found = ask(roots, tmp_path / "not" / "yet")["disk"]
    assert found.status == "ok"
    assert found.text.endswith(f"free for {tmp_path / 'not' / 'yet'}")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("usage", (), {"free": 10 * 1024**2})())
    assert ask(roots, tmp_path)["disk"].status == "warning"
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert ask(roots, tmp_path)["disk"].status == "problem"


def test_an_absent_bandwidth_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "measure", lambda _: Absent(reason="too little memory"))
    found = ask(plant(tmp_path, BARE), tmp_path)["memory bandwidth"]
    assert (found.status, found.text) == ("unknown", "too little memory")


def test_findings_as_json() -> None:
    finding = Finding("clock", "warning", "5 °C", "do")
    assert json.loads(to_json([finding])) == [{"area": "clock", "status": "warning", "text": "5 °C", "fix": "do"}]


# --- boards -----------------------------------------------------------------------------------------------------------
def on_board(name: str, tmp_path: Path, **named: Any) -> dict[str, Finding]:
    roots = trees.board(name, tmp_path / "board")
    return ask(roots, tmp_path, **named)


def states(found: dict[str, Finding]) -> dict[str, str]:
    """The areas that are peculiar to boards."""
    areas = ("profile", "power mode", "supply", "throttling", "swap on the card", "memory control", "desktop", "energy")
    return {area: found[area].status for area in areas if area in found}


@pytest.mark.parametrize("name", trees.NAMES)
def test_every_board_is_answered_and_every_warning_has_advice(name: str, tmp_path: Path) -> None:
    found = on_board(name, tmp_path)
    assert all(f.fix for f in found.values() if f.status in ("warning", "problem"))
    assert trees.PROFILES[name] in found["profile"].text


def test_a_pi_whose_supply_was_weak_with_swap_on_its_card(tmp_path: Path) -> None:
    found = on_board("raspberry-pi-4-bookworm", tmp_path)  # throttled=0x50000
    assert states(found) == {
        "profile": "ok",
        "supply": "warning",
        "throttling": "warning",
        "swap on the card": "warning",
        "memory control": "warning",
        "energy": "warning",
    }
    assert "was too low since the boot" in found["supply"].text
    assert "/var/swap" in found["swap on the card"].text
    assert "cgroup_enable=memory" in found["memory control"].fix
    assert "cannot measure its own power" in found["energy"].text


@pytest.mark.parametrize(
    ("bits", "supply", "throttling"),
    [
        ("0x0", "ok", "ok"),
        ("0x50005", "problem", "problem"),
        ("0x80008", "ok", "problem"),
        ("0x80000", "ok", "warning"),
    ],
)
def test_supply_and_throttling_of_a_pi(bits: str, supply: str, throttling: str, tmp_path: Path) -> None:
    roots = trees.board("raspberry-pi-5-bookworm", tmp_path / "board")
    trees.answer(roots, "vcgencmd", f'[ "$1" = get_throttled ] && echo throttled={bits} || cat {tmp_path / "pmic"}')
    (tmp_path / "pmic").write_text(" VDD_CORE_A current(7)=2.0A\n VDD_CORE_V volt(15)=0.9V\n")
    found = ask(roots, tmp_path, sleep=time.sleep)
    assert (found["supply"].status, found["throttling"].status) == (supply, throttling)
    assert "pmic.sum 1.80 W" in found["sensor pmic"].text
    assert found["energy"].text == "joules are counted by pmic.sum (rail)"


def test_swap_in_compressed_memory_is_not_on_the_card(tmp_path: Path) -> None:
    assert "swap on the card" not in on_board("raspberry-pi-4-trixie", tmp_path)


def test_a_jetson_with_over_current_events_and_its_mode(tmp_path: Path) -> None:
    found = on_board("jetson-orin-nano-jetpack6", tmp_path)
    assert states(found) == {"profile": "ok", "power mode": "ok", "supply": "warning", "energy": "ok"}
    assert found["supply"].text.startswith("52 over-current or under-voltage events")
    assert found["power mode"].text == "MAXN_SUPER (2)"
    assert found["energy"].text == "joules are counted by ina3221.VDD_IN (rail)"


def test_a_mode_that_was_never_chosen_names_the_choices(tmp_path: Path) -> None:
    roots = trees.board("jetson-nano-jetpack4", tmp_path / "board")
    (roots.var / "lib/nvpmodel/status").unlink()
    found = ask(roots, tmp_path)["power mode"]
    assert found.status == "warning"
    assert "0: MAXN, 1: 5W" in found.fix


def test_a_running_desktop(tmp_path: Path) -> None:
    roots = trees.board("raspberry-pi-5-bookworm", tmp_path / "board")
    for pid, name in (("811", "labwc"), ("812", "Xwayland"), ("9", "kworker")):
        (roots.proc / pid).mkdir()
        (roots.proc / pid / "comm").write_text(name + "\n")
    found = ask(roots, tmp_path)["desktop"]
    assert found.status == "warning"
    assert "(Xwayland, labwc)" in found.text
    assert "multi-user.target" in found.fix


def test_a_clock_that_was_never_set(tmp_path: Path) -> None:
    roots = trees.board("raspberry-pi-4-bookworm", tmp_path / "board")
    clock = HandClock()
    found = {
        f.area: f
        for f in examine(roots, tmp_path, clock=clock, sleep=clock.wait, run_child=good_engine, wall=lambda: 60.0)
    }
    assert "says 1970-01-01" in found["date"].text


def test_a_bandwidth_beyond_the_makers_is_a_cache(tmp_path: Path) -> None:
    found = on_board("raspberry-pi-3-bookworm", tmp_path)["memory bandwidth"]  # 12.5 GB/s measured, 4.0 stated
    assert found.status == "warning"
    assert "more than the 4 GB/s that the maker gives" in found.text


def test_a_meter_that_the_profile_does_not_use_is_shown(tmp_path: Path) -> None:
    roots = trees.board("arm64-virtual-machine", tmp_path / "board")
    (roots.sys / "class/hwmon/hwmon0").mkdir(parents=True)
    (roots.sys / "class/hwmon/hwmon0/name").write_text("rpi_volt\n")
    (roots.sys / "class/hwmon/hwmon0/in0_lcrit_alarm").write_text("0\n")
    assert "there, and not in the profile" in ask(roots, tmp_path)["sensor undervoltage"].text


def test_a_malformed_profile_of_the_owner_is_a_problem(tmp_path: Path) -> None:
    roots = trees.board("raspberry-pi-4-bookworm", tmp_path / "board")
    own = roots.etc / "joulemark/device_profiles"
    own.mkdir(parents=True)
    (own / "raspberry-pi-4.toml").write_text("id = 3\n")
    found = ask(roots, tmp_path)
    assert found["profile"].status == "problem"
    assert "raspberry-pi-4.toml" in found["profile"].text
