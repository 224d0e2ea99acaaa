"""A GGUF as a source: what comes out is what went in, for every architecture that can be turned back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest

from joulemark.errors import BadInput, ModelRejected
from joulemark_exporter import checkpoint, gguf_source
from joulemark_exporter.quantizers import none, rtn
from joulemark_exporter.writers import gguf as writer
from tests.fixtures import hub_models
from tests.fixtures.exporting import task, write
from tests.fixtures.tiny_models import write_mamba


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"])
def test_weights_and_configuration_come_back(family: str, tmp_path: Path) -> None:
    hub_models.write(tmp_path / "model", family)
    original = checkpoint.open_folder(tmp_path / "model")
    found = gguf_source.open_file(write(tmp_path / "model", tmp_path / "out"), tmp_path / "cache")
    assert set(found.weights) == set(original.weights)
    for name, weight in original.weights.items():
        # Gemma's norms went up by one and came down again.
        assert np.abs(found.weights[name].whole() - weight.whole()).max() <= 1.2e-7, name
        assert np.array_equal(found.weights[name].read(1, 3), found.weights[name].whole()[1:3])
    # What was read is a model again: written once more it is the same file, but for the name of its tokenizer's folder.
    (tmp_path / "again").mkdir()
    given = dataclasses.replace(task(tmp_path / "model", tmp_path), model=found)
    again = writer.write(
        given, none.quantize(given, none.Options(type="F32")), tmp_path / "again", writer.Options()
    ).files[0]
    if not family.startswith("gemma"):
        assert again.read_bytes()[-100_000:] == (tmp_path / "out" / "model.gguf").read_bytes()[-100_000:]


def test_quantized_weights_are_widened(tmp_path: Path) -> None:
    hub_models.write(tmp_path / "model", "llama")
    path = write(
        tmp_path / "model",
        tmp_path / "out",
        rtn.quantize(task(tmp_path / "model", tmp_path), rtn.Options(embedding="Q8_0")),
    )
    model = gguf_source.open_file(path, tmp_path / "cache")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    down, table = stored["blk.1.ffn_down.weight"], stored["token_embd.weight"]
    assert model.weights["model.layers.1.mlp.down_proj.weight"].stored == "Q4_0"
    assert np.array_equal(
        model.weights["model.layers.1.mlp.down_proj.weight"].whole(), gguf.dequantize(down.data, down.tensor_type)
    )
    assert np.array_equal(
        model.weights["model.embed_tokens.weight"].read(7, 9), gguf.dequantize(table.data, table.tensor_type)[7:9]
    )


def test_files_that_cannot_be_turned_back_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="'mamba'"):
        gguf_source.open_file(write_mamba(tmp_path / "mamba.gguf"), tmp_path / "cache")
    hub_models.write(tmp_path / "scaled", "llama", rope_parameters={
        "rope_type": "llama3", "rope_theta": 1e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    })  # fmt: skip
    with pytest.raises(BadInput, match="scaled rotary"):
        gguf_source.open_file(write(tmp_path / "scaled", tmp_path / "out"), tmp_path / "cache")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "out" / "model.gguf").read_bytes()[:-3000])
    with pytest.raises(ModelRejected):
        gguf_source.open_file(tmp_path / "cut.gguf", tmp_path / "cache")
