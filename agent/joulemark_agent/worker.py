"""The worker process, both ends: the agent starts it and reads its messages; the child runs the evaluation or serves completions.

An engine can crash, hang, or be killed for memory; only this process dies of it. The child talks over a private copy of its standard
output, so that nothing an engine prints can be taken for a message, and it dies with its parent. Lines are bounded.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from joulemark.errors import JoulemarkError, to_problem
from joulemark.wire import Problem
from joulemark_agent.backends import Options
from joulemark_agent.messages import (
    LINE_LIMIT,
    CompletionJob,
    EvaluateJob,
    Failed,
    Loaded,
    Message,
    ServeJob,
    job_reader,
    message_reader,
)
from joulemark_agent.pins import SyncPin
from joulemark_agent.runner import Heart, Surroundings, evaluate, open_backend, verify_model
from joulemark_agent.serving import answer

STDERR_TAIL_BYTES = 4000
PR_SET_PDEATHSIG = 1
FIRST_TO_DIE = "1000"


class WorkerStalled(Exception):
    """The worker said nothing for longer than it may."""


# --- the agent's end --------------------------------------------------------------------------------------------------
class Worker:
    """A running child. Use as a context manager: leaving it kills the child's whole process group."""

    def __init__(self, job: EvaluateJob | ServeJob, vmstat: Path = Path("/proc/vmstat")) -> None:
        self._vmstat = vmstat
        self._kills_before = _memory_kills(vmstat)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        self._messages: queue.Queue[Message | None] = queue.Queue(maxsize=1000)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "joulemark_agent.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="worker-reader", daemon=True)
        self._reader.start()
        self.send(job)

    @property
    def pid(self) -> int:
        """The child's process id, for the sensors."""
        return self._process.pid

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def send(self, job: EvaluateJob | ServeJob | CompletionJob) -> None:
        """Give the child something to do. A child that is gone is noticed when its messages end."""
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.write(job.model_dump_json().encode() + b"\n")
            self._process.stdin.flush()

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, None when the child has ended. Raises WorkerStalled after `timeout_s` of silence."""
        try:
            return self._messages.get(timeout=timeout_s)
        except queue.Empty:
            raise WorkerStalled(f"the worker said nothing for {timeout_s:g} s") from None

    def _read(self) -> None:
        reader = message_reader()
        stream = self._process.stdout
        assert stream is not None
        while line := stream.readline(LINE_LIMIT):
            try:
                message = reader.validate_json(line)
            except ValidationError as error:
                message = Failed(
                    problem=Problem(
                        code="worker_garbled",
                        message=f"the worker sent something unreadable: {error.error_count()} errors in {len(line)} bytes",
                        hint="the engine may have overwritten its memory: check the model file and the engine's version",
                    )
                )
            self._messages.put(message)
        self._messages.put(None)

    def stop(self) -> None:
        """End the child and everything it started; waits for it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._stderr.close()

    def explain_end(self) -> Problem | None:
        """Why the child ended; None when it ended well."""
        return explain_exit(self._process.wait(), _memory_kills(self._vmstat) > self._kills_before, self._tail())

    def _tail(self) -> str:
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - STDERR_TAIL_BYTES))
        return self._stderr.read().decode(errors="replace").strip()


def explain_exit(code: int, memory_kill: bool, stderr_tail: str) -> Problem | None:
    """A child's exit in words. Pure. `memory_kill`: the kernel's out-of-memory counter rose while it lived."""
    last = stderr_tail.splitlines()[-1][:300] if stderr_tail else "it printed nothing"
    if code == 0:
        return None
    if code == -signal.SIGKILL and memory_kill:
        return Problem(
            code="out_of_memory",
            message="the kernel killed the worker because the machine ran out of memory",
            hint="use a smaller model, a shorter context or fewer sequences",
        )
    if code < 0:
        name = signal.Signals(-code).name
        return Problem(
            code="worker_crashed",
            message=f"the worker was ended by {name}; its last words: {last}",
            hint="SIGABRT or SIGSEGV: the engine could not bear this model file; SIGILL: the engine was built for another CPU; "
            "SIGKILL: somebody killed it",
        )
    return Problem(
        code="worker_crashed",
        message=f"the worker ended with exit code {code}; its last words: {last}",
        hint="run `joulemark doctor` to see whether the engine loads",
    )


def _memory_kills(vmstat: Path) -> int:
    """The kernel's count of out-of-memory kills; 0 where it does not count them (Linux before 4.13)."""
    try:
        lines = vmstat.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


# --- the child's end --------------------------------------------------------------------------------------------------
def main() -> int:
    """Read one job from standard input and do it. Exit code 0 when it was done or refused in words."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return 1
    _volunteer_for_memory_kill()
    channel = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    lock = threading.Lock()

    def emit(message: Message) -> None:
        with lock:
            _write_all(channel, message.model_dump_json().encode() + b"\n")

    lines = _lines(sys.stdin.buffer)
    reader = job_reader()
    try:
        job = reader.validate_json(next(lines))
        if isinstance(job, EvaluateJob):
            with contextlib.closing(SyncPin(job.sync_gpio)) as sync:
                evaluate(job, Surroundings(time.monotonic, time.sleep, emit, sync))
        elif isinstance(job, ServeJob):
            _serve(job, (reader.validate_json(line) for line in lines), emit)
    except (JoulemarkError, MemoryError, OSError) as error:
        emit(Failed(problem=to_problem(error)))
    return 0


def _serve(job: ServeJob, requests: Iterator[object], emit: Callable[[Message], None]) -> None:
    around = Surroundings(time.monotonic, time.sleep, emit)
    options = Options(job.threads, verify_model(job), memory_bytes=job.memory_bytes, beat=Heart(around))
    session = open_backend(job, options)
    try:
        emit(Loaded(engine=session.facts()))
        for request in requests:
            if isinstance(request, CompletionJob):
                answer(session, request, emit)
    finally:
        session.close()


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    while line := stream.readline(LINE_LIMIT):
        yield line


def _write_all(channel: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = channel.write(view)
        view = view[written:]


def _volunteer_for_memory_kill() -> None:
    """Ask the kernel to kill this process first when memory runs out; where that is not allowed the default order stands."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(FIRST_TO_DIE)


if __name__ == "__main__":
    sys.exit(main())
