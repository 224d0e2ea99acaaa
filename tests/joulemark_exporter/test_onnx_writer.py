"""ONNX graphs beside transformers: prefill, steps of unequal rows, continuations side by side; and the whole way to an artifact."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from joulemark import artifact
from joulemark.errors import BadInput
from joulemark.graph_form import HIDDEN
from joulemark_exporter import onnx_artifact, onnx_attention, onnx_graph, onnx_packed, pipeline
from joulemark_exporter.group_quantized import GroupQuantized, IntegerForm
from joulemark_exporter.quantizers import Floats, GgufTypes, Integers, gptq
from joulemark_exporter.writers import onnx as writer
from tests.fixtures import hub_models
from tests.fixtures.exporting import quiet, request, task


class Graph:
    """A graph in onnxruntime, with a memory of 64 positions that grows in place."""

    def __init__(self, path: Path, rows: int) -> None:
        self.session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.memory = {
            item.name: np.zeros((rows, item.shape[1], 64, item.shape[3]), np.float32)
            for item in self.session.get_inputs()
            if item.name.startswith("past_key_values.")
        }

    def run(
        self, tokens: np.ndarray, positions: Any, last: list[int], wanted: list[int], bias: Any = None, keys: Any = None
    ) -> np.ndarray:
        total = max(last) + 1
        feeds: dict[str, Any] = {
            "input_ids": tokens,
            "position_ids": np.array(positions),
            "attention_bias": np.zeros((1, 1, tokens.shape[1], total), np.float32) if bias is None else bias,
            "key_positions": np.arange(total) if keys is None else np.array(keys),
            "last_keys": np.array(last, np.int32),
            "total_keys": np.array([total], np.int32),
            "logit_positions": np.array(wanted),
        }
        binding = self.session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        for name, value in self.memory.items():
            shared = onnxruntime.OrtValue.ortvalue_from_numpy(value)
            binding.bind_ortvalue_input(name, shared)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), shared)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()


@pytest.mark.parametrize("family", hub_models.FAMILIES)
def test_the_graph_computes_what_transformers_computes(family: str, tmp_path: Path) -> None:
    model = hub_models.write(tmp_path / "base", family)
    tokens = torch.randint(5, 600, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(tokens).logits.numpy()
        other = torch.cat([tokens[:1, :20], tokens[1:, 20:24]], 1)
        second = model(other).logits.numpy()
    given = task(tmp_path / "base", tmp_path)
    facts = onnx_artifact.facts(given, "fp32", "fp32")
    onnx_graph.write(model, given.family.memory(given.model.config), tmp_path / "model.onnx", facts)
    ids, line = tokens.numpy(), np.arange(40)[None].repeat(2, 0)
    graph = Graph(tmp_path / "model.onnx", 2)
    first = graph.run(ids[:, :30], line[:, :30], [29, 29], list(range(30)))
    assert np.abs(first - expected[:, :30]).max() < 1e-4
    # One step of two rows of which one is shorter: it has forgotten its last ten positions.
    step = graph.run(np.stack([ids[0, 30:31], ids[1, 20:21]]), [[30], [20]], [30, 20], [0])
    assert np.abs(step[0, 0] - expected[0, 30]).max() < 1e-4
    assert np.abs(step[1, 0] - expected[1, 20]).max() < 1e-4
    # Two continuations of the first row's 20 tokens side by side, hidden from one another: its own, and the second row's.
    alone = Graph(tmp_path / "model.onnx", 1)
    alone.run(ids[:1, :20], line[:1, :20], [19], [19])
    bias = np.zeros((1, 1, 8, 28), np.float32)
    bias[0, 0, 4:, 20:24] = HIDDEN
    places = [*range(20, 24), *range(20, 24)]
    beside = np.concatenate([ids[:1, 20:24], ids[1:, 20:24]], 1)
    both = alone.run(beside, [places], [27], list(range(8)), bias, [*range(20), *places])
    assert np.abs(both[0, :4] - expected[0, 20:24]).max() < 1e-4
    assert np.abs(both[0, 4:] - second[0, 20:24]).max() < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_floats_the_whole_way(precision: str, tmp_path: Path) -> None:
    hub_models.write(tmp_path / "base", "llama")
    given = request(tmp_path / "base", "use = 'none'", f"[writer]\nuse = 'onnx'\nprecision = '{precision}'\n")
    exported = pipeline.export(given, quiet)
    manifest = artifact.verify(exported.folder)
    assert (manifest.format, manifest.quantization, manifest.context_tokens) == ("onnx", precision, 256)
    assert exported.report["findings"]["divergence"] < 1e-4
    again = pipeline.export(dataclasses.replace(given, out=tmp_path / "again"), quiet)
    assert again.manifest.files == manifest.files  # the same inputs, the same bytes


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma"]
)  # plain; matrices the other way round; a scaled embedding
def test_integers_the_whole_way(family: str, tmp_path: Path) -> None:
    hub_models.write(tmp_path / "base", family)
    given = request(
        tmp_path / "base",
        "use = 'gptq'\nsymmetric = false",
        "[writer]\nuse = 'onnx'\nprecision = 'int4'\naccuracy_level = 1\n",
    )
    exported = pipeline.export(given, quiet)
    assert artifact.verify(exported.folder).quantization == "GPTQ-4-g32"
    assert exported.report["findings"]["divergence"] < 0.2
    # The pipeline has compared logits; here the integers in the file with those that were chosen.
    (tmp_path / "work").mkdir()
    again = task(tmp_path / "base", tmp_path / "work")
    again = dataclasses.replace(again, calibration=given.recipe.calibration, cache=given.cache)
    chosen = gptq.quantize(again, gptq.Options(symmetric=False))
    names = onnx_packed.packed_names(again, chosen)
    stored = onnx_packed.read_back(onnx.load(exported.folder / "model.onnx"), names.values())
    compared = 0
    for name, choice in chosen.by_name.items():
        if isinstance(choice, Integers):
            matrix, found = choice.load(), stored[names[name]]
            assert np.array_equal(matrix.integers, found.integers), name
            assert np.array_equal(matrix.zeros, found.zeros) and np.array_equal(matrix.scales, found.scales), name
            compared += 1
    assert compared == len(again.family.matrices(again.model.config))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("symmetric", "groups"), [(True, 4), (False, 4), (False, 5)])
def test_onnxruntime_multiplies_with_the_integers(bits: int, symmetric: bool, groups: int, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    shape = (24, 16 * groups)
    zeros = np.full((24, groups), 1 << (bits - 1), np.uint8)
    if not symmetric:
        zeros = random.integers(0, 1 << bits, zeros.shape, np.uint8)
    scales = random.uniform(0.01, 0.02, zeros.shape).astype(np.float16)
    matrix = GroupQuantized(bits, 16, symmetric, random.integers(0, 1 << bits, shape, np.uint8), scales, zeros)
    bias = torch.randn(24)
    linear = onnx_packed.PackedLinear(onnx_packed.Packed(matrix), bias, 1).eval()
    torch.onnx.export(linear, (torch.zeros(3, shape[1]),), tmp_path / "linear.onnx", dynamo=True, verbose=False)
    given = random.normal(size=(3, shape[1])).astype(np.float32)
    session: Any = onnxruntime.InferenceSession(tmp_path / "linear.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: given})
    assert np.abs(found - (given @ matrix.dequantize().T + bias.numpy())).max() < 1e-4


def test_what_the_graphs_cannot_hold_is_said_before(tmp_path: Path) -> None:
    hub_models.write(tmp_path / "model", "llama")
    hub_models.write(tmp_path / "odd", "llama", head_dim=12)
    given, odd = task(tmp_path / "model", tmp_path), task(tmp_path / "odd", tmp_path)
    int4 = writer.Options(precision="int4")
    floats = Floats()
    for which, options, numbers, words in (
        (given, writer.Options(), IntegerForm(4, 32, True), "holds no integers"),
        (given, int4, floats, "needs integers"),
        (given, int4, GgufTypes(), "only GGUF has"),
        (given, writer.Options(), GgufTypes(), "only GGUF has"),
        (given, writer.Options(), Floats("F16"), "the writer F32"),
        (given, writer.Options(precision="fp16"), Floats("BF16"), "the writer F16"),
        (given, writer.Options(), Floats(embedding="Q8_0"), "Q8_0 has no place"),
        (given, int4, IntegerForm(8, 32, True), "cannot hold 8 bits"),
        (given, int4, IntegerForm(3, 32, True), "4 or 8 bits"),
        (given, int4, IntegerForm(4, 48, True), "4 or 8 bits"),
        (given, int4, IntegerForm(4, 32, True, contiguous=False), "4 or 8 bits"),
        (given, int4, IntegerForm(4, 32, True, embedding="Q6_K"), "Q6_K has no place"),
        (odd, writer.Options(), floats, "multiple of 8"),
    ):
        with pytest.raises(BadInput, match=words):
            writer.check(which, options, numbers)


def test_a_soft_cap_that_is_left_out_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers 4's fused attention does to Gemma 2: logits differ by a hundredth, which rounding alone never does."""
    hub_models.write(tmp_path / "base", "gemma2")
    attend = onnx_attention.Attention._attend

    def uncapped(self: Any, *given: Any) -> Any:
        return attend(self, *given[:-1], None)

    monkeypatch.setattr(onnx_attention.Attention, "_attend", uncapped)
    with pytest.raises(BadInput, match="something else from this file than its weights say"):
        pipeline.export(request(tmp_path / "base", "use = 'none'", "[writer]\nuse = 'onnx'\n"), quiet)
    assert not (tmp_path / "out").exists()


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
