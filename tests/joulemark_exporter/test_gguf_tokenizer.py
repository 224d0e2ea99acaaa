"""Tokenizers in GGUF: the engine's tokens are the model's, on texts where rules differ; and the converter's key-values are ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from joulemark.errors import BadInput, NotFound
from joulemark_exporter import gguf_tokenizer, hub_tokenizer, pre_tokenizers, probe
from joulemark_exporter.verify import TOKENIZER_PROBES
from tests.fixtures import hub_models
from tests.fixtures.exporting import write

TEXTS = (
    *TOKENIZER_PROBES,
    "  two spaces first",
    "",
    " ",
    "\n\n  \n",
    "I'm you're THEY'VE it'D",
    "1 12 123 1234 12345 1,234.56",
    "①²½ ٣٤٥ १२३",
    "a\u200bb\u00a0c\u3000d",
    "<|im_start|>user\nhi<|im_end|>",
    "text<|im_end|>more </s> <s>",
    "trailing space ",
    "ﬁ ﬂ Å Å",
    "mixedCASE_snake-kebab.dot/slash\\back",
)
PATTERNS = {
    "llama-bpe": hub_models.split(pre_tokenizers.LLAMA3_PATTERN),
    "stablelm2": hub_models.split(pre_tokenizers.QWEN2_PATTERN),
    "bloom": hub_models.split(pre_tokenizers.BLOOM_PATTERN),
    "gpt-2": hub_models.pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": None,
}


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_the_engine_tokenizes_as_the_model_does(name: str, begins: bool, tmp_path: Path) -> None:
    hub_models.write(tmp_path / "model", "llama")
    hub_models.write_tokenizer(tmp_path / "model", PATTERNS[name], begins=begins)
    assert gguf_tokenizer.read(tmp_path / "model", hub_models.VOCABULARY).pre == name
    own = AutoTokenizer.from_pretrained(tmp_path / "model")
    with probe.opened("llamacpp", write(tmp_path / "model", tmp_path / "out"), 1) as session:
        for text in TEXTS:
            assert session.tokenize(text) == own(text)["input_ids"], text
        assert session.chat_template() == hub_models.TEMPLATE


def test_sentencepiece_and_what_was_made_of_it(tmp_path: Path) -> None:
    """A tokenizer.json without scores must merge as the SentencePiece model did that it was converted from."""
    hub_models.write(tmp_path / "model", "llama", bos_token_id=1, eos_token_id=2)
    folder = tmp_path / "model"
    (folder / "tokenizer.json").unlink()
    hub_models.write_sentencepiece(folder)
    own, pieces = AutoTokenizer.from_pretrained(folder), sentencepiece.SentencePieceProcessor()
    pieces.LoadFromFile(str(folder / "tokenizer.model"))
    with probe.opened("llamacpp", write(folder, tmp_path / "pieces"), 1) as session:
        expected = {text: session.tokenize(text) for text in TEXTS}
    for text in TEXTS:
        # Where a text begins with a space, or goes on behind a special token, transformers 5 puts no other space before it; SentencePiece
        # and llama.cpp do. Scores do not depend on it: prompts begin with a word.
        if "<" not in text:
            assert expected[text] == [1, *pieces.encode(text)], text
            if not text.startswith(" "):
                assert expected[text] == own(text)["input_ids"], text
    own.save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    assert gguf_tokenizer.read(folder, hub_models.VOCABULARY).scores is not None
    with probe.opened("llamacpp", write(folder, tmp_path / "converted"), 1) as session:
        for text in TEXTS:
            assert session.tokenize(text) == expected[text], text


def test_free_ids_are_padded_and_kinds_are_kept(tmp_path: Path) -> None:
    hub_models.write_tokenizer(tmp_path)
    found = gguf_tokenizer.read(tmp_path, 640)
    assert len(found.tokens) == len(found.kinds) == 640
    assert found.tokens[639] == "[PAD639]"
    assert found.kinds[639] == int(gguf_tokenizer.TokenType.UNUSED)
    assert found.kinds[3] == int(gguf_tokenizer.TokenType.CONTROL)
    assert found.kinds[100] == int(gguf_tokenizer.TokenType.NORMAL)


def change(folder: Path, **changed: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def test_tokenizers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    hub_models.write_tokenizer(tmp_path)
    with pytest.raises(BadInput, match="embedding has 500 rows"):
        gguf_tokenizer.read(tmp_path, 500)
    change(tmp_path, pre_tokenizer={"type": "Whitespace"})
    with pytest.raises(BadInput, match="Whitespace"):
        gguf_tokenizer.read(tmp_path, 640)
    assert gguf_tokenizer.read(tmp_path, 640, "gpt-2").pre == "gpt-2"
    change(tmp_path, model={"type": "Unigram", "vocab": []})
    with pytest.raises(BadInput, match="Unigram"):
        gguf_tokenizer.read(tmp_path, 640)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BadInput, match="not JSON"):
        gguf_tokenizer.read(tmp_path, 640)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(NotFound, match="no tokenizer"):
        gguf_tokenizer.read(tmp_path, 640)


def test_names_and_rules_are_read_both_ways() -> None:
    for name in pre_tokenizers.NAMES:
        normalizer, splitter = pre_tokenizers.as_json(name)
        assert pre_tokenizers.name_of({"normalizer": normalizer, "pre_tokenizer": splitter}) == name
    with pytest.raises(BadInput, match="not known"):
        pre_tokenizers.as_json("viking")


@pytest.mark.parametrize("name", PATTERNS)
def test_a_tokenizer_comes_back_from_gguf(name: str, tmp_path: Path) -> None:
    import gguf

    hub_models.write(tmp_path / "model", "llama")
    hub_models.write_tokenizer(tmp_path / "model", PATTERNS[name], begins=True)
    hub_tokenizer.write(gguf.GGUFReader(write(tmp_path / "model", tmp_path / "out")), tmp_path / "back")
    own, back = (AutoTokenizer.from_pretrained(tmp_path / folder) for folder in ("model", "back"))
    for text in TEXTS:
        assert back(text)["input_ids"] == own(text)["input_ids"], text
    assert back.chat_template == own.chat_template
    assert (back.bos_token, back.eos_token, back.pad_token) == (own.bos_token, own.eos_token, own.pad_token)
