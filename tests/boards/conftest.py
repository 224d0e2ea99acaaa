"""Emulated boards: made once a session, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from joulemark import sources
from joulemark_deploy import wheelhouse
from joulemark_deploy.targets import target_of
from tests.fixtures import arm64


@pytest.fixture(scope="session")
def wheelhouses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wheels for a Raspberry Pi 4 and a Pi 5, as a person would build them; the engine is cross-compiled where the cache has none."""
    folder = tmp_path_factory.mktemp("wheelhouses")
    made: dict[str, Path] = {}
    for name, pythons in (("pi4", ("3.10", "3.11")), ("pi5", ("3.11",))):
        made[name] = folder / name
        wheelhouse.build(
            target_of(name),
            made[name],
            pythons,
            sources.default_cache(),
            None,
            lambda _: None,
            lambda _done, _total: None,
        )
    return made


@pytest.fixture(scope="session")
def userland(tmp_path_factory: pytest.TempPathFactory) -> Iterator[arm64.Userland]:
    """An arm64 Debian bookworm, as Raspberry Pi OS is made of."""
    arm64.require()
    with arm64.emulation():
        yield arm64.Userland(tmp_path_factory.mktemp("arm64") / "root")
