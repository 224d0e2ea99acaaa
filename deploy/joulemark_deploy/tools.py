"""Running other people's programs on this workstation: pip, uv, ssh, the compiler. Their last words become ours when they fail."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from joulemark.errors import ToolFailed

Line = Callable[[bytes], None]
_TAIL_LINES = 40
_TAIL_CHARACTERS = 2000


def pip(verb: str, *options: str, python: Path | None = None) -> list[str]:
    """The command that runs pip's `verb` in this Python's environment, or in that of `python`."""
    return [str(python or sys.executable), "-m", "pip", verb, "--disable-pip-version-check", *options]


def run(
    command: Sequence[str],
    failure: str,
    hint: str = "the lines above are the tool's own; full disks and a missing network are usual causes",
    environment: Mapping[str, str] | None = None,
    each_line: Line | None = None,
    stdin: bytes | None = None,
) -> str:
    """Run a program to its end and give what it printed (its last lines). Raises ToolFailed with `failure` and those lines."""
    tail: list[bytes] = []
    try:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment) if environment is not None else None,
        )
    except OSError as error:
        raise ToolFailed(
            f"{failure}: {command[0]} cannot be started: {error}", "install it, or correct PATH"
        ) from error
    with process:
        assert process.stdout is not None
        if stdin is not None and process.stdin is not None:
            # A program that ends without having read: what it said and its exit status tell why.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(stdin)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for line in process.stdout:
            tail = [*tail[1 - _TAIL_LINES :], line]
            if each_line is not None:
                each_line(line)
    text = b"".join(tail).decode("utf-8", "replace").strip()
    if process.returncode != 0:
        raise ToolFailed(f"{failure} (exit status {process.returncode}):\n{text[-_TAIL_CHARACTERS:]}", hint)
    return text
