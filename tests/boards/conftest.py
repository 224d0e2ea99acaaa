"""Emulated boards: made once a session, for all tests of this folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from joulemark import sources
from joulemark_deploy import release, wheelhouse
from joulemark_deploy.targets import target_of
from tests.fixtures import arm64
from tests.fixtures.host_process import HostProcess
from tests.fixtures.ssh_server import SshServer

CPU = "cortex-a72"
NAME = "emulated"


@pytest.fixture(scope="session")
def wheelhouses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wheels for a Raspberry Pi 4 and a Pi 5, as a person would build them; the engine is cross-compiled where the cache has none."""
    folder = tmp_path_factory.mktemp("wheelhouses")
    made: dict[str, Path] = {}
    for name, pythons in (("pi4", ("3.10", "3.11")), ("pi5", ("3.11", "3.13"))):
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
def packed(wheelhouses: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release for a Raspberry Pi 4, as `joulemark install` makes it."""
    out = tmp_path_factory.mktemp("release") / "joulemark-armv8.0.tar.gz"
    quiet = (lambda _: None, lambda _done, _total: None)
    release.build(target_of("pi4"), wheelhouses["pi4"], out, sources.default_cache(), *quiet)
    return out


@pytest.fixture(scope="session")
def userland(tmp_path_factory: pytest.TempPathFactory) -> Iterator[arm64.Userland]:
    """An arm64 Debian bookworm, as Raspberry Pi OS is made of."""
    arm64.require()
    with arm64.emulation():
        yield arm64.Userland(tmp_path_factory.mktemp("arm64") / "root")


def joulemark(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of the workstation."""
    command = [sys.executable, "-m", "joulemark", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


@dataclass
class Board:
    """An emulated board behind a real sshd, with Joulemark installed from the workstation and enrolled at a real host."""

    userland: arm64.Userland
    server: SshServer
    host: HostProcess
    said: str

    def run(self, *arguments: str, cpu: str = CPU, **more: object) -> subprocess.CompletedProcess[str]:
        """A command on the board."""
        return self.userland.run(*arguments, cpu=cpu, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def board(userland: arm64.Userland, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """See Board."""
    folder = tmp_path_factory.mktemp("board")
    server = SshServer(userland, CPU, {"/sources": sources.default_cache() / "sources"}, folder / "ssh")
    host = HostProcess(folder / "host")
    try:
        key = host.key_file(folder / "board.key")
        wishes = ("--host-url", host.url, "--enrol-key-file", str(key), "--name", NAME)
        done = joulemark("install", "root@127.0.0.1", "--release", str(packed), *wishes, *server.options)
        assert done.returncode == 0, done.stdout + done.stderr + server.agent_log()
        assert not key.exists()
        yield Board(userland, server, host, done.stdout)
    finally:
        server.stop()
        host.close()
