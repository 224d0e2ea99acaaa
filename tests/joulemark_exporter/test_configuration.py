"""config.json of both generations of transformers, and what must not be guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from joulemark.errors import BadInput, NotFound
from joulemark_exporter import configuration
from joulemark_exporter.quantizers import Floats
from joulemark_exporter.writers import gguf as writer
from tests.fixtures import hub_models
from tests.fixtures.exporting import engine_logits, some_tokens, task, write

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "theta": {"rope_type": "default"},
    "llama3": LLAMA3,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("generation", [4, 5])
def test_rotary_settings_of_both_generations_reach_the_engine(kind: str, generation: int, tmp_path: Path) -> None:
    """The silent error: a reader of the other generation takes theta 10000 and no scaling, and all logits are wrong."""
    settings = {**SCALINGS[kind], "rope_theta": 500_000.0}
    model = hub_models.write(tmp_path / "model", "llama", rope_parameters=settings)
    if generation == 4:
        path = tmp_path / "model" / "config.json"
        config = json.loads(path.read_text())
        del config["rope_parameters"]
        config["rope_theta"] = 500_000.0
        config["rope_scaling"] = (
            None if kind == "theta" else {key: value for key, value in settings.items() if key != "rope_theta"}
        )
        path.write_text(json.dumps(config))
    tokens = some_tokens(100)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    found = engine_logits(write(tmp_path / "model", tmp_path / "out"), tokens)
    assert np.abs(found - expected).max() < 2e-3


def test_a_rotary_base_that_is_nowhere_is_not_guessed(tmp_path: Path) -> None:
    hub_models.write(tmp_path / "model", "llama")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps(config))
    with pytest.raises(BadInput, match="no rotary base"):
        writer.check(task(tmp_path / "model", tmp_path), writer.Options(), Floats())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "not hold a JSON object"),
        ("{}", "names no model_type"),
        ('{"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}', "auto_map"),
        ('{"model_type": "llama"' + " " * (5 << 20) + "}", "larger than"),
    ],
)
def test_hostile_files_are_refused(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BadInput, match=words):
        configuration.read(tmp_path)


def test_no_file() -> None:
    with pytest.raises(NotFound, match=r"config\.json"):
        configuration.read(Path("/nonexistent"))


@pytest.mark.parametrize("value", [0, -3, 1 << 30, 2.5, "12", True])
def test_sizes_are_whole_numbers_within_bounds(value: object) -> None:
    with pytest.raises(BadInput, match="hidden_size"):
        configuration.count({"hidden_size": value}, "hidden_size")
