"""`joulemark eval` and `verify` as a person types them: files written, resumed, compared, errors in words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from joulemark import documents, sources
from tests.fixtures.tiny_models import write_llama


def joulemark(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "joulemark", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    documents.load("arc_challenge", sources.default_cache())
    return write_llama(tmp_path_factory.mktemp("model") / "tiny.gguf")


def test_it_evaluates_writes_and_verifies(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = joulemark(
        "eval", model, "--task", "arc_challenge,gsm8k_cot", "--limit", 6, "--out", out, "--idle", 0.5, "--json"
    )
    assert done.returncode == 0, done.stderr
    summaries = json.loads(done.stdout)
    assert [entry["pack"]["task"] for entry in summaries] == ["arc_challenge", "gsm8k_cot"]
    assert all(entry["status"] == "done" and entry["engine"]["backend"] == "llamacpp" for entry in summaries)
    accuracy = summaries[0]["summary"]["metrics"]["score.acc_norm"]
    samples = next(out.glob("samples_arc_challenge_*.jsonl"))
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(lines) == 6 and accuracy["n"] == 6
    assert accuracy["value"] == pytest.approx(sum(line["acc_norm"] for line in lines) / 6)
    results = json.loads(next(out.glob("results_*.json")).read_text())
    assert "arc_challenge" in results["results"] or "gsm8k_cot" in results["results"]
    same = joulemark("verify", out, "--against", samples)
    assert same.returncode == 0 and "identical" in same.stdout
    flipped = tmp_path / samples.name
    lines[2]["acc_norm"] = 1.0 - lines[2]["acc_norm"]
    lines[2]["resps"] = lines[2]["filtered_resps"] = list(reversed(lines[2]["resps"]))
    flipped.write_text("".join(json.dumps(line) + "\n" for line in lines))
    other = joulemark("verify", out, "--against", flipped)
    assert other.returncode == 1 and "different" in other.stdout


def test_a_killed_evaluation_goes_on_where_it_stopped(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "joulemark", "eval", str(model), "--task", "arc_challenge", "--limit", "40"]
    command += ["--out", str(out), "--idle", "0.5", "--backend", "fake"]
    environment = {**os.environ, "JOULEMARK_FAKE_FAULT": "slow:0.1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    import sqlite3

    def answered() -> int:
        with sqlite3.connect(out / "journal.sqlite") as database:
            return int(database.execute("SELECT count(*) FROM items").fetchone()[0])

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (out / "journal.sqlite").exists():
            try:
                if answered() >= 5:
                    break
            except sqlite3.OperationalError:
                pass  # the tables are being made
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = answered()
    assert 5 <= before < 40
    again = joulemark(*command[3:], "--json")
    assert again.returncode == 0, again.stderr
    entry = json.loads(again.stdout)[0]
    assert entry["status"] == "done" and entry["attempts"] == 2
    assert entry["summary"]["metrics"]["score.acc_norm"]["n"] == 40 and answered() == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "none.gguf"), "no model file"),
        (("eval", "MODEL", "--task", "nonsense"), "nonsense"),
        (("eval", "MODEL", "--task", ","), "no task"),
        (("eval", "MODEL", "--limit", "0"), "--limit"),
        (("verify", "none.jsonl", "--against", "none.jsonl"), "none.jsonl"),
        (("nonsense",), "no command"),
    ],
)
def test_errors_are_words(model: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    given = [str(model) if part == "MODEL" else part for part in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "joulemark", *given],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode in (1, 2)
    assert message in done.stderr and "Traceback" not in done.stderr


def test_help_names_every_command() -> None:
    done = joulemark("--help")
    assert done.returncode == 0
    for command in ("demo", "eval", "verify", "doctor", "agent", "host", "push", "run", "heatmap"):
        assert f"  {command} " in done.stdout
        assert joulemark(command, "--help").returncode == 0


def test_doctor_finds_something_in_every_area() -> None:
    done = joulemark("doctor", "--json")
    areas = {finding["area"] for finding in json.loads(done.stdout)}
    assert {"cores", "memory", "memory bandwidth", "clock", "contention", "disk"} <= areas
