"""Folders that others read: transformers finds the same model in them, and the integers are GPTQ's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from joulemark.errors import Conflict
from joulemark_exporter import checkpoint, configuration, hub_folder
from joulemark_exporter.quantizers import Integers, none, rtn
from tests.fixtures import hub_models
from tests.fixtures.exporting import WINDOW, task

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_transformers_finds_the_same_model(family: str, tmp_path: Path) -> None:
    model = hub_models.write(tmp_path / "model", family)
    hub_folder.write(checkpoint.open_folder(tmp_path / "model"), tmp_path / "out")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        assert torch.equal(loaded(WINDOW).logits, model(WINDOW).logits)
    own, copied = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("model", "out"))
    assert own("12345 naïve")["input_ids"] == copied("12345 naïve")["input_ids"]
    assert own.chat_template == copied.chat_template


@pytest.mark.parametrize("settings", [{"rope_type": "default", "rope_theta": 500_000.0}, LLAMA3])
def test_rotary_settings_are_written_for_both_generations(settings: dict[str, Any], tmp_path: Path) -> None:
    """transformers 4 takes theta 10000 without a word where there are only version 5's keys."""
    hub_models.write(tmp_path / "model", "llama", rope_parameters=settings)
    hub_folder.write(checkpoint.open_folder(tmp_path / "model"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 500_000.0
    legacy = {key: value for key, value in config.items() if key != "rope_parameters"}
    found = configuration.rope(legacy)
    assert (found.theta, found.kind) == (500_000.0, settings["rope_type"])
    assert (config["rope_scaling"] is None) == (settings["rope_type"] == "default")


@pytest.mark.parametrize(("family", "symmetric"), [("llama", True), ("llama", False), ("gpt2", True)])
def test_gptq_s_integers_come_back(
    family: str, symmetric: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_folder, "SHARD_BYTES", 60_000)
    hub_models.write(tmp_path / "model", family)
    given = task(tmp_path / "model", tmp_path)
    options = rtn.Options(symmetric=symmetric)
    choices = rtn.quantize(given, options)
    hub_folder.write(given.model, tmp_path / "out", choices, options.form(), "F16")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    found = checkpoint.open_folder(tmp_path / "out")
    integers = 0
    kept = none.quantize(dataclasses.replace(given, model=found), none.Options()).by_name
    turned = given.family.matrices(given.model.config)
    for name, choice in choices.by_name.items():
        if isinstance(choice, Integers):
            integers += 1
            expected, back = choice.load(), found.weights[name].integers
            assert back is not None
            values = expected.dequantize()
            assert np.array_equal(found.weights[name].whole(), values.T if turned[name].transposed else values)
            assert found.weights[name].form == dataclasses.replace(options.form(), embedding="Q8_0")
            assert isinstance(kept[name], Integers)
            for part in ("integers", "scales", "zeros"):
                assert np.array_equal(getattr(back(), part), getattr(expected, part))
    assert integers == len(turned)
    if family != "llama":
        return
    norm = "model.layers.0.input_layernorm.weight"
    assert np.array_equal(
        found.weights[norm].whole(), given.model.weights[norm].whole().astype(np.float16).astype(np.float32)
    )


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    hub_models.write(tmp_path / "model", "llama")
    model = checkpoint.open_folder(tmp_path / "model")
    name = "model.norm.weight"

    def fails(start: int, stop: int) -> Any:
        raise OSError(28, "No space left on device")

    broken = dataclasses.replace(
        model, weights={**model.weights, name: dataclasses.replace(model.weights[name], read=fails)}
    )
    with pytest.raises(OSError, match="No space"):
        hub_folder.write(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hub_folder.write(model, tmp_path / "out")
    with pytest.raises(Conflict, match="exists"):
        hub_folder.write(model, tmp_path / "out")
