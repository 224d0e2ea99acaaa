"""A Hugging Face tokenizer in GGUF's words: tokens, their kinds and scores, merges, special tokens, chat template.

Owns reading the folder and choosing between llama.cpp's two kinds: byte-level BPE ("gpt2") and SentencePiece ("llama"). A
tokenizer.json that was converted from SentencePiece carries no scores; they are made from the order of its merges, which decides the same
way (llama.cpp's converter gives all the same score). Special ids, added beginnings and the template are read by gguf's own `SpecialVocab`.
Whether the engine then tokenizes as the model does is looked at in `verify`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from joulemark.errors import BadInput, NotFound
from joulemark_exporter import pre_tokenizers

MAX_BYTES = 256 << 20
MAX_TOKENS = 1 << 21
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
UNDERLINE = "\u2581"
"""SentencePiece's mark of a space."""
UNUSED_SCORE, ADDED_SCORE = -10_000.0, -1000.0


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer. `scores` None: byte-level BPE, which has merges instead."""

    model: str
    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...] | None
    merges: tuple[str, ...]
    special: gguf.SpecialVocab
    space_prefix: bool | None = None


def read(folder: Path, size: int, pre: str | None = None) -> Vocabulary:
    """The tokenizer in `folder` for an embedding of `size` rows. `pre` overrules the name of the pre-tokenizer.

    Raises NotFound without a tokenizer, BadInput for one that llama.cpp has no kind for or that does not fit the embedding.
    """
    if (folder / "tokenizer.model").is_file():
        return _from_sentencepiece(folder, size, _special(folder, size))
    tokenizer = _json(folder / "tokenizer.json")
    special = _special(folder, size)
    model = tokenizer.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), Mapping):
        kind = model.get("type") if isinstance(model, Mapping) else None
        raise BadInput(f"llama.cpp has no tokenizer of type {kind!r}", "BPE and SentencePiece models can be written")
    tokens, kinds = _tokens(tokenizer, size)
    merges = tuple(_merge(item) for item in _list(model.get("merges"), "merges"))
    if model.get("byte_fallback"):
        return _converted(folder, tokens, kinds, merges, special)
    name = pre or pre_tokenizers.name_of(tokenizer)
    return Vocabulary("gpt2", name, tokens, kinds, None, merges, special)


def add(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """Writes all key-values of the tokenizer."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    if vocabulary.scores is not None:
        writer.add_token_scores(list(vocabulary.scores))
    writer.add_token_types(list(vocabulary.kinds))
    if vocabulary.scores is None:
        writer.add_token_merges(list(vocabulary.merges))
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    vocabulary.special.add_to_gguf(writer, quiet=True)


def _special(folder: Path, size: int) -> gguf.SpecialVocab:
    """Special ids, what a text begins and ends with, the chat template. Raises BadInput.

    Whether a text begins with the special token is always stated: llama.cpp's own default depends on the pre-tokenizer's name.
    """
    _settings(folder)
    try:
        special = gguf.SpecialVocab(folder, load_merges=False, n_vocab=size)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"the tokenizer's settings in {folder} cannot be read: {error!r}", "the files are damaged"
        ) from error
    special.add_special_token.setdefault("bos", (folder / "tokenizer.model").is_file())
    return special


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise NotFound(f"there is no tokenizer in {path.parent}", "expected tokenizer.json or tokenizer.model")
    if path.stat().st_size > MAX_BYTES:
        raise BadInput(f"{path} is larger than {MAX_BYTES} bytes", "this is not a tokenizer")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON: {error}", "download it again") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} holds no JSON object", "download it again")
    return value


# --- tokenizer.json ---------------------------------------------------------------------------------------------------
def _tokens(tokenizer: Mapping[str, Any], size: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Tokens and kinds by id; ids that the tokenizer leaves free are padded, as the embedding has rows for them."""
    by_id: dict[int, str] = {}
    kinds: dict[int, int] = {}
    for token, index in tokenizer["model"]["vocab"].items():
        _put(by_id, index, str(token), size)
    for item in _list(tokenizer.get("added_tokens"), "added_tokens"):
        index, content, special = _described(item)
        # What users defined is matched in the text itself, where a space is a space.
        _put(by_id, index, content if special else content.replace(UNDERLINE, " "), size, replace=True)
        kinds[index] = int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
    tokens = tuple(by_id.get(index, f"[PAD{index}]") for index in range(size))
    normal, unused = int(TokenType.NORMAL), int(TokenType.UNUSED)
    return tokens, tuple(kinds.get(index, normal if index in by_id else unused) for index in range(size))


def _described(item: Any) -> tuple[int, str, bool]:
    """(id, token, whether it is special) of an added token."""
    index = item.get("id") if isinstance(item, Mapping) else None
    if not isinstance(index, int) or isinstance(index, bool) or not isinstance(item.get("content"), str):
        raise BadInput(f"tokenizer.json describes an added token as {item!r}"[:200], "the file is damaged")
    content: str = item["content"]
    return index, content, bool(item.get("special")) or _looks_special(content)


def _list(value: Any, what: str) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise BadInput(f"{what} of the tokenizer is not a list", "the file is damaged")
    return value or []


def _merge(item: Any) -> str:
    parts = item if isinstance(item, list) else [item]
    if not all(isinstance(part, str) for part in parts):
        raise BadInput(f"the tokenizer has a merge {item!r}"[:200], "the file is damaged")
    return " ".join(parts)


def _put(by_id: dict[int, str], index: Any, token: str, size: int, replace: bool = False) -> None:
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < min(size, MAX_TOKENS):
        raise BadInput(
            f"the token {token!r} has the id {index!r}, the embedding has {size} rows",
            "tokenizer and weights do not belong together",
        )
    if index in by_id and by_id[index] != token and not replace:
        raise BadInput(
            f"the tokens {by_id[index]!r} and {token!r} have the same id {index}", "the tokenizer is damaged"
        )
    by_id[index] = token


def _looks_special(token: str) -> bool:
    """Tokens that some tokenizers do not mark as special although no text should ever produce them (as llama.cpp's converter judges)."""
    framed = (token.startswith("<|") and token.endswith("|>")) or (token.startswith("<｜") and token.endswith("｜>"))
    return (
        framed
        or token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (token.startswith("<unused") and token.endswith(">"))
    )


def _converted(
    folder: Path, tokens: tuple[str, ...], kinds: tuple[int, ...], merges: tuple[str, ...], special: gguf.SpecialVocab
) -> Vocabulary:
    """SentencePiece behind a tokenizer.json: the earlier a merge, the higher the score of what it makes."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), number)
    normal = int(TokenType.NORMAL)
    scores = tuple(
        -float(rank.get(token, len(merges))) if kind == normal else ADDED_SCORE
        for token, kind in zip(tokens, kinds, strict=True)
    )
    adjusted = tuple(_kind(token, kind) for token, kind in zip(tokens, kinds, strict=True))
    return Vocabulary("llama", "default", tokens, adjusted, scores, (), special, _space_prefix(folder))


def _kind(token: str, kind: int) -> int:
    if kind == int(TokenType.NORMAL) and BYTE.fullmatch(token):
        return int(TokenType.BYTE)
    return int(TokenType.UNKNOWN) if token == "<unk>" else kind


def _space_prefix(folder: Path) -> bool | None:
    """Whether a space is put before a text: what tokenizer_config.json says, else whether tokenizer.json does it."""
    stated = _settings(folder).get("add_prefix_space")
    if isinstance(stated, bool):
        return stated
    if not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = _json(folder / "tokenizer.json")
    text = json.dumps([tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return _json(path) if path.is_file() else {}


# --- tokenizer.model --------------------------------------------------------------------------------------------------
def _from_sentencepiece(folder: Path, size: int, special: gguf.SpecialVocab) -> Vocabulary:
    from sentencepiece import SentencePieceProcessor

    path = folder / "tokenizer.model"
    if path.stat().st_size > MAX_BYTES:
        raise BadInput(f"{path} is larger than {MAX_BYTES} bytes", "this is not a tokenizer")
    pieces: Any = SentencePieceProcessor()
    try:
        pieces.LoadFromFile(str(path))
    except (OSError, RuntimeError) as error:
        raise BadInput(f"{path} is not a SentencePiece model: {error}", "download it again") from error
    tokens = [f"[PAD{index}]" for index in range(size)]
    scores, kinds = [UNUSED_SCORE] * size, [int(TokenType.UNUSED)] * size
    for index in range(min(pieces.vocab_size(), size)):
        tokens[index], scores[index] = pieces.IdToPiece(index), float(pieces.GetScore(index))
        kinds[index] = _piece_kind(pieces, index)
    for index, content, is_special in _added(folder):
        if 0 <= index < size:
            tokens[index] = content if is_special else content.replace(UNDERLINE, " ")
            scores[index], kinds[index] = ADDED_SCORE, int(TokenType.CONTROL if is_special else TokenType.USER_DEFINED)
    return Vocabulary(
        "llama", "default", tuple(tokens), tuple(kinds), tuple(scores), (), special, _space_prefix(folder)
    )


def _piece_kind(pieces: Any, index: int) -> int:
    for asked, kind in (
        (pieces.IsUnknown, TokenType.UNKNOWN),
        (pieces.IsControl, TokenType.CONTROL),
        (pieces.IsUnused, TokenType.UNUSED),
        (pieces.IsByte, TokenType.BYTE),
    ):
        if asked(index):
            return int(kind)
    return int(TokenType.NORMAL)


def _added(folder: Path) -> list[tuple[int, str, bool]]:
    """(id, token, whether it is special) of what was added to the SentencePiece model, the later statement winning."""
    found: list[tuple[int, str, bool]] = []
    old = folder / "added_tokens.json"
    if old.is_file():
        found += [(_id(index), str(token), False) for token, index in _json(old).items()]
    stated = _settings(folder).get("added_tokens_decoder") or {}
    for index, item in stated.items() if isinstance(stated, Mapping) else ():
        if not isinstance(item, Mapping):
            raise BadInput(
                f"tokenizer_config.json describes the added token {index!r} as {item!r}"[:200], "the file is damaged"
            )
        content = str(item.get("content"))
        found.append((_id(index), content, bool(item.get("special")) or _looks_special(content)))
    return found


def _id(value: Any) -> int:
    if isinstance(value, int) or (isinstance(value, str) and value.isdecimal() and len(value) < 10):
        return int(value)
    raise BadInput(f"an added token has the id {value!r}"[:200], "the tokenizer is damaged")
