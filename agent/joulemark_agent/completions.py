"""Completions on the agent's side: one serving worker, loaded on demand, unloaded when idle or when a run needs the machine.

A completion holds the machine's lock, as a run does: a measurement is never disturbed, and a completion that comes meanwhile is
refused with a reason instead of waiting for hours. Not aware of HTTP.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from joulemark.errors import Conflict, EngineFailed
from joulemark.wire import Manifest
from joulemark_agent.fitting import cache_budget, choose_backend, misfit
from joulemark_agent.machine import available_bytes, usable_cores
from joulemark_agent.messages import Beat, Completed, CompletionJob, Failed, Loaded, Message, Piece, ServeJob
from joulemark_agent.worker import Worker, WorkerStalled
from joulemark_agent.workplace import Library, Machine

LOCK_WAIT_S = 5.0
SILENCE_LIMIT_S = 120.0
CHECK_INTERVAL_S = 5.0


class Completions:
    """See the module. `close` ends the worker."""

    def __init__(self, library: Library, machine: Machine, idle_s: float) -> None:
        self._library = library
        self._machine = machine
        self._idle_s = idle_s
        self._worker: Worker | None = None
        self._artifact_id = ""
        self._used_s = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._unload_when_idle, name="completions", daemon=True)

    def start(self) -> None:
        """Begin watching for idleness."""
        self._thread.start()

    def close(self) -> None:
        """End the worker for good."""
        self._closing.set()
        with self._machine.lock:
            self.unload()

    def unload(self) -> None:
        """End the worker. The caller holds the machine's lock."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def uses(self, artifact_id: str) -> bool:
        """Whether the worker has this artifact loaded."""
        return self._worker is not None and self._artifact_id == artifact_id

    def complete(self, artifact_id: str, job: CompletionJob) -> Iterator[Piece | Completed]:
        """Pieces, then Completed. Raises Conflict while a run is measured, NotFound, or what the engine said.

        Closing the iterator early ends the worker: an engine cannot be interrupted in another way.
        """
        if not self._machine.lock.acquire(timeout=LOCK_WAIT_S):
            raise Conflict(
                "the board is measuring a run and must not be disturbed",
                "ask again when GET /api/runs shows no running run",
            )
        finished = False
        try:
            worker = self._load(artifact_id)
            worker.send(job)
            for message in self._answers(worker):
                yield message
                finished = isinstance(message, Completed)
        except _Refused as refused:
            finished = True
            raise refused.error from None
        finally:
            if not finished:
                self.unload()
            self._used_s = time.monotonic()
            self._machine.lock.release()

    def _load(self, artifact_id: str) -> Worker:
        if self._worker is not None and self._artifact_id == artifact_id:
            return self._worker
        self.unload()
        manifest = self._library.manifest(artifact_id)
        if problem := misfit(available_bytes(self._machine.roots), manifest):
            raise Conflict(problem.message, problem.hint)
        worker = Worker(self._job(artifact_id, manifest))
        self._worker, self._artifact_id = worker, artifact_id
        while True:
            message = self._next(worker)
            if isinstance(message, Loaded):
                return worker
            if isinstance(message, Failed):
                raise EngineFailed(message.problem.message, message.problem.hint, message.problem.code)

    def _job(self, artifact_id: str, manifest: Manifest) -> ServeJob:
        available = available_bytes(self._machine.roots)
        return ServeJob(
            manifest=manifest,
            backend=choose_backend(self._machine.profile.backends, manifest.format),
            threads=usable_cores(self._machine.roots),
            memory_bytes=cache_budget(available, manifest),
            model_path=str(self._library.model_path(artifact_id)),
        )

    def _answers(self, worker: Worker) -> Iterator[Piece | Completed]:
        while True:
            message = self._next(worker)
            if isinstance(message, Failed):
                problem = message.problem
                raise _Refused(EngineFailed(problem.message, problem.hint, problem.code))
            if isinstance(message, Piece):
                yield message
            elif isinstance(message, Completed):
                yield message
                return
            elif not isinstance(message, Beat | Loaded):
                raise EngineFailed(f"the serving worker sent a {message.kind} message", "this is a defect: report it")

    def _next(self, worker: Worker) -> Message:
        try:
            message = worker.receive(SILENCE_LIMIT_S)
        except WorkerStalled as stalled:
            raise EngineFailed(str(stalled), "the worker was killed; try a shorter prompt", "worker_hung") from stalled
        if message is None:
            problem = worker.explain_end()
            raise EngineFailed(
                problem.message if problem else "the serving worker ended",
                problem.hint if problem else "",
                "worker_crashed",
            )
        return message

    def _unload_when_idle(self) -> None:
        while not self._closing.wait(CHECK_INTERVAL_S):
            if self._worker is not None and time.monotonic() - self._used_s > self._idle_s:
                with self._machine.lock:
                    self.unload()


class _Refused(Exception):
    """The worker refused one request in words and is still sound."""

    def __init__(self, error: EngineFailed) -> None:
        super().__init__(str(error))
        self.error = error
