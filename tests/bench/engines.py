"""Engines on the same weights: SmolLM2-135M in float32 and in four bits, as GGUF and as a graph; optimum's graph beside ours; and the
llama.cpp of the binary wheel beside the one that was built for this processor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from joulemark import sources
from joulemark_agent.backends import Choice, GenerateRequest, Options, ScoreRequest, Session, llamacpp, onnx, xllamacpp
from joulemark_exporter import models, optimum_environment
from joulemark_exporter.quantizers import none, rtn
from joulemark_exporter.writers import gguf, optimum
from joulemark_exporter.writers import onnx as graphs
from tests.bench.pairs import Pairs, take_turns
from tests.fixtures.exporting import task_of

QUESTIONS = 8
ANSWERS = 16
NEW_TOKENS = 32
PAIRS = 9
Sessions = tuple[Session, Session]


@dataclass(frozen=True)
class Contest:
    """What both hold, what the two are called, and their sessions."""

    held: str
    names: tuple[str, str]
    sessions: Sessions


def contests(folder: Path, threads: int) -> Iterator[Contest]:
    """The pairs that are compared. Integers are those of round to nearest: the method changes no speed. optimum where it is installed."""
    cache = sources.default_cache()
    published = sources.fetch("smollm2-135m-instruct-q4_1", cache)
    model = models.open_model(str(published), cache)
    options = Options(threads=threads, model_sha256="0" * 64)
    forms = (
        ("float32", "four bits", "float32 by optimum") if optimum_environment.is_there() else ("float32", "four bits")
    )
    for name in forms:
        place = folder / name.replace(" ", "-")
        place.mkdir()
        task = task_of(model, place)
        if name == "four bits":
            chosen, settings = rtn.quantize(task, rtn.Options()), graphs.Options(precision="int4")
        else:
            chosen, settings = none.quantize(task, none.Options(type="F32")), graphs.Options()
        graph = onnx.open_session(graphs.write(task, chosen, place, settings).files[0], options)
        if name == "float32 by optimum":
            (place / "optimum").mkdir()
            other = optimum.write(task, chosen, place / "optimum", optimum.Options()).files[0]
            contest = Contest(
                name, ("optimum's graph", "the onnx writer's"), (onnx.open_session(other, options), graph)
            )
        else:
            file = gguf.write(task, chosen, place, gguf.Options()).files[0]
            contest = Contest(name, ("ONNX Runtime", "llama.cpp"), (graph, llamacpp.open_session(file, options)))
        yield from _opened(contest)
    builds = (xllamacpp.open_session(published, options), llamacpp.open_session(published, options))
    yield from _opened(Contest("Q4_1 by two builds of llama.cpp", ("binary wheel", "built here"), builds))


def _opened(contest: Contest) -> Iterator[Contest]:
    yield contest
    for session in contest.sessions:
        session.close()


def compare(
    sessions: Sessions, scoring: Sequence[ScoreRequest], generating: Sequence[GenerateRequest]
) -> Iterator[tuple[str, Pairs]]:
    """(what is done, rates of both in turns)."""
    works: dict[str, Callable[[Session], Callable[[], float]]] = {
        "questions scored": lambda session: _scored(session, scoring),
        "tokens generated side by side": lambda session: _generated(session, generating),
        "tokens of a single stream": lambda session: _streamed(session, generating[0].prompt),
        "tokens of a prompt": lambda session: _read(session, generating[0].prompt),
    }
    for name, work in works.items():
        ours, theirs = map(work, sessions)
        yield name, take_turns(ours, theirs, PAIRS)


def _scored(session: Session, requests: Sequence[ScoreRequest]) -> Callable[[], float]:
    results = session.score(requests[: QUESTIONS * (PAIRS + 2)])

    def rate() -> float:
        started = time.perf_counter()
        return sum(1 for _ in islice(results, QUESTIONS)) / (time.perf_counter() - started)

    return rate


def _generated(session: Session, requests: Sequence[GenerateRequest]) -> Callable[[], float]:
    slices = cycle(requests[start : start + ANSWERS] for start in range(0, len(requests) - ANSWERS, ANSWERS))

    def rate() -> float:
        asked = [GenerateRequest(item.key, item.prompt, NEW_TOKENS) for item in next(slices)]
        started = time.perf_counter()
        return sum(item.new_tokens for item in session.generate(asked)) / (time.perf_counter() - started)

    return rate


def _streamed(session: Session, prompt: str) -> Callable[[], float]:
    def rate() -> float:
        stream = session.stream(prompt, NEW_TOKENS, Choice())
        next(stream)
        started = time.perf_counter()
        return sum(1 for _ in stream) / (time.perf_counter() - started)

    return rate


def _read(session: Session, prompt: str) -> Callable[[], float]:
    tokens = session.count_tokens(prompt)

    def rate() -> float:
        started = time.perf_counter()
        next(iter(session.stream(prompt, 1, Choice())))
        return tokens / (time.perf_counter() - started)

    return rate
