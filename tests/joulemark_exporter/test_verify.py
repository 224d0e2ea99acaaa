"""The figures of a comparison against torch's own, on logits that are known."""

from __future__ import annotations

import dataclasses
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from joulemark.errors import BadInput, EngineFailed
from joulemark_exporter import probe, verify
from joulemark_exporter.calibration import Windows
from joulemark_exporter.recipe import Limits
from tests.fixtures import hub_models
from tests.fixtures.exporting import engine_logits, some_tokens, write

TOKENS = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(0))
REFERENCE = torch.randn((3, 12, 50), generator=torch.Generator().manual_seed(1)) * 2
FOUND = REFERENCE + torch.randn((3, 12, 50), generator=torch.Generator().manual_seed(2)) * 0.7


class Walk:
    """Gives out the reference: a window's states are its number."""

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return REFERENCE[int(states)]


class Session:
    """An engine that answers with what it is given."""

    def __init__(self, answers: torch.Tensor) -> None:
        self._answers = iter(answers.numpy())

    def logits(self, tokens: list[int]) -> np.ndarray:
        del tokens
        return next(self._answers)

    def peak_memory_bytes(self) -> int:
        return 1234


def compare(answers: torch.Tensor) -> verify.Findings:
    windows = Windows(TOKENS, "made", "0" * 64, beginning=False)
    return verify.compare(Session(answers), windows, Walk(), torch.arange(3))  # type: ignore[arg-type]


def test_every_figure_is_torch_s() -> None:
    found = compare(FOUND)
    true, other = REFERENCE.double().log_softmax(-1), FOUND.double().log_softmax(-1)
    divergence = functional.kl_div(other, true, reduction="sum", log_target=True) / 36
    assert found.tokens == 36
    assert found.divergence == pytest.approx(float(divergence), rel=1e-5)
    assert found.top1_agreement == pytest.approx(float((REFERENCE.argmax(-1) == FOUND.argmax(-1)).double().mean()))
    for figure, logits in ((found.perplexity, FOUND), (found.reference_perplexity, REFERENCE)):
        loss = functional.cross_entropy(logits[:, :-1].double().reshape(-1, 50), TOKENS[:, 1:].reshape(-1))
        assert figure == pytest.approx(math.exp(loss), rel=1e-5)
    difference = (FOUND - FOUND.mean(-1, keepdim=True)) - (REFERENCE - REFERENCE.mean(-1, keepdim=True))
    assert found.largest_difference == pytest.approx(float(difference.abs().max()), rel=1e-5)
    assert found.engine_peak_memory_bytes == 1234
    # The two directions differ: it is the reference whose words are weighed.
    assert abs(found.divergence - float(functional.kl_div(true, other, reduction="sum", log_target=True) / 36)) > 0.01


def test_equal_logits_differ_in_nothing() -> None:
    found = compare(REFERENCE + 3.0)
    assert abs(found.divergence) < 1e-6
    assert found.top1_agreement == 1
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-6)
    assert found.largest_difference < 1e-5


def test_another_vocabulary_is_an_error() -> None:
    with pytest.raises(BadInput, match="vocabulary of 49"):
        compare(FOUND[:, :, :49])


def test_each_limit_is_kept_on_its_own_side() -> None:
    found = dataclasses.replace(
        compare(FOUND), divergence=0.2, top1_agreement=0.8, perplexity=11.0, reference_perplexity=10.0
    )
    kept = Limits(divergence=0.2, top1_agreement=0.8, perplexity_increase=1.1, bits_per_weight=5.0)
    assert verify.failures(found, 5.0, kept) == []
    assert verify.failures(found, 5.0, Limits()) == []
    for name, value in (
        ("divergence", 0.19),
        ("top1_agreement", 0.81),
        ("perplexity_increase", 1.09),
        ("bits_per_weight", 4.9),
    ):
        broken = verify.failures(found, 5.0, Limits(**{name: value}))
        assert len(broken) == 1
        assert broken[0].startswith(name)
    # A figure that is not a number keeps no limit.
    assert verify.failures(dataclasses.replace(found, divergence=math.nan), 5.0, Limits(divergence=1.0))


def test_an_engine_that_dies_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    hub_models.write(tmp_path / "model", "llama")
    path = write(tmp_path / "model", tmp_path / "out")
    with probe.opened("llamacpp", path, 1) as session, pytest.raises(EngineFailed, match="ended with status"):
        process = vars(session)["_process"]
        process.kill()
        process.wait()  # so that the question breaks on the pipe, and stays in its buffer
        session.tokenize("a")
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:5000])
    with probe.opened("llamacpp", tmp_path / "cut.gguf", 1) as session, pytest.raises(EngineFailed, match="refuses"):
        session.tokenize("a")
    assert engine_logits(path, some_tokens(9)).shape == (9, hub_models.VOCABULARY)


def test_an_engine_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_models.write(tmp_path / "model", "llama")
    path = write(tmp_path / "model", tmp_path / "out")
    with probe.opened("llamacpp", path, 1) as session:
        assert session.tokenize("def")
        process = vars(session)["_process"]
        process.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(probe, "SILENCE_S", 0.5)
        with pytest.raises(EngineFailed, match="hangs"):
            session.tokenize("def")
    assert process.wait(10) == -signal.SIGKILL


def test_a_small_engine_of_a_large_exporter_is_small(tmp_path: Path) -> None:
    """ru_maxrss of a child begins with what its parent had: here half a gigabyte, which the engine has not."""
    hub_models.write(tmp_path / "model", "llama")
    path = write(tmp_path / "model", tmp_path / "out")
    ballast = np.ones(1 << 26)
    with probe.opened("llamacpp", path, 1) as session:
        session.logits([5, 6, 7])
        assert 10_000_000 < session.peak_memory_bytes() < ballast.nbytes // 2
