"""What systemd is told, over the socket that it names: a file, or a name in the abstract."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from joulemark_agent.service_manager import ready


@pytest.mark.parametrize("abstract", [False, True])
def test_it_is_told_that_the_agent_is_ready(abstract: bool, tmp_path: Path) -> None:
    name = f"@joulemark-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        manager.settimeout(5)
        ready("serving on port 8090", {"NOTIFY_SOCKET": name})
        assert manager.recv(1000) == b"READY=1\nSTATUS=serving on port 8090"


def test_a_manager_that_has_gone_is_logged_and_the_agent_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ready("serving", {"NOTIFY_SOCKET": str(tmp_path / "nobody")})
    assert "cannot be told" in caplog.text


def test_nobody_asks(caplog: pytest.LogCaptureFixture) -> None:
    ready("serving", {})
    assert not caplog.text
