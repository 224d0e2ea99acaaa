"""The GGUF writer beside llama.cpp's converter and beside transformers, for every family; and its tensors beside the integers chosen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from joulemark.errors import BadInput
from joulemark_exporter.quantizers import Floats, Integers, none, rtn
from joulemark_exporter.writers import gguf as writer
from tests.fixtures import hub_models, llama_cpp_source
from tests.fixtures.exporting import engine_logits, some_tokens, task, write

WRITABLE = tuple(name for name in hub_models.FAMILIES if name != "opt")
# ggml computes GELU from a table of 16-bit floats; SiLU it computes in full.
TABLED = ("gemma", "gemma2", "gemma3", "gpt2", "bloom")


@pytest.mark.parametrize("family", WRITABLE)
def test_every_family_computes_what_transformers_computes(family: str, tmp_path: Path) -> None:
    model = hub_models.write(tmp_path / "model", family)
    tokens = some_tokens()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    found = engine_logits(write(tmp_path / "model", tmp_path / "out"), tokens)
    assert expected.std() > 0.5, "logits that hardly differ would hide a fault"
    assert np.abs(found - expected).max() < (3e-2 if family in TABLED else 1e-3)


@pytest.mark.parametrize("family", WRITABLE)
@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_the_file_is_the_one_that_llama_cpp_s_converter_writes(family: str, kind: str, tmp_path: Path) -> None:
    """Every tensor bit for bit, so that logits are equal too; and every key-value that decides about a result."""
    hub_models.write(tmp_path / "model", family)
    if family == "gpt2":
        _state_context(tmp_path / "model")
    if family.startswith("gemma"):  # llama.cpp's converter takes Gemma with SentencePiece only
        (tmp_path / "model" / "tokenizer.json").unlink()
        hub_models.write_sentencepiece(tmp_path / "model")
    theirs = tmp_path / "theirs.gguf"
    llama_cpp_source.convert(tmp_path / "model", theirs, "smollm", kind.lower())
    ours = gguf.GGUFReader(write(tmp_path / "model", tmp_path / "out", kind=kind))
    reference = gguf.GGUFReader(theirs)
    found = {tensor.name: tensor for tensor in ours.tensors}
    for tensor in reference.tensors:
        own = found.pop(tensor.name)
        assert own.tensor_type == tensor.tensor_type, tensor.name
        assert np.array_equal(own.data, tensor.data), tensor.name
    assert not found
    found_facts, expected_facts = _facts(ours), _facts(reference)
    for key in (*ALLOWED.get(family, ()), "tokenizer.ggml.add_bos_token"):
        found_facts.pop(key, None)
        expected_facts.pop(key, None)
    assert found_facts == expected_facts


def _state_context(folder: Path) -> None:
    """llama.cpp's converter wants a key that transformers 5 no longer writes."""
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"n_positions"', '"n_ctx": 256, "n_positions"'))


# Where we differ on purpose, or the converter states what is llama.cpp's default. And we always state whether a text begins with the
# special token, because that default depends on the pre-tokenizer's name; test_gguf_tokenizer compares the tokens.
ALLOWED = {
    "bloom": ("bloom.context_length",),  # the converter takes the width for the context where config.json does not say
    "gemma": ("gemma.rope.freq_base",),  # the converter leaves it to llama.cpp's default
    "gemma2": ("gemma2.rope.freq_base",),
}


def _facts(reader: gguf.GGUFReader) -> dict[str, Any]:
    """What decides about results; names, sizes and version numbers of writers aside."""
    aside = ("general.", "GGUF.", "tokenizer.ggml.add_sep", "tokenizer.ggml.prefix", "tokenizer.ggml.suffix", "tokenizer.ggml.middle",
             "tokenizer.ggml.fsep", "tokenizer.ggml.eot", "tokenizer.ggml.add_space_prefix")  # fmt: skip
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith(aside)}


def test_llama_cpp_has_no_opt(tmp_path: Path) -> None:
    hub_models.write(tmp_path / "model", "opt")
    with pytest.raises(BadInput, match="no OPT"):
        writer.check(task(tmp_path / "model", tmp_path), writer.Options(), Floats())


@pytest.mark.parametrize(
    ("bits", "symmetric", "kind"), [(4, True, "Q4_0"), (4, False, "Q4_1"), (8, True, "Q8_0"), (3, True, "Q4_0")]
)
def test_the_integers_in_the_file_are_those_that_were_chosen(
    bits: int, symmetric: bool, kind: str, tmp_path: Path
) -> None:
    hub_models.write(tmp_path / "model", "llama")
    given = task(tmp_path / "model", tmp_path)
    options = rtn.Options(bits=bits, symmetric=symmetric)  # pyright: ignore[reportArgumentType]
    choices = rtn.quantize(given, options)
    path = write(tmp_path / "model", tmp_path / "out", choices)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    compared = 0
    for tensor in given.family.tensors(given.model.config):
        choice = choices.by_name.get(tensor.name)
        if not isinstance(choice, Integers):
            continue
        stored = tensors[tensor.placement.name]
        assert stored.tensor_type.name == kind
        matrix = choice.load()
        if tensor.placement.row_order is not None:
            matrix = matrix.rows(tensor.placement.row_order)
        found = gguf.dequantize(stored.data, stored.tensor_type)
        if symmetric:
            assert np.array_equal(found, matrix.dequantize())
        else:
            integers = integers_of_q4_1(stored.data, matrix.shape)
            assert np.array_equal(integers, matrix.integers)
            # The offset is stored as a 16-bit float: half a unit of its last place at the most.
            largest = np.abs(matrix.scales.astype(np.float32) * matrix.zeros.astype(np.float32)).max()
            assert np.abs(found - matrix.dequantize()).max() <= largest * 2**-11 * 1.01
        compared += 1
    assert compared == 3 * 7


def integers_of_q4_1(data: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    blocks = data.reshape(shape[0], -1, 20)[:, :, 4:]
    return np.concatenate([blocks & 15, blocks >> 4], axis=2).reshape(shape)


def test_a_damaged_weight_is_found_before_the_file_is_whole(tmp_path: Path) -> None:
    hub_models.write(tmp_path / "model", "llama")
    given = task(tmp_path / "model", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"

    def damaged(start: int, stop: int) -> np.ndarray:
        values = given.model.weights[name].read(start, stop)
        values[-1, -1] = np.nan
        return values

    bad = dataclasses.replace(given.model.weights[name], read=damaged)
    broken = dataclasses.replace(
        given, model=dataclasses.replace(given.model, weights={**given.model.weights, name: bad})
    )
    choices = none.quantize(broken, none.Options(type="F16"))
    with pytest.raises(BadInput, match=r"layers\.1\.mlp\.up_proj"):
        writer.write(broken, choices, tmp_path, writer.Options())
