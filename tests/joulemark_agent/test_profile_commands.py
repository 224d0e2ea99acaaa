"""`joulemark profile`: show, check, new, record; and the format of recorded trees, which come from strangers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulemark.__main__ import main
from joulemark.errors import BadInput
from joulemark_agent import recorded_tree
from joulemark_agent.profiles import load_profiles, match, own_folder, read_profile
from joulemark_agent.sysfs import Roots
from tests.fixtures import trees


def tree(name: str) -> list[str]:
    return ["--tree", str(trees.FOLDER / f"{name}.txt")]


def test_show_the_profile_of_a_board(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["profile", "show", *tree("jetson-agx-orin-jetpack6")]) == 0
    shown = capsys.readouterr().out
    assert 'ina3221 {"total": ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"]}' in shown
    assert "MAXN (0)" in shown
    assert "raspberry-pi-zero-2-w" in shown, "all profiles are listed"
    assert main(["profile", "show", "raspberry-pi-5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory_bandwidth"] == 17.1e9
    assert main(["profile", "show", "commodore-64"]) == 1
    assert "known: arm64" in capsys.readouterr().err


@pytest.mark.parametrize("name", trees.NAMES)
def test_every_board_passes_the_check_of_its_profile(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "check", *tree(name), "--json"]) == 0
    found = {finding["area"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert found["match"]["status"] == "ok"
    assert found["memory"]["status"] == "ok", "the memory that the kernel shows is one of the sizes that are sold"
    assert found.get("power modes", {"status": "ok"})["status"] == "ok"


def test_the_check_names_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "check", "jetson-nano", *tree("jetson-orin-nano-jetpack6"), "--json"]) == 1
    found = {finding["area"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert found["match"]["status"] == "problem"
    assert "nvidia,p3767-0005" in found["match"]["text"]
    assert found["memory"]["status"] == "warning"
    assert "no rail POM_5V_IN; it has VDD_IN" in found["sensor ina3221"]["text"]
    assert "MAXN_SUPER" in found["power modes"]["text"]
    assert found["energy"]["status"] == "warning"


@pytest.mark.parametrize("name", trees.NAMES)
def test_a_new_profile_is_valid_and_fits_its_board(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    assert main(["profile", "new", "mine", "--out", str(path), *tree(name)]) == 0
    assert main(["profile", "check", str(path), *tree(name)]) == 0
    text = path.read_text()
    has_rails = "ina3221" in name or ("jetson" in name and "2gb" not in name)
    assert ("which of them, or which sum, is the whole board?" in text) is has_rails
    if has_rails:  # what its owner fills in makes a meter
        rails = {"jetson-nano-jetpack4": "POM_5V_IN", "jetson-agx-orin-jetpack6": "VIN_SYS_5V0"}.get(name, "VDD_IN")
        path.write_text(text.replace("# options = { total = [] }", f'options = {{ total = ["{rails}"] }}'))
        capsys.readouterr()
        assert main(["profile", "check", str(path), *tree(name), "--json"]) == 0
        assert f"ina3221.{rails} (rail)" in json.loads(capsys.readouterr().out)[-1]["text"]


def test_new_overwrites_nothing_and_wants_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("precious")
    assert main(["profile", "new", "mine", "--out", str(path)]) == 1
    assert main(["profile", "new", "other", "--out", str(path)]) == 1
    assert main(["profile", "new", "../evil", "--out", str(tmp_path / "evil.toml")]) == 1
    assert path.read_text() == "precious"
    assert sorted(tmp_path.iterdir()) == [path]


def test_the_owners_profile_wins_over_the_shipped_one(tmp_path: Path) -> None:
    roots = trees.board("raspberry-pi-4-bookworm", tmp_path)
    own = own_folder(roots)
    own.mkdir(parents=True)
    shipped = next(profile for profile in load_profiles() if profile.id == "raspberry-pi-4")
    socket = '\n[[sensors]]\nuse = "wall_http"\noptions = { url = "http://10.0.0.9/meter/0", kind = "shelly1" }\n'
    text = f'id = "raspberry-pi-4"\ntitle = "Mine"\nbackends = ["llamacpp"]\n[match]\ndt_compatible = ["raspberrypi,4-model-b"]\n{socket}'
    (own / "raspberry-pi-4.toml").write_text(text)
    found = match(load_profiles(own=own), roots)
    assert (shipped.title, found.title) == ("Raspberry Pi 4", "Mine")
    assert [use.use for use in found.sensors] == ["wall_http"]
    assert {profile.id for profile in load_profiles(own=own)} == {profile.id for profile in load_profiles()}


# --- recorded trees ---------------------------------------------------------------------------------------------------
def test_this_machine_recorded_and_planted_is_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "here.txt"
    assert main(["profile", "record", str(path), "--title", "a test machine"]) == 0
    planted = recorded_tree.plant(path.read_text(), tmp_path / "planted")
    assert match(load_profiles(), planted).id == match(load_profiles(), Roots()).id
    assert (planted.proc / "meminfo").read_text().split("kB")[0] == Path("/proc/meminfo").read_text().split("kB")[0]
    assert main(["profile", "record", str(path)]) == 1, "what is there is not overwritten"


def test_what_a_stranger_should_not_see_is_left_out(tmp_path: Path) -> None:
    roots = trees.board("raspberry-pi-4-bookworm", tmp_path)
    (roots.proc / "cpuinfo").write_text("CPU part\t: 0xd08\nSerial\t\t: 10000000deadbeef\nRevision\t: c03115\n")
    (roots.proc / "cmdline").write_text("smsc95xx.macaddr=DC:A6:32:22:C1:1C root=PARTUUID=1badc0de-02\n")
    (roots.proc / "self/status").write_text("Name:\tsecret\nUid:\t4711\nCpus_allowed_list:\t0-3\n")
    text = recorded_tree.record(roots, "x", {"vcgencmd get_throttled": "throttled=0x0"})
    for secret in ("deadbeef", "DC:A6", "secret", "4711"):
        assert secret not in text
    again = recorded_tree.plant(text, tmp_path / "again")
    assert (again.proc / "cpuinfo").read_text() == "CPU part\t: 0xd08\nRevision\t: c03115\n"
    assert again.bin is not None
    said = subprocess.run([again.bin / "vcgencmd", "get_throttled"], capture_output=True, text=True, check=True)
    assert said.stdout == "throttled=0x0"


@pytest.mark.parametrize(
    "line",
    [
        '../evil = "x"',
        'sys/../../evil = "x"',
        '/etc/evil = "x"',
        'etc = "x"',
        'home/evil = "x"',
        'bin/a/b = "x"',
        'bin/.. x = "x"',
        "sys/a = x",
        "sys/a = [1]",
        'sys/a = "x',
        "sys/a",
        'sys//a = "x"',
        'sys/./a = "x"',
    ],
)
def test_a_line_that_is_none_is_refused_and_nothing_is_written(line: str, tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    with pytest.raises(BadInput, match="line 2 of the recorded tree"):
        recorded_tree.plant(f'sys/good = "x"\n{line}\n', folder)
    assert list(tmp_path.iterdir()) == []


@given(st.text(max_size=200))
def test_any_text_is_planted_or_refused(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder) / "inside"
        try:
            recorded_tree.plant(text, inside)
        except BadInput:
            assert not inside.exists()
        assert {path.name for path in Path(folder).iterdir()} <= {"inside"}


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60).filter(lambda text: "\0" not in text))
def test_what_a_program_printed_is_printed_again(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        roots = recorded_tree.plant(f"bin/say it = {json.dumps(text)}\n", Path(folder))
        assert roots.bin is not None
        done = subprocess.run([roots.bin / "say", "it"], capture_output=True, check=True)
        assert done.stdout == text.encode()


def test_a_tree_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "check", "--tree", str(tmp_path / "none.txt")]) == 1
    assert "profile record" in capsys.readouterr().err
    with pytest.raises(BadInput, match="larger than"):
        recorded_tree.plant("#" * (5 * 1024 * 1024), tmp_path / "inside")


def test_shipped_profiles_are_explained_by_the_generic_one() -> None:
    """Every key that a shipped profile uses is in the comment that explains the format."""
    explained = (Path("device_profiles") / "generic.toml").read_text()
    for path in Path("device_profiles").glob("*.toml"):
        fields = read_profile(path).model_dump(exclude_defaults=True)
        for key in (*fields, *fields["match"], *fields.get("limits", {})) if "match" in fields else fields:
            assert key in explained, (path.name, key)
