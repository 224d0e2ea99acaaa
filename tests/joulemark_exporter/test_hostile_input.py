"""Files from outside, spoiled at random: whatever they say, the answer is one of our errors or a result, never another exception."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from joulemark.errors import JoulemarkError
from joulemark_exporter import checkpoint, families, gguf_tokenizer, lora, recipe
from tests.fixtures import hub_models
from tests.fixtures.exporting import train
from tests.fixtures.json_places import places

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
SETTINGS = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def spoil(value: Any, data: st.DataObject) -> Any:
    spoiled = copy.deepcopy(value)
    for _ in range(data.draw(st.integers(1, 2))):
        if not (found := list(places(spoiled))):
            break
        place, key = found[data.draw(st.integers(0, len(found) - 1))]
        if isinstance(place, dict) and data.draw(st.booleans()):
            place.pop(key)
        else:
            place[key] = data.draw(JUNK)
    return spoiled


def survives(work: Callable[[], object]) -> None:
    try:
        work()
    except JoulemarkError as error:
        assert error.message
        assert error.hint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    hub_models.write(folder, "llama")
    return folder


@given(st.data(), st.sampled_from(hub_models.FAMILIES))
@SETTINGS
def test_config_json(data: st.DataObject, name: str) -> None:
    config = _configs()[name]
    spoiled = spoil(config, data)

    def work() -> None:
        family = families.find(config["model_type"])
        family.tensors(spoiled)
        family.context(spoiled)
        family.metadata(spoiled)
        family.generated(spoiled)

    survives(work)


def _configs() -> dict[str, Any]:
    if not _CONFIGS:
        _CONFIGS.update(
            {
                name: json.loads(hub_models.build(name).config.to_json_string(use_diff=False))
                for name in hub_models.FAMILIES
            }
        )
    return _CONFIGS


_CONFIGS: dict[str, Any] = {}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@given(st.data())
@SETTINGS
def test_tokenizers(name: str, model: Path, data: st.DataObject) -> None:
    path = model / name
    whole = path.read_text()
    try:
        path.write_text(json.dumps(spoil(json.loads(whole), data)))
        survives(lambda: gguf_tokenizer.read(model, hub_models.VOCABULARY))
    finally:
        path.write_text(whole)


@given(st.data())
@SETTINGS
def test_a_quantization_config(model: Path, data: st.DataObject) -> None:
    path = model / "config.json"
    whole = path.read_text()
    stated = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
    }
    try:
        path.write_text(json.dumps({**json.loads(whole), "quantization_config": spoil(stated, data)}))
        survives(lambda: checkpoint.open_folder(model))
    finally:
        path.write_text(whole)


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    train(model, folder, "llama", rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 3})
    return folder


@given(st.data())
@SETTINGS
def test_an_adapter_s_config(model: Path, adapter: Path, data: st.DataObject) -> None:
    path = adapter / "adapter_config.json"
    whole = path.read_text()
    try:
        path.write_text(json.dumps(spoil(json.loads(whole), data)))
        survives(lambda: lora.fold(checkpoint.open_folder(model), [(lora.read_adapter(adapter), 1.0)]))
    finally:
        path.write_text(whole)


def test_a_pattern_that_would_never_end_is_refused(model: Path, adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    whole = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(whole), "rank_pattern": {"(a|a.|.a|l|.)+x": 4}}))
        with pytest.raises(JoulemarkError, match="adapter_config"):
            lora.read_adapter(adapter)
    finally:
        path.write_text(whole)


@given(st.text(max_size=60))
@SETTINGS
def test_recipes(text: str) -> None:
    survives(lambda: recipe.parse(f"[quantizer]\nuse = 'gptq'\n{text}"))


def test_a_shard_that_is_cut_short(model: Path, tmp_path: Path) -> None:
    for cut in (3, 9, 500, 4000, 60_000):
        for path in model.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        whole = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(JoulemarkError, match="not a readable safetensors"):
            checkpoint.open_folder(tmp_path)


@pytest.mark.parametrize("name", hub_models.FAMILIES)
def test_sizes_that_no_model_has_cost_nothing(name: str) -> None:
    """Each of them alone would make millions of tensors, or an order of rows of gigabytes."""
    config = _configs()[name]
    family = families.find(config["model_type"])
    sizes = [
        key
        for key, value in config.items()
        if key.startswith(("num_", "n_", "hidden_size", "head_dim", "ffn_dim")) and value
    ]
    refused = 0
    for key in sizes:
        try:
            family.tensors({**config, key: 1 << 23})
        except JoulemarkError:
            refused += 1
    assert refused >= 3, sizes
