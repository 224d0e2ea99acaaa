"""How many tokens a scoring batch may have: their logits lie beside each other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from joulemark_agent.backends import Options
from joulemark_agent.backends._llama_session import LlamaSession


@pytest.mark.parametrize(
    ("vocabulary", "memory", "tokens"),
    [
        (49_152, None, 512),
        (49_152, 8 * 2**30, 512),
        (262_144, None, 128),  # 2 MiB a token, 256 MiB at most
        (262_144, 100 * 2**20, 50),
        (262_144, 0, 32),
        (300, 1, 32),
    ],
)
def test_a_large_vocabulary_or_a_small_memory_makes_small_batches(
    vocabulary: int, memory: int | None, tokens: int
) -> None:
    given: Any = SimpleNamespace(
        _options=Options(threads=1, model_sha256="0" * 64, memory_bytes=memory),
        _model=SimpleNamespace(vocabulary_size=vocabulary),
    )
    assert LlamaSession._scoring_batch(given) == tokens  # pyright: ignore[reportPrivateUsage]
