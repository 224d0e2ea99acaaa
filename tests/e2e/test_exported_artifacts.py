"""What the exporter publishes goes to a real agent as it is, several files and all, and runs there: GGUF with tables beside it, ONNX with
its weights and tokenizer in files of their own, optimum's graphs too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from joulemark import artifact
from joulemark.errors import BadInput, DigestMismatch
from joulemark.wire import Manifest, RunRecord, RunSpec
from joulemark_agent import local_run
from joulemark_exporter import onnx_graph, pipeline
from joulemark_host.client import AgentClient
from joulemark_host.publishing import publish_model
from joulemark_host.shelf import Shelf
from tests.fixtures import exporting, hub_models, tiny_graphs
from tests.fixtures.agent_process import AgentProcess
from tests.fixtures.small_world import make_files, make_machine, make_spec

WRITERS = {
    "gguf": ("use = 'gptq'", ""),
    "onnx": ("use = 'gptq'", "[writer]\nuse = 'onnx'\nprecision = 'int4'\naccuracy_level = 1\n"),
    "optimum": ("use = 'none'", "[writer]\nuse = 'optimum'\n"),
}


@pytest.fixture(scope="module", params=list(WRITERS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "optimum":
        tiny_graphs.need_optimum()
    folder = tmp_path_factory.mktemp("exported")
    hub_models.write(folder / "base", "llama")
    quantizer, writer = WRITERS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_graph, "LARGEST_FILE", 1000)
        return pipeline.export(exporting.request(folder / "base", quantizer, writer), exporting.quiet).folder


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    process = AgentProcess(tmp_path / "agent")
    yield process
    process.stop()


def bring(agent: AgentProcess, folder: Path, shelf: Shelf) -> tuple[str, Manifest]:
    artifact_id, manifest = publish_model(shelf, str(folder), folder)
    client = AgentClient(agent.url)
    client.push_artifact(artifact_id, manifest, shelf.file)
    client.close()
    return artifact_id, manifest


def run(agent: AgentProcess, artifact_id: str, folder: Path, run_id: str) -> RunRecord:
    files = make_files(folder, 6)
    spec: RunSpec = make_spec(files, run_id, artifact_id=artifact_id, backend=None)
    agent.push_pack(spec.pack_id, files.packs[spec.pack_id])
    agent.submit(spec)
    return agent.record(run_id)


def test_it_runs_on_a_board_as_it_was_exported(exported: Path, agent: AgentProcess, tmp_path: Path) -> None:
    artifact_id, manifest = bring(agent, exported, Shelf(tmp_path / "shelf"))
    assert manifest == artifact.read_manifest(exported) and len(manifest.files) > 1
    record = run(agent, artifact_id, tmp_path / "files", "first")
    assert record.status == "done", record.problem
    assert record.manifest == manifest and len(record.items) == 6 and len(record.latency) == 2
    engine = record.engine
    assert engine is not None and engine.backend == {"gguf": "llamacpp", "onnx": "onnx"}[manifest.format]
    assert engine.model_sha256 == manifest.files[0].sha256
    answer = agent.client.post(
        "/v1/completions", json={"model": artifact_id, "prompt": "def wrap", "max_tokens": 5, "temperature": 0}
    )
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] >= 1, answer.text
    said = agent.client.post(
        "/v1/chat/completions",
        json={"model": artifact_id, "messages": [{"role": "user", "content": "wrap"}], "max_tokens": 5},
    )
    assert said.status_code == 200 and said.json()["choices"], said.text


def test_it_runs_from_its_folder(exported: Path, agent: AgentProcess, tmp_path: Path) -> None:
    """`joulemark eval FOLDER` and a board give the same answers."""
    packs = make_files(tmp_path / "files", 6).packs
    files = local_run.prepare(exported, packs, None)
    base = make_spec(files, backend=None)
    (here,) = local_run.evaluate(files, base, make_machine(), tmp_path / "results", lambda *_: None)
    artifact_id, _ = bring(agent, exported, Shelf(tmp_path / "shelf"))
    there = run(agent, artifact_id, tmp_path / "files", "there")
    assert here.status == there.status == "done", here.problem
    assert here.spec.artifact_id == artifact_id
    assert [item.choice_logprobs for item in here.items] == [item.choice_logprobs for item in there.items]


def test_every_file_is_looked_at_before_it_is_loaded(exported: Path, agent: AgentProcess, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    artifact_id, manifest = bring(agent, exported, shelf)
    last = manifest.files[-1].sha256
    (stored,) = (agent.data / "store" / "files").rglob(last)
    stored.chmod(0o644)
    stored.write_bytes(stored.read_bytes()[:-1] + b"?")
    record = run(agent, artifact_id, tmp_path / "files", "rotten")
    assert record.status == "failed" and record.problem is not None and record.problem.code == "digest_mismatch"
    assert manifest.files[-1].path in record.problem.message
    bring(agent, exported, shelf)
    assert run(agent, artifact_id, tmp_path / "files", "again").status == "done"
    assert agent.client.delete(f"/api/artifacts/{artifact_id}").status_code == 204
    assert not list((agent.data / "store" / "opened").iterdir())


def test_publishing_says_how_far_it_is(exported: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    shelf = Shelf(tmp_path / "shelf")
    artifact_id, manifest = shelf.publish_folder(exported, lambda done, total: told.append((done, total)))
    whole = 2 * sum(entry.size_bytes for entry in manifest.files)  # hashed, then copied
    assert told[-1] == (whole, whole) and {total for _, total in told} == {whole}
    assert told == sorted(told) and len(told) > len(manifest.files)
    assert shelf.publish_folder(exported) == (artifact_id, manifest)


def test_a_changed_folder_is_not_published(exported: Path, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in exported.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((copy / "manifest.json").read_bytes())
    name = manifest["files"][-1]["path"]
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-1] + b"?")
    with pytest.raises(DigestMismatch, match=name):
        publish_model(shelf, str(copy), tmp_path)
    (copy / name).unlink()
    with pytest.raises(BadInput, match=name):
        publish_model(shelf, str(copy), tmp_path)
    (copy / name).write_bytes(content)
    with pytest.raises(BadInput, match="has its name"):
        publish_model(shelf, str(copy), tmp_path, name="other")
    assert shelf.artifacts() == {}
