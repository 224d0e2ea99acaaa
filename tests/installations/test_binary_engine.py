"""A machine that may not compile: installed from a checkout with the binary engine, which then evaluates a real model unasked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from joulemark import sources
from joulemark_agent.backends.xllamacpp import VERSION

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.mark.model
@pytest.mark.timeout(900)
def test_the_binary_engine_alone(tmp_path: Path) -> None:
    place = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    install = [str(place / "bin/python"), "-m", "pip", "install", "-q", f"{CHECKOUT}[agent,xllamacpp]"]
    # As where there is no compiler; everything has to come as a binary.
    bare = {**os.environ, "PATH": str(place / "bin"), "CC": "false", "CXX": "false"}
    done = subprocess.run(install, env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    command = str(place / "bin/joulemark")
    done = subprocess.run([command, "doctor", "--json"], capture_output=True, text=True, check=False)
    engines = {found["area"]: found for found in json.loads(done.stdout) if found["area"].startswith("engine")}
    assert engines["engine xllamacpp"]["status"] == "ok"
    assert [*engines] == ["engine xllamacpp", "engine onnxruntime"]
    assert engines["engine onnxruntime"]["text"] == "it is not installed: ONNX artifacts cannot be evaluated"
    model = sources.fetch("smollm2-135m-instruct-q4_1", sources.default_cache())
    words = [command, "eval", str(model), "--task", "arc_challenge", "--limit", "5", "--idle", "0.5"]
    done = subprocess.run(
        [*words, "--out", str(tmp_path / "out"), "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)
    assert record["status"] == "done"
    assert (record["engine"]["backend"], record["engine"]["version"]) == ("xllamacpp", f"xllamacpp {VERSION}")
