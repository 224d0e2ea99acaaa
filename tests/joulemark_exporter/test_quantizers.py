"""What quantizers report and choose, against the same done by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from joulemark.errors import BadInput
from joulemark.sources import default_cache
from joulemark_exporter import calibration, ggml, importance, pipeline, sensitivity
from joulemark_exporter.quantizers import Rounded, Task, gptq, kquant, lobi
from joulemark_exporter.recipe import CalibrationSettings
from joulemark_exporter.rounding import Rounding, round_to_grid
from joulemark_exporter.writers import gguf as writer
from tests.fixtures import hub_models
from tests.fixtures.exporting import quiet, request, task

TYPES = ("Q4_0", "Q5_0", "Q8_0", "F16")


@pytest.fixture
def given(tmp_path: Path) -> Task:
    hub_models.write(tmp_path / "model", "llama")
    settings = CalibrationSettings(samples=6, tokens=48)
    return dataclasses.replace(task(tmp_path / "model", tmp_path), calibration=settings, cache=default_cache())


# --- ggml -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_ggml_rounds_as_the_published_library_does(kind: str) -> None:
    values = np.random.default_rng(0).standard_normal((70, 96)).astype(np.float32)
    number = gguf.GGMLQuantizationType[kind]
    expected = gguf.quantize(values, number)
    found = ggml.encode(values, kind, threads=2)
    assert np.array_equal(found, np.ascontiguousarray(expected).view(np.uint8).reshape(70, -1))
    assert np.array_equal(ggml.decode(found, kind, 96, threads=2), gguf.dequantize(expected, number))


@pytest.mark.parametrize("kind", ["Q3_K", "Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_importance_puts_the_error_where_it_matters_less(kind: str) -> None:
    random = np.random.default_rng(1)
    values = random.standard_normal((64, 256)).astype(np.float32)
    weights = np.where(np.arange(256) % 8 == 0, 50.0, 0.1).astype(np.float32)
    plain, weighed = (ggml.decode(ggml.encode(values, kind, given), kind, 256) for given in (None, weights))
    assert (np.square(weighed - values) @ weights).sum() < (np.square(plain - values) @ weights).sum()
    assert np.array_equal(
        ggml.decode(ggml.encode(values, kind), kind, 256),
        gguf.dequantize(ggml.encode(values, kind), gguf.GGMLQuantizationType[kind]),
    )


def test_what_ggml_cannot_do_is_refused() -> None:
    values = np.ones((2, 64), np.float32)
    for kind, weights, words in (
        ("Q4_K", None, "blocks hold 256"),
        ("Q9_9", None, "no tensor type"),
        ("IQ2_XXS", None, "blocks hold 256"),
        ("Q4_0", np.ones(63, np.float32), "does not fit rows of 64"),
    ):
        with pytest.raises(BadInput, match=words):
            ggml.encode(values, kind, weights)
    with pytest.raises(BadInput, match="needs an importance"):
        ggml.encode(np.ones((1, 256), np.float32), "IQ2_XXS")
    with pytest.raises(BadInput, match="does not fit F16"):
        ggml.encode(values * 1e6, "F16")


# --- GPTQ -------------------------------------------------------------------------------------------------------------
def test_gptq_reports_output_errors_that_are_right_and_below_rtn_s(given: Task) -> None:
    """The first layer's errors by hand: its inputs are those of the unquantized model."""
    model = hub_models.build("llama")
    windows = calibration.calibration_windows(given.model, given.calibration, given.cache)
    seen: list[torch.Tensor] = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0].reshape(-1, 64))
    )
    with torch.inference_mode():
        model(windows.tokens)
    choices = gptq.quantize(given, gptq.Options())
    table = json.loads(choices.tables["gptq.json"])
    weight = given.model.weights["model.layers.0.self_attn.q_proj.weight"].whole().astype(np.float64)
    inputs = seen[0].double().numpy().T
    chosen = choices.by_name["model.layers.0.self_attn.q_proj.weight"].load().dequantize()  # type: ignore[union-attr]
    nearest = round_to_grid(weight.astype(np.float32), Rounding()).dequantize()
    for name, rounded in (("gptq", chosen), ("rtn", nearest)):
        expected = np.square((weight - rounded) @ inputs).sum() / np.square(weight @ inputs).sum()
        assert table["layers"][0]["errors"]["self_attn.q_proj"][name] == pytest.approx(expected, rel=1e-4)
    every = [error for layer in table["layers"] for error in layer["errors"].values()]
    assert len(every) == 3 * 7
    assert all(error["gptq"] < error["rtn"] for error in every)


def test_later_layers_are_measured_behind_quantized_ones(given: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first layer left as it was, the second one's moments, and so its integers, are others."""
    name = "model.layers.2.mlp.down_proj.weight"
    proper = gptq.quantize(given, gptq.Options()).by_name[name].load().integers  # type: ignore[union-attr]
    original = gptq._matrix  # pyright: ignore[reportPrivateUsage]

    def keep(*arguments: Any) -> Any:
        module = arguments[2]
        before = module.weight.data
        found = original(*arguments)
        module.weight.data = before
        return found

    monkeypatch.setattr(gptq, "_matrix", keep)
    work = given.work / "other"
    work.mkdir()
    stale = gptq.quantize(dataclasses.replace(given, work=work), gptq.Options()).by_name[name].load().integers  # type: ignore[union-attr]
    assert not np.array_equal(proper, stale)


def test_true_sequential_gives_other_integers_from_the_second_stage_on(given: Task) -> None:
    found = {}
    for name, sequential in (("plain", False), ("sequential", True)):
        work = given.work / name
        work.mkdir()
        found[name] = gptq.quantize(
            dataclasses.replace(given, work=work), gptq.Options(true_sequential=sequential)
        ).by_name

    def equal(linear: str) -> bool:
        name = f"model.layers.0.{linear}.weight"
        one, other = (found[key][name].load().integers for key in ("plain", "sequential"))  # type: ignore[union-attr]
        return bool(np.array_equal(one, other))

    assert equal("self_attn.q_proj")
    assert not equal("self_attn.o_proj")
    assert not equal("mlp.down_proj")


# --- llama.cpp's own --------------------------------------------------------------------------------------------------
def test_the_engine_s_quantizer_uses_our_importance_and_types(given: Task) -> None:
    options = kquant.Options(type="Q5_0", pure=True, tensors={r"blk\.1\.ffn_up": "Q8_0"})
    path = writer.write(given, kquant.quantize(given, options), given.work, writer.Options()).files[0]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert tensors["blk.1.ffn_up.weight"].tensor_type.name == "Q8_0"
    weights = importance.measure(given)[0]["model.layers.0.mlp.down_proj.weight"]
    values = given.model.weights["model.layers.0.mlp.down_proj.weight"].whole()
    stored = tensors["blk.0.ffn_down.weight"]
    assert stored.tensor_type.name == "Q5_0"
    assert np.array_equal(stored.data, ggml.encode(values, "Q5_0", weights))
    assert not np.array_equal(stored.data, ggml.encode(values, "Q5_0"))


# --- Lo-Bi ------------------------------------------------------------------------------------------------------------
def test_sensitivities_are_divergences_measured_one_matrix_at_a_time(given: Task) -> None:
    """By hand: the class itself with that matrix rounded, compared on the same tokens."""
    weights, windows = importance.measure(given)
    tokens = windows.tokens[:2, :32]
    rows = {row.name: row for row in sensitivity.measure(given, TYPES, weights, tokens)}
    model = hub_models.build("llama")
    with torch.inference_mode():
        true = model(tokens).logits.double().log_softmax(-1)
    names = [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
    ]
    for name in names:
        parameter = model.get_parameter(name)
        kept = parameter.data.clone()
        rounded = sensitivity.rounded(kept.numpy(), rows[name].cheapest, weights.get(name), 1)
        parameter.data = torch.from_numpy(rounded)
        with torch.inference_mode():
            found = model(tokens).logits.double().log_softmax(-1)
        parameter.data = kept
        expected = float((true.exp() * (true - found)).sum(-1).mean())
        assert rows[name].divergence == pytest.approx(expected, rel=1e-3, abs=1e-7), name
        assert rows[name].cheapest == "Q4_0"
    assert len(rows) == 2 + 3 * 7


def test_errors_of_types_are_weighed_and_scaled(given: Task) -> None:
    weights, windows = importance.measure(given)
    rows = {row.name: row for row in sensitivity.measure(given, TYPES, weights, windows.tokens[:1, :32])}
    name = "model.layers.1.mlp.gate_proj.weight"
    values, row = given.model.weights[name].whole(), rows[name]
    errors = {
        kind: float((np.square(values - sensitivity.rounded(values, kind, weights[name], 1)) @ weights[name]).sum())
        for kind in TYPES
    }
    for kind in TYPES:
        size, divergence = row.candidates[kind]
        assert size == values.shape[0] * ggml.row_bytes(kind, values.shape[1])
        assert divergence == pytest.approx(row.divergence * errors[kind] / errors["Q4_0"], rel=1e-4)
    assert errors["Q4_0"] > errors["Q5_0"] > errors["Q8_0"] > errors["F16"]


def test_lobi_keeps_the_budget_and_beats_one_type_of_the_same_bytes(given: Task, tmp_path: Path) -> None:
    sizes = {name: weight.size for name, weight in given.model.weights.items() if len(weight.shape) == 2}
    budget = sum(sizes.values()) * ggml.row_bytes("Q5_0", 64) // 64
    options = lobi.Options(budget_bytes=budget, types=TYPES, windows=2, tokens=48)
    choices = lobi.quantize(given, options)
    table = json.loads(choices.tables["sensitivity.json"])
    used = 0
    for name, choice in choices.by_name.items():
        assert isinstance(choice, Rounded)
        shape = given.model.weights[name].shape
        used += shape[0] * ggml.row_bytes(choice.type_name, shape[1])
    assert used == table["bytes"] <= budget
    assert {row["name"]: row["chosen"] for row in table["matrices"]} == {
        name: choice.type_name for name, choice in choices.by_name.items()
    }  # type: ignore[union-attr]
    found = {}
    recipes = {
        "lobi": f"use = 'lobi'\nbudget_bytes = {budget}\ntypes = {list(TYPES)}\nwindows = 2\ntokens = 48",
        "uniform": "use = 'kquant'\ntype = 'Q5_0'\npure = true",
    }
    for name, quantizer in recipes.items():
        exported = pipeline.export(request(tmp_path / "model", quantizer, out=tmp_path / name), quiet)
        found[name] = (exported.report["findings"]["divergence"], exported.manifest.weight_bytes)
    assert found["lobi"][1] <= found["uniform"][1]
    assert found["lobi"][0] < found["uniform"][0]
