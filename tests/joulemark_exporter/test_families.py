"""Every family's list of tensors is its class's own, and the layer-by-layer walk computes what the class computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from joulemark.errors import BadInput
from joulemark_exporter import checkpoint, families
from joulemark_exporter.walk import Walk
from tests.fixtures import hub_models


@pytest.mark.parametrize("family", hub_models.FAMILIES)
def test_the_tensors_are_those_of_the_class(family: str) -> None:
    model = hub_models.build(family)
    found = families.find(model.config.model_type)
    stated = {tensor.name: tensor.shape for tensor in found.tensors(model.config.to_dict())}
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if found.is_tied(model.config.to_dict()):
        own.pop("lm_head.weight", None)
    assert stated == own


@pytest.mark.parametrize("family", hub_models.FAMILIES)
def test_the_walk_computes_what_the_class_computes(family: str, tmp_path: Path) -> None:
    model = hub_models.write(tmp_path, family)
    opened = checkpoint.open_folder(tmp_path)
    walk = Walk(opened, families.find(opened.model_type))
    windows = torch.randint(3, 600, (2, 40), generator=torch.Generator().manual_seed(0))
    states = walk.embed(windows)
    for index in range(walk.layers):
        with walk.layer(index) as layer:
            walk.run(index, layer, states)
        assert all(parameter.is_meta for parameter in walk._real[index].parameters())  # pyright: ignore[reportPrivateUsage]
    with torch.inference_mode():
        expected = model(windows).logits
    for window in range(2):
        assert (walk.logits(states[window]) - expected[window]).abs().max() < 1e-5


def test_stored_states_are_taken_up_where_they_were(tmp_path: Path) -> None:
    model = hub_models.write(tmp_path, "gemma3")
    opened = checkpoint.open_folder(tmp_path)
    windows = torch.randint(3, 600, (2, 40), generator=torch.Generator().manual_seed(0))
    first = Walk(opened, families.find(opened.model_type))
    states = first.embed(windows)
    for index in range(3):
        with first.layer(index) as layer:
            first.run(index, layer, states)
    second = Walk(opened, families.find(opened.model_type))
    states = second.prepare(windows, states)
    for index in range(3, second.layers):
        with second.layer(index) as layer:
            second.run(index, layer, states)
    with torch.inference_mode():
        assert (second.logits(states[1]) - model(windows).logits[1]).abs().max() < 1e-5


def test_linears_are_those_that_share_an_input_in_order() -> None:
    config = hub_models.build("llama").config.to_dict()
    found = families.find("llama").matrices(config)
    assert len(found) == 3 * 7
    assert next(iter(found)) == "model.layers.0.self_attn.q_proj.weight"


def test_an_unknown_family_is_named_with_the_known_ones() -> None:
    with pytest.raises(BadInput, match="'mamba'"):
        families.find("mamba")


@pytest.mark.parametrize(
    ("family", "changed", "words"),
    [
        ("gemma2", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar"),
        ("gemma3", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar"),
        ("gemma3", {"layer_types": ["sliding_attention"] * 7}, "not windowed as"),
        ("qwen2", {"use_sliding_window": True}, "sliding window"),
        ("gpt2", {"activation_function": "relu"}, "relu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scales its attention"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "residual"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ],
)
def test_variants_that_llama_cpp_computes_otherwise_are_refused(
    family: str, changed: dict[str, object], words: str
) -> None:
    config = {**hub_models.build(family).config.to_dict(), **changed}
    found = families.find(config["model_type"])
    with pytest.raises(BadInput, match=words):
        found.tensors(config)
        found.metadata(config)
