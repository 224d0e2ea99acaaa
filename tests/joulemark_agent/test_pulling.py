"""Transfers that fail in ways that nobody foresaw: they are told, and the others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from joulemark.wire import Manifest
from joulemark_agent.host_link import HostLink
from joulemark_agent.pulling import Puller
from joulemark_agent.store import Store
from tests.fixtures.grids import SMOL_Q8
from tests.fixtures.host_process import wait_until


class NoStore:
    """A store whose transfers fail with something that is no error of ours."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def manifest_of(self, _: str) -> Manifest:
        return SMOL_Q8

    def pull(self, artifact_id: str, _: Callable[[str, int], Iterator[bytes]]) -> None:
        self.asked.append(artifact_id)
        raise ValueError("nobody thought of this")


def test_an_error_that_nobody_foresaw_is_told_and_does_not_stop_the_others():
    store = NoStore()
    puller = Puller(store, HostLink("http://127.0.0.1:9"), lambda: False)  # type: ignore[arg-type]
    first, second = "a" * 64, "b" * 64
    puller.start(first)
    puller.start(second)
    wait_until(lambda: not puller.active(first) and not puller.active(second), 10)
    problem = puller.problem(first)
    assert problem is not None and problem.code == "internal" and not problem.retryable
    assert store.asked == [first, second]
    puller.start(first)  # the thread that ended is begun anew
    wait_until(lambda: store.asked == [first, second, first], 10)
    puller.stop()


def test_a_host_that_is_away_is_told_as_something_that_may_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("joulemark_agent.pulling.TRIES", 1)
    store = Store(tmp_path / "store")
    artifact_id, _ = store.announce(SMOL_Q8)
    puller = Puller(store, HostLink("http://127.0.0.1:9"), lambda: False)
    puller.start(artifact_id)
    wait_until(lambda: not puller.active(artifact_id), 10)
    problem = puller.problem(artifact_id)
    assert problem is not None and problem.code == "unavailable" and problem.retryable
