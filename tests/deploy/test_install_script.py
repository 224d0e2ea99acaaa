"""deploy/install.sh as far as it runs without root and without changing the machine, and the files that it installs."""

from __future__ import annotations

import configparser
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def install(*options: str) -> subprocess.CompletedProcess[str]:
    """Runs the script with no way to install anything: every path that it writes to belongs to the system."""
    command = ["sh", str(DEPLOY / "install.sh"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def interpreter() -> list[str]:
    """The tests' own Python, unless it lives in a home folder, which the script rightly refuses."""
    base = os.path.realpath(sys.base_prefix)
    if base.startswith(("/root/", "/home/", "/run/user/")):
        if not Path("/usr/bin/python3").exists():
            pytest.skip("the only Python here lives in a home folder")
        return []
    return ["--python", sys.executable]


def dry_run(*options: str) -> subprocess.CompletedProcess[str]:
    done = install("--dry-run", *interpreter(), *options)
    if "apt-get install" in done.stderr:
        pytest.skip(f"this machine lacks what the script asks for: {done.stderr.strip()}")
    return done


def test_a_dry_run_says_everything_and_does_nothing() -> None:
    done = dry_run("--host-url", "https://192.0.2.1:8443", "--listen", "127.0.0.1:8091")
    assert done.returncode == 0, done.stderr
    steps = done.stdout.splitlines()
    assert any("-m venv /opt/joulemark" in step for step in steps) or Path("/opt/joulemark").exists()
    engine = next(index for index, step in enumerate(steps) if "build_engine.py" in step)
    package = next(index for index, step in enumerate(steps) if step.endswith("[agent,llama]"))
    assert engine < package  # else pip would build the engine its own long way
    assert any("--host-url https://192.0.2.1:8443 --listen 127.0.0.1:8091" in step for step in steps)
    assert any(step.endswith("/etc/udev/rules.d/99-joulemark.rules") for step in steps)
    assert not [step for step in steps if not step.startswith(("would ", "kept:", "systemd does not run"))]


def test_without_a_compiler_the_engine_comes_as_a_binary_wheel() -> None:
    done = dry_run("--binary-engine")
    assert done.returncode == 0, done.stderr
    assert "build_engine.py" not in done.stdout
    assert any(step.endswith("[agent,xllamacpp]") for step in done.stdout.splitlines())


def test_a_key_goes_into_the_data_folder_for_the_service_alone(tmp_path: Path) -> None:
    key = tmp_path / "board.key"
    key.write_text("jme.0011223344556677.secret")
    done = dry_run("--host-url", "https://192.0.2.1:8443", "--enrol-key-file", str(key))
    assert done.returncode == 0, done.stderr
    assert f"install -m 0600 -o joulemark -g joulemark {key} /var/lib/joulemark/enrol.key" in done.stdout
    assert "--enrol-key-file /var/lib/joulemark/enrol.key" in done.stdout and "jme." not in done.stdout
    for wrong, says in (
        (["--enrol-key-file", str(key)], "--host-url"),
        (["--host-url", "https://192.0.2.1:8443", "--enrol-key-file", str(tmp_path / "none")], "host token"),
    ):
        refused = install("--dry-run", *interpreter(), *wrong)
        assert refused.returncode != 0 and (says in refused.stderr or "apt-get" in refused.stderr)


@pytest.mark.parametrize(("root", "limited"), [("/dev/mmcblk0p2", True), ("/dev/nvme0n1p2", False), ("overlay", False)])
def test_on_a_card_the_journal_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str, limited: bool
) -> None:
    (tmp_path / "findmnt").write_text(f"#!/bin/sh\necho {root}\n")
    (tmp_path / "findmnt").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = dry_run("--no-engine")
    assert done.returncode == 0, done.stderr
    assert ("90-joulemark.conf: SystemMaxUse=64M" in done.stdout) == limited


def test_without_the_engine_nothing_is_compiled() -> None:
    done = dry_run("--no-engine")
    assert done.returncode == 0, done.stderr
    assert "build_engine" not in done.stdout
    assert "[agent]" in done.stdout


def test_uninstall_keeps_the_data_unless_told() -> None:
    kept = install("--dry-run", "--uninstall")
    assert kept.returncode == 0, kept.stderr
    assert "/var/lib/joulemark" not in "".join(
        line for line in kept.stdout.splitlines(keepends=True) if line.startswith("would run: rm")
    )
    purged = install("--dry-run", "--uninstall", "--purge")
    assert "would run: rm -rf /var/lib/joulemark /etc/joulemark" in purged.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bogus"], "unknown option --bogus"),
        (["--wheel"], "--wheel needs a value"),
        (["--host-url", ""], "--host-url needs a value"),
        (["--name", "a b"], "has a space"),
        (["--name", "$(reboot)"], "dollar sign"),
        (["--listen", 'x"y'], "a quote"),
        (["--purge"], "--purge belongs to --uninstall"),
        (["--dry-run", "--python", "no-such-python"], "no-such-python was not found"),
    ],
)
def test_bad_options_end_it_at_once_with_a_hint(options: list[str], message: str) -> None:
    done = install(*options)
    assert done.returncode == 1
    assert message in done.stderr
    assert "hint:" in done.stderr
    assert done.stdout == ""


def test_a_wheel_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.whl", tmp_path):
        done = dry_run("--no-engine", "--wheel", str(path))
        assert done.returncode == 1
        assert "hint: give" in done.stderr


def test_the_unit_runs_what_the_script_installs() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / "joulemark-agent.service", encoding="utf-8")
    service, script = unit["Service"], (DEPLOY / "install.sh").read_text(encoding="utf-8")
    program, *arguments = service["ExecStart"].split()
    assert program == "/opt/joulemark/bin/joulemark"
    assert arguments == ["agent", "--data", "/var/lib/joulemark", "$JOULEMARK_OPTIONS"]
    assert "program=/opt/joulemark\n" in script
    assert "data=/var/lib/joulemark\n" in script
    assert f"options={service['EnvironmentFile'].removeprefix('-')}\n" in script
    assert service["User"] in script
    # Without it systemd stops the agent when the worker is killed for memory.
    assert service["OOMPolicy"] == "continue"


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", *sorted(DEPLOY.glob("*.sh"))], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def packed(folder: Path, machine: str, hwcap: int = 0) -> Path:
    """The beginning of a release."""
    text = json.dumps({"arch": machine, "hwcap": hwcap}, indent=2).encode() + b"\n"
    path = folder / "release.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("release.json")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text))
    return path


def test_what_is_said_to_nobody_stops_nothing(tmp_path: Path) -> None:
    """A connection that is lost while a release is tried: going back says what it does, to a pipe that nobody reads any more."""
    script = (DEPLOY / "install.sh").read_text()
    functions = re.findall(r"(?ms)^(?:say|fail)\(\) .*?\}$", script)
    trap = re.search(r"(?m)^ *(trap '' .*)$", script)
    assert len(functions) == 2 and trap is not None
    text = "\n".join(
        ["set -eu", *functions, trap[1], "say going back", "say still", f"touch {tmp_path}/gone-back", "fail done hint"]
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        ["sh", "-c", text], stdout=writer, stderr=writer, check=False, timeout=20, restore_signals=True
    )
    os.close(writer)
    assert (tmp_path / "gone-back").exists() and done.returncode == 1


def test_a_release_needs_no_python_of_the_system(tmp_path: Path) -> None:
    done = install("--dry-run", "--release", str(packed(tmp_path, platform.machine())), "--python", "/nowhere/python")
    assert done.returncode == 0, done.stderr
    assert "would run: tar -xzf" in done.stdout and "venv" not in done.stdout
    assert "usermod --append --groups" in done.stdout, "the agent reads meters on buses and lines"


def test_a_release_for_another_machine_or_processor_or_none_is_refused(tmp_path: Path) -> None:
    cases = [
        (packed(tmp_path, "s390x"), "is for another machine than"),
        (tmp_path / "nowhere.tar.gz", "does not exist"),
    ]
    for path, words in cases:
        done = install("--dry-run", "--release", str(path))
        assert done.returncode == 1 and words in done.stderr, done.stderr
    # A bit that no kernel sets.
    done = install("--dry-run", "--release", str(packed(tmp_path, platform.machine(), 1 << 62)))
    assert done.returncode == 1 and "is for another processor than this board's" in done.stderr
    (tmp_path / "release.tar.gz").write_text("nothing packed")
    done = install("--dry-run", "--release", str(tmp_path / "release.tar.gz"))
    assert done.returncode == 1 and "is no release of Joulemark" in done.stderr
