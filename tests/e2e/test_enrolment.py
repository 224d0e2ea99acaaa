"""Boards enrol at a host, all real processes over TLS: taken in, approved, delivering; copies, revoked boards and strangers are not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from joulemark.errors import Untrusted
from joulemark.wire import RunSpec
from joulemark_agent import hardware
from joulemark_agent import identity as agent_identity
from joulemark_agent.sysfs import Roots
from joulemark_host.client import AgentClient
from tests.fixtures.agent_process import AgentProcess
from tests.fixtures.fleet import enrolled, make_subject
from tests.fixtures.host_process import HostProcess, wait_until


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HostProcess]:
    running = HostProcess(tmp_path / "host")
    yield running
    running.close()


def joulemark(*arguments: str, data: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "joulemark", *arguments]
    if data is not None:
        command += ["--data", str(data)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def run_one(host: HostProcess, device: str, tmp_path: Path, run_id: str) -> None:
    """Queues a run for a board; whether and when it is done is the test's question."""
    subject = make_subject(host, tmp_path / "files", 4)
    spec = RunSpec(
        run_id=run_id,
        artifact_id=subject.artifact_id,
        pack_id=subject.packs["arc_challenge"],
        backend="fake",
        idle_s=0.5,
        cooldown_s=0.0,
    )
    host.dispatch.queue(host.registry.device(device).device_id, spec, subject.manifest)


def arrived(host: HostProcess, run_id: str) -> bool:
    return any(run.run_id == run_id for run in host.records.facts())


def notes(agent: AgentProcess) -> str:
    return " ".join(agent.client.get("/api/health").raise_for_status().json()["notes"])


def test_from_a_key_to_a_record(host: HostProcess, tmp_path: Path):
    """A person's way: init, token, enrol, approve, as commands; the record waits until the operator has decided."""
    made = joulemark("host", "token", "--out", str(tmp_path / "board.key"), data=host.data)
    assert made.returncode == 0 and "jme." not in made.stdout + made.stderr
    assert (tmp_path / "board.key").stat().st_mode & 0o777 == 0o600
    done = joulemark(
        "enrol", host.url, "--key-file", str(tmp_path / "board.key"), "--name", "pi5", data=tmp_path / "board"
    )
    assert done.returncode == 0, done.stderr
    assert "devices approve" in done.stdout and not (tmp_path / "board.key").exists()
    for path in (tmp_path / "board" / "identity").iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
    listed = json.loads(joulemark("devices", "--json", data=host.data).stdout)
    assert [(row["name"], row["admission"]) for row in listed] == [("pi5", "pending")]
    assert listed[0]["key_id"] in done.stdout
    agent = AgentProcess(tmp_path / "board", open_to_all=False)
    try:
        run_one(host, "pi5", tmp_path, "first")
        wait_until(lambda: "waits for an operator" in notes(agent))
        assert not arrived(host, "first")
        assert joulemark("devices", "approve", "pi5", data=host.data).returncode == 0
        wait_until(lambda: arrived(host, "first"))
        assert notes(agent) == ""
        (facts,) = host.records.facts()
        assert (facts.device_id, facts.device_name) == (listed[0]["device_id"], "pi5")
        assert joulemark("devices", "revoke", "pi5", data=host.data).returncode == 0
        run_one(host, "pi5", tmp_path, "second")
        wait_until(lambda: "wrong, expired or revoked" in notes(agent), 60)
        assert agent.client.get("/api/runs").json()["runs"][0]["run_id"] == "first"
        assert [run.status for run in host.dispatch.runs()] == ["done", "queued"]
    finally:
        agent.stop()
    assert "revoked" in joulemark("devices", data=host.data).stdout


def test_no_secret_is_in_logs_command_lines_or_records(host: HostProcess, tmp_path: Path):
    agent = enrolled(host, tmp_path / "board")
    try:
        run_one(host, "board", tmp_path, "only")
        wait_until(lambda: arrived(host, "only"))
        folder = agent.data / "identity"
        secrets = [(folder / name).read_text().strip() for name in ("credential", "local.token")]
        secrets += [(folder / "signing.key").read_text().splitlines()[1]]
        secrets += [secret.split(".")[2] for secret in secrets if secret.startswith("jmc.")]
        shown = host.log_text() + agent.data.with_suffix(".log").read_text() + host.records.raw("only").decode()
        for process in (host.process, agent.process):
            shown += Path(f"/proc/{process.pid}/cmdline").read_bytes().decode()
            shown += Path(f"/proc/{process.pid}/environ").read_bytes().decode()
        for secret in secrets:
            assert len(secret) > 40 and secret not in shown
    finally:
        agent.stop()


def test_a_copied_card_is_noticed_and_the_operator_is_told(host: HostProcess, tmp_path: Path):
    """Two agents with one data folder's content on one machine: same keys, same credential, same hardware."""
    original = enrolled(host, tmp_path / "board")
    try:
        wait_until(lambda: host.registry.device("board").seen_at is not None)
        shutil.copytree(original.data, tmp_path / "copy")
        copy = AgentProcess(tmp_path / "copy", open_to_all=False)
        try:
            wait_until(lambda: len(copy.data.with_suffix(".log").read_text()) > 0)
            run_one(host, "board", tmp_path, "from-the-original")
            wait_until(lambda: host.registry.device("board").admission == "cloned")
            wait_until(lambda: "two agents show the identity" in notes(original) + notes(copy), 60)
            assert not arrived(host, "from-the-original")
            assert "cloned" in joulemark("devices", data=host.data).stdout
        finally:
            copy.stop()
        host.registry.approve("board", "test")
        wait_until(lambda: arrived(host, "from-the-original"), 60)
    finally:
        original.stop()


def test_a_copied_card_in_another_board_is_refused_and_the_original_goes_on(host: HostProcess, tmp_path: Path):
    original = enrolled(host, tmp_path / "board")
    try:
        wait_until(lambda: host.registry.device("board").seen_at is not None)
        who = agent_identity.load(original.data / "identity")
        assert who.credential is not None
        facts = original.client.get("/api/device").json()
        body = {"instance_id": "i-other", "boot_id": "b", "hardware": "ff" * 32, "facts": facts}
        answer = host.client.put(
            "/api/device/session", json=body, headers={"Authorization": f"Bearer {who.credential}"}
        )
        if hardware.digest(Roots(), who.key.public) is None:
            # Nothing tells this machine from another: the second agent is noticed when the first one speaks again.
            assert answer.status_code == 200
            wait_until(lambda: host.registry.device("board").admission == "cloned", 90)
        else:
            assert (answer.status_code, answer.json()["code"]) == (409, "cloned")
            run_one(host, "board", tmp_path, "only")
            wait_until(lambda: arrived(host, "only"))
    finally:
        original.stop()


def test_a_host_that_poses_as_another_gets_no_key(host: HostProcess, tmp_path: Path):
    key = host.key_file(tmp_path / "board.key")
    stranger = HostProcess(tmp_path / "stranger")
    try:
        done = joulemark("enrol", stranger.url, "--key-file", str(key), data=tmp_path / "board")
        assert done.returncode == 1 and "not the host that printed this key" in done.stderr
        assert key.exists()
        assert stranger.registry.events() == [] or "refused" not in [e.what for e in stranger.registry.events()]
    finally:
        stranger.close()
    assert joulemark("enrol", host.url, "--key-file", str(key), data=tmp_path / "board").returncode == 0
    again = joulemark("enrol", host.url, "--key-file", str(key), data=tmp_path / "board")
    assert again.returncode == 1 and "--leave" in again.stderr


def test_a_host_with_another_identity_at_the_same_address_gets_nothing(host: HostProcess, tmp_path: Path):
    agent = enrolled(host, tmp_path / "board")
    try:
        wait_until(lambda: host.registry.device("board").seen_at is not None)
        host.stop()
        stranger = HostProcess(tmp_path / "stranger", port=host.port)
        try:
            run_one(host, "board", tmp_path, "only")
            wait_until(lambda: "CERTIFICATE_VERIFY_FAILED" in agent.data.with_suffix(".log").read_text())
            assert stranger.records.facts() == []
        finally:
            stranger.close()
        host.start()
        wait_until(lambda: arrived(host, "only"), 60)
    finally:
        agent.stop()


def test_an_agent_asks_who_is_there_and_knows_its_hosts_people(host: HostProcess, tmp_path: Path):
    agent = enrolled(host, tmp_path / "board")
    try:
        strangers = httpx.Client(base_url=agent.url)
        assert strangers.get("/healthz").status_code == 200
        for path in ("/api/device", "/api/health", "/metrics", "/v1/models", "/api/runs", "/openapi.json"):
            assert strangers.get(path).status_code == 401, path
        client = AgentClient(agent.url, host.identity)
        assert client.device().name == "board"
        client.close()
        other = HostProcess(tmp_path / "other")
        try:
            with pytest.raises(Untrusted):
                AgentClient(agent.url, other.identity).device()
        finally:
            other.close()
    finally:
        agent.stop()


def test_a_board_waits_for_a_host_that_is_not_there_yet(host: HostProcess, tmp_path: Path):
    key = host.key_file(tmp_path / "board.key")
    host.stop()
    command = [sys.executable, "-m", "joulemark", "agent", "--data", str(tmp_path / "board"), "--listen", "127.0.0.1:0"]
    options = ["--host-url", host.url, "--enrol-key-file", str(key), "--name", "board"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, *options], stdout=log, stderr=log, env=dict(os.environ))
    try:
        wait_until(lambda: "next try" in (tmp_path / "log").read_text())
        assert key.exists()
        host.start()
        wait_until(lambda: any(row.seen_at for row in host.registry.devices()))
        assert not key.exists()
    finally:
        process.terminate()
        process.wait(20)


def test_a_key_that_opens_nothing_leaves_a_board_that_serves_and_says_why(host: HostProcess, tmp_path: Path) -> None:
    """A flashed card lay about for too long, or its file is damaged: nobody is near the board to start it again."""
    used = host.registry.issue_key("device", "test", True, life_s=0.001)
    for text, words in (("not a key", "this is no enrolment key"), (used.text(), "could not be enrolled")):
        key = tmp_path / "board.key"
        key.write_text(text)
        agent = AgentProcess(
            tmp_path / words.replace(" ", "-"), "--host-url", host.url, "--enrol-key-file", str(key), open_to_all=False
        )
        try:
            assert agent.client.get("/healthz").is_success
            said = agent.data.with_suffix(".log").read_text()
            assert words in said and "could not be enrolled" in said and "belongs to no host" in said
            assert used.secret not in said and "Traceback" not in said
            assert key.exists()
        finally:
            agent.stop()
    assert not host.registry.devices()
