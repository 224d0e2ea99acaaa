"""One evaluation inside the worker process: the phases, the clock, the order of things.

    verify the file | idle window | load | warm-up | latency phase | accuracy phase | cool-down

Owns the clock: backends never report time. Latency is single stream without reuse; accuracy uses all sharing that the engine offers; their
numbers are never mixed. Says what happens through `emit`; keeps nothing. Not aware of sensors, SQLite or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Literal

from joulemark import packs, plugins
from joulemark.artifact import hash_file
from joulemark.errors import BadInput, DigestMismatch
from joulemark.gguf_header import read_header
from joulemark.grading import Outcome
from joulemark.onnx_header import read_onnx
from joulemark.wire import FileEntry, ItemRecord, LatencySample, PackItem, Phase, TaskPack
from joulemark_agent.backends import Choice, Generated, GenerateRequest, Options, Scored, ScoreRequest, Session
from joulemark_agent.messages import (
    Beat,
    EvaluateJob,
    Finished,
    ItemDone,
    LatencyDone,
    Loaded,
    Message,
    PhaseEnded,
    PhaseStarted,
    ServeJob,
)
from joulemark_agent.pins import SyncPin

BEAT_INTERVAL_S = 1.0
MARKED = ("idle", "latency", "accuracy")
"""The phases that have an energy, which an external analyser may measure too."""
PhaseName = Literal["idle", "load", "warmup", "latency", "accuracy", "cooldown"]


@dataclass(frozen=True)
class Surroundings:
    """What the runner is given: the monotonic clock, a sleep, and where to say things."""

    clock: Callable[[], float]
    sleep: Callable[[float], None]
    emit: Callable[[Message], None]
    sync: SyncPin = field(default_factory=lambda: SyncPin(None))


class Heart:
    """Passes on the engine's beats, at most one a second."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._last = around.clock()

    def __call__(self) -> None:
        now = self._around.clock()
        if now - self._last >= BEAT_INTERVAL_S:
            self._last = now
            self._around.emit(Beat())


def open_backend(job: EvaluateJob | ServeJob, options: Options) -> Session:
    """Open the job's model with the named backend. Raises BadInput when it cannot read the artifact's format."""
    backend = plugins.load("joulemark_agent.backends", job.backend)
    if job.manifest.format not in backend.FORMATS:
        raise BadInput(
            f"backend {job.backend} cannot open a {job.manifest.format} artifact",
            f"it opens: {', '.join(backend.FORMATS)}",
        )
    return backend.open_session(Path(job.model_path), options)


def verify_model(job: EvaluateJob | ServeJob) -> str:
    """Re-hash the model's files and read its header with bounds right before it is loaded: bits rot, engines do not notice, and a
    hostile header takes an engine down. Returns the first file's sha256. Raises DigestMismatch, ModelRejected.
    """
    model, (first, *others) = Path(job.model_path), job.manifest.files
    _verify_file(model, first, job.manifest.name)
    for entry in others:
        _verify_file(model.with_name(entry.path), entry, job.manifest.name)
    if job.manifest.format == "gguf":
        read_header(model)
    elif job.manifest.format == "onnx":
        read_onnx(model, {entry.path: entry.size_bytes for entry in job.manifest.files})
    return first.sha256


def _verify_file(path: Path, entry: FileEntry, name: str) -> None:
    """Raises DigestMismatch where the file is missing or not what the manifest says."""
    actual = hash_file(path) if path.is_file() else None
    if actual != entry.sha256:
        found = "it is missing" if actual is None else f"sha256 {actual[:12]}… instead of {entry.sha256[:12]}…"
        raise DigestMismatch(
            f"the stored model {name} is damaged: {entry.path}, {found}",
            "push the artifact again; if it happens twice, check the SD card",
        )


def evaluate(job: EvaluateJob, around: Surroundings) -> None:
    """Run all phases. Raises JoulemarkErrors for what ends the run; a single item's trouble is a problem on that item."""
    spec = job.spec
    digest = verify_model(job)
    pack = packs.read(Path(job.pack_path), spec.pack_id)
    task = packs.task_module(pack)
    chosen = pack.items[: spec.limit]
    done = set(job.done)
    with _phase("idle", around):
        around.sleep(job.idle_s)
    with _phase("load", around):
        options = Options(
            threads=job.threads,
            model_sha256=digest,
            context_tokens=spec.context_tokens,
            batch_tokens=spec.batch_tokens,
            sequences=spec.sequences,
            memory_bytes=job.memory_bytes,
            beat=Heart(around),
        )
        session = open_backend(job, options)
    try:
        around.emit(Loaded(engine=session.facts()))
        _measure_latency(session, job, chosen, around)
        remaining = [item for item in chosen if item.doc_id not in done]
        if remaining:
            with _phase("accuracy", around):
                for record in _answer(session, pack, task, remaining, around.clock):
                    around.emit(ItemDone(item=record))
        around.emit(Loaded(engine=session.facts()))
    finally:
        session.close()
    with _phase("cooldown", around):
        around.sleep(spec.cooldown_s)
    around.emit(Finished())


@contextmanager
def _phase(name: PhaseName, around: Surroundings) -> Generator[None, None, None]:
    start = around.clock()
    around.emit(PhaseStarted(name=name, start_s=start))
    fell_s = around.clock() if name in MARKED and around.sync.fall() else None
    try:
        yield
    finally:
        end = around.clock()
        if fell_s is not None:
            around.sync.rise()
    around.emit(PhaseEnded(phase=Phase(name=name, start_s=start, end_s=end, sync_s=fell_s)))


# --- latency ----------------------------------------------------------------------------------------------------------
def _measure_latency(session: Session, job: EvaluateJob, items: Sequence[PackItem], around: Surroundings) -> None:
    """Warm up, then time single-stream generations over the pack's first prompts that fit the context."""
    plan = job.spec.latency
    window = session.facts().context_tokens
    fitting = (item for item in items if session.count_tokens(item.prompt) + plan.new_tokens <= window)
    prompts = list(islice(fitting, plan.prompts))
    if not prompts:
        return
    with _phase("warmup", around):
        for _ in range(plan.warmup):
            for _token in session.stream(prompts[0].prompt, plan.new_tokens, Choice()):
                pass
    if job.latency_done:
        return
    with _phase("latency", around):
        for item in prompts:
            around.emit(LatencyDone(sample=_time_stream(session, item, plan.new_tokens, around.clock)))


def _time_stream(session: Session, item: PackItem, new_tokens: int, clock: Callable[[], float]) -> LatencySample:
    start = clock()
    times = [clock() for _token in session.stream(item.prompt, new_tokens, Choice())]
    return LatencySample(
        doc_id=item.doc_id,
        prompt_tokens=session.count_tokens(item.prompt),
        start_s=start,
        token_times_s=tuple(times),
    )


# --- accuracy ---------------------------------------------------------------------------------------------------------
def _answer(
    session: Session, pack: TaskPack, task: ModuleType, items: Sequence[PackItem], clock: Callable[[], float]
) -> Iterator[ItemRecord]:
    by_document = {item.doc_id: item for item in items}
    if pack.kind == "choice":
        scoring = [
            ScoreRequest(item.doc_id, item.prompt, tuple(" " + choice for choice in item.choices)) for item in items
        ]
        for scored in session.score(scoring):
            yield _scored_record(by_document[scored.key], scored, task, clock())
        return
    generation = pack.generation
    if generation is None:
        raise BadInput(f"pack {pack.task} generates text but has no generation settings", "render the pack again")
    generating = [
        GenerateRequest(item.doc_id, item.prompt, generation.max_new_tokens, generation.stop) for item in items
    ]
    for generated in session.generate(generating):
        yield _generated_record(by_document[generated.key], generated, task, clock())


def _scored_record(item: PackItem, scored: Scored, task: ModuleType, now: float) -> ItemRecord:
    record = _begin_record(item, scored, now)
    if scored.problem is not None:
        return record
    grade = task.grade(item, Outcome(output=None, choice_logprobs=scored.logprobs))
    return record.model_copy(
        update={"choice_logprobs": scored.logprobs, "choice_greedy": scored.greedy, "grade": grade}
    )


def _generated_record(item: PackItem, generated: Generated, task: ModuleType, now: float) -> ItemRecord:
    record = _begin_record(item, generated, now)
    if generated.problem is not None:
        return record
    grade = task.grade(item, Outcome(output=generated.text, choice_logprobs=None))
    answer = {"new_tokens": generated.new_tokens, "output": generated.text, "finish": generated.finish}
    return record.model_copy(update={**answer, "grade": grade})


def _begin_record(item: PackItem, result: Scored | Generated, now: float) -> ItemRecord:
    """What every item has; the whole record of one that came to grief."""
    return ItemRecord(
        doc_id=item.doc_id,
        prompt_sha256=packs.prompt_sha256(item),
        end_s=now,
        prompt_tokens=result.prompt_tokens,
        problem=result.problem,
    )
