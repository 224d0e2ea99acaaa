"""optimum's graphs beside transformers, step by step as the agent runs them; and what happens where optimum is not, or fails."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from tokenizers import Tokenizer

from joulemark import artifact
from joulemark.errors import BadInput, EngineFailed, MissingExtra, NoSpace
from joulemark_agent.backends import GenerateRequest, Options
from joulemark_agent.backends._onnx_engine import Graph
from joulemark_agent.backends._onnx_memory import _Call, memory_of
from joulemark_agent.backends.onnx import GROWTH, open_session
from joulemark_exporter import hub_folder, optimum_environment, pipeline
from joulemark_exporter.quantizers import Floats, GgufTypes, IntegerForm
from joulemark_exporter.writers import optimum
from tests.fixtures import hub_models, tiny_graphs
from tests.fixtures.exporting import quiet, request, task

BY_OPTIMUM = "[writer]\nuse = 'optimum'\n"
COUNT_BY_THEMSELVES = ("gemma", "gemma2", "gemma3", "bloom")
"""Families whose graphs take no positions."""


@pytest.mark.parametrize("family", hub_models.FAMILIES)
def test_the_graph_computes_what_transformers_computes(family: str, tmp_path: Path) -> None:
    path = tiny_graphs.write(tmp_path, family, optimum=True)
    model = hub_models.write(tmp_path / "again", family)  # the same seed, the same weights
    tokens = torch.randint(5, 600, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(tokens).logits.numpy()
    rows = [row.tolist() for row in tokens]
    graph = Graph(path, 1)
    assert (graph.form, graph.branches, graph.uneven) == ("rebuilt", False, family not in COUNT_BY_THEMSELVES)
    memory = memory_of(graph, 2, 64)

    def close(found: np.ndarray, row: int, start: int, end: int) -> None:
        assert np.abs(found - expected[row, start:end]).max() < 1e-4

    close(memory.feed(0, rows[0][:30], 0, range(30)), 0, 0, 30)
    close(memory.feed(1, rows[1][:12], 0, range(12)), 1, 0, 12)
    close(memory.feed(1, rows[1][12:30], 12, range(18)), 1, 12, 30)
    # Together, as often as it takes for a row's place to differ from its position; then one row goes back behind the other.
    for at in (30, 31):
        found = memory.step([rows[0][at], rows[1][at]], [at, at])
        close(found[:1], 0, at, at + 1)
        close(found[1:], 1, at, at + 1)
    if graph.uneven:
        for at, back in ((32, 20), (33, 21)):
            found = memory.step([rows[0][at], rows[1][back]], [at, back])
            close(found[:1], 0, at, at + 1)
            close(found[1:], 1, back, back + 1)
    # A try that is not kept leaves the row as it was; another row can begin as it began.
    tried = memory.feed(0, rows[0][20:24], 20, [1, 3], kept=False)
    assert np.abs(tried - expected[0, [21, 23]]).max() < 1e-4
    memory.share(25, 2)
    close(memory.feed(1, rows[0][25:28], 25, range(3)), 0, 25, 28)
    memory.feed(0, rows[0][25:32], 25, [6])
    close(memory.feed(0, rows[0][32:36], 32, range(4)), 0, 32, 36)
    # Both rows of a call become the first one of them.
    memory.feed(0, rows[0][:10], 0, [9])
    memory.feed(1, rows[1][:10], 0, [9])
    memory.step([rows[0][10], rows[1][10]], [10, 10])
    memory.copy(0, 1, 0, 11)
    for found in memory.step([rows[0][11]] * 2, [11, 11]):
        close(found[None], 0, 11, 12)


def test_what_calls_left_is_given_back(tmp_path: Path) -> None:
    """However many sequences end one after the other: what they share, what the last call left, and a prompt that has just begun."""
    path = tiny_graphs.write(tmp_path, "llama", optimum=True)
    session = open_session(path, Options(threads=1, model_sha256="0" * 64, sequences=6))
    requests = [
        GenerateRequest(index, "Once upon a time, in a land far away " + "x" * index, 4 + 3 * index)
        for index in range(9)
    ]
    counts = [sum(isinstance(item, _Call) for item in gc.get_objects()) for _ in session.generate(requests)]
    session.close()
    assert len(counts) == 9 and 1 <= max(counts) <= 3


def test_the_whole_way_twice_the_same(tmp_path: Path) -> None:
    tiny_graphs.need_optimum()
    hub_models.write(tmp_path / "base", "llama", shards=True)
    given = request(tmp_path / "base", "use = 'none'", BY_OPTIMUM)
    exported = pipeline.export(given, quiet)
    manifest = artifact.verify(exported.folder)
    assert (manifest.format, manifest.quantization, manifest.architecture) == ("onnx", "fp32", "llama")
    assert [entry.path for entry in manifest.files] == ["model.onnx", "tokenizer.json", "tokenizer_config.json"]
    assert manifest.origin is not None
    assert manifest.origin.tools["optimum environment: transformers"].startswith("4.")
    # Three layers, two key heads of 16: 192 numbers a position, 256 positions, four copies.
    assert manifest.required_memory_bytes == manifest.memory_of_weights + 256 * 192 * 4 * 4
    assert exported.report["findings"]["divergence"] < 1e-6
    again = pipeline.export(dataclasses.replace(given, out=tmp_path / "again"), quiet)
    assert again.manifest.files == manifest.files


def test_a_rotary_base_that_transformers_4_does_not_find_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes 10000 without a word where a checkpoint has the keys of version 5 only."""
    tiny_graphs.need_optimum()
    hub_models.write(tmp_path / "base", "llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    given = request(tmp_path / "base", "use = 'none'", BY_OPTIMUM)
    with monkeypatch.context() as patch:
        patch.setattr(hub_folder, "_legacy_rope", lambda _: {})
        with pytest.raises(BadInput, match="something else from this file than its weights say"):
            pipeline.export(given, quiet)
    assert not given.out.exists()
    assert pipeline.export(given, quiet).report["findings"]["divergence"] < 1e-6


def test_what_it_cannot_write_is_said_before(tmp_path: Path) -> None:
    hub_models.write(tmp_path / "model", "llama")
    given = task(tmp_path / "model", tmp_path)
    for numbers, words in (
        (IntegerForm(4, 32, True), "float32 only"),
        (GgufTypes(), "float32 only"),
        (Floats("F16"), "the writer F32"),
    ):
        with pytest.raises(BadInput, match=words):
            optimum.check(given, optimum.Options(), numbers)
    optimum.check(given, optimum.Options(), Floats())


def test_without_its_environment_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_models.write(tmp_path / "base", "llama")
    monkeypatch.setenv(optimum_environment.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(MissingExtra, match="make install-optimum"):
        pipeline.export(request(tmp_path / "base", "use = 'none'", BY_OPTIMUM), quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        ("echo 'out of memory' >&2; exit 9", EngineFailed, "status 9: out of memory"),
        ("kill -9 $$", EngineFailed, "optimum was killed"),
        ("echo 'OSError: [Errno 28] No space left on device' >&2; exit 1", NoSpace, "the disk is full"),
        ("echo \"ModuleNotFoundError: No module named 'optimum'\" >&2; exit 1", MissingExtra, "not whole: .*optimum"),
    ],
)
def test_its_failures_are_told_in_its_own_words(
    script: str, error: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "environment" / "bin" / "python"
    python.parent.mkdir(parents=True)
    versions = '[ "$3" = versions ] && echo "{}" && exit 0'
    python.write_text(f"#!/bin/sh\n{versions}\n{script}\n")
    python.chmod(0o755)
    hub_models.write(tmp_path / "base", "llama")
    monkeypatch.setenv(optimum_environment.VARIABLE, str(tmp_path / "environment"))
    with pytest.raises(error, match=words):
        pipeline.export(request(tmp_path / "base", "use = 'none'", BY_OPTIMUM), quiet)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / ".out.export" / "written").glob("*")), "what was half written stays"


def test_whoever_is_killed_leaves_no_process_behind(tmp_path: Path) -> None:
    tiny_graphs.need_optimum()
    hub_models.write(tmp_path / "base", "llama")
    (tmp_path / "recipe.toml").write_text(f"[quantizer]\nuse = 'none'\n{BY_OPTIMUM}")
    command = [sys.executable, "-m", "joulemark", "export", "base", "--recipe", "recipe.toml", "--out", "out"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as export:
        other = _wait_for(lambda: [child for child in _children(export.pid) if "graph" in child.cmdline()])[0]
        export.kill()
    assert _wait_for(lambda: not other.is_running() or other.status() == psutil.STATUS_ZOMBIE)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("model.onnx")), "it went on writing"
    again = request(tmp_path / "base", "use = 'none'", BY_OPTIMUM)
    assert pipeline.export(again, quiet).report["findings"]["divergence"] < 1e-6


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


def _wait_for(seen: Callable[[], Any]) -> Any:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = seen()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("nothing happened within a minute")


def test_what_a_row_is_reckoned_to_take_decides_how_many_there_are(tmp_path: Path) -> None:
    """Three layers with two key heads of 16, keys and values, four bytes, four copies."""
    path = tiny_graphs.write(tmp_path, "llama", optimum=True)
    assert Graph(path, 1).position_bytes() == 3 * 2 * 2 * 16 * 4 * 4
    requests = [GenerateRequest(index, "Once upon a time" + " and" * index, 8) for index in range(6)]
    longest = 8 + len(Tokenizer.from_file(str(path.parent / "tokenizer.json")).encode(requests[-1].prompt).ids)
    for rows in (2, 3):
        room = rows * (longest + GROWTH) * 3072
        session = open_session(path, Options(threads=1, model_sha256="0" * 64, sequences=6, memory_bytes=room))
        list(session.generate(requests))
        assert session.facts().sequences == rows
        session.close()
