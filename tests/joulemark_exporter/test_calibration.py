"""Calibration: windows are what the text says, moments are what the inputs are, and no evaluation item is among them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from joulemark import documents
from joulemark.errors import BadInput, NotFound
from joulemark.sources import default_cache
from joulemark_exporter import calibration, checkpoint, families, importance, texts
from joulemark_exporter.recipe import CalibrationSettings
from joulemark_exporter.walk import Walk
from tests.fixtures import hub_models
from tests.fixtures.exporting import task

TEXT = texts.Text(
    "made", "here", "0" * 64, tuple(f"Paragraph {number} speaks of {number * 7} things." for number in range(200))
)


def test_windows_are_consecutive_tokens_of_the_shuffled_text(tmp_path: Path) -> None:
    hub_models.write(tmp_path, "llama")
    model = checkpoint.open_folder(tmp_path)
    found = calibration.windows(model, TEXT, 5, 64, seed=3)
    encode, first = calibration.tokenizer(tmp_path)
    assert first == []
    whole = [token for document in texts.shuffled(TEXT, 3) for token in encode(document + "\n\n")]
    assert found.tokens.reshape(-1).tolist() == whole[: 5 * 64]
    assert not torch.equal(found.tokens, calibration.windows(model, TEXT, 5, 64, seed=4).tokens)
    assert torch.equal(found.tokens, calibration.windows(model, TEXT, 5, 64, seed=3).tokens)


def test_every_window_begins_as_a_prompt_on_the_board_does(tmp_path: Path) -> None:
    hub_models.write(tmp_path, "llama")
    hub_models.write_tokenizer(tmp_path, begins=True)
    found = calibration.windows(checkpoint.open_folder(tmp_path), TEXT, 5, 64, seed=None)
    assert found.beginning
    assert found.tokens[:, 0].tolist() == [0] * 5


def test_a_text_that_is_too_short_says_how_much_there_is(tmp_path: Path) -> None:
    hub_models.write(tmp_path, "llama")
    with pytest.raises(BadInput, match=r"makes \d+ windows of 512 tokens, 500 are asked for"):
        calibration.windows(checkpoint.open_folder(tmp_path), TEXT, 500, 512, seed=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_moments_are_those_of_the_inputs(family: str, tmp_path: Path) -> None:
    """Against hooks on the whole model: sums over all tokens of x·xᵀ, divided by their number."""
    model = hub_models.write(tmp_path, family)
    opened = checkpoint.open_folder(tmp_path)
    found_family = families.find(opened.model_type)
    windows = torch.randint(3, 600, (3, 32), generator=torch.Generator().manual_seed(0))
    seen: dict[tuple[int, int], list[torch.Tensor]] = {}
    for index, layer in enumerate(model.get_submodule(found_family.layers)):
        for linear in found_family.linears:
            layer.get_submodule(linear.name).register_forward_pre_hook(
                lambda _module, inputs, key=(index, linear.stage): seen.setdefault(key, []).append(
                    inputs[0].reshape(-1, inputs[0].shape[-1])
                )
            )
    with torch.inference_mode():
        model(windows)
    walk = Walk(opened, found_family)
    states = walk.embed(windows)
    for index in range(walk.layers):
        with walk.layer(index) as layer:
            with calibration.measured(layer, found_family, found_family.stages()) as full:
                walk.run(index, layer, states, keep=False)
            with calibration.measured(layer, found_family, found_family.stages(), diagonal=True) as diagonal:
                walk.run(index, layer, states)
        for stage, moments in full.items():
            rows = seen[index, stage][0].double()
            expected = (rows.T @ rows / len(rows)).numpy()
            assert np.allclose(moments, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
            assert np.allclose(diagonal[stage], np.diag(expected), rtol=1e-4)


def test_importance_is_measured_once_and_kept(tmp_path: Path) -> None:
    hub_models.write(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT.documents))
    settings = CalibrationSettings(dataset=str(tmp_path / "text.txt"), samples=3, tokens=32)
    steps: list[str] = []
    given = dataclasses.replace(
        task(tmp_path / "model", tmp_path),
        calibration=settings,
        cache=default_cache(),
        say=lambda step, *_: steps.append(step),
    )
    first, _ = importance.measure(given)
    assert steps
    steps.clear()
    second, _ = importance.measure(given)
    assert not steps
    assert set(first) == set(given.family.matrices(given.model.config))
    assert all(np.array_equal(first[name], second[name]) for name in first)


# --- texts ------------------------------------------------------------------------------------------------------------
def test_the_shipped_texts_hold_no_evaluation_item() -> None:
    for name in ("stories", "novels", "passages"):
        text = texts.load(name, default_cache())
        assert len(text.documents) > 400
        texts.refuse_evaluation_items(text, default_cache())


def test_an_evaluation_item_in_the_text_is_found() -> None:
    """Planted: one question of each evaluation in the middle of an innocent text, in other letters and line breaks."""
    for name, number in (("arc_challenge", 17), ("arc_easy", 900), ("gsm8k", 1318)):
        question = documents.load(name, default_cache()).docs[number]["question"]
        hidden = f"It was a dark night. {question.upper().replace(' ', chr(10), 3)} And so on."
        planted = dataclasses.replace(TEXT, documents=(*TEXT.documents[:5], hidden))
        with pytest.raises(BadInput, match=rf"evaluation item \({name} document {number}\)"):
            texts.refuse_evaluation_items(planted, default_cache())


def test_thirteen_words_of_an_item_are_enough_and_twelve_are_not() -> None:
    question = max((row["question"] for row in documents.load("gsm8k", default_cache()).docs), key=len)
    words = question.split()[20:40]
    for count, found in ((13, True), (12, False)):
        part = " ".join(re.findall(r"\w+", " ".join(words))[:count])
        planted = dataclasses.replace(TEXT, documents=(f"Once there was {part} and then nothing.",))
        if found:
            with pytest.raises(BadInput, match="evaluation item"):
                texts.refuse_evaluation_items(planted, default_cache())
        else:
            texts.refuse_evaluation_items(planted, default_cache())


def test_texts_by_name_and_path(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="known: stories"):
        texts.load("tales", tmp_path)
    with pytest.raises(NotFound, match="WikiText-2"):
        texts.load("wikitext-2-test", tmp_path, environment={})
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2" / "test.txt").write_text("another text")
    with pytest.raises(BadInput, match="not the WikiText-2 file"):
        texts.load("wikitext-2-test", tmp_path, environment={})
    (tmp_path / "own.txt").write_text("one\n\ntwo\n\n\n\nthree")
    assert texts.load(str(tmp_path / "own.txt"), tmp_path).documents == ("one", "two", "three")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="not UTF-8"):
        texts.load(str(tmp_path / "binary.txt"), tmp_path)
