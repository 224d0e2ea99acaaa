"""A GGUF file's tokenizer in Hugging Face's files: tokenizer.json and tokenizer_config.json, chat template included.

Owns the way back. Byte-level BPE is built anew from tokens, merges and the name of the pre-tokenizer; SentencePiece models go through
transformers' own converter. transformers' converter is not used for byte-level BPE, because it takes every pre-tokenizer for GPT-2's and
then splits SmolLM's digits otherwise, without a word. What was built is compared with the engine's tokens by `verify.check_text`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, processors

from joulemark import durable
from joulemark.errors import BadInput
from joulemark_exporter import pre_tokenizers

CONTROL, USER_DEFINED = int(gguf.TokenType.CONTROL), int(gguf.TokenType.USER_DEFINED)


def write(reader: gguf.GGUFReader, folder: Path) -> None:
    """Writes the tokenizer's files into `folder`. Raises BadInput for kinds that cannot be turned back."""
    kind = _text(reader, "tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(reader)
    else:
        raise BadInput(
            f"a GGUF tokenizer of kind {kind!r} cannot be turned back into tokenizer.json",
            "give the Hugging Face folder of this model as the source",
        )
    described = json.loads(tokenizer.to_str())
    described["normalizer"], described["pre_tokenizer"] = pre_tokenizers.as_json(_text(reader, "tokenizer.ggml.pre"))
    durable.replace_file(folder / "tokenizer.json", [json.dumps(described, indent=1, ensure_ascii=False).encode()])
    durable.replace_file(
        folder / "tokenizer_config.json", [json.dumps(_settings(reader), indent=1, ensure_ascii=False).encode()]
    )


def _field(reader: gguf.GGUFReader, key: str) -> Any:
    found = reader.get_field(key)
    return None if found is None else found.contents()


def _text(reader: gguf.GGUFReader, key: str) -> str:
    value = _field(reader, key)
    if not isinstance(value, str):
        raise BadInput(f"the GGUF does not state {key}", "the file is damaged")
    return value


def _list(reader: gguf.GGUFReader, name: str) -> list[Any]:
    value = _field(reader, f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or not value:
        raise BadInput(f"the GGUF does not state tokenizer.ggml.{name}", "the file is damaged")
    return value


def _byte_level(reader: gguf.GGUFReader) -> Tokenizer:
    tokens, kinds = _list(reader, "tokens"), _list(reader, "token_type")
    if len(tokens) != len(kinds):
        raise BadInput(f"the GGUF has {len(tokens)} tokens of {len(kinds)} kinds", "the file is damaged")
    merges = [tuple(line.split(" ", 1)) for line in _field(reader, "tokenizer.ggml.merges") or []]
    unused = int(gguf.TokenType.UNUSED)
    vocabulary = {
        token: index for index, token in enumerate(tokens) if kinds[index] not in (unused, CONTROL, USER_DEFINED)
    }
    # Special tokens are part of the vocabulary too, so that they keep their ids.
    added = [index for index, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)]
    vocabulary |= {tokens[index]: index for index in added}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=_ignores_merges(reader)))
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(tokens[index], special=kinds[index] == CONTROL, normalized=False) for index in added]
    tokenizer.add_tokens([token for token in special if not token.special])
    tokenizer.add_special_tokens([token for token in special if token.special])
    tokenizer.post_processor = _post_processor(reader, tokens)
    return tokenizer


def _ignores_merges(reader: gguf.GGUFReader) -> bool:
    """llama.cpp takes whole words that are in the vocabulary before any merge for these (llama-vocab.cpp, `ignore_merges`)."""
    return _text(reader, "tokenizer.ggml.pre") in ("llama-bpe", "llama3", "llama-v3")


def _post_processor(reader: gguf.GGUFReader, tokens: list[str]) -> Any:
    """Adds the beginning-of-sequence token where the file says that prompts begin with it."""
    level = processors.ByteLevel(trim_offsets=False)
    if not _field(reader, "tokenizer.ggml.add_bos_token"):
        return level
    index = _field(reader, "tokenizer.ggml.bos_token_id")
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise BadInput(f"the GGUF begins texts with the token {index!r}", "the file is damaged")
    template = processors.TemplateProcessing(
        single=f"{tokens[index]} $A", pair=None, special_tokens=[(tokens[index], index)]
    )
    return processors.Sequence([level, template])


def _settings(reader: gguf.GGUFReader) -> dict[str, Any]:
    tokens = _list(reader, "tokens")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for word, name in (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")):
        index = _field(reader, f"tokenizer.ggml.{word}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            settings[name] = tokens[index]
    for name in ("add_bos_token", "add_eos_token"):
        value = _field(reader, f"tokenizer.ggml.{name}")
        if value is not None:
            settings[name] = bool(value)
    template = _field(reader, "tokenizer.chat_template")
    if template is not None:
        settings["chat_template"] = template
    return settings
