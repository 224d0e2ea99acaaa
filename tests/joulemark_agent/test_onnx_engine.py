"""Graphs that are not what they should be: each is refused in words, by what it says of itself and by what it takes and gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from joulemark.errors import EngineFailed
from joulemark_agent.backends import Options, ScoreRequest
from joulemark_agent.backends import onnx as backend
from tests.fixtures import tiny_graphs

onnx = pytest.importorskip("onnx", reason="onnx is not installed: make install-test")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: make install-test")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_graphs.write(tmp_path_factory.mktemp("graph"), "llama")


def changed(graph: Path, folder: Path, change: Callable[[Any], None]) -> Path:
    """A copy with its tokenizer beside it."""
    proto = onnx.load(graph)
    change(proto)
    for path in graph.parent.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    onnx.save_model(proto, folder / "model.onnx")
    return folder / "model.onnx"


def stating(name: str, text: str | None) -> Callable[[Any], None]:
    def change(proto: Any) -> None:
        kept = {item.key: item.value for item in proto.metadata_props}
        if text is None:
            del kept[f"joulemark.{name}"]
        else:
            kept[f"joulemark.{name}"] = text
        onnx.helper.set_model_props(proto, kept)

    return change


def score(path: Path) -> None:
    session = backend.open_session(path, Options(threads=1, model_sha256="0" * 64))
    list(session.score([ScoreRequest(0, "Question", (" a", " b"))]))
    session.close()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("vocabulary", None, "does not say what model it is"),
        ("vocabulary", "641", "metadata says 641"),
        ("vocabulary", "-1", "does not say what model it is"),
        ("vocabulary", json.dumps(10**12), "does not say what model it is"),
        ("context_tokens", "0", "does not say what model it is"),
        ("end_tokens", "[" * 100_000, "does not say what model it is"),
        ("end_tokens", json.dumps(list(range(2000))), "does not say what model it is"),
        ("architecture", json.dumps("../x"), "does not say what model it is"),
        ("parameters", "NaN", "does not say what model it is"),
    ],
)
def test_what_a_graph_says_of_itself_is_read_with_bounds(
    graph: Path, name: str, text: str | None, words: str, tmp_path: Path
) -> None:
    score(graph)
    with pytest.raises(EngineFailed, match=words):
        score(changed(graph, tmp_path, stating(name, text)))


def test_a_graph_of_another_kind_is_refused(graph: Path, tmp_path: Path) -> None:
    def rename(proto: Any) -> None:
        for item in (*proto.graph.input, *proto.graph.node):
            if item in proto.graph.input and item.name == "logit_positions":
                item.name = "something_else"
            elif hasattr(item, "op_type"):
                for number, name in enumerate(item.input):
                    if name == "logit_positions":
                        item.input[number] = "something_else"

    with pytest.raises(EngineFailed, match="not a graph that `joulemark export` wrote"):
        score(changed(graph, tmp_path, rename))


def test_a_graph_that_gives_no_memory_back_is_refused(graph: Path, tmp_path: Path) -> None:
    def forget(proto: Any) -> None:
        del proto.graph.output[-1]

    with pytest.raises(EngineFailed, match="not a graph that `joulemark export` wrote"):
        score(changed(graph, tmp_path, forget))


def test_a_cut_graph_is_refused(graph: Path, tmp_path: Path) -> None:
    path = changed(graph, tmp_path, lambda _: None)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(EngineFailed, match="onnxruntime refused"):
        score(path)
