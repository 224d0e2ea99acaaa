"""The tokenizer of an ONNX artifact: tokenizer.json through Hugging Face's own library, and the bytes of each token. Not a plug-in;
`onnx` builds on it.

Text is tokenized as transformers does it, special tokens parsed, BOS in front where the file says so. A token's bytes are what it
stands for in a text: byte-level alphabets are turned back, SentencePiece's ▁ is a space, control tokens are empty (as llama.cpp has it)."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from joulemark.errors import EngineFailed, MissingExtra

INSTALL_HINT = "install it with: pip install 'joulemark[onnx]'"
TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
MOST_BYTES = 1 << 28
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class OnnxTokenizer:
    """See the module. Raises MissingExtra, EngineFailed for files that are missing or damaged."""

    def __init__(self, folder: Path, ends: Collection[int]) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingExtra(f"the tokenizers library cannot be loaded: {error}", INSTALL_HINT) from error
        text = _read(folder / TOKENIZER)
        try:
            self._tokenizer: Any = Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exceptions
            raise EngineFailed(f"{folder / TOKENIZER} cannot be used: {error}"[:600], _AGAIN) from error
        # The file may say to what length its texts were cut and filled in training. A text is scored whole.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._ends = frozenset(ends)
        self._settings: dict[str, Any] = read_json(folder / SETTINGS)
        added: dict[int, Any] = self._tokenizer.get_added_tokens_decoder()
        self._added = {token: b"" if item.special else item.content.encode() for token, item in added.items()}
        self._alphabet = byte_alphabet() if _byte_level(_parsed(text, folder / TOKENIZER).get("decoder")) else None

    def tokenize(self, text: str) -> list[int]:
        """See the contract of `_generation.Vocabulary`."""
        return list(self._tokenizer.encode(text).ids)

    def adds_bos(self) -> bool:
        """Whether texts begin with BOS without saying so."""
        first = self._tokenizer.encode("").ids[:1]
        return bool(first) and self._tokenizer.id_to_token(first[0]) == self._settings.get("bos_token")

    def piece(self, token: int) -> bytes:
        """The bytes of a token; control tokens are empty, and so is what the tokenizer does not know (padding of the output matrix)."""
        if token in self._added:
            return self._added[token]
        word: str | None = self._tokenizer.id_to_token(token)
        if word is None:
            return b""
        if self._alphabet is not None:
            known = [self._alphabet.get(character) for character in word]
            return bytes(byte for byte in known if byte is not None) if None not in known else word.encode()
        byte = _BYTE.fullmatch(word)
        return bytes([int(byte[1], 16)]) if byte else word.replace("▁", " ").encode()

    def is_end(self, token: int) -> bool:
        """Whether the token ends a generation."""
        return token in self._ends

    @property
    def chat_template(self) -> str | None:
        """The chat template that came with the model."""
        template = self._settings.get("chat_template")
        return template if isinstance(template, str) else None

    def special_text(self) -> dict[str, str]:
        """The texts of BOS and EOS, which chat templates may ask for."""
        return {name: text for name in ("bos_token", "eos_token") if isinstance(text := self._settings.get(name), str)}


_AGAIN = "push the artifact again, or export the model again"


def byte_alphabet() -> dict[str, int]:
    """The bytes that GPT-2's printable stand-ins mean: printable Latin-1 stands for itself, the rest counts up from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _byte_level(decoder: Any) -> bool:
    parts = [decoder, *(decoder.get("decoders") or [])] if isinstance(decoder, dict) else []
    return any(isinstance(part, dict) and part.get("type") == "ByteLevel" for part in parts)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise EngineFailed(f"{path} has more than {MOST_BYTES} bytes", _AGAIN)
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EngineFailed(f"{path} cannot be read: {error}", _AGAIN) from error


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EngineFailed(f"{path} is not JSON: {error}"[:600], _AGAIN) from error
    if not isinstance(found, dict):
        raise EngineFailed(f"{path} is not a JSON object", _AGAIN)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size. Raises EngineFailed."""
    return _parsed(_read(path), path)
