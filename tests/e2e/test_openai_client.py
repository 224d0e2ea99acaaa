"""The official openai client, unchanged, against a real agent with a real engine and a tiny model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.fixtures.agent_process import AgentProcess
from tests.fixtures.small_world import make_files, make_spec

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make install")


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    folder = tmp_path_factory.mktemp("openai")
    files = make_files(folder / "files")
    process = AgentProcess(folder / "agent")
    process.push_model(files.model_manifest, files.model)
    process.push_pack(next(iter(files.packs)), next(iter(files.packs.values())))
    yield process
    process.stop()


@pytest.fixture
def client(agent: AgentProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=agent.url + "/v1", api_key="none", max_retries=0)


MODEL = "tiny"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_a_completion_with_usage(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Once upon", max_tokens=8, temperature=0)
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].text
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (9, 8, 17)


def test_streamed_text_equals_whole_text(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="Once upon", max_tokens=8, temperature=0)
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt="Once upon",
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert len([chunk for chunk in chunks if chunk.choices]) > 2
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 8


def test_stop_cuts_the_text(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="Once upon", max_tokens=8, temperature=0).choices[0].text
    stop = whole[2:4]
    cut = client.completions.create(model=MODEL, prompt="Once upon", max_tokens=8, temperature=0, stop=[stop])
    assert cut.choices[0].text == whole[: whole.find(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_seeds_repeat(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        answer = client.completions.create(model=MODEL, prompt="x", max_tokens=12, temperature=1.5, seed=seed)
        return answer.choices[0].text

    assert sample(7) == sample(7) != sample(8)


def test_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Once", max_tokens=4, temperature=0, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    assert len(logprobs.token_logprobs) == 4 and all(
        value is not None and value <= 0 for value in logprobs.token_logprobs
    )
    assert all(0 < sum(math.exp(value) for value in top.values()) <= 1.0001 for top in logprobs.top_logprobs)


def test_several_prompts(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=3, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1]


def test_chat_without_a_template_is_refused_in_words(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="chat template"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])


def test_an_unknown_model_and_an_unsupported_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="models here: tiny"):
        client.completions.create(model="nope", prompt="x")
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        client.completions.create(model=MODEL, prompt="x", logit_bias={"1": 2})
    with pytest.raises(openai.APIStatusError, match="context"):
        client.completions.create(model=MODEL, prompt="x" * 5000, max_tokens=5)
    # The worker is still sound after the refusals.
    assert client.completions.create(model=MODEL, prompt="x", max_tokens=2).choices


def test_a_measurement_is_not_disturbed(agent: AgentProcess, client: openai.OpenAI, tmp_path: Path) -> None:
    files = make_files(tmp_path / "files")
    spec = make_spec(files, "quiet", idle_s=8.0)
    agent.submit(spec)
    while agent.state("quiet")["phase"] != "idle":
        assert agent.state("quiet")["status"] in ("queued", "running")
    with pytest.raises(openai.ConflictError, match="must not be disturbed"):
        client.completions.create(model=MODEL, prompt="x", max_tokens=2)
    assert agent.record("quiet").status == "done"
    assert client.completions.create(model=MODEL, prompt="x", max_tokens=2).choices
