"""Child processes of a demonstration: started with a log, watched, stopped in order. Times are in seconds.

Each child leads a session of its own, so that Ctrl-C in the terminal reaches only the parent, which then stops them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from joulemark.errors import EngineFailed

STOP_S = 15.0
TAIL_LINES = 30


class Child:
    """A running `python -m joulemark …`. Use as a context: leaving it stops the process."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "joulemark", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process id, which is the id of its session too."""
        return self._process.pid

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def check(self, patience_s: float = 0.0) -> None:
        """Raises EngineFailed with the log's end when the process is gone, or goes within `patience_s`."""
        try:
            status = self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            status = None
        if status is not None:
            raise EngineFailed(
                f"the {self.name} ended with status {status}; its log ends so:\n{self.tail()}",
                f"the whole log is {self.log}",
                code="child_ended",
            )

    def tail(self) -> str:
        """The log's last lines."""
        lines = self.log.read_text("utf-8", errors="replace").splitlines()
        return "\n".join(f"  | {line}" for line in lines[-TAIL_LINES:])

    def stop(self) -> None:
        """SIGTERM, and after STOP_S seconds SIGKILL to the whole session, so that nothing of it stays behind."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()


def free_port() -> int:
    """A loopback port that nothing listens on now. Another process may take it first; the server then says so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
