"""ONNX graphs beside transformers: prefill, continuation, masks with holes, picked positions; and the whole way to an artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from joulemark import artifact
from joulemark.errors import BadInput
from joulemark_exporter import onnx_graph, pipeline
from joulemark_exporter.writers import onnx as writer
from tests.fixtures import hub_models
from tests.fixtures.exporting import quiet, request, task


class Graph:
    """A graph in onnxruntime, with its memory."""

    def __init__(self, path: Path) -> None:
        self.session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.memory: dict[str, np.ndarray] = {}

    def run(self, tokens: np.ndarray, mask: np.ndarray, positions: np.ndarray, wanted: list[int]) -> np.ndarray:
        feeds: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        feeds["logit_positions"] = np.array(wanted, np.int64)
        for item in self.session.get_inputs():
            if item.name.startswith("past"):
                empty = np.zeros((len(tokens), item.shape[1], 0, item.shape[3]), np.float32)
                feeds[item.name] = self.memory.get(item.name, empty)
        names = [item.name for item in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(names, feeds), strict=True))
        self.memory = {
            name.replace("present", "past_key_values"): value for name, value in found.items() if name != "logits"
        }
        return found["logits"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "gemma2"])
def test_the_graph_computes_what_transformers_computes(family: str, tmp_path: Path) -> None:
    model = hub_models.build(family)
    onnx_graph.write(model, tmp_path / "model.onnx", {"architecture": family})
    tokens = torch.randint(5, 600, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(tokens).logits.numpy()
    graph, given = Graph(tmp_path / "model.onnx"), tokens.numpy()
    positions = np.arange(40)[None].repeat(2, 0)
    first = graph.run(given[:, :30], np.ones((2, 30), np.int64), positions[:, :30], list(range(30)))
    assert np.abs(first - expected[:, :30]).max() < 1e-4
    second = graph.run(given[:, 30:], np.ones((2, 40), np.int64), positions[:, 30:], [0, 9])
    assert np.abs(second - expected[:, [30, 39]]).max() < 1e-4
    # Rows of different lengths: the shorter one begins behind eight masked positions.
    padded = np.concatenate([np.zeros((1, 8), np.int64), given[:1, :32]], 1)
    mask = np.ones((1, 40), np.int64)
    mask[0, :8] = 0
    shifted = np.maximum(np.arange(40) - 8, 0)[None]
    alone = Graph(tmp_path / "model.onnx").run(padded, mask, shifted, [39])
    assert np.abs(alone[0, 0] - expected[0, 31]).max() < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_floats_the_whole_way(precision: str, tmp_path: Path) -> None:
    hub_models.write(tmp_path / "base", "llama")
    given = request(tmp_path / "base", "use = 'none'", f"[writer]\nuse = 'onnx'\nprecision = '{precision}'\n")
    exported = pipeline.export(given, quiet)
    manifest = artifact.verify(exported.folder)
    assert (manifest.format, manifest.quantization, manifest.context_tokens) == ("onnx", precision, 256)
    assert exported.report["findings"]["divergence"] < 1e-4


def test_four_bits_the_whole_way(tmp_path: Path) -> None:
    hub_models.write(tmp_path / "base", "llama")
    given = request(
        tmp_path / "base", "use = 'gptq'", "[writer]\nuse = 'onnx'\nprecision = 'int4'\naccuracy_level = 1\n"
    )
    exported = pipeline.export(given, quiet)
    assert artifact.verify(exported.folder).quantization == "GPTQ-4-g32"
    assert exported.report["findings"]["divergence"] < 0.6


def test_what_the_graphs_cannot_hold_is_said_before(tmp_path: Path) -> None:
    from joulemark_exporter.quantizers import IntegerForm

    hub_models.write(tmp_path / "model", "llama")
    hub_models.write(tmp_path / "opt", "opt")
    given, other = task(tmp_path / "model", tmp_path), task(tmp_path / "opt", tmp_path)
    int4 = writer.Options(precision="int4")
    for which, options, form, words in (
        (given, writer.Options(), IntegerForm(4, 32, True), "holds no integers"),
        (given, int4, None, "needs integers"),
        (other, int4, IntegerForm(4, 32, True), "does not know opt"),
        (given, int4, IntegerForm(8, 32, True), "4 bits"),
        (given, int4, IntegerForm(4, 48, True), "4 bits"),
    ):
        with pytest.raises(BadInput, match=words):
            writer.check(which, options, form)


def test_large_graphs_keep_their_weights_in_a_file_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph, "LARGEST_FILE", 1000)
    hub_models.write(tmp_path / "base", "llama")
    exported = pipeline.export(request(tmp_path / "base", "use = 'none'", "[writer]\nuse = 'onnx'\n"), quiet)
    assert [entry.path for entry in exported.manifest.files][:2] == ["model.onnx", "model.onnx.data"]
    sizes = {entry.path: entry.size_bytes for entry in exported.manifest.files}
    assert sizes["model.onnx.data"] > 4 * 0.9 * exported.manifest.parameters
    assert exported.manifest.weight_bytes == sizes["model.onnx"] + sizes["model.onnx.data"]
    assert exported.report["findings"]["divergence"] < 1e-6


def test_a_generation_ends_where_the_model_s_own_settings_say(tmp_path: Path) -> None:
    hub_models.write(tmp_path / "base", "llama")
    exported = pipeline.export(request(tmp_path / "base", "use = 'none'", "[writer]\nuse = 'onnx'\n"), quiet)
    graph = onnxruntime.InferenceSession(str(exported.folder / "model.onnx"), providers=["CPUExecutionProvider"])
    told = {name: json.loads(value) for name, value in graph.get_modelmeta().custom_metadata_map.items()}
    assert told["joulemark.end_tokens"] == [1, 4, 5]  # </s> by config.json; <|im_end|> and <|endoftext|> always
    assert told["joulemark.context_tokens"] == 256
    assert told["joulemark.parameters"] == exported.manifest.parameters
