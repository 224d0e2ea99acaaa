"""Reads lm-eval's per-item sample files (`samples_<task>_<time>.jsonl`), its own or ours.

Owns the parsing. The file is somebody else's and may be anything: size, line length and line count are bounded and only
BadInput or NotFound leaves it. Older files are accepted too: without `filter` and hashes, with numbers instead of
text in `resps`, with lists instead of dictionaries in `arguments`. The prompt's hash is taken from the prompt itself.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from joulemark.errors import BadInput, NotFound
from joulemark.packs import text_sha256

MAX_LINE_BYTES = 8 << 20
MAX_FILE_BYTES = 512 << 20
MAX_REQUESTS = 1024
"""Requests (choices) of one document."""


@dataclass(frozen=True)
class Sample:
    """One line: what was asked, answered and scored for a document under one filter.

    `logprobs` (natural logarithm, per choice) and `choices` are set for choice tasks, `output` and `answer` (what the
    filter extracted) for generation tasks.
    """

    doc_id: int
    filter: str
    prompt_sha256: str
    target: str
    choices: tuple[str, ...]
    logprobs: tuple[float, ...] | None
    output: str | None
    answer: str | None
    scores: dict[str, float]

    @property
    def key(self) -> tuple[int, str]:
        """Document and filter: one line each in a file."""
        return self.doc_id, self.filter


def read_samples(path: Path) -> tuple[Sample, ...]:
    """Every line of the file, in its order. Raises NotFound, or BadInput naming the line."""
    try:
        with path.open("rb") as file:
            found = tuple(_read(file, path.name))
    except FileNotFoundError as error:
        raise NotFound(f"there is no sample file at {path}", "give the path of a samples_….jsonl file") from error
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error}", "give the path of a samples_….jsonl file") from error
    if not found:
        raise BadInput(f"{path} has no samples", "give a file that lm-eval wrote with --log_samples")
    if len({sample.key for sample in found}) != len(found):
        raise BadInput(f"{path} has a document twice under the same filter", "give the file of one run and one task")
    return found


def parse(line: dict[str, Any]) -> Sample:
    """One decoded line. Raises ValueError, TypeError, KeyError or IndexError when it is not of lm-eval's form."""
    requests = _requests(line["arguments"])
    resps = [_only(entry) for entry in line["resps"]]
    if not 0 < len(requests) == len(resps) <= MAX_REQUESTS:
        raise ValueError(f"{len(requests)} requests but {len(resps)} responses")
    doc_id = line["doc_id"]
    if isinstance(doc_id, bool) or not isinstance(doc_id, int) or doc_id < 0:
        raise TypeError("doc_id is not a whole number")
    prompt = _text(requests[0][0])
    choice_task = isinstance(requests[0][1], str)
    filtered = line.get("filtered_resps") or [None]
    return Sample(
        doc_id=doc_id,
        filter=_text(line.get("filter", "none")),
        prompt_sha256=text_sha256(prompt),
        target=str(line["target"]),
        choices=tuple(_text(request[1]).removeprefix(" ") for request in requests) if choice_task else (),
        logprobs=tuple(_number(resp[0]) for resp in resps) if choice_task else None,
        output=None if choice_task else _text(resps[0]),
        answer=None if choice_task or filtered[0] is None else _text(filtered[0]),
        scores=_scores(line),
    )


def _read(file: BinaryIO, name: str) -> Iterator[Sample]:
    total = 0
    for number in itertools.count(1):
        data = file.readline(MAX_LINE_BYTES + 1)
        if not data:
            return
        total += len(data)
        if len(data) > MAX_LINE_BYTES or total > MAX_FILE_BYTES:
            raise BadInput(f"{name} is too large at line {number}", f"at most {MAX_FILE_BYTES} bytes are read")
        if not data.strip():
            continue
        yield _parse_bytes(data, f"{name}, line {number}")


def _parse_bytes(data: bytes, where: str) -> Sample:
    try:
        return parse(json.loads(data))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise BadInput(f"{where} is not a sample of lm-eval ({reason})", "write it with --log_samples") from error


def _requests(arguments: Any) -> list[Any]:
    """(prompt, continuation or settings) per request."""
    if isinstance(arguments, dict):
        # Numbered names: their order in the file is the order of the choices.
        named = [arguments[f"gen_args_{place}"] for place in range(min(len(arguments), MAX_REQUESTS + 1))]
        return [(request["arg_0"], request["arg_1"]) for request in named]
    return [(request[0], request[1]) for request in arguments]


def _only(entry: Any) -> Any:
    """lm-eval keeps a list of repeats per request; the tasks here have one."""
    if not isinstance(entry, list) or len(entry) != 1:
        raise ValueError("a request has not exactly one response")
    return entry[0]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {type(value).__name__}")
    return value


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("a log-probability is not finite")
    return number


def _scores(line: dict[str, Any]) -> dict[str, float]:
    names = line.get("metrics", [name for name in ("acc", "acc_norm", "exact_match") if name in line])
    return {_text(name): _number(line[name]) for name in names}
