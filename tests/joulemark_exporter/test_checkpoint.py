"""Checkpoints: shards, tied weights, both GPTQ formats, and everything that can be wrong with them, said before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from joulemark.errors import BadInput, NotFound
from joulemark_exporter import checkpoint, packing
from joulemark_exporter.rounding import Rounding, round_to_grid
from tests.fixtures import hub_models

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hub_models.write(tmp_path / "model", "llama")
    return tmp_path / "model"


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = dict(load_file(path))
    change(tensors)
    save_file(tensors, path)


def configure(folder: Path, **changed: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def test_every_number_is_read_as_it_is_stored(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    model = checkpoint.open_folder(folder)
    assert set(model.weights) == set(stored)
    for name, values in stored.items():
        weight = model.weights[name]
        assert np.array_equal(weight.whole(), values)
        assert np.array_equal(weight.read(1, 3), values[1:3])
        assert weight.read(0, 1).flags.owndata


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened_exactly(folder: Path, kind: Any) -> None:
    def narrow(tensors: dict[str, Any]) -> None:
        tensors.update({name: values.astype(kind) for name, values in tensors.items()})

    rewrite(folder, narrow)
    weight = checkpoint.open_folder(folder).weights[f"{UP}.weight"]
    assert weight.stored in ("F16", "BF16")
    assert np.array_equal(weight.whole(), load_file(folder / "model.safetensors")[f"{UP}.weight"].astype(np.float32))


def test_shards_are_one_model(folder: Path, tmp_path: Path) -> None:
    whole = checkpoint.open_folder(folder)
    hub_models.write(tmp_path / "sharded", "llama", shards=True)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    sharded = checkpoint.open_folder(tmp_path / "sharded")
    assert all(np.array_equal(sharded.weights[name].whole(), weight.whole()) for name, weight in whole.weights.items())
    gone = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(NotFound, match=gone.name):
        checkpoint.open_folder(tmp_path / "sharded")


def test_an_index_that_leaves_its_folder_is_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    with pytest.raises(BadInput, match="outside its folder"):
        checkpoint.open_folder(folder)


def test_the_digest_changes_with_every_file_that_matters(folder: Path) -> None:
    before = checkpoint.digest(folder)
    assert checkpoint.open_folder(folder).lineage == (("checkpoint", before),)
    configure(folder, rms_norm_eps=1e-4)
    changed = checkpoint.digest(folder)
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b" ")
    assert len({before, changed, checkpoint.digest(folder)}) == 3


def test_checkpoints_of_the_bare_model_are_read(tmp_path: Path) -> None:
    """The hub's gpt2 has no prefix, and buffers that nobody reads."""
    model = hub_models.write(tmp_path, "gpt2")

    def strip(tensors: dict[str, Any]) -> None:
        bare = {name.removeprefix("transformer."): values for name, values in tensors.items()}
        tensors.clear()
        tensors.update(
            {
                **bare,
                "h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32),
                "h.0.attn.masked_bias": np.ones((), np.float32),
            }
        )

    rewrite(tmp_path, strip)
    found = checkpoint.open_folder(tmp_path).weights["transformer.h.2.mlp.c_fc.weight"].whole()
    assert np.array_equal(found, model.transformer.h[2].mlp.c_fc.weight.detach().numpy())


def test_what_is_wrong_with_tensors_is_said(folder: Path) -> None:
    values = load_file(folder / "model.safetensors")[f"{UP}.weight"]
    cases: list[tuple[Any, str]] = [
        (lambda tensors: tensors.pop(f"{UP}.weight"), f"lacks the tensor {UP}"),
        (lambda tensors: tensors.update({f"{UP}.weight": values.T.copy()}), r"shape \(64, 160\).*implies \(160, 64\)"),
        (lambda tensors: tensors.update({f"{UP}.weight": values.astype(np.int32)}), "stored as I32"),
        (
            lambda tensors: tensors.update({f"{UP}.weight": values, "vision.weight": values}),
            r"vision\.weight.*no place|no place.*vision\.weight",
        ),
    ]
    for change, words in cases:
        rewrite(folder, change)
        with pytest.raises(BadInput, match=words):
            checkpoint.open_folder(folder)


def test_files_that_are_no_safetensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(BadInput, match="not a readable safetensors"):
        checkpoint.open_folder(folder)
    path.unlink()
    with pytest.raises(NotFound, match="no weights"):
        checkpoint.open_folder(folder)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match="pickle"):
        checkpoint.open_folder(folder)


# --- GPTQ -------------------------------------------------------------------------------------------------------------
def as_gptq(folder: Path, version: str, bits: int = 4, symmetric: bool = True) -> dict[str, Any]:
    chosen: dict[str, Any] = {}

    def quantize(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "proj" in name]:
            matrix = round_to_grid(tensors.pop(name), Rounding(bits, 32, symmetric))
            chosen[name] = matrix
            for part, values in packing.to_gptq(matrix, version).items():
                tensors[f"{name.removesuffix('weight')}{part}"] = values

    rewrite(folder, quantize)
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": symmetric, "desc_act": False}
    configure(folder, quantization_config={**settings, "checkpoint_format": version})
    return chosen


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (3, False)])
def test_gptq_checkpoints_keep_their_integers(folder: Path, version: str, bits: int, symmetric: bool) -> None:
    chosen = as_gptq(folder, version, bits, symmetric)
    weights = checkpoint.open_folder(folder).weights
    assert len(chosen) == 3 * 7
    for name, matrix in chosen.items():
        assert weights[name].integers is not None
        assert np.array_equal(weights[name].integers().integers, matrix.integers)
        assert np.array_equal(weights[name].whole(), matrix.dequantize())
        assert np.array_equal(weights[name].read(2, 5), matrix.dequantize()[2:5])


def test_gptq_of_the_wrong_format_is_noticed(folder: Path) -> None:
    """The silent error: zero points that are one off."""
    as_gptq(folder, "gptq_v2")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    configure(folder, quantization_config={**config, "checkpoint_format": "gptq"})
    with pytest.raises(BadInput, match="not in the middle"):
        checkpoint.open_folder(folder).weights[f"{UP}.weight"].whole()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "gptq", "bits": 5, "group_size": 32}, "5 bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "groups of 0"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}, "marlin"),
        ("x", "'x'"),
    ],
)
def test_other_quantizations_are_refused(folder: Path, settings: Any, words: str) -> None:
    configure(folder, quantization_config=settings)
    with pytest.raises(BadInput, match=words):
        checkpoint.open_folder(folder)
