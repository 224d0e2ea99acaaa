"""Asking a board's own programs (vcgencmd, nvpmodel): never through a shell, with a limit of time and of output.

Owns: finding the program, ending one that hangs together with its children, and why there is no answer. Not aware of what an
answer means. Such a call forks and costs milliseconds, so that it has no place in a sampling loop: see sensors/_polling.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence

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


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the program and whatever it started; a child that keeps the pipe open must not keep us."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
