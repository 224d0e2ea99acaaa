"""What the agent and its worker process say to each other: one JSON object a line, read with bounds.

The worker's answers are typed here because a crashed or hostile engine may write anything: whatever does not parse ends the
attempt as a failure. Times are the worker's CLOCK_MONOTONIC seconds, which on Linux is the agent's clock too.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from joulemark.wire import EngineFacts, ItemRecord, LatencySample, Manifest, Phase, Problem, RunSpec, Wire

LINE_LIMIT = 16 * 1024 * 1024


# --- agent → worker ---------------------------------------------------------------------------------------------------
class EvaluateJob(Wire):
    """Evaluate one pack. `done` are the documents that the journal has already."""

    kind: Literal["evaluate"] = "evaluate"
    spec: RunSpec
    manifest: Manifest
    backend: str
    threads: int
    memory_bytes: int
    model_path: str
    pack_path: str
    done: tuple[int, ...] = ()
    latency_done: bool = False
    idle_s: float = 3.0
    sync_gpio: int | None = None


class ServeJob(Wire):
    """Load a model and answer completion requests until standard input ends."""

    kind: Literal["serve"] = "serve"
    manifest: Manifest
    backend: str
    threads: int
    memory_bytes: int
    model_path: str


class CompletionJob(Wire):
    """One completion for a serving worker. Either a prompt or chat messages."""

    kind: Literal["complete"] = "complete"
    prompt: str | None = None
    messages: tuple[dict[str, str], ...] = ()
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    logprobs: bool = False
    top_logprobs: int = 0


# --- worker → agent ---------------------------------------------------------------------------------------------------
class PhaseStarted(Wire):
    """A phase began."""

    kind: Literal["phase_started"] = "phase_started"
    name: str
    start_s: float


class PhaseEnded(Wire):
    """A phase is over."""

    kind: Literal["phase_ended"] = "phase_ended"
    phase: Phase


class Loaded(Wire):
    """The model is in memory, or its context changed: what really runs."""

    kind: Literal["loaded"] = "loaded"
    engine: EngineFacts


class LatencyDone(Wire):
    """One single-stream generation."""

    kind: Literal["latency_done"] = "latency_done"
    sample: LatencySample


class ItemDone(Wire):
    """One answered question."""

    kind: Literal["item_done"] = "item_done"
    item: ItemRecord


class Beat(Wire):
    """The engine is alive: at most once a second."""

    kind: Literal["beat"] = "beat"


class Piece(Wire):
    """New text of a completion."""

    kind: Literal["piece"] = "piece"
    text: str
    token: str = ""
    logprob: float | None = None
    top: tuple[tuple[str, float], ...] = ()


class Completed(Wire):
    """A completion is over. `rest` is text that was held back."""

    kind: Literal["completed"] = "completed"
    rest: str
    finish: Literal["stop", "length"]
    prompt_tokens: int
    new_tokens: int


class Failed(Wire):
    """What was asked cannot be done; the worker itself is sound."""

    kind: Literal["failed"] = "failed"
    problem: Problem


class Finished(Wire):
    """The evaluation is complete."""

    kind: Literal["finished"] = "finished"


Job = Annotated[EvaluateJob | ServeJob | CompletionJob, Field(discriminator="kind")]
Message = Annotated[
    PhaseStarted | PhaseEnded | Loaded | LatencyDone | ItemDone | Beat | Piece | Completed | Failed | Finished,
    Field(discriminator="kind"),
]


def job_reader() -> TypeAdapter[Job]:
    """Parses the agent's lines."""
    return TypeAdapter(Job)


def message_reader() -> TypeAdapter[Message]:
    """Parses the worker's lines."""
    return TypeAdapter(Message)
