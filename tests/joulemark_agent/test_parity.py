"""The scorer against transformers on the same (dequantised) weights, item by item.

On a float32 model the two engines must agree to 1e-3 per token. On SmolLM2 in Q4_1 they cannot: llama.cpp rounds activations to eight bits.
There the choices must be equal on 97 % of the ARC items, and the score within one standard error. The share is close to 97 % (485 of 500),
so a hundred items would decide by luck: 94 to 99 of the first hundred are equal, depending on how they are batched.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from joulemark import documents, packs, sources
from joulemark.grading import Outcome
from joulemark.lmeval import standard_error
from joulemark_agent.backends import Options, ScoreRequest
from joulemark_agent.backends.llamacpp import LlamaSession, open_session
from tests.fixtures.tiny_models import write_llama

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make install")
torch = pytest.importorskip("torch", reason="torch is not installed: make install-test")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: make install-test")


def open_model(path: Path) -> LlamaSession:
    session = open_session(path, Options(threads=2, model_sha256="0" * 64))
    assert isinstance(session, LlamaSession)
    return session


def reference(path: Path) -> Any:
    """The same file in transformers, dequantised to float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval()


def reference_logprobs(model: Any, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[list[float]]:
    """Per-token log-probabilities of each continuation, computed as lm-eval does."""
    longest = max(len(prompt) + len(part) for part in continuations)
    rows = [[*prompt, *part] + [0] * (longest - len(prompt) - len(part)) for part in continuations]
    # Only the positions from the prompt's last token on are read; the head over all others would be most of the work.
    with torch.inference_mode():
        logits = model(torch.tensor(rows), logits_to_keep=longest - len(prompt) + 1).logits.float().log_softmax(-1)
    return [
        [float(logits[row, index, token]) for index, token in enumerate(part)] for row, part in enumerate(continuations)
    ]


def split(session: LlamaSession, prompt: str, continuations: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    tokenize = session._model.tokenize  # pyright: ignore[reportPrivateUsage]
    head = tokenize(prompt)
    return head, [tokenize(prompt + text)[len(head) :] for text in continuations]


@pytest.fixture(scope="module")
def questions() -> list[tuple[str, tuple[str, ...]]]:
    return [
        (
            f"Question {index}: what is {'rather ' * (index % 7)}blue?\nAnswer:",
            (" sky", " the sea", " a", " nothing at all"),
        )
        for index in range(25)
    ]


def test_a_float32_model_agrees_to_a_thousandth_per_token(
    tmp_path: Path, questions: list[tuple[str, tuple[str, ...]]]
) -> None:
    path = write_llama(tmp_path / "tiny.gguf")
    session, model = open_model(path), reference(path)
    requests = [ScoreRequest(index, prompt, choices) for index, (prompt, choices) in enumerate(questions)]
    worst, tokens = 0.0, 0
    for result in session.score(requests):
        head, parts = split(session, *questions[result.key])
        expected = reference_logprobs(model, head, parts)
        assert result.continuation_tokens == tuple(len(part) for part in parts)
        for ours, theirs in zip(result.logprobs, expected, strict=True):
            worst = max(worst, abs(ours - sum(theirs)) / len(theirs))
            tokens += len(theirs)
        sums = [sum(values) for values in expected]
        assert max(range(4), key=lambda i: result.logprobs[i]) == max(range(4), key=lambda i: sums[i])
    session.close()
    assert tokens > 500
    assert worst < 1e-3, f"largest difference per token {worst:.2e}"


ITEMS = 500


@pytest.mark.model
@pytest.mark.timeout(1500)
def test_smollm2_chooses_as_transformers_does() -> None:
    cache = sources.default_cache()
    path = sources.fetch("smollm2-135m-instruct-q4_1", cache)
    pack = packs.render("arc_challenge", documents.load("arc_challenge", cache))
    items = pack.items[:ITEMS]
    task = packs.task_module(pack)
    session, model = open_model(path), reference(path)
    requests = [ScoreRequest(item.doc_id, item.prompt, tuple(" " + text for text in item.choices)) for item in items]
    ours = {result.key: result for result in session.score(requests)}
    equal, differences, scores = 0, list[float](), ([0.0] * 0, [0.0] * 0)
    for item in items:
        head, parts = split(session, item.prompt, tuple(" " + text for text in item.choices))
        expected = [sum(values) for values in reference_logprobs(model, head, parts)]
        grades = [
            task.grade(item, Outcome(output=None, choice_logprobs=values))
            for values in (ours[item.doc_id].logprobs, tuple(expected))
        ]
        equal += grades[0].answers["acc_norm"] == grades[1].answers["acc_norm"]
        for collected, grade in zip(scores, grades, strict=True):
            collected.append(grade.scores["acc_norm"])
        pairs = zip(ours[item.doc_id].logprobs, expected, parts, strict=True)
        differences.extend(abs(a - b) / len(part) for a, b, part in pairs)
    session.close()
    error = standard_error(scores[1])
    assert error is not None
    mean = sum(differences) / len(differences)
    print(f"acc_norm choices equal: {equal}/{ITEMS}, mean |Δ log p| per token {mean:.3f}")
    assert equal >= 0.97 * ITEMS
    assert abs(sum(scores[0]) - sum(scores[1])) / len(items) <= error
    assert mean < 0.1
