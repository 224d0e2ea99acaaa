"""A host, a release and a published system: made once, for every card that is flashed here."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from joulemark import sources
from joulemark.wire import RunRecord, RunSpec
from joulemark_deploy import release
from joulemark_deploy.targets import target_of
from joulemark_host.evaluation import Subject
from tests.fixtures import arm64_machine
from tests.fixtures.host_process import HostProcess, wait_until

USER, PASSWORD = "anna", "correct horse"
DATA = "/var/lib/joulemark"


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> arm64_machine.System:
    """A Debian that has never started."""
    arm64_machine.require()
    return arm64_machine.System(tmp_path_factory.mktemp("system"))


@pytest.fixture(scope="session")
def packed(system: arm64_machine.System) -> Path:
    """The release for a Raspberry Pi 4, from the cache or built now."""
    return release.current(target_of("pi4"), sources.default_cache(), lambda _: None, lambda _done, _total: None)


@pytest.fixture(scope="session")
def host(system: arm64_machine.System, tmp_path_factory: pytest.TempPathFactory) -> Generator[HostProcess]:
    """A real host; it needs a system only because that says where none can be had."""
    with arm64_machine.host_address() as address:
        made = HostProcess(tmp_path_factory.mktemp("host") / "data", address=address)
        yield made
        made.close()


@pytest.fixture(scope="session")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The person's ssh key."""
    return arm64_machine.ssh_key(tmp_path_factory.mktemp("key"))


def joulemark(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of the workstation."""
    command = [sys.executable, "-m", "joulemark", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)


def flash(
    system: arm64_machine.System, packed: Path, host: HostProcess, key: Path, out: Path, name: str, *options: str
) -> Path:
    """A card as a person makes it."""
    enrolment_key = host.key_file(out.with_suffix(".key"))
    wishes = ["--board", "pi4", "--release", str(packed), "--hostname", name, "--host-url", host.url]
    wishes += ["--enrol-key-file", str(enrolment_key)]
    wishes += ["--user", USER, "--ssh-key", str(key.with_suffix(".pub")), "--wifi", "home", "--wifi-country", "DE"]
    password = out.with_suffix(".wifi")
    password.write_text(f"{PASSWORD}\n")
    done = joulemark(
        "flash", str(system.image), "--out", str(out), *wishes, "--wifi-password-file", str(password), *options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def number(board: arm64_machine.Machine, database: str, query: str) -> int:
    """A number out of one of the agent's databases, read beside it; -1 when there is none yet. Each question costs the emulated board three
    seconds of a processor: whoever asks all the time slows down what he waits for."""
    program = "import sqlite3, sys; print(sqlite3.connect(f'file:{sys.argv[1]}?mode=ro', uri=True).execute(sys.argv[2]).fetchone()[0])"
    said = board.run(
        f"sudo python3 -c {shlex.quote(program)} {DATA}/{database} {shlex.quote(query)}", check=False
    ).strip()
    return int(said) if said.isdecimal() else -1


def queue(host: HostProcess, name: str, subject: Subject, run_id: str, **more: Any) -> None:
    """A run on the subject's ARC items for this board."""
    fields = {"run_id": run_id, "artifact_id": subject.artifact_id, "pack_id": subject.packs["arc_challenge"]}
    quick = {"idle_s": 0.5, "cooldown_s": 0.0, "latency": {"prompts": 1, "new_tokens": 2}}
    spec = RunSpec.model_validate({**fields, **quick, **more})
    host.dispatch.queue(host.registry.device(name).device_id, spec, subject.manifest)


def record_of(host: HostProcess, run_id: str, timeout_s: float = 900) -> RunRecord:
    """The record, as soon as the host has it."""
    wait_until(lambda: any(run.run_id == run_id for run in host.records.facts()), timeout_s, 1)
    return RunRecord.model_validate_json(host.records.raw(run_id))
