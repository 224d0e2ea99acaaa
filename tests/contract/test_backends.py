"""What every backend must keep, on tiny models of several kinds: branching gives what whole sequences give, batches what single sequences
give, and nothing is cut in silence. A new backend joins by a line in MODELS; one without is found out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from joulemark import plugins
from joulemark.errors import BadInput, EngineFailed
from joulemark_agent.backends import Choice, GenerateRequest, Options, Scored, ScoreRequest, Session
from tests.fixtures import tiny_graphs, tiny_models

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make install")
pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: make install-test")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: make install-test")

PACKAGE = "joulemark_agent.backends"


@dataclass(frozen=True)
class Kind:
    """A tiny model of a backend. `write` makes it; `branches`: whether its memory can; `end`: an end token, and one that is none."""

    backend: str
    write: Callable[[Path], Path]
    branches: bool = True
    end: tuple[int, int] = (tiny_models.EOS, 65)


MODELS = {
    "llama": Kind("llamacpp", lambda folder: tiny_models.write_llama(folder / "tiny.gguf")),
    "gemma3, sliding window": Kind("llamacpp", lambda folder: tiny_models.write_gemma3(folder / "tiny.gguf")),
    "mamba, recurrent": Kind("llamacpp", lambda folder: tiny_models.write_mamba(folder / "tiny.gguf"), branches=False),
    "llama, binary wheel": Kind("xllamacpp", lambda folder: tiny_models.write_llama(folder / "tiny.gguf")),
    "gemma3, binary wheel": Kind("xllamacpp", lambda folder: tiny_models.write_gemma3(folder / "tiny.gguf")),
    "mamba, binary wheel": Kind(
        "xllamacpp", lambda folder: tiny_models.write_mamba(folder / "tiny.gguf"), branches=False
    ),
    "llama as a graph": Kind("onnx", lambda folder: tiny_graphs.write(folder, "llama"), end=(1, 65)),
    "gemma3 as a graph, sliding window": Kind("onnx", lambda folder: tiny_graphs.write(folder, "gemma3"), end=(1, 65)),
    "bloom as a graph, alibi": Kind("onnx", lambda folder: tiny_graphs.write(folder, "bloom"), end=(1, 65)),
    "llama by optimum": Kind(
        "onnx", lambda folder: tiny_graphs.write(folder, "llama", optimum=True), branches=False, end=(1, 65)
    ),
    "gemma3 by optimum, which counts positions by itself": Kind(
        "onnx", lambda folder: tiny_graphs.write(folder, "gemma3", optimum=True), branches=False, end=(1, 65)
    ),
}
QUESTIONS = [
    ScoreRequest(
        index, "Facts. " * 12 + f"Question: how many {'very ' * (index % 5)}long tails? {index}\nAnswer:", choices
    )
    for index, choices in enumerate([(" two", " twenty", " t"), (" none", " nobody"), (" a", " b", " c", " d")] * 6)
]
LONG = "".join(f"{index} qz " for index in range(60))


@pytest.fixture(scope="module", params=list(MODELS))
def kind(request: pytest.FixtureRequest) -> Kind:
    return MODELS[request.param]


@pytest.fixture(scope="module")
def model(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kind.write(tmp_path_factory.mktemp("models"))


def session_of(kind: Kind, path: Path, **options: Any) -> Session:
    return plugins.load(PACKAGE, kind.backend).open_session(path, Options(threads=1, model_sha256="0" * 64, **options))


@pytest.fixture
def session(kind: Kind, model: Path) -> Iterator[Session]:
    opened = session_of(kind, model)
    yield opened
    opened.close()


def test_every_backend_is_tested_here() -> None:
    assert {kind.backend for kind in MODELS.values()} == {*plugins.names(PACKAGE)} - {
        "fake"
    }  # which answers from a hash


def by_key(results: Iterator[Scored]) -> list[Scored]:
    return sorted(results, key=lambda result: result.key)


def score_whole(session: Session, requests: list[ScoreRequest]) -> list[Scored]:
    """Each (question, choice) alone in an empty memory: what lm-eval does."""
    results: list[Scored] = []
    for request in requests:
        parts = [
            next(iter(session.score([ScoreRequest(0, request.prompt, (text,))]))) for text in request.continuations
        ]
        sums = tuple(part.logprobs[0] for part in parts)
        results.append(Scored(request.key, parts[0].prompt_tokens, sums, tuple(part.greedy[0] for part in parts)))
    return results


def test_branching_equals_whole_sequences(session: Session) -> None:
    shared = by_key(session.score(QUESTIONS))
    alone = score_whole(session, QUESTIONS)
    assert [result.key for result in shared] == list(range(len(QUESTIONS)))
    for ours, theirs in zip(shared, alone, strict=True):
        assert ours.problem is None
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)
        assert ours.greedy == theirs.greedy


@pytest.mark.parametrize("options", [{"batch_tokens": 32}, {"memory_bytes": 1}])
def test_small_batches_give_the_same(options: dict[str, int], kind: Kind, model: Path, session: Session) -> None:
    """Also those of a board whose memory holds no more logits."""
    narrow = session_of(kind, model, **options)
    try:
        for ours, theirs in zip(by_key(narrow.score(QUESTIONS)), by_key(session.score(QUESTIONS)), strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)
    finally:
        narrow.close()


def test_a_question_that_does_not_fit_is_a_problem_of_its_own(kind: Kind, model: Path) -> None:
    session = session_of(kind, model, context_tokens=160)
    try:
        long = ScoreRequest(99, LONG, (" a", " b"))
        results = {result.key: result for result in session.score([QUESTIONS[0], long, QUESTIONS[1]])}
        problem = results[99].problem
        assert problem is not None and problem.code == "prompt_too_long" and "160" in problem.message
        assert results[0].problem is None and results[1].problem is None and len(results) == 3
        generated = list(session.generate([GenerateRequest(1, LONG, 30), GenerateRequest(2, "short", 5)]))
        assert {item.key: item.problem is None for item in generated} == {1: False, 2: True}
        with pytest.raises(BadInput, match="160"):
            next(iter(session.stream(LONG, 30, Choice())))
    finally:
        session.close()


def test_batched_generation_equals_one_at_a_time(session: Session) -> None:
    requests = [
        GenerateRequest(index, "Once upon a time, in a land far away " + "and " * index, 6 + index)
        for index in range(9)
    ]
    batched = {result.key: result for result in session.generate(requests)}
    for request in requests:
        alone = next(iter(session.generate([request])))
        assert batched[request.key].text == alone.text
        assert batched[request.key].new_tokens == alone.new_tokens
        assert batched[request.key].finish in ("length", "eos")


def test_a_stream_gives_the_tokens_of_generation(session: Session) -> None:
    prompt = "Once upon a time"
    generated = next(iter(session.generate([GenerateRequest(0, prompt, 12)])))
    streamed = list(session.stream(prompt, 12, Choice()))
    assert len(streamed) == 12
    until_end = []
    for token in streamed:
        if token.end:
            break
        until_end.append(token.piece)
    assert b"".join(until_end).decode(errors="replace") == generated.text


def test_a_stream_and_the_scorer_find_the_same_probabilities(session: Session) -> None:
    """Token by token behind a memory, or all at once: one model. Only of texts that are tokenized as they were said."""
    vocabulary: Any = vars(session).get("_model") or vars(session)["_tokenizer"]
    prompt, compared = "Facts. Facts. Question: how many?", 0
    for seed in range(400):
        said = list(session.stream(prompt, 3, Choice(temperature=1.0, seed=seed, logprobs=True)))
        tokens = [token.token for token in said]
        try:
            text = b"".join(token.piece for token in said).decode()
        except UnicodeDecodeError:
            continue
        if vocabulary.tokenize(prompt + text) != [*vocabulary.tokenize(prompt), *tokens]:
            continue
        scored = next(iter(session.score([ScoreRequest(0, prompt, (text,))])))
        assert scored.logprobs[0] == pytest.approx(sum(token.logprob or 0.0 for token in said), abs=1e-3)
        compared += 1
        if compared == 3:
            return
    raise AssertionError(f"{compared} texts of 400 are tokenized as they were said")


def test_a_stop_string_ends_a_sequence_and_is_cut(session: Session) -> None:
    # What random models say is not always text.
    prompts = [f"Once upon a time {index}" for index in range(20)]
    said = session.generate([GenerateRequest(index, prompt, 12) for index, prompt in enumerate(prompts)])
    free = next(result for result in sorted(said, key=lambda result: result.key) if len(result.text) >= 6)
    stop = free.text[3:5]
    first = free.text.find(stop)
    stopped = next(iter(session.generate([GenerateRequest(0, prompts[free.key], 12, (stop,))])))
    assert (stopped.text, stopped.finish) == (free.text[:first], "stop")
    assert stopped.new_tokens <= free.new_tokens


def test_seeds_repeat_and_differ(session: Session) -> None:
    def sample(seed: int) -> list[int]:
        return [token.token for token in session.stream("Hello", 10, Choice(temperature=1.5, seed=seed))]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_log_probabilities_of_a_stream_are_normalised(session: Session) -> None:
    for token in session.stream("Hello", 3, Choice(logprobs=True, top_logprobs=5)):
        assert token.logprob is not None
        values = [value for _, value in token.top]
        assert values == sorted(values, reverse=True) and len(values) == 5
        # Greedy: the chosen token is the most likely one.
        assert token.logprob == pytest.approx(values[0])


def test_facts_say_what_runs(kind: Kind, session: Session) -> None:
    list(session.score(QUESTIONS[:1]))
    facts = session.facts()
    assert facts.backend == kind.backend and any(character.isdigit() for character in facts.version)
    assert facts.kv_type == "f32" and facts.branching is kind.branches
    assert (facts.threads, facts.model_sha256) == (1, "0" * 64)


def test_an_empty_choice_is_a_problem(session: Session) -> None:
    result = next(iter(session.score([ScoreRequest(0, "Question", ("",))])))
    assert result.problem is not None and result.problem.code == "empty_continuation"


@pytest.mark.parametrize("content", [b"GGUF" + b"\0" * 100, b"", b"\x08\x09" * 50], ids=["header", "empty", "noise"])
def test_a_file_that_is_no_model_is_refused(kind: Kind, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.model"
    path.write_bytes(content)
    with pytest.raises(EngineFailed, match=r"bad\.model"):
        session_of(kind, path)


def test_the_end_token_ends_a_stream(kind: Kind, session: Session) -> None:
    """Which tokens a random model gives is its own affair; what they count as is the backend's."""
    ends, other = kind.end
    vocabulary: Any = vars(session).get("_model") or vars(session)["_tokenizer"]
    assert vocabulary.is_end(ends) and not vocabulary.is_end(other)


def test_beats_are_felt(kind: Kind, model: Path) -> None:
    beats: list[int] = []
    session = session_of(kind, model, beat=lambda: beats.append(1))
    list(session.score(QUESTIONS[:2]))
    scored = len(beats)
    list(session.stream("Hello", 3, Choice()))
    session.close()
    assert scored >= 1 and len(beats) >= scored + 3


def test_a_small_memory_is_kept(kind: Kind, model: Path, session: Session) -> None:
    """Fewer sequences side by side, the same answers."""
    requests = [GenerateRequest(index, "Once upon a time" + " and" * index, 8) for index in range(6)]
    wide = {result.key: result for result in session.generate(requests)}
    narrow = session_of(kind, model, memory_bytes=1)
    assert {result.key: result for result in narrow.generate(requests)} == wide
    assert narrow.facts().sequences == 1
    narrow.close()


LOG_AFTER_CLOSING = """
import gc, sys
from pathlib import Path
from joulemark_agent.backends import Options
from joulemark_agent.backends.llamacpp import open_session
import llama_cpp

session = open_session(Path(sys.argv[1]), Options(threads=1, model_sha256="0" * 64))
session.close()
del session
gc.collect()
junk = [object() for _ in range(100_000)]
for _ in range(20):
    llama_cpp.llama_model_load_from_file(b"/nonexistent.gguf", llama_cpp.llama_model_default_params())
"""


def test_the_library_may_speak_after_a_session_is_gone(tmp_path: Path) -> None:
    """It keeps the log callback of the last model for ever; were that collected, its next line would end the process."""
    path = tiny_models.write_llama(tmp_path / "tiny.gguf")
    done = subprocess.run([sys.executable, "-c", LOG_AFTER_CLOSING, str(path)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
