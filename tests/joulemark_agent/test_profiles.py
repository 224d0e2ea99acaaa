"""Device profiles: which one fits which machine, hostile files, and the facts of the device."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from joulemark import __version__
from joulemark.errors import BadInput, NotFound
from joulemark.wire import Absent, Channel
from joulemark_agent import machine, profiles
from joulemark_agent.profiles import DeviceProfile, MatchRules, load_profiles, match, read_profile
from tests.fixtures.boards import BARE, CPUINFO_BIG_LITTLE, CPUINFO_PI5, LAPTOP, plant

PI5 = {
    "proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0",
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "proc/cpuinfo": CPUINFO_PI5,
}


def profile(name: str, **rules: tuple[str, ...]) -> DeviceProfile:
    return DeviceProfile(
        id=name, title=name, match=MatchRules.model_validate(rules), sensors=(), backends=("llamacpp",)
    )


# --- the shipped profiles ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("files", "arch", "expected"),
    [
        (LAPTOP, "x86_64", "x86-rapl"),
        (BARE, "x86_64", "x86"),
        (BARE, "aarch64", "arm64"),
        ({**BARE, **PI5}, "aarch64", "raspberry-pi-5"),
        (BARE, "riscv64", "generic"),
    ],
)
def test_shipped_profiles(tmp_path: Path, files: dict[str, str], arch: str, expected: str) -> None:
    assert match(load_profiles(), plant(tmp_path, files, arch)).id == expected


def test_the_folder_is_found_inside_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(profiles.profile_folder(), tmp_path / "joulemark_agent" / "device_profiles")
    monkeypatch.setattr(profiles, "_HERE", tmp_path / "joulemark_agent")
    assert [p.id for p in load_profiles()] == sorted(path.stem for path in profiles.profile_folder().glob("*.toml"))
    monkeypatch.setattr(profiles, "_HERE", tmp_path / "nowhere" / "deep")
    with pytest.raises(NotFound, match="device_profiles is missing"):
        load_profiles()


# --- matching ---------------------------------------------------------------------------------------------------------
def test_the_most_specific_profile_wins(tmp_path: Path) -> None:
    roots = plant(
        tmp_path, {**BARE, **PI5, "sys/class/power/a": "", "sys/class/dmi/id/product_name": "Board X\n"}, "aarch64"
    )
    ladder = [
        profile("everything"),
        profile("by-arch", arch=("aarch64",)),
        profile("by-path", sys_path=("class/power/a",)),
        profile("by-path-and-arch", sys_path=("class/power/a",), arch=("aarch64", "armv7l")),
        profile("by-product", dmi_product=("BOARD x",)),
        profile("by-family", dt_compatible=("brcm,bcm2712",)),
        profile("by-model", dt_compatible=("raspberrypi,5-model-b",)),
    ]
    for best in range(1, len(ladder) + 1):
        assert match(ladder[:best], roots).id == ladder[best - 1].id
        assert match(ladder[best - 1 :: -1], roots).id == ladder[best - 1].id, "the order of the files does not matter"


@pytest.mark.parametrize(
    "rules",
    [
        {"arch": ("x86_64",)},
        {"dt_compatible": ("raspberrypi,4-model-b",)},
        {"dmi_product": ("Board Y",)},
        {"sys_path": ("class/power/a", "class/power/b")},
        {"dt_compatible": ("raspberrypi,5-model-b",), "arch": ("x86_64",)},
    ],
)
def test_one_rule_that_does_not_hold_is_enough(tmp_path: Path, rules: dict[str, tuple[str, ...]]) -> None:
    roots = plant(tmp_path, {**BARE, **PI5, "sys/class/power/a": ""}, "aarch64")
    with pytest.raises(NotFound, match="no device profile fits"):
        match([profile("one", **rules)], roots)


def test_equally_specific_profiles_are_refused_and_a_name_overrides(tmp_path: Path) -> None:
    roots = plant(tmp_path, BARE, "aarch64")
    pair = [profile("one", arch=("aarch64",)), profile("two", arch=("aarch64",))]
    with pytest.raises(BadInput, match="one and two fit this machine equally well"):
        match(pair, roots)
    assert match([*pair, profile("other", arch=("x86_64",))], roots, name="other").id == "other"
    with pytest.raises(NotFound, match="no device profile 'third'"):
        match(pair, roots, name="third")


# --- hostile files ----------------------------------------------------------------------------------------------------
GOOD = 'id = "board"\ntitle = "A board"\nbackends = ["llamacpp"]\n[[sensors]]\nuse = "thermal"\n'


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("id = ", "not valid TOML"),
        (b"\xff\xfe", "not valid TOML"),
        ("a = " + "[" * 50_000, "not valid TOML"),
        ("x" * 300_000, "larger than"),
        ("", "id: Field required"),
        (GOOD.replace("board", "../../etc", 1), "id: String should match pattern"),
        (GOOD.replace('"board"', '"other"', 1), "not the file's name"),
        (GOOD.replace("thermal", "nvml"), "sensors.0: there is no 'nvml'"),
        (GOOD.replace("thermal", "os.system"), "sensors.0"),
        (GOOD.replace("llamacpp", "torch"), "backends.0: there is no 'torch'"),
        (GOOD.replace('["llamacpp"]', "[]"), "backends"),
        (GOOD + '[[sensors]]\nuse = "thermal"\n', "sensors.1: 'thermal' is twice there"),
        (GOOD + "extra = 1\n", "sensors.0.extra"),
        ("colour = 1\n" + GOOD, "colour"),
        ("idle_s = nan\n" + GOOD, "idle_s"),
        ("idle_s = -1\n" + GOOD, "idle_s"),
        (GOOD + "[limits]\ntemperature_c = 9000\n", "limits.temperature_c"),
        (GOOD + '[match]\nsys_path = ["../../etc/shadow"]\n', "match.sys_path.0"),
        (GOOD + '[match]\nsys_path = ["/etc/shadow"]\n', "match.sys_path.0"),
        (GOOD + '[match]\narch = "aarch64"\n', "match.arch"),
    ],
)
def test_malformed_profiles_name_file_and_field(tmp_path: Path, content: str | bytes, fault: str) -> None:
    path = tmp_path / "board.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput) as caught:
        read_profile(path)
    assert "board.toml" in caught.value.message
    assert fault in caught.value.message
    assert caught.value.hint


def test_a_good_profile(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(GOOD + 'options = { a = 1 }\n[match]\ndt_compatible = ["maker,board"]\n[limits]\npower_w = 15\n')
    read = read_profile(path)
    assert read.sensors[0].options == {"a": 1}
    assert read.match.dt_compatible == ("maker,board",)
    assert read.limits.power_w == 15.0
    assert read.limits.temperature_c is None


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        load_profiles(tmp_path)


# --- facts ------------------------------------------------------------------------------------------------------------
def test_device_facts_of_a_fake_board(tmp_path: Path) -> None:
    roots = plant(tmp_path, {**BARE, **PI5}, "aarch64")
    meters = (
        Channel(name="psu", quantity="power", unit="W", source="x", meaning="wall", total=True),
        Channel(name="hot", quantity="temperature", unit="Cel", source="x"),
    )
    absent = {"rapl": Absent(reason="not here")}
    found = match(load_profiles(), roots)
    facts = profiles.device_facts(found, roots, "dev-1", "bench", meters, absent, Absent(reason="not measured"))
    assert facts.model_dump(exclude={"meters", "absent", "memory_bandwidth"}) == {
        "device_id": "dev-1",
        "name": "bench",
        "profile": "raspberry-pi-5",
        "title": "Raspberry Pi 5 Model B Rev 1.0",
        "arch": "aarch64",
        "cpu": "4 × Cortex-A76",
        "cores": 2,
        "cores_online": None,
        "memory_bytes": 4_000_000 * 1024,
        "kernel": "6.1.0-28-cloud-arm64",
        "operating_system": "Debian GNU/Linux 12 (bookworm)",
        "governor": None,
        "power_mode": None,
        "clocks": None,
        "agent_version": __version__,
    }
    assert [channel.name for channel in facts.meters] == ["psu"]
    assert facts.absent == absent


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (CPUINFO_BIG_LITTLE, "4 × Cortex-A55 + 2 × Cortex-A76"),
        ("model name\t: Intel(R) Xeon(R)\nmodel name\t: Intel(R) Xeon(R)\n", "Intel(R) Xeon(R)"),
        ("model name\t: ARMv7 Processor rev 4 (v7l)\nCPU implementer: 0x41\nCPU part\t: 0xD03\n", "1 × Cortex-A53"),
        ("CPU implementer\t: 0x99\nCPU part\t: 0x123\n", "1 × implementer 0x99 part 0x123"),
        ("uarch\t: sifive,u74-mc\n", "sifive,u74-mc"),
        ("", "some-arch"),
    ],
)
def test_cpu_models(tmp_path: Path, cpuinfo: str, expected: str) -> None:
    assert machine.cpu_model(plant(tmp_path, {"proc/cpuinfo": cpuinfo}, "some-arch")) == expected


def test_model_names(tmp_path: Path) -> None:
    assert machine.model_name(plant(tmp_path / "a", LAPTOP)) == "LENOVO 20L5CTO1WW"
    filler = {"sys/class/dmi/id/product_name": "To Be Filled By O.E.M.\n", "sys/class/dmi/id/sys_vendor": "X\n"}
    assert machine.model_name(plant(tmp_path / "b", filler)) is None
    assert machine.governor(plant(tmp_path / "c", LAPTOP)) == "schedutil"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0-3,8", (0, 1, 2, 3, 8)), ("0", (0,)), ("", ()), ("5-5, 7", (5, 7)), ("x,1", (1,)), ("3-", (3,))],
)
def test_cpu_lists(text: str, expected: tuple[int, ...]) -> None:
    assert machine.parse_cpu_list(text) == expected


@pytest.mark.parametrize(
    ("files", "cores", "quota"),
    [
        ({}, 8, None),
        ({"sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 8, None),
        ({"sys/fs/cgroup/a/b/cpu.max": "250000 100000\n"}, 2, 2.5),
        ({"sys/fs/cgroup/a/cpu.max": "50000 100000\n", "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n"}, 1, 0.5),
        ({"sys/fs/cgroup/a/b/cpu.max": "1600000 100000\n"}, 8, 16.0),
        ({"sys/devices/system/cpu/online": "0-15\n"}, 8, None),
        ({"sys/devices/system/cpu/online": "0-1,8\n"}, 3, None),  # nvpmodel switched the others off
    ],
)
def test_cores_follow_affinity_and_quota(
    tmp_path: Path, files: dict[str, str], cores: int, quota: float | None
) -> None:
    own = {"proc/self/status": "Cpus_allowed_list:\t0-3,8-11\n", "proc/self/cgroup": "0::/a/b\n"}
    roots = plant(tmp_path, {**own, **files})
    assert machine.usable_cores(roots) == cores
    assert machine.cpu_quota(roots) == quota


def test_cgroup_version_1_quota_and_memory_limit(tmp_path: Path) -> None:
    files = {
        **BARE,
        "proc/self/cgroup": "4:memory:/box\n1:cpu,cpuacct:/box\n0::/\n",
        "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "150000\n",
        "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "536870912\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    }
    roots = plant(tmp_path, files)
    assert machine.cpu_quota(roots) == 1.5
    assert machine.memory_limit_bytes(roots) == 536870912
    assert machine.memory_limit_bytes(plant(tmp_path / "free", BARE)) is None
    # What a container may take is not what its machine has: a model that fits the one is killed by the other.
    available = machine.memory_field_bytes(roots, "MemAvailable")
    assert available is not None and available > 536870912 == machine.available_bytes(roots)
    assert machine.available_bytes(plant(tmp_path / "bare", BARE)) == available
    assert machine.available_bytes(plant(tmp_path / "silent", {})) is None


def test_what_the_kernel_does_not_say(tmp_path: Path) -> None:
    roots = plant(tmp_path, {})
    assert isinstance(machine.boot_id(roots), Absent)
    assert machine.kernel(roots) == machine.operating_system(roots) == "unknown"
    with pytest.raises(NotFound):
        machine.memory_bytes(roots)
    with pytest.raises(NotFound):
        machine.usable_cores(roots)


def test_clock_synchronised(tmp_path: Path) -> None:
    roots = plant(tmp_path, {})
    assert machine.clock_synchronised(roots, lambda: 0) is True
    assert machine.clock_synchronised(roots, lambda: 1) is True, "a leap second is coming: synchronised"
    assert machine.clock_synchronised(roots, lambda: 5) is False

    def refused() -> int:
        raise PermissionError(1, "Operation not permitted")

    unknown = machine.clock_synchronised(roots, refused)
    assert isinstance(unknown, Absent)
    assert "not permitted" in unknown.reason
    plant(tmp_path, {"run/systemd/timesync/synchronized": ""})
    assert machine.clock_synchronised(roots, lambda: 5) is True
    assert machine.kernel_clock_state() in range(6)
