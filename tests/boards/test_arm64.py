"""An arm64 board without a compiler: installed from a wheelhouse, enrolled at a real host, a real model evaluated, the record at the host.

Emulated: what is checked is that it works, never how long it took.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from joulemark import documents, packs, sources
from joulemark.tasks import arc_challenge
from joulemark.wire import LatencyPlan, RunRecord, RunSpec
from joulemark_agent.backends import Options, ScoreRequest, llamacpp, xllamacpp
from joulemark_agent.local_run import evaluate, local_machine, prepare
from joulemark_agent.sysfs import Roots
from joulemark_host.evaluation import Subject
from tests.boards.conftest import NAME, Board
from tests.fixtures import tiny_models
from tests.fixtures.arm64 import Userland
from tests.fixtures.host_process import HostProcess, wait_until

pytestmark = pytest.mark.timeout(1700)
DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
ITEMS = 2
LOADER = "ld-linux-aarch64.so.1"
SMOLLM2 = "smollm2-135m-instruct-q4_1"
QUICK = {"limit": ITEMS, "idle_s": 0.5, "cooldown_s": 0.0, "latency": LatencyPlan(prompts=1, new_tokens=2)}


def script(userland: Userland, wheels: Path, cpu: str, *options: str) -> subprocess.CompletedProcess[str]:
    """The install script on the board itself, with a wheelhouse."""
    words = ["sh", "/deploy/install.sh", "--wheelhouse", "/wheels", "--python", "/usr/bin/python3", *options]
    # Byte code is compiled when it is needed: emulated, compiling all of it would take half of the time.
    environment = {"PIP_NO_COMPILE": "1"}
    return userland.run(*words, cpu=cpu, shared={"/deploy": DEPLOY, "/wheels": wheels}, environment=environment)


def test_wheels_for_another_processor_are_refused_before_anything_is_changed(
    userland: Userland, wheelhouses: dict[str, Path]
) -> None:
    """By the script on the board, which looks at the processor itself."""
    before = {path.name for path in (userland.root / "opt").glob("*")}
    done = script(userland, wheelhouses["pi5"], "cortex-a72")
    assert done.returncode == 1
    assert "is for another processor than this board's" in done.stderr and "with --target" in done.stderr
    assert {path.name for path in (userland.root / "opt").glob("*")} == before
    assert script(userland, wheelhouses["pi5"], "cortex-a76", "--dry-run").returncode == 0


def test_a_wheelhouse_installs_with_the_boards_own_python(
    userland: Userland, wheelhouses: dict[str, Path], tmp_path: Path
) -> None:
    own = Userland.copy_of(userland, tmp_path / "root")
    done = script(own, wheelhouses["pi4"], "cortex-a72")
    assert done.returncode == 0, done.stdout + done.stderr
    assert own.run("/opt/joulemark/bin/joulemark", "--version").stdout.startswith("joulemark ")
    assert "3.11" in own.run("/opt/joulemark/bin/python", "-c", "import sys, llama_cpp; print(sys.version)").stdout
    check_binary_wheel(own, tmp_path)


def check_binary_wheel(board: Userland, folder: Path) -> None:
    """xllamacpp's, where nothing was compiled: on the oldest processor its log-probabilities are those of the engine that we built."""
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    fetch += ["--platform", "manylinux2014_aarch64", "--abi", "abi3", "--python-version", "3.11"]
    subprocess.run([*fetch, f"xllamacpp=={xllamacpp.VERSION}"], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
    path = small_model(folder / "models")
    shared = {"/models": path.parent, "/wheel": folder / "wheel"}
    command = ["/opt/joulemark/bin/python", "-c", scoring("xllamacpp"), f"/models/{path.name}"]
    done = board.run(*command, cpu="cortex-a53", shared=shared, environment={"PYTHONPATH": "/wheel"})
    assert done.returncode == 0, done.stderr
    facts, binary = json.loads(done.stdout)
    assert (facts["backend"], facts["version"]) == ("xllamacpp", f"xllamacpp {xllamacpp.VERSION}")
    assert "NEON = 1" in facts["build"] and "DOTPROD" not in facts["build"]
    assert binary == pytest.approx(logprobs_here(path), abs=1e-3)


QUESTION = ("Question: What is the capital of France?\nAnswer:", (" London", " Paris", " Rome is the capital"))


def small_model(folder: Path) -> Path:
    """In float32, so that nothing is rounded that two processors could round differently."""
    folder.mkdir()
    return tiny_models.write_llama(folder / "tiny.gguf")


def scoring(backend: str) -> str:
    """What a board is told to run: an engine's facts, and what it makes of the question."""
    return f"""
import json, sys
from pathlib import Path
from joulemark_agent.backends import Options, ScoreRequest, {backend}
session = {backend}.open_session(Path(sys.argv[1]), Options(threads=2, model_sha256="0" * 64))
(scored,) = session.score([ScoreRequest(0, *{QUESTION!r})])
print(json.dumps([session.facts().model_dump(mode="json"), scored.logprobs]))
"""


def logprobs_here(path: Path) -> tuple[float, ...]:
    """What this machine's engine makes of the question."""
    session = llamacpp.open_session(path, Options(threads=2, model_sha256="0" * 64))
    (scored,) = session.score([ScoreRequest(0, *QUESTION)])
    session.close()
    return scored.logprobs


def test_a_release_runs_on_a_system_without_python_and_without_its_c_library(
    userland: Userland, packed: Path, tmp_path: Path
) -> None:
    """As on a Jetson Nano, whose processor is a Cortex-A57: whatever the system has of these is hidden."""
    bare = tmp_path / "root"
    for name in ("bin", "proc", "dev", "tmp", "release"):
        (bare / name).mkdir(parents=True)
    subprocess.run(["tar", "-xzf", str(packed), "-C", str(bare / "release")], check=True)
    assert not list(bare.glob("lib*")) and not (bare / "usr").exists()
    alone = Userland.__new__(Userland)
    alone.root = bare
    python = [f"/release/lib/{LOADER}", "--library-path", "/release/lib", "/release/bin/python3.11"]
    code = "import sys; sys.path.insert(0, '/release/site'); import onnxruntime, joulemark_agent.cli" + scoring(
        "llamacpp"
    )
    path = small_model(tmp_path / "models")
    done = alone.run(*python, "-c", code, f"/models/{path.name}", cpu="cortex-a57", shared={"/models": path.parent})
    assert done.returncode == 0, done.stderr
    facts, scored = json.loads(done.stdout)
    assert "NEON = 1" in facts["build"] and "DOTPROD" not in facts["build"]
    assert scored == pytest.approx(logprobs_here(path), abs=1e-3)


def test_the_board_needs_no_compiler_and_no_network(board: Board) -> None:
    root = board.userland.root
    assert not list((root / "usr/bin").glob("*gcc*")) and not list((root / "usr/bin").glob("c++*"))
    assert board.run("/opt/joulemark/bin/joulemark", "--version").stdout.startswith("joulemark ")
    # Nor anything of the folder in which somebody calls it, who may be root.
    place = root / "tmp/somebody/joulemark"
    place.mkdir(parents=True)
    (place / "__init__.py").write_text("raise SystemExit('somebody else was asked')\n")
    said = board.run("sh", "-c", "cd /tmp/somebody && /opt/joulemark/bin/joulemark --version")
    assert said.stdout.startswith("joulemark "), said.stdout + said.stderr
    unit = root / "etc/systemd/system/joulemark-agent.service"
    ours = (DEPLOY / "joulemark-agent.service").read_text().splitlines()
    unknown = [line for line in ours if line.startswith(("SystemCallFilter=@system-service", "SystemCallErrorNumber="))]
    assert len(unknown) == 2, "what systemd 237 misunderstands"
    assert unit.read_text().splitlines() == [line for line in ours if line not in unknown]


def test_the_doctor_on_the_board_finds_both_engines(board: Board) -> None:
    done = board.run("/opt/joulemark/bin/joulemark", "doctor", "--json")
    found = {finding["area"]: finding for finding in json.loads(done.stdout)}
    assert found["profile"]["text"].startswith("64-bit ARM board")
    for engine in ("engine llama.cpp", "engine onnxruntime"):
        assert found[engine]["status"] == "ok", found[engine]
    assert "NEON = 1" in found["engine llama.cpp"]["text"]
    assert "DOTPROD" not in found["engine llama.cpp"]["text"]
    assert "warning profile: 64-bit ARM board" in board.said, (
        "what the doctor found was said at the end of the installation"
    )


@pytest.mark.model
def test_from_enrolment_to_a_record_that_agrees_with_this_machine(board: Board, tmp_path: Path) -> None:
    """The same file, the same questions: the emulated board's choices and log-probabilities are this machine's, but for rounding."""
    host = board.host
    subject, here = publish(host, tmp_path)
    spec = RunSpec(run_id="arm64", artifact_id=subject.artifact_id, pack_id=subject.packs["arc_challenge"], **QUICK)
    host.dispatch.queue(host.registry.device(NAME).device_id, spec, subject.manifest)
    wait_until(lambda: any(run.run_id == "arm64" for run in host.records.facts()), 600)
    record = RunRecord.model_validate_json(host.records.raw("arm64"))
    assert record.status == "done", record.problem
    assert (record.device.arch, record.device.profile) == ("aarch64", "arm64")
    assert record.engine is not None and "NEON = 1" in record.engine.build
    assert len(record.items) == ITEMS
    for there, native in zip(record.items, here.items, strict=True):
        assert there.prompt_sha256 == native.prompt_sha256
        assert there.choice_logprobs == pytest.approx(native.choice_logprobs, rel=0.03)
        assert there.grade is not None and native.grade is not None


def publish(host: HostProcess, folder: Path) -> tuple[Subject, RunRecord]:
    """The real model and task on the host's shelf, and the record of the same run on this machine."""
    model = sources.fetch(SMOLLM2, sources.default_cache())
    rendered = packs.render("arc_challenge", documents.load(arc_challenge.DATASET, sources.default_cache()))
    path = folder / "arc_challenge.pack.json"
    pack_id = packs.write(rendered, path)
    artifact_id, manifest = host.shelf.publish_model(model, "SmolLM2-135M-Q4_1")
    host.shelf.publish_pack(rendered)
    files = prepare(model, {pack_id: path}, None)
    machine = local_machine(Roots(), "here", "here", None, None)
    base = RunSpec(run_id="run", artifact_id="0" * 64, pack_id="0" * 64, **QUICK)
    (record,) = evaluate(files, base, machine, folder / "here", lambda _state, _task: None)
    return Subject(artifact_id, manifest, {"arc_challenge": pack_id}), record


@pytest.mark.model
def test_an_engine_for_another_processor_dies_and_the_record_says_how(
    board: Board, wheelhouses: dict[str, Path], tmp_path: Path
) -> None:
    """A Pi 5's engine: on its own processor it answers, on a Pi 4's the worker dies with SIGILL, and the command lives to say so."""
    (wheel,) = wheelhouses["pi5"].glob("llama_cpp_python-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "other")
    model = sources.fetch(SMOLLM2, sources.default_cache())
    shared = {"/other": tmp_path / "other", "/root/.cache/joulemark/sources": model.parent}
    inside, other = f"/root/.cache/joulemark/sources/{model.name}", {"PYTHONPATH": "/other"}
    command = ["/opt/joulemark/bin/python", "-c", GENERATE, inside]
    lives = board.run(*command, cpu="cortex-a76", shared=shared, environment=other)
    assert lives.returncode == 0 and "Paris" in lives.stdout, lives.stderr
    evaluation = [
        "/opt/joulemark/bin/joulemark",
        "eval",
        inside,
        "--task",
        "arc_challenge",
        "--limit",
        "1",
        "--idle",
        "0.5",
    ]
    dies = board.run(*evaluation, "--out", "/tmp/dies", "--json", cpu="cortex-a72", shared=shared, environment=other)
    assert dies.returncode == 1
    (record,) = json.loads(dies.stdout)
    assert (record["status"], record["problem"]["code"]) == ("failed", "worker_crashed")
    assert "SIGILL" in record["problem"]["message"]


GENERATE = """
import sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=64, n_threads=2, verbose=False)
print(model("The capital of France is", max_tokens=3, temperature=0)["choices"][0]["text"])
"""
