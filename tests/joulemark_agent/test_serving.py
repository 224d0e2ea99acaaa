"""What a completion takes when nobody says how much: not the whole context, and nothing where the model does not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from joulemark.errors import Conflict
from joulemark_agent import serving
from joulemark_agent.backends import Options, Token
from joulemark_agent.backends.fake import open_session
from joulemark_agent.completions import Completions
from joulemark_agent.messages import Completed, CompletionJob
from tests.fixtures.boards import BARE, plant
from tests.fixtures.small_world import make_files, make_machine


@pytest.mark.parametrize(
    ("context", "asked", "given"), [(8192, None, 1024), (8192, 3000, 3000), (200, None, 199), (200, 7, 7)]
)
def test_an_answer_without_a_limit_does_not_take_the_whole_context(
    context: int, asked: int | None, given: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session: Any = open_session(
        tmp_path / "model.gguf", Options(threads=1, model_sha256="0" * 64, context_tokens=context)
    )
    limits: list[int] = []

    def stream(prompt: str, max_new_tokens: int, choice: object) -> list[Token]:
        limits.append(max_new_tokens)
        return [Token(0, b"", True)]

    monkeypatch.setattr(session, "stream", stream)
    last = list(serving.complete(session, "hello", CompletionJob(prompt="hello", max_new_tokens=asked)))[-1]
    assert isinstance(last, Completed) and last.prompt_tokens == 1
    assert limits == [given]


def test_a_model_that_does_not_fit_is_not_loaded(tmp_path: Path) -> None:
    """Nor one that fits the machine and not the container."""
    files = make_files(tmp_path / "files")
    limited = {"proc/self/cgroup": "0::/box\n", "sys/fs/cgroup/box/memory.max": f"{100 * 2**20}\n"}
    for name, tree in (
        ("small", {**BARE, "proc/meminfo": "MemTotal: 200000 kB\nMemAvailable: 100000 kB\n"}),
        ("boxed", {**BARE, **limited}),
    ):
        machine = dataclasses.replace(make_machine(), roots=plant(tmp_path / name, tree))
        completions = Completions(files, machine, idle_s=60)
        with pytest.raises(Conflict, match="are available"):
            next(completions.complete(files.artifact_id, CompletionJob(prompt="hello")))
        assert not completions.uses(files.artifact_id)
        assert machine.lock.acquire(timeout=1), "the machine is free again"
