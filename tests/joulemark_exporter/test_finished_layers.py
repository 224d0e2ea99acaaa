"""What survives: every state in which a crash can leave the working folder, and a real kill -9 in the middle of an export."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from joulemark import artifact
from joulemark_exporter.finished_layers import FinishedLayers
from joulemark_exporter.rounding import Rounding, round_to_grid
from tests.fixtures import hub_models

MATRIX = round_to_grid(np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32), Rounding())


def fill(folder: Path, layers: int) -> FinishedLayers:
    finished = FinishedLayers(folder, "gptq")
    for layer in range(layers):
        finished.add({f"layer.{layer}": MATRIX}, {"layer": layer}, np.full((2, 3, 4), layer, np.float32))
    return finished


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    found = FinishedLayers(tmp_path, "gptq")
    assert found.count == 3
    states = found.states()
    assert states is not None
    assert (states == 2).all()
    matrix = found.matrix("layer.1")
    assert np.array_equal(matrix.integers, MATRIX.integers)
    assert np.array_equal(matrix.scales, MATRIX.scales)
    assert found.notes() == [{"layer": 0}, {"layer": 1}, {"layer": 2}]
    assert FinishedLayers(tmp_path, "other").count == 0


def test_only_the_latest_states_are_kept(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    assert [path.name for path in sorted((tmp_path / "gptq").glob("states-*"))] == ["states-0003.npy"]


@pytest.mark.parametrize(
    ("lost", "count"),
    [
        (
            ["states-0003.npy"],
            0,
        ),  # without the states behind it a layer is not finished, and older states are gone: from the start
        (["layer-0001.npz"], 0),
        (["layer-0002.npz"], 0),
    ],
)
def test_a_gap_is_never_bridged(lost: list[str], count: int, tmp_path: Path) -> None:
    fill(tmp_path, 3)
    for name in lost:
        (tmp_path / "gptq" / name).unlink()
    assert FinishedLayers(tmp_path, "gptq").count == count


def test_a_crash_between_a_layer_and_its_states_repeats_that_layer(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    (tmp_path / "gptq" / "layer-0002.npz").write_bytes((tmp_path / "gptq" / "layer-0001.npz").read_bytes())
    (tmp_path / "gptq" / ".states-0003.npy.part").write_bytes(b"half")
    found = FinishedLayers(tmp_path, "gptq")
    assert found.count == 2
    states = found.states()
    assert states is not None
    assert (states == 1).all()


RECIPE = """
name = "tiny"
[quantizer]
use = "gptq"
[calibration]
samples = 150
tokens = 200
[probe]
windows = 2
tokens = 48
"""


def command(folder: Path, out: str) -> list[str]:
    words = [
        str(folder / "model"),
        "--recipe",
        str(folder / "recipe.toml"),
        "--out",
        str(folder / out),
        "--json",
        "--threads",
        "1",
    ]
    return [sys.executable, "-m", "joulemark", "export", *words]


def test_a_killed_export_goes_on_and_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    hub_models.write(tmp_path / "model", "llama", num_hidden_layers=6)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    whole = subprocess.run(command(tmp_path, "whole"), capture_output=True, text=True, check=True)
    process = subprocess.Popen(command(tmp_path, "out"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    layers = tmp_path / ".out.export" / "gptq"
    deadline = time.monotonic() + 120
    while not (layers / "layer-0001.npz").is_file() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    reached = len(list(layers.glob("layer-*.npz")))
    assert 2 <= reached < 6, "it was killed too late to show anything"
    before = (layers / "layer-0000.npz").stat().st_mtime_ns
    again = subprocess.Popen(command(tmp_path, "out"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen: set[int] = set()
    while again.poll() is None:
        if (layers / "layer-0000.npz").is_file():
            seen.add((layers / "layer-0000.npz").stat().st_mtime_ns)
        time.sleep(0.005)
    output = again.communicate()[0]
    assert again.returncode == 0
    assert seen == {before}, "the first layer was computed again"
    assert json.loads(output)["artifact_id"] == json.loads(whole.stdout)["artifact_id"]
    artifact.verify(tmp_path / "out")
    assert not (tmp_path / ".out.export").exists()
    assert not (tmp_path / ".out.lock").exists()
