"""The agent as a real process: light, quick, and nothing lost or doubled when it is killed in mid-run."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from joulemark.wire import FileEntry, Manifest, RunRecord
from joulemark_agent.local_run import LocalFiles
from tests.fixtures.agent_process import AgentProcess
from tests.fixtures.records import make_manifest
from tests.fixtures.small_world import make_files, make_spec

SIZE = 30


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    process = AgentProcess(tmp_path / "agent")
    yield process
    process.stop()


def test_kill_9_of_the_agent_in_mid_run(tmp_path: Path) -> None:
    files = make_files(tmp_path / "files", SIZE)
    spec = make_spec(files)
    agent = AgentProcess(tmp_path / "agent", JOULEMARK_FAKE_FAULT="slow:0.05")
    agent.push_model(files.model_manifest, files.model)
    agent.push_pack(spec.pack_id, files.packs[spec.pack_id])
    agent.submit(spec)
    while agent.state(spec.run_id)["items_done"] < 8:
        time.sleep(0.02)
    agent.kill()
    agent.start()
    record = agent.record(spec.run_id)
    agent.stop()
    assert record.status == "done" and record.attempts == 2
    assert [item.doc_id for item in record.items] == list(range(SIZE))
    # The killed attempt's part of the trace and its open phase are kept.
    accuracy = [phase for phase in record.phases if phase.name == "accuracy"]
    assert len(accuracy) in (1, 2) and record.trace is not None
    undisturbed = AgentProcess(tmp_path / "other")
    undisturbed.push_model(files.model_manifest, files.model)
    undisturbed.push_pack(spec.pack_id, files.packs[spec.pack_id])
    undisturbed.submit(spec)
    clean = undisturbed.record(spec.run_id)
    undisturbed.stop()
    assert [(i.doc_id, i.prompt_sha256, i.choice_logprobs) for i in clean.items] == [
        (i.doc_id, i.prompt_sha256, i.choice_logprobs) for i in record.items
    ]


def test_a_rotten_or_unwanted_artifact_does_not_block_the_queue(tmp_path: Path) -> None:
    files = make_files(tmp_path / "files", SIZE)
    specs = [make_spec(files, name) for name in ("sound", "rotten", "missing")]
    agent = AgentProcess(tmp_path / "agent", JOULEMARK_FAKE_FAULT="slow:0.05")
    try:
        agent.push_model(files.model_manifest, files.model)
        agent.push_pack(specs[0].pack_id, files.packs[specs[0].pack_id])
        for spec in specs:
            agent.submit(spec)
        while agent.state("sound")["items_done"] < 2:
            time.sleep(0.02)
        refused = agent.client.delete(f"/api/artifacts/{specs[0].artifact_id}")
        assert refused.status_code == 409 and "cancel the run" in refused.json()["hint"]
        (stored,) = (tmp_path / "agent" / "store" / "files").rglob(files.model_manifest.files[0].sha256)
        stored.chmod(0o644)
        stored.write_bytes(stored.read_bytes()[:-1] + b"?")
        assert agent.record("sound").status == "done"
        codes = [problem.code for name in ("rotten", "missing") if (problem := agent.record(name).problem)]
        assert codes == ["digest_mismatch", "not_found"]
        agent.push_model(files.model_manifest, files.model)
        agent.submit(make_spec(files, "again"))
        assert agent.record("again").status == "done"
        assert agent.client.delete(f"/api/artifacts/{specs[0].artifact_id}").status_code == 204
    finally:
        agent.stop()


def test_no_worker_outlives_a_killed_agent(tmp_path: Path) -> None:
    files = make_files(tmp_path / "files", SIZE)
    spec = make_spec(files)
    agent = AgentProcess(tmp_path / "agent", JOULEMARK_FAKE_FAULT="slow:0.5")
    agent.push_model(files.model_manifest, files.model)
    agent.push_pack(spec.pack_id, files.packs[spec.pack_id])
    agent.submit(spec)
    while agent.state(spec.run_id)["items_done"] < 1:
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(agent.process.pid)], capture_output=True, text=True, check=False)
    workers = children.stdout.split()
    assert workers
    agent.kill()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "the worker lives on without its agent"
        time.sleep(0.05)


def test_an_interrupted_upload_goes_on(agent: AgentProcess, tmp_path: Path) -> None:
    files = make_files(tmp_path / "files")
    data = files.model.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    answer = agent.client.post("/api/artifacts", content=files.model_manifest.model_dump_json()).json()
    assert answer["missing"] == [digest]
    half = len(data) // 2
    agent.client.put(f"/api/files/{digest}", content=data[:half]).raise_for_status()
    agent.kill()
    agent.start()
    assert agent.client.head(f"/api/files/{digest}").headers["Upload-Offset"] == str(half)
    wrong = agent.client.put(f"/api/files/{digest}", params={"offset": half + 5}, content=data[half + 5 :])
    assert wrong.status_code == 409
    done = agent.client.put(f"/api/files/{digest}", params={"offset": half}, content=data[half:])
    assert done.json()["complete"] is True
    # The answer was lost with the connection: whoever sends the rest again, which is nothing, hears that all is there.
    nothing = agent.client.put(f"/api/files/{digest}", params={"offset": len(data)}, content=iter(()))
    assert nothing.is_success and nothing.json() == done.json()
    state = agent.client.get(f"/api/artifacts/{answer['artifact_id']}").json()
    assert state["complete"] is True


def test_flipped_bytes_never_become_an_artifact(agent: AgentProcess, tmp_path: Path) -> None:
    files = make_files(tmp_path / "files")
    data = bytearray(files.model.read_bytes())
    data[1000] ^= 1
    digest = files.model_manifest.files[0].sha256
    agent.client.post("/api/artifacts", content=files.model_manifest.model_dump_json())
    refused = agent.client.put(f"/api/files/{digest}", content=bytes(data))
    assert refused.status_code == 422 and refused.json()["code"] == "digest_mismatch" and refused.json()["hint"]
    assert agent.client.get(f"/api/artifacts/{files.artifact_id}").json()["complete"] is False


def hostile_model(files: LocalFiles) -> tuple[Manifest, bytes]:
    """The tiny model with 100,000 blocks in its header, which makes llama.cpp abort, under a manifest of its own."""
    data = bytearray(files.model.read_bytes())
    place = data.index(b"llama.block_count") + len(b"llama.block_count") + 4
    struct.pack_into("<I", data, place, 100_000)
    entry = FileEntry(path="hostile.gguf", size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return files.model_manifest.model_copy(update={"name": "hostile", "files": (entry,)}), bytes(data)


def test_a_hostile_model_fails_its_run_and_not_the_agent(agent: AgentProcess, tmp_path: Path) -> None:
    files = make_files(tmp_path / "files")
    manifest, data = hostile_model(files)
    (tmp_path / "hostile.gguf").write_bytes(data)
    good = make_spec(files, "good")
    agent.push_pack(good.pack_id, files.packs[good.pack_id])
    for backend in ("fake", "llamacpp"):
        bad = make_spec(
            files, f"bad-{backend}", backend=backend, artifact_id=agent.push_model(manifest, tmp_path / "hostile.gguf")
        )
        agent.submit(bad)
        record = agent.record(bad.run_id)
        assert record.status == "failed" and record.problem is not None
        assert record.problem.code == "model_rejected" and record.problem.hint
    agent.push_model(files.model_manifest, files.model)
    agent.submit(good)
    assert agent.record("good").status == "done"


def bad_requests() -> dict[str, tuple[str, str, bytes, int]]:
    """name → (method, path, body, status)."""
    spec = {"run_id": "r", "artifact_id": "0" * 64, "pack_id": "0" * 64}

    def run(**changes: object) -> bytes:
        return json.dumps({**spec, **changes}).encode()

    return {
        "missing artifact": ("POST", "/api/runs", run(), 404),
        "limit 0": ("POST", "/api/runs", run(limit=0), 400),
        "limit as text": ("POST", "/api/runs", run(limit="5"), 400),
        "not JSON": ("POST", "/api/runs", b"{", 400),
        "not UTF-8": ("POST", "/api/runs", b'{"run_id": "\xff\xfe"}', 400),
        "NaN": ("POST", "/api/runs", run(idle_s=1).replace(b": 1}", b": NaN}"), 400),
        "deep JSON": ("POST", "/api/runs", b"[" * 100_000, 400),
        "huge body": ("POST", "/api/runs", b" " * (2 * 1024 * 1024), 413),
        "run id with a path": ("POST", "/api/runs", run(run_id="../x"), 400),
        "unknown run": ("GET", "/api/runs/none", b"", 404),
        "unknown artifact": ("GET", "/api/artifacts/" + "0" * 64, b"", 404),
        "artifact id with a path": ("GET", "/api/artifacts/..%2f..%2fetc", b"", 404),
        "file nobody announced": ("PUT", "/api/files/" + "0" * 64, b"x", 404),
        "file id that is none": ("PUT", "/api/files/xyz", b"x", 400),
        "pack that is no pack": ("PUT", "/api/packs/" + "0" * 64, b"{}", 422),
        "pull without a host": ("POST", "/api/artifacts/" + "0" * 64 + "/pull", b"", 400),
        "manifest with a path": (
            "POST",
            "/api/artifacts",
            make_manifest().model_dump_json().replace("smollm2-135m-instruct.gguf", "../../evil.gguf").encode(),
            400,
        ),
        "unknown model": ("POST", "/v1/completions", b'{"model": "x", "prompt": "y"}', 404),
        "wrong method": ("DELETE", "/api/device", b"", 405),
    }


@pytest.mark.parametrize("name", list(bad_requests()))
def test_bad_input_is_answered_in_words(shared_agent: AgentProcess, name: str) -> None:
    method, path, body, status = bad_requests()[name]
    answer = shared_agent.client.request(method, path, content=body)
    assert answer.status_code == status, answer.text
    assert "Traceback" not in answer.text
    if status != 405 and not path.startswith("/v1"):
        assert set(answer.json()) == {"code", "message", "hint", "retryable"} and answer.json()["message"]
    assert shared_agent.client.get("/healthz").json()["status"] == "ok"


@pytest.fixture(scope="module")
def shared_agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    process = AgentProcess(tmp_path_factory.mktemp("shared") / "agent")
    yield process
    process.stop()


def test_it_is_light_and_imports_no_engine(shared_agent: AgentProcess) -> None:
    assert shared_agent.resident_bytes() < 70e6 * 1.1
    maps = Path(f"/proc/{shared_agent.process.pid}/maps").read_text()
    assert not any(name in maps for name in ("numpy", "llama", "torch", "onnxruntime"))


def test_a_port_in_use_is_one_clear_line(shared_agent: AgentProcess, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "joulemark", "agent", "--data", str(tmp_path / "x")]
    second = subprocess.run(
        [*command, "--listen", f"127.0.0.1:{shared_agent.port}"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert second.returncode == 1
    assert "cannot listen on" in second.stderr and "hint:" in second.stderr and "Traceback" not in second.stderr
    assert not (tmp_path / "x").exists()


def test_it_does_not_serve_strangers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "joulemark", "agent", "--data", str(tmp_path / "x"), "--listen", "0.0.0.0:0"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert refused.returncode == 1 and "knows no host" in refused.stderr


def test_a_data_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    command = [
        sys.executable,
        "-m",
        "joulemark",
        "agent",
        "--data",
        str(tmp_path / "file" / "x"),
        "--listen",
        "127.0.0.1:0",
    ]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr and "file" in refused.stderr


def test_metrics_are_prometheus_text(shared_agent: AgentProcess) -> None:
    page = httpx.get(shared_agent.url + "/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    assert "joulemark_outbox_pending 0.0" in page.text


def test_a_replayed_meter_gives_joules(tmp_path: Path) -> None:
    meter = tmp_path / "meter.csv"
    meter.write_text("time_s,psu:power:wall:total\n0,10\n600,10\n")
    files = make_files(tmp_path / "files", 10)
    spec = make_spec(files)
    agent = AgentProcess(tmp_path / "agent", "--replay", str(meter), JOULEMARK_FAKE_FAULT="slow:0.1")
    agent.push_model(files.model_manifest, files.model)
    agent.push_pack(spec.pack_id, files.packs[spec.pack_id])
    agent.submit(spec)
    record: RunRecord = agent.record(spec.run_id)
    agent.stop()
    assert record.summary is not None
    metrics = record.summary.metrics
    phase = next(phase for phase in record.phases if phase.name == "accuracy")
    energy = metrics["energy_accuracy"]
    # A constant 10 W over the phase, whose length the record gives.
    assert energy.value == pytest.approx(10 * (phase.end_s - phase.start_s), rel=1e-3)  # type: ignore[union-attr]
    assert "replay" in energy.source and "wall" in energy.source  # type: ignore[union-attr]
    right = sum(item.grade.scores["acc_norm"] for item in record.items if item.grade)
    assert right > 0
    assert metrics["energy_per_correct"].value == pytest.approx(energy.value / right)  # type: ignore[union-attr]
