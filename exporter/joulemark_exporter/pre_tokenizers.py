"""How a byte-level tokenizer splits text before it merges: the rules of tokenizer.json, and the names that llama.cpp has for them.

Owns the table, read both ways. llama.cpp's converter recognises a tokenizer by a hash of some encoded text, so that every tokenizer that
somebody trained or extended is unknown to it; here the rules themselves are compared. Truth: `llm_tokenizer_bpe` in llama-vocab.cpp of
llama-cpp-python 0.3.36 for the names, the tokenizer.json of the models named beside them for the rules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from joulemark.errors import BadInput

Rules = tuple[tuple[Any, ...], ...]

BYTES = ("ByteLevel", False)
"""Only the mapping of bytes to characters."""
GPT2 = ("ByteLevel", True)
"""GPT-2's pattern, which is built into the library."""
DIGITS = ("Digits", True)
LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
BLOOM_PATTERN = " ?[^(\\s|.,!?…。，、।۔،)]+"


def _split(pattern: str) -> tuple[Any, ...]:
    return ("Split", pattern, "Isolated", False)


NAMES: Mapping[str, tuple[Rules, Rules]] = {
    "gpt-2": ((), (GPT2,)),
    "smollm": ((), (DIGITS, GPT2)),  # SmolLM 1 to 2, StarCoder, Granite
    "llama-bpe": ((), (_split(LLAMA3_PATTERN), BYTES)),  # Llama 3, SmolLM3
    "qwen2": ((("NFC",),), (_split(QWEN2_PATTERN), BYTES)),  # Qwen 2, 2.5, 3
    "stablelm2": ((), (_split(QWEN2_PATTERN), BYTES)),
    "bloom": ((), (_split(BLOOM_PATTERN), BYTES)),
}
"""Name → (normalizer's rules, pre-tokenizer's rules)."""


def name_of(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name of the rules in a parsed tokenizer.json. Raises BadInput that shows them."""
    found = (
        _rules(tokenizer.get("normalizer"), "normalizers"),
        _rules(tokenizer.get("pre_tokenizer"), "pretokenizers"),
    )
    for name, rules in NAMES.items():
        if rules == found:
            return name
    shown = json.dumps({"normalizer": tokenizer.get("normalizer"), "pre_tokenizer": tokenizer.get("pre_tokenizer")})
    raise BadInput(
        f"llama.cpp's name of these pre-tokenizer rules is not known: {shown[:600]}",
        "state it, if llama.cpp has it, as tokenizer_pre in [writer]; it is compared with the tokenizer before anything is published",
    )


def _rules(stated: Any, parts: str) -> Rules:
    """The steps of a normalizer or pre-tokenizer, without what does not change tokens (trim_offsets)."""
    if stated is None:
        return ()
    if not isinstance(stated, Mapping):
        return (("unreadable",),)
    kind = stated.get("type")
    if kind == "Sequence":
        steps = stated.get(parts)
        return (
            tuple(step for part in steps for step in _rules(part, parts))
            if isinstance(steps, list)
            else (("unreadable",),)
        )
    if kind == "ByteLevel" and parts == "pretokenizers":
        prefix = ("prefix space",) if stated.get("add_prefix_space", True) else ()
        return (("ByteLevel", stated.get("use_regex", True), *prefix),)
    if kind == "Digits":
        return (("Digits", stated.get("individual_digits", False)),)
    if kind == "Split":
        pattern = stated.get("pattern")
        text = pattern.get("Regex", pattern.get("String")) if isinstance(pattern, Mapping) else None
        return (("Split", text, stated.get("behavior"), stated.get("invert", False)),)
    return ((kind,),)


def as_json(name: str) -> tuple[Any, Any]:
    """(normalizer, pre_tokenizer) of tokenizer.json for a name. Raises BadInput for names whose rules are not in the table."""
    if name not in NAMES:
        raise BadInput(
            f"the rules of the pre-tokenizer {name!r} are not known",
            f"known: {', '.join(NAMES)}; give the model's Hugging Face folder instead",
        )
    normalizer, splitter = NAMES[name]
    return ({"type": normalizer[0][0]} if normalizer else None), {
        "type": "Sequence",
        "pretokenizers": [_step(rule) for rule in splitter],
    }


def _step(rule: tuple[Any, ...]) -> dict[str, Any]:
    if rule[0] == "ByteLevel":
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": rule[1]}
    if rule[0] == "Digits":
        return {"type": "Digits", "individual_digits": rule[1]}
    return {"type": "Split", "pattern": {"Regex": rule[1]}, "behavior": rule[2], "invert": rule[3]}
