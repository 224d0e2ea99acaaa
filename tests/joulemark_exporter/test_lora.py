"""Folded adapters against PEFT itself: the same logits, for every rule of scales; and what must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from joulemark.errors import BadInput, NotFound
from joulemark_exporter import checkpoint, lora
from joulemark_exporter.weights import Model
from tests.fixtures import hub_models
from tests.fixtures.exporting import CASES, WINDOW, logits_of, train


def peft_logits(base: Path, adapters: dict[str, Path]) -> torch.Tensor:
    loaded: Any = AutoModelForCausalLM.from_pretrained(base)
    model: Any = None
    for name, path in adapters.items():
        if model is None:
            model = PeftModel.from_pretrained(loaded, path, adapter_name=name)
        else:
            model.load_adapter(path, adapter_name=name)
    model.base_model.set_adapter(list(adapters))
    with torch.inference_mode():
        return model.eval()(WINDOW).logits[0]


@pytest.mark.parametrize("case", CASES)
def test_a_folded_adapter_computes_what_peft_computes(case: str, tmp_path: Path) -> None:
    family, settings = CASES[case]
    base = tmp_path / "base"
    hub_models.write(base, family)
    train(base, tmp_path / "adapter", family, **settings)
    model = checkpoint.open_folder(base)
    expected = peft_logits(base, {"one": tmp_path / "adapter"})
    found = logits_of(lora.fold(model, [(lora.read_adapter(tmp_path / "adapter"), 1.0)]))
    assert (expected - logits_of(model)).abs().max() > 0.1, "an adapter that changes nothing would hide a fault"
    assert (found - expected).abs().max() < 1e-4


def test_two_adapters_add_up_each_with_its_scale(tmp_path: Path) -> None:
    base = tmp_path / "base"
    hub_models.write(base, "llama")
    train(base, tmp_path / "first", "llama", seed=1)
    train(base, tmp_path / "second", "llama", seed=2, r=6, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    both = {"first": tmp_path / "first", "second": tmp_path / "second"}
    expected = peft_logits(base, both)
    model = checkpoint.open_folder(base)
    adapters = {name: lora.read_adapter(path) for name, path in both.items()}
    found = logits_of(lora.fold(model, [(adapters["first"], 1.0), (adapters["second"], 1.0)]))
    assert (found - expected).abs().max() < 1e-4
    # Twice half an adapter is the adapter; and the lineage says what was done.
    halves = lora.fold(model, [(adapters["first"], 0.5), (adapters["first"], 0.5), (adapters["second"], 1.0)])
    assert (logits_of(halves) - expected).abs().max() < 1e-4
    assert [step for step, _ in halves.lineage[1:]] == [
        "adapter first × 0.5",
        "adapter first × 0.5",
        "adapter second × 1",
    ]


def test_rows_are_folded_as_they_are_read(tmp_path: Path) -> None:
    base = tmp_path / "base"
    hub_models.write(base, "gpt2")
    train(base, tmp_path / "adapter", "gpt2", fan_in_fan_out=True, use_dora=True)
    folded = lora.fold(checkpoint.open_folder(base), [(lora.read_adapter(tmp_path / "adapter"), 1.0)])
    for name in ("transformer.h.1.attn.c_attn.weight", "transformer.h.2.mlp.c_fc.weight"):
        weight = folded.weights[name]
        whole = weight.whole()
        assert np.array_equal(np.concatenate([weight.read(0, 7), weight.read(7, weight.shape[0])]), whole)


# --- what is refused --------------------------------------------------------------------------------------------------
@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Path]:
    hub_models.write(tmp_path / "base", "llama")
    train(tmp_path / "base", tmp_path / "adapter", "llama")
    return tmp_path / "base", tmp_path / "adapter"


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = dict(load_file(path))
    change(tensors)
    save_file(tensors, path)


def configure(folder: Path, **changed: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def fold(base: Path, adapter: Path) -> Model:
    return lora.fold(checkpoint.open_folder(base), [(lora.read_adapter(adapter), 1.0)])


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"


def test_an_untrained_adapter_is_reported(trained: tuple[Path, Path]) -> None:
    def clear(tensors: dict[str, np.ndarray]) -> None:
        for name in tensors:
            if "lora_B" in name:
                tensors[name] = np.zeros_like(tensors[name])

    rewrite(trained[1], clear)
    assert len(lora.read_adapter(trained[1]).untrained) == 3 * 7
    with pytest.raises(BadInput, match="untrained"):
        fold(*trained)


def test_an_adapter_of_another_base_is_refused(trained: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    hub_models.write(other, "llama", hidden_size=96)
    with pytest.raises(BadInput, match=r"64.*the model's is .*96"):
        fold(other, trained[1])
    hub_models.write(other, "llama", num_hidden_layers=2)
    with pytest.raises(BadInput, match=r"layers\.2.*does not have"):
        fold(other, trained[1])


def test_a_rank_above_the_layer_is_refused(trained: tuple[Path, Path]) -> None:
    def widen(tensors: dict[str, np.ndarray]) -> None:
        for letter, shape in (("A", (70, 64)), ("B", (64, 70))):
            tensors[KEY.format(letter)] = np.ones(shape, np.float32)

    rewrite(trained[1], widen)
    configure(trained[1], rank_pattern={r"layers\.1\.self_attn\.q_proj": 70})
    with pytest.raises(BadInput, match="above the layer"):
        fold(*trained)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"use_dora": True}, "magnitudes"),
        ({"r": 5}, "rank 4.*says 5"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"alpha_pattern": {"(": 3}}, "not one"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(
    trained: tuple[Path, Path], changed: dict[str, Any], words: str
) -> None:
    configure(trained[1], **changed)
    with pytest.raises(BadInput, match=words):
        fold(*trained)


def test_a_diverged_or_incomplete_adapter_is_refused(trained: tuple[Path, Path]) -> None:
    def poison(tensors: dict[str, np.ndarray]) -> None:
        tensors[KEY.format("B")][3, 1] = np.nan

    rewrite(trained[1], poison)
    with pytest.raises(BadInput, match="NaN"):
        fold(*trained)
    rewrite(trained[1], lambda tensors: tensors.pop(KEY.format("B")))
    with pytest.raises(BadInput, match="lacks lora_B"):
        fold(*trained)


def test_pickles_are_not_read(trained: tuple[Path, Path]) -> None:
    (trained[1] / "adapter_model.safetensors").rename(trained[1] / "adapter_model.bin")
    with pytest.raises(NotFound, match=r"adapter_model\.safetensors"):
        lora.read_adapter(trained[1])


def test_the_ends_of_a_tied_model_are_not_changed_alone(tmp_path: Path) -> None:
    hub_models.write(tmp_path / "base", "llama", tie_word_embeddings=True)
    train(tmp_path / "base", tmp_path / "adapter", "llama", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(BadInput, match="tied"):
        fold(tmp_path / "base", tmp_path / "adapter")
