"""Disks that are full or turn read-only under a living agent: real file systems, mounted in a namespace of the agent's own.

The agent answers in words, loses nothing that it committed, and goes on when the disk takes writes again.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.agent_process import AgentProcess, free_port
from tests.fixtures.small_world import make_files, make_spec

SIZE = 20
MOUNT = 'mount -t tmpfs -o size=300m none "$0" && exec "$@"'


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An empty folder where the agent will find its own small disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


@pytest.fixture
def agent(disk: Path, namespace: tuple[str, ...]) -> Iterator[AgentProcess]:
    inside = (*namespace, "sh", "-c", MOUNT, str(disk))
    started = AgentProcess(disk, inside=inside, JOULEMARK_FAKE_FAULT="slow:0.15")
    yield started
    started.stop()


def seen_by(agent: AgentProcess) -> Path:
    """The agent's disk as other processes can reach it."""
    return Path(f"/proc/{agent.process.pid}/root{agent.data}")


def mount(agent: AgentProcess, *arguments: str, command: str = "mount") -> None:
    enter = ["nsenter", "--target", str(agent.process.pid), "--mount"]
    if Path("/proc/self/ns/user").readlink() != Path(f"/proc/{agent.process.pid}/ns/user").readlink():
        enter.insert(1, "--user")
    subprocess.run([*enter, command, *arguments], check=True, capture_output=True)


def fill(folder: Path) -> Path:
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return filler


def wait_for(agent: AgentProcess, run_id: str, items: int) -> None:
    deadline = time.monotonic() + 30
    while agent.state(run_id)["items_done"] < items:
        assert time.monotonic() < deadline, agent.state(run_id)
        time.sleep(0.05)


def wait_for_note(agent: AgentProcess, words: str) -> None:
    deadline = time.monotonic() + 30
    while not any(words in note for note in agent.client.get("/api/health").raise_for_status().json()["notes"]):
        assert time.monotonic() < deadline, agent.client.get("/api/health").json()
        time.sleep(0.1)


def test_a_disk_that_is_full_in_mid_run_delays_the_run_and_loses_nothing(agent: AgentProcess, tmp_path: Path) -> None:
    files = make_files(tmp_path / "files", SIZE)
    agent.push_model(files.model_manifest, files.model)
    (pack_id, pack), *_ = files.packs.items()
    agent.push_pack(pack_id, pack)
    agent.submit(make_spec(files, "patient"))
    wait_for(agent, "patient", 3)
    filler = fill(seen_by(agent))
    wait_for_note(agent, "runs wait")
    assert agent.state("patient")["status"] == "running"
    refused = agent.client.post("/api/runs", content=make_spec(files, "another").model_dump_json())
    assert refused.status_code == 507 and refused.json()["code"] == "no_space" and refused.json()["hint"]
    stuck = agent.state("patient")["items_done"]
    filler.unlink()
    # The note goes as soon as the run goes on, not when it ends.
    wait_for(agent, "patient", stuck + 1)
    notes = agent.client.get("/api/health").json()["notes"]
    assert agent.state("patient")["status"] == "running" and notes == []
    record = agent.record("patient")
    assert record.status == "done" and [item.doc_id for item in record.items] == list(range(SIZE))
    assert record.attempts >= 2
    assert agent.client.get("/api/health").json()["notes"] == []
    agent.submit(make_spec(files, "next"))
    assert agent.record("next").status == "done"


def test_a_store_that_turns_read_only_is_answered_in_words(agent: AgentProcess, tmp_path: Path) -> None:
    files = make_files(tmp_path / "files", SIZE)
    # A whole disk with open files cannot be made read-only by hand, its part for the models can.
    store = str(agent.data / "store")
    mount(agent, "--bind", store, store)
    mount(agent, "-o", "remount,bind,ro", store)
    announced = agent.client.post("/api/artifacts", content=files.model_manifest.model_dump_json())
    assert announced.status_code in (403, 500, 507) and "read-only" in announced.json()["message"].lower()
    assert agent.client.get("/healthz").status_code == 200
    mount(agent, store, command="umount")
    agent.push_model(files.model_manifest, files.model)
    (pack_id, pack), *_ = files.packs.items()
    agent.push_pack(pack_id, pack)
    agent.submit(make_spec(files, "after"))
    assert agent.record("after").status == "done"


def test_a_read_only_data_folder_is_one_clear_line(disk: Path, namespace: tuple[str, ...]) -> None:
    mount = MOUNT.replace("size=300m", "size=300m,ro")
    command = [sys.executable, "-m", "joulemark", "agent", "--data", str(disk), "--listen", f"127.0.0.1:{free_port()}"]
    done = subprocess.run(
        [*namespace, "sh", "-c", mount, str(disk), *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "read-only" in done.stderr.lower() and "hint:" in done.stderr
