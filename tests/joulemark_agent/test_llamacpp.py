"""The llama.cpp backend on tiny models of three kinds: branching gives what whole sequences give, and nothing is cut in silence."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from joulemark.errors import BadInput, EngineFailed
from joulemark_agent.backends import Choice, GenerateRequest, Options, Scored, ScoreRequest
from tests.fixtures.tiny_models import EOS, write_gemma3, write_llama, write_mamba

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make install")
from joulemark_agent.backends.llamacpp import LlamaSession, open_session

WRITERS = {"llama": write_llama, "gemma3 (sliding window)": write_gemma3, "mamba (recurrent)": write_mamba}
QUESTIONS = [
    ScoreRequest(
        index, "Facts. " * 12 + f"Question: how many {'very ' * (index % 5)}long tails? {index}\nAnswer:", choices
    )
    for index, choices in enumerate([(" two", " twenty", " t"), (" none", " nobody"), (" a", " b", " c", " d")] * 6)
]


@pytest.fixture(scope="module", params=list(WRITERS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WRITERS[request.param](tmp_path_factory.mktemp("models") / "tiny.gguf")


def session_of(path: Path, **options: int) -> LlamaSession:
    opened = open_session(path, Options(threads=1, model_sha256="0" * 64, **options))  # type: ignore[arg-type]
    assert isinstance(opened, LlamaSession)
    return opened


@pytest.fixture
def session(model: Path) -> Iterator[LlamaSession]:
    opened = session_of(model)
    yield opened
    opened.close()


def by_key(results: Iterator[Scored]) -> list[Scored]:
    return sorted(results, key=lambda result: result.key)


def score_whole(session: LlamaSession, requests: list[ScoreRequest]) -> list[Scored]:
    """Each (question, choice) alone in an empty memory: what lm-eval does."""
    results: list[Scored] = []
    for request in requests:
        parts = [
            next(iter(session.score([ScoreRequest(0, request.prompt, (text,))]))) for text in request.continuations
        ]
        sums = tuple(part.logprobs[0] for part in parts)
        results.append(Scored(request.key, parts[0].prompt_tokens, sums, tuple(part.greedy[0] for part in parts)))
    return results


def test_branching_equals_whole_sequences(session: LlamaSession) -> None:
    shared = by_key(session.score(QUESTIONS))
    alone = score_whole(session, QUESTIONS)
    assert [result.key for result in shared] == list(range(len(QUESTIONS)))
    for ours, theirs in zip(shared, alone, strict=True):
        assert ours.problem is None
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)
        assert ours.greedy == theirs.greedy


def test_small_batches_give_the_same(model: Path, session: LlamaSession) -> None:
    narrow = session_of(model, batch_tokens=32)
    try:
        for ours, theirs in zip(by_key(narrow.score(QUESTIONS)), by_key(session.score(QUESTIONS)), strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)
    finally:
        narrow.close()


def test_a_question_that_does_not_fit_is_a_problem_of_its_own(model: Path) -> None:
    session = session_of(model, context_tokens=160)
    try:
        long = ScoreRequest(99, "x" * 200, (" a", " b"))
        results = {result.key: result for result in session.score([QUESTIONS[0], long, QUESTIONS[1]])}
        problem = results[99].problem
        assert problem is not None and problem.code == "prompt_too_long" and "160" in problem.message
        assert results[0].problem is None and results[1].problem is None and len(results) == 3
        generated = list(session.generate([GenerateRequest(1, "x" * 150, 30), GenerateRequest(2, "short", 5)]))
        assert {item.key: item.problem is None for item in generated} == {1: False, 2: True}
        with pytest.raises(BadInput, match="160"):
            next(iter(session.stream("x" * 150, 30, Choice())))
    finally:
        session.close()


def test_batched_generation_equals_one_at_a_time(session: LlamaSession) -> None:
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


def test_a_stream_gives_the_tokens_of_generation(session: LlamaSession) -> None:
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


def test_a_stop_string_ends_a_sequence_and_is_cut(session: LlamaSession) -> None:
    free = next(iter(session.generate([GenerateRequest(0, "Once upon a time", 12)])))
    assert len(free.text) >= 6
    stop = free.text[3:5]
    first = free.text.find(stop)
    stopped = next(iter(session.generate([GenerateRequest(0, "Once upon a time", 12, (stop,))])))
    assert (stopped.text, stopped.finish) == (free.text[:first], "stop")
    assert stopped.new_tokens <= free.new_tokens


def test_seeds_repeat_and_differ(session: LlamaSession) -> None:
    def sample(seed: int) -> list[int]:
        return [token.token for token in session.stream("Hello", 10, Choice(temperature=1.5, seed=seed))]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_log_probabilities_of_a_stream_are_normalised(session: LlamaSession) -> None:
    for token in session.stream("Hello", 3, Choice(logprobs=True, top_logprobs=5)):
        assert token.logprob is not None
        values = [value for _, value in token.top]
        assert values == sorted(values, reverse=True) and len(values) == 5
        # Greedy: the chosen token is the most likely one.
        assert token.logprob == pytest.approx(values[0])


def test_facts_say_what_runs(session: LlamaSession, model: Path) -> None:
    list(session.score(QUESTIONS[:1]))
    facts = session.facts()
    assert facts.backend == "llamacpp" and facts.version.startswith("llama-cpp-python ")
    assert facts.kv_type == "f32"
    assert facts.branching is ("mamba" not in facts.model.lower())


def test_an_empty_choice_is_a_problem(session: LlamaSession) -> None:
    result = next(iter(session.score([ScoreRequest(0, "Question", ("",))])))
    assert result.problem is not None and result.problem.code == "empty_continuation"


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(EngineFailed, match=r"bad\.gguf"):
        session_of(path)


def test_the_eos_token_ends_a_sequence(model: Path, session: LlamaSession) -> None:
    assert session._model.is_end(EOS)  # pyright: ignore[reportPrivateUsage]
    assert not session._model.is_end(65)  # pyright: ignore[reportPrivateUsage]


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
    path = write_llama(tmp_path / "tiny.gguf")
    done = subprocess.run([sys.executable, "-c", LOG_AFTER_CLOSING, str(path)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
