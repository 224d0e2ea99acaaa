"""The board's tokenizer for ONNX artifacts beside llama.cpp's on the same model: the same tokens, and the same bytes of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from joulemark.errors import EngineFailed
from joulemark_exporter import onnx_artifact
from joulemark_exporter.quantizers import none
from joulemark_exporter.writers import gguf
from tests.fixtures import exporting, hub_models

pytest.importorskip("tokenizers", reason="tokenizers is not installed: make install-test")
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from joulemark_agent.backends import llamacpp
from joulemark_agent.backends._llama_engine import Model
from joulemark_agent.backends._onnx_tokenizer import OnnxTokenizer

TEXTS = (
    "def wrap(text):\n    return 12345",
    "naïve café, 日本語 한국어 🙂",
    " leading and trailing ",
    "<|im_start|>user\nhello<|im_end|>",
    "tabs\tand\r\nlines\n\n\n",
)


def both(folder: Path, sentencepiece: bool, begins: bool) -> tuple[OnnxTokenizer, Model]:
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2} if sentencepiece else {}
    hub_models.write(folder / "base", "llama", **ends)
    if sentencepiece:
        (folder / "base" / "tokenizer.json").unlink()
        hub_models.write_sentencepiece(folder / "base")
    else:
        hub_models.write_tokenizer(folder / "base", begins=begins)
    given = exporting.task(folder / "base", folder)
    (folder / "out").mkdir()
    onnx_artifact.write_tokenizer(given, folder / "out")
    path = gguf.write(given, none.quantize(given, none.Options()), folder / "out", gguf.Options()).files[0]
    return OnnxTokenizer(folder / "out", [1]), Model(path, llamacpp.library())


@pytest.mark.parametrize(("sentencepiece", "begins"), [(False, False), (False, True), (True, True)])
def test_tokens_and_their_bytes_are_llama_cpp_s(sentencepiece: bool, begins: bool, tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, sentencepiece, begins)
    for text in TEXTS:
        if sentencepiece and text.startswith(" "):
            continue  # transformers puts no second space in front of one, llama.cpp does
        tokens = ours.tokenize(text)
        assert tokens == theirs.tokenize(text), text
        assert [ours.piece(token) for token in tokens] == [theirs.piece(token) for token in tokens], text
        told = b"".join(ours.piece(token) for token in tokens).decode()
        assert told.lstrip() == text.lstrip() or "<|" in text  # control tokens say nothing
    known = range(500 if sentencepiece else 600)
    assert [ours.piece(token) for token in known] == [theirs.piece(token) for token in known]
    assert ours.piece(639) == b""  # the output matrix is wider than the vocabulary
    assert ours.is_end(1) and not ours.is_end(2)
    assert ours.chat_template == theirs.metadata("tokenizer.chat_template")
    assert ours.special_text() == theirs.special_text()


@pytest.mark.parametrize("who", ["exporter", "board"])
def test_a_text_is_neither_cut_nor_filled_to_what_the_training_had(who: str, tmp_path: Path) -> None:
    """A tokenizer that was saved after training cuts its texts, as transformers does when it is asked to; lm-eval does not ask."""
    hub_models.write(tmp_path / "base", "llama")
    hub_models.write_tokenizer(tmp_path / "base")
    trained = Tokenizer.from_file(str(tmp_path / "base" / "tokenizer.json"))
    trained.enable_truncation(8)
    trained.enable_padding(length=12)
    trained.save(str(tmp_path / "base" / "tokenizer.json"))
    folder = tmp_path / "base"
    if who == "exporter":
        folder = tmp_path / "out"
        folder.mkdir()
        onnx_artifact.write_tokenizer(exporting.task(tmp_path / "base", tmp_path), folder)
        written = json.loads((folder / "tokenizer.json").read_bytes())
        assert written["truncation"] is None and written["padding"] is None
    ours, theirs = OnnxTokenizer(folder, []), AutoTokenizer.from_pretrained(tmp_path / "base")
    for text in ("a", "def f(x): return x + 1 and then some more of it, until it is long"):
        assert ours.tokenize(text) == theirs(text, add_special_tokens=True)["input_ids"], text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"["),
        ("tokenizer_config.json", None),
    ],
)
def test_damaged_files_are_refused_in_words(name: str, content: Any, tmp_path: Path) -> None:
    hub_models.write_tokenizer(tmp_path)
    assert OnnxTokenizer(tmp_path, []).tokenize("def")
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(EngineFailed, match=name.replace(".", r"\.")):
        OnnxTokenizer(tmp_path, [])


def test_a_template_that_is_no_text_is_none(tmp_path: Path) -> None:
    hub_models.write_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": 5, "bos_token": [1]}))
    found = OnnxTokenizer(tmp_path, [])
    assert found.chat_template is None and found.special_text() == {"eos_token": "</s>"}
