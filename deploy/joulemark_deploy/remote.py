"""One board over the plain OpenSSH client: its configuration, keys, agents and known hosts count as for `ssh` itself.

Owns: one shared connection (a password is asked once), running a command there, bringing a file there so that it is whole or not there.
Not aware of what is installed. Nothing is needed on the board but a POSIX shell, tar and sha256sum.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from joulemark.errors import BadInput, ToolFailed
from joulemark_deploy.digests import sha256_of
from joulemark_deploy.tools import Line, run

_DESTINATION = re.compile(r"^([A-Za-z0-9_][A-Za-z0-9_.-]{0,60}@)?[A-Za-z0-9][A-Za-z0-9_.:-]{0,250}$", re.ASCII)
_TRIES = 4
_PIECE_BYTES = 256 * 1024
_HINT = "try `ssh` with the same words; keys and addresses are its affair"
Sent = Callable[[Path, int, int], None]
"""(file, bytes sent of all, bytes of all)"""


class Board:
    """See the module. `options` are handed to ssh as they are. Use as a context manager."""

    def __init__(self, destination: str, port: int | None = None, options: Sequence[str] = ()) -> None:
        if not _DESTINATION.match(destination):
            raise BadInput(f"{destination[:80]!r} is no user@address", "for example: pi@raspberrypi.local")
        self.destination = destination
        self._folder = tempfile.TemporaryDirectory(prefix="joulemark-ssh-")
        self._options = [
            *("-o", "ControlMaster=auto", "-o", f"ControlPath={self._folder.name}/%C", "-o", "ControlPersist=60"),
            *("-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"),
            *(("-p", str(port)) if port is not None else ()),
            *options,
        ]

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        subprocess.run(self._command("-O", "exit"), capture_output=True, check=False)
        self._folder.cleanup()

    def _command(self, *control: str) -> list[str]:
        return ["ssh", *self._options, *control, "--", self.destination]

    def run(self, command: str, failure: str, each_line: Line | None = None, stdin: bytes | None = None) -> str:
        """What a shell command prints there. Raises ToolFailed with its last lines."""
        return run([*self._command(), command], failure, hint=_HINT, each_line=each_line, stdin=stdin)

    def run_at_terminal(self, command: str, failure: str) -> None:
        """Run a command there that may ask the person something (sudo's password). Raises ToolFailed."""
        ended = subprocess.run(["ssh", "-t", *self._options, "--", self.destination, command], check=False)
        if ended.returncode != 0:
            raise ToolFailed(f"{failure} (exit status {ended.returncode})", "the lines above say why")

    def bring(self, paths: Sequence[Path], folder: str, sent: Sent = lambda _path, _done, _total: None) -> None:
        """Bring files into a private folder there under their own names. What is there whole already is not sent again; a connection that
        breaks is tried again, and goes on with the next file. Raises ToolFailed."""
        digests = {path.name: sha256_of(path) for path in paths}
        for attempt in range(1, _TRIES + 1):
            lacking = self._missing(folder, digests)
            bring = [path for path in paths if path.name in lacking]
            if not bring:
                return
            try:
                self._send(bring, folder, sent)
            except ToolFailed:
                if attempt == _TRIES:
                    raise
                time.sleep(2.0**attempt)
        if lacking := self._missing(folder, digests):
            raise ToolFailed(
                f"what arrived at {self.destination} is not what was sent: {', '.join(sorted(lacking))}", _HINT
            )

    def _missing(self, folder: str, digests: Mapping[str, str]) -> set[str]:
        """The names of those that are not whole in that folder there."""
        listing = "".join(f"{sha256}  {name}\n" for name, sha256 in digests.items())
        place = shlex.quote(folder)
        check = f"mkdir -p -m 700 {place} && cd {place} && {{ LC_ALL=C sha256sum -c - 2>/dev/null; true; }}"
        said = self.run(check, "the board could not be looked at", stdin=listing.encode())
        whole = {line.removesuffix(": OK") for line in said.splitlines() if line.endswith(": OK")}
        return set(digests) - whole

    def _send(self, paths: Sequence[Path], folder: str, sent: Sent) -> None:
        """One stream of files for tar. Each is complete before the next begins."""
        total, done = sum(path.stat().st_size for path in paths), 0
        with tempfile.TemporaryFile() as said:
            command = [*self._command(), f"umask 077 && tar -xf - -C {shlex.quote(folder)}"]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said)
            assert process.stdin is not None
            # A connection that breaks shows here as a broken pipe; what ssh said about it follows.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                with tarfile.open(fileobj=process.stdin, mode="w|", format=tarfile.GNU_FORMAT) as stream:
                    for path in paths:
                        member = tarfile.TarInfo(path.name)
                        member.size, member.mode = path.stat().st_size, 0o600
                        with path.open("rb") as file:
                            stream.addfile(member, _Counted(file, path, done, total, sent))
                        done += member.size
                process.stdin.close()
            if process.wait() != 0:
                said.seek(0)
                last = said.read().decode("utf-8", "replace").strip()[-500:]
                raise ToolFailed(f"the files could not be brought to {self.destination}: {last}", _HINT)


class _Counted:
    """A file that tells how much of all has been read with it."""

    def __init__(self, file: IO[bytes], path: Path, before: int, total: int, sent: Sent) -> None:
        self._file, self._path, self._done, self._total, self._sent = file, path, before, total, sent

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        piece = self._file.read(size)
        self._done += len(piece)
        self._sent(self._path, self._done, self._total)
        return piece
