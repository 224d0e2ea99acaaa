"""The agent's run queue: one run at a time, each in a worker process of its own, each ending in exactly one record.

Supervises: starts the worker and the sampler, journals what the worker says, resumes a run whose worker died after making
progress, gives up with the reason when it did not, builds the record. Knows nothing of HTTP. Its thread holds `machine` while a run
lasts, so that nothing else the agent does (completions, deliveries) disturbs the timing.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from joulemark import packs
from joulemark.errors import BadInput, DigestMismatch, JoulemarkError, NoSpace, NotFound, to_problem
from joulemark.wire import Clock, DeviceFacts, Manifest, Metric, Problem, RunRecord, RunSpec, RunState
from joulemark_agent import holding, readiness, reporting
from joulemark_agent.fitting import cache_budget, choose_backend, misfit
from joulemark_agent.giving_up import WORKER_HUNG, lost, why_no_more
from joulemark_agent.journal import Journal
from joulemark_agent.machine import available_bytes, boot_id, usable_cores
from joulemark_agent.messages import (
    Beat,
    EvaluateJob,
    Failed,
    Finished,
    ItemDone,
    LatencyDone,
    Loaded,
    Message,
    PhaseEnded,
    PhaseStarted,
)
from joulemark_agent.pins import steady_fan
from joulemark_agent.reporting import FinalStatus
from joulemark_agent.sampling import Row, Sampler, open_sensors
from joulemark_agent.sensors import SensorUse
from joulemark_agent.verdict import Limits
from joulemark_agent.worker import Worker, WorkerStalled
from joulemark_agent.workplace import Library, Machine

POLL_S = 0.5
# A full or read-only disk is looked at again after so long.
DISK_PATIENCE_S = 10.0
_DISK_REFUSES = (NoSpace.code, "not_permitted", "storage_failed")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Ended:
    """How an attempt ended. `problem` None: it finished. `again`: another attempt may do better."""

    problem: Problem | None
    again: bool = False
    cancelled: bool = False
    stopped: bool = False


class Jobs:
    """See the module. `on_record(run_id, body)` is called after the journal has a record, and again at every start: an agent that
    died in between loses none. `before_run` makes the machine quiet; `on_damage` puts aside a model that was found rotten."""

    def __init__(
        self,
        journal: Journal,
        library: Library,
        machine: Machine,
        on_record: Callable[[str, bytes], None],
        before_run: Callable[[], None] = lambda: None,
        on_damage: Callable[[Manifest], None] = lambda _: None,
    ) -> None:
        self._journal = journal
        self._library = library
        self._machine = machine
        self._on_record = on_record
        self._before_run = before_run
        self._on_damage = on_damage
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._cancelled: set[str] = set()
        self._undelivered: set[str] = set()
        self._waits: dict[str, str] = {}
        self._trouble: str | None = None
        self._thread = threading.Thread(target=self._loop, name="jobs", daemon=True)

    # --- callers' side ------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Begin working; runs that an earlier agent left unfinished go first."""
        if self._machine.note is not None:
            holding.put_back(self._machine.roots, self._machine.note)
        for spec in self._journal.runs("done", "failed", "cancelled", "interrupted"):
            self._deliver(spec.run_id)
        self._thread.start()
        self._wake.set()

    def stop(self) -> None:
        """End the current worker; its run stays in the journal and is resumed at the next start."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, spec: RunSpec) -> RunState:
        """Queue a run. Raises NotFound for a missing artifact or pack, BadInput for an unknown backend, Conflict for a taken id."""
        manifest = self._library.manifest(spec.artifact_id)
        self._library.model_path(spec.artifact_id)
        pack = packs.read(self._library.pack_path(spec.pack_id), spec.pack_id)
        packs.task_module(pack)
        self._backend(spec, manifest)
        self._journal.add_run(spec, len(pack.items[: spec.limit]))
        self._wake.set()
        return self._journal.state(spec.run_id)

    def state(self, run_id: str) -> RunState:
        """Raises NotFound."""
        return self._with_wait(self._journal.state(run_id))

    def states(self) -> tuple[RunState, ...]:
        """All runs in queue order."""
        return tuple(self._with_wait(self._journal.state(spec.run_id)) for spec in self._journal.runs())

    def _with_wait(self, state: RunState) -> RunState:
        words = self._waits.get(state.run_id)
        return state.model_copy(update={"message": words}) if words else state

    def record(self, run_id: str) -> bytes:
        """The record of an ended run. Raises NotFound before that."""
        self._journal.state(run_id)
        return self._journal.record(run_id)

    def cancel(self, run_id: str) -> RunState:
        """Ask a queued or running run to end; an ended run stays as it is."""
        state = self._journal.state(run_id)
        if state.status in ("queued", "running"):
            self._cancelled.add(run_id)
            self._wake.set()
        return state

    def busy(self) -> bool:
        """Whether a run is going on."""
        return bool(self._journal.runs("running"))

    def current(self) -> tuple[RunSpec, RunState] | None:
        """The run that is going on, and how far it is."""
        running = self._journal.runs("running")
        return (running[0], self.state(running[0].run_id)) if running else None

    def needs(self, artifact_id: str) -> bool:
        """Whether a run that is not over yet is about this artifact: its record needs the manifest."""
        return any(spec.artifact_id == artifact_id for spec in self._journal.runs("queued", "running"))

    def trouble(self) -> str | None:
        """Why no run can go on just now, if the disk refuses."""
        return self._trouble

    # --- the thread ---------------------------------------------------------------------------------------------------
    def _loop(self) -> None:
        while not self._stopping.is_set():
            try:
                self._work()
            except (JoulemarkError, OSError) as error:
                # The disk refuses, or the run cannot even be recorded: what is committed stays, and it goes on when it can.
                self._trouble = f"runs wait: {error}"
                log.exception("the run queue cannot go on; it tries again in %.0f s", DISK_PATIENCE_S)
                self._stopping.wait(DISK_PATIENCE_S)

    def _work(self) -> None:
        """One run, or a wait for one."""
        for run_id in tuple(self._undelivered):
            self._undelivered.discard(run_id)
            self._deliver(run_id)
        waiting = self._journal.runs("running") or self._journal.runs("queued")
        if not waiting:
            self._trouble = None
            self._wake.wait(DISK_PATIENCE_S if self._undelivered else None)
            self._wake.clear()
            return
        with self._machine.lock:
            # Busy first: whoever asks from now on must not begin anything.
            self._journal.set_status(waiting[0].run_id, "running")
            self._trouble = None  # the disk takes writes again; the run itself may last for hours
            self._before_run()
            self._run(waiting[0])

    def _run(self, spec: RunSpec) -> None:
        ended = _Ended(None)
        memory_bandwidth: Metric | None = None
        device: DeviceFacts | None = None
        try:
            while True:
                refused = self._refuse(spec)
                if refused is not None:
                    ended = refused
                    break
                with self._held(spec):
                    # As the run has the machine: a power mode sets the memory's clock too, and how warm it is at rest.
                    memory_bandwidth = memory_bandwidth or self._machine.bandwidth()
                    self._wait_until_cool(spec)
                    if self._stopping.is_set():
                        return
                    if spec.run_id in self._cancelled:
                        continue
                    pins = self._machine.profile.pins
                    with steady_fan(pins.fan_gpio, pins.fan_speed):
                        device = self._machine.facts(memory_bandwidth)
                        ended = self._attempt(spec)
                if ended.stopped:
                    return
                if not ended.again:
                    break
        except (JoulemarkError, OSError) as error:
            problem = to_problem(error)
            if problem.code in _DISK_REFUSES:
                raise  # not the run's fault: it is resumed when the disk takes writes again
            log.exception("run %s failed outside its worker", spec.run_id)
            ended = _Ended(problem)
        self._finish(spec, ended, device or self._machine.facts(memory_bandwidth or reporting.not_measured()))

    def _held(self, spec: RunSpec) -> contextlib.AbstractContextManager[None]:
        machine = self._machine
        if machine.note is None:
            if spec.tuning is not None:
                raise BadInput("this program does not set machines", "set it by hand, or give the run to an agent")
            return contextlib.nullcontext()
        return holding.held(machine.roots, spec.tuning, machine.note)

    def _refuse(self, spec: RunSpec) -> _Ended | None:
        """Reasons not to start a worker (again)."""
        if spec.run_id in self._cancelled:
            return _Ended(None, cancelled=True)
        attempts = self._journal.attempts(spec.run_id)
        hopeless = why_no_more(attempts, lambda n: self._journal.item_count(spec.run_id, n), self._now().boot_id)
        if hopeless is not None:
            return _Ended(hopeless)
        available = available_bytes(self._machine.roots)
        problem = misfit(available, self._library.manifest(spec.artifact_id))
        if problem is None and not spec.anyway:
            problem = readiness.low_voltage(self._machine.profile, self._machine.roots)
        return _Ended(problem) if problem else None

    def _wait_until_cool(self, spec: RunSpec) -> None:
        """A warm board is given its time; what keeps the run waiting is shown as its phase."""

        def go_on() -> bool:
            return not self._stopping.is_set() and spec.run_id not in self._cancelled

        def sleep(seconds: float) -> None:
            self._stopping.wait(seconds)

        machine = self._machine
        readiness.wait_until_cool(
            machine.profile,
            machine.roots,
            spec.cool_wait_s,
            go_on,
            lambda words: self._say(spec.run_id, words),
            sleep=sleep,
        )
        self._waits.pop(spec.run_id, None)

    def _say(self, run_id: str, words: str) -> None:
        if run_id not in self._waits:
            log.info("run %s: %s", run_id, words)
        self._waits[run_id] = words

    def _backend(self, spec: RunSpec, manifest: Manifest) -> str:
        return choose_backend((spec.backend,) if spec.backend else self._machine.profile.backends, manifest.format)

    def _job(self, spec: RunSpec) -> EvaluateJob:
        manifest = self._library.manifest(spec.artifact_id)
        available = available_bytes(self._machine.roots)
        boot = self._now().boot_id
        here = [attempt for attempt in self._journal.attempts(spec.run_id) if attempt.clock.boot_id == boot]
        return EvaluateJob(
            spec=spec,
            manifest=manifest,
            backend=self._backend(spec, manifest),
            threads=spec.threads or usable_cores(self._machine.roots),
            idle_s=spec.idle_s or self._machine.profile.idle_s,
            sync_gpio=self._machine.profile.pins.sync_gpio,
            memory_bytes=cache_budget(available, manifest),
            model_path=str(self._library.model_path(spec.artifact_id)),
            pack_path=str(self._library.pack_path(spec.pack_id)),
            done=self._journal.done(spec.run_id),
            # Of this boot: the record cannot place another one's times.
            latency_done=any(phase.name == "latency" for attempt in here for phase in attempt.phases),
        )

    # --- one attempt --------------------------------------------------------------------------------------------------
    def _attempt(self, spec: RunSpec) -> _Ended:
        job = self._job(spec)
        number = self._journal.begin_attempt(spec.run_id, self._now())
        with Worker(job, self._machine.roots.proc / "vmstat") as worker:
            sampler = self._start_sampling(spec, number, worker.pid)
            try:
                ended = self._listen(spec, number, worker)
            finally:
                trace = sampler.stop()
        self._journal.end_attempt(spec.run_id, number, ended.problem, trace)
        return ended

    def _start_sampling(self, spec: RunSpec, attempt: int, pid: int) -> Sampler:
        """Sample the profile's sensors around this worker; parts of the trace are journaled as they come."""
        machine = self._machine
        extra = [SensorUse("replay", {"path": str(machine.replay)})] if machine.replay else []
        sensors, absent = open_sensors(machine.profile, machine.roots, pid, extra=extra)
        interval_s = 1 / spec.sample_hz
        numbers = itertools.count()

        def keep(rows: list[Row]) -> None:
            self._journal.add_samples(spec.run_id, attempt, next(numbers), sampler.part(rows))

        sampler = Sampler(sensors, interval_s, on_chunk=keep, absent=absent)
        sampler.start()
        return sampler

    def _listen(self, spec: RunSpec, attempt: int, worker: Worker) -> _Ended:
        """Journal the worker's messages until it finishes, fails, dies, stalls, is cancelled, or the agent stops."""
        deadline = time.monotonic() + spec.timeout_s - self._spent_s(spec.run_id, attempt)
        heard = time.monotonic()
        while True:
            if self._stopping.is_set():
                return _Ended(lost(), stopped=True)
            if spec.run_id in self._cancelled:
                return _Ended(None, cancelled=True)
            if time.monotonic() > deadline:
                return _Ended(_hung(f"the run took longer than its limit of {spec.timeout_s:g} s"))
            try:
                message = worker.receive(POLL_S)
            except WorkerStalled:
                if time.monotonic() - heard > spec.stall_timeout_s:
                    return _Ended(_hung(f"the worker said nothing for {spec.stall_timeout_s:g} s"), again=True)
                continue
            heard = time.monotonic()
            if message is None:
                return _Ended(worker.explain_end() or lost(), again=True)
            if isinstance(message, Finished):
                return _Ended(None)
            if isinstance(message, Failed):
                return _Ended(message.problem)
            self._keep(spec, attempt, message)

    def _spent_s(self, run_id: str, attempt: int) -> float:
        """How long the run's attempts before this one lasted, whenever that was."""
        former = (one for one in self._journal.attempts(run_id) if one.number < attempt)
        return sum(reporting.lasted_s(self._journal, run_id, one) for one in former)

    def _keep(self, spec: RunSpec, attempt: int, message: Message) -> None:
        journal, run = self._journal, spec.run_id
        if isinstance(message, ItemDone):
            journal.add_item(run, attempt, message.item)
        elif isinstance(message, LatencyDone):
            number = len(journal.attempts(run)[-1].latency)
            journal.add_latency(run, attempt, number, message.sample)
        elif isinstance(message, PhaseStarted):
            journal.start_phase(run, attempt, message.name, message.start_s)
        elif isinstance(message, PhaseEnded):
            journal.end_phase(run, attempt, message.phase)
        elif isinstance(message, Loaded):
            journal.set_engine(run, message.engine)
        elif not isinstance(message, Beat):
            raise BadInput(f"the worker sent a {message.kind} message in an evaluation", "this is a defect: report it")

    # --- the record ---------------------------------------------------------------------------------------------------
    def _finish(self, spec: RunSpec, ended: _Ended, device: DeviceFacts) -> None:
        status: FinalStatus = "cancelled" if ended.cancelled else "failed" if ended.problem else "done"
        record = self._build(spec, status, ended.problem, device)
        self._journal.set_record(spec.run_id, status, ended.problem, record.model_dump_json().encode())
        self._cancelled.discard(spec.run_id)
        if ended.problem is not None and ended.problem.code == DigestMismatch.code:
            self._on_damage(record.manifest)
        self._deliver(spec.run_id)

    def _now(self) -> Clock:
        return Clock(monotonic_s=time.monotonic(), wall_s=time.time(), boot_id=str(boot_id(self._machine.roots)))

    def _build(self, spec: RunSpec, status: FinalStatus, problem: Problem | None, device: DeviceFacts) -> RunRecord:
        pack = packs.read(self._library.pack_path(spec.pack_id), spec.pack_id)
        return reporting.build_record(
            self._journal,
            spec,
            status,
            problem,
            self._library.manifest_of(spec.artifact_id),
            packs.header(pack, spec.pack_id),
            device,
            self._now(),
            Limits(**self._machine.profile.limits.model_dump()),
        )

    def _deliver(self, run_id: str) -> None:
        """Hand the record on; handing on twice is harmless, because receivers are idempotent. What the disk refuses is tried again."""
        try:
            with contextlib.suppress(NotFound):
                self._on_record(run_id, self._journal.record(run_id))
        except (JoulemarkError, OSError):
            log.exception("the record of run %s is in the journal and cannot be handed on now", run_id)
            self._undelivered.add(run_id)


def _hung(message: str) -> Problem:
    return Problem(
        code=WORKER_HUNG, message=message, hint="the worker was killed; raise the limit if the board is merely slow"
    )
