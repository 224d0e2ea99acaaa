"""Asking a board's own programs (vcgencmd, nvpmodel): never through a shell, with a limit of time and of output.

Owns: finding the program, ending one that hangs together with its children, and why there is no answer; asking one that root runs behind a
socket. Not aware of what an answer means. Such a call forks and costs milliseconds, so that it has no place in a sampling loop: see
sensors/_polling.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from joulemark_agent.sysfs import Roots, Unreadable

_MOST_BYTES = 65_536
_SYSTEM_FOLDERS = "/usr/bin:/bin:/usr/sbin:/sbin:/opt/vc/bin"
"""Where the makers put their programs. Not PATH: what answers for a board is not the caller's to choose."""


def ask(roots: Roots, command: Sequence[str], timeout_s: float = 2.0) -> str | Unreadable:
    """What `command` prints (64 KiB at most), or why it says nothing. The environment is empty but for the language."""
    name = " ".join(command)
    program = shutil.which(command[0], path=str(roots.bin) if roots.bin is not None else _SYSTEM_FOLDERS)
    if program is None:
        return Unreadable(name, "not there", f"no program {command[0]}")
    try:
        process = subprocess.Popen(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"LC_ALL": "C", "PATH": _SYSTEM_FOLDERS},
            start_new_session=True,
        )
    except OSError as error:
        return Unreadable(name, "not permitted" if isinstance(error, PermissionError) else "failed", str(error))
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _end(process)
        return Unreadable(name, "no answer in time", f"{timeout_s:g} s")
    text = output[:_MOST_BYTES].decode("utf-8", "replace").strip()
    if process.returncode != 0:
        last = text.rpartition("\n")[2][:200]
        return Unreadable(name, "failed", f"exit status {process.returncode}" + (f": {last}" if last else ""))
    return text if text else Unreadable(name, "empty")


def ask_behind(socket_path: Path, question: str, timeout_s: float) -> str | Unreadable:
    """What a program says that a service manager starts with `question` for its input (64 KiB at most), or why it says nothing.

    Its exit status is not told: whoever asks looks at what has become of it.
    """
    name, ends = str(socket_path), time.monotonic() + timeout_s
    answer = bytearray()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.settimeout(timeout_s)
            channel.connect(name)
            channel.sendall(question.encode())
            channel.shutdown(socket.SHUT_WR)
            while len(answer) < _MOST_BYTES and (read := channel.recv(4096)):
                answer += read
                channel.settimeout(max(0.001, ends - time.monotonic()))
    except TimeoutError:
        return Unreadable(name, "no answer in time", f"{timeout_s:g} s")
    except OSError as error:
        return Unreadable(name, "not permitted" if isinstance(error, PermissionError) else "failed", str(error))
    text = answer.decode("utf-8", "replace").strip()
    return text if text else Unreadable(name, "empty")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the program and whatever it started; a child that keeps the pipe open must not keep us."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
