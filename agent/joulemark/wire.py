"""Every model that crosses a process or reaches disk as JSON, with its bounds.

SI units are part of the names: _s seconds, _j joules, _w watts, _bytes, _hz, _c degrees Celsius. All times called *_s are
CLOCK_MONOTONIC seconds of the board that made them; `Clock` anchors them once to the wall clock. Everything is frozen.
Unknown fields are ignored (a newer peer may send more); unknown values are refused. Numbers are finite.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    field_validator,
    model_serializer,
)

SCHEMA = 1

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")]
Title = Annotated[str, StringConstraints(max_length=200)]
Text = Annotated[str, StringConstraints(max_length=4000)]


class Wire(BaseModel):
    """The common settings: strict types, finite numbers, unknown fields ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


def canonical_json(value: BaseModel | dict[str, Any]) -> bytes:
    """One byte string per value: sorted keys, no white space, UTF-8. The base of every content id."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def content_id(value: BaseModel | dict[str, Any]) -> str:
    """sha256 (hex) of the canonical JSON: the name of an artifact or of a pack."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


# --- values -----------------------------------------------------------------------------------------------------------
class Measure(Wire):
    """A number that was measured or counted, with its unit, sample size, interval and where it came from."""

    value: float
    unit: str
    n: int | None = None
    low: float | None = None
    high: float | None = None
    source: str


class Absent(Wire):
    """No number, and why."""

    reason: Text


Metric = Measure | Absent


class Problem(Wire):
    """An error in its wire form. `hint` is the next step for a person."""

    code: Identifier
    message: str
    hint: str = ""
    retryable: bool = False


# --- artifacts --------------------------------------------------------------------------------------------------------
class FileEntry(Wire):
    """One file of an artifact. `path` is a plain file name: no folders, so it can never leave its folder."""

    path: Identifier
    size_bytes: Annotated[int, Field(ge=1)]
    sha256: Sha256


class Step(Wire):
    """One step of an artifact's making, and the sha256 of what it took in."""

    name: Title
    sha256: Sha256


class Origin(Wire):
    """Where an exported artifact comes from: the base and what was done to it, in order; the whole recipe; the tools that did it."""

    steps: Annotated[tuple[Step, ...], Field(min_length=1, max_length=64)]
    recipe: dict[str, Any]
    tools: dict[str, Title]


class Manifest(Wire):
    """What an artifact is. Its id is `content_id(manifest)`; it is written last when an artifact is published."""

    schema_number: int = SCHEMA
    name: Identifier
    format: Literal["gguf", "onnx"]
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1, max_length=64)]
    architecture: Identifier
    quantization: Identifier
    parameters: Annotated[int, Field(ge=1)]
    weight_bytes: Annotated[int, Field(ge=1)]
    bytes_per_token: int | None = None
    """Bytes of weights that one decoded token reads; None where that is not known (mixture of experts)."""
    context_tokens: Annotated[int, Field(ge=1)]
    chat_template_sha256: Sha256 | None = None
    tokenizer_sha256: Sha256 | None = None
    licence: Title | None = None
    origin: Origin | None = None
    """None for a file that was published as it came."""
    required_memory_bytes: Annotated[int, Field(ge=1)] | None = None
    """Reckoned: loaded weights and the key-value memory of the whole context; the engine's own buffers come on top."""
    loaded_weight_bytes: Annotated[int, Field(ge=1)] | None = None
    """What the weights take once the engine has loaded them; None where that is `weight_bytes`."""

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Fields that came later stay out while they are empty, so that the ids of older manifests do not change."""
        values = serialize(self)
        return {
            key: value
            for key, value in values.items()
            if value is not None or key not in ("origin", "required_memory_bytes", "loaded_weight_bytes")
        }

    @field_validator("files")
    @classmethod
    def _names_differ(cls, files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
        if len({entry.path for entry in files}) != len(files):
            raise ValueError("two files have the same name")
        return files

    @property
    def title(self) -> str:
        """What people call it."""
        return f"{self.name} {self.quantization}"

    @property
    def memory_of_weights(self) -> int:
        """Bytes that the loaded weights take: never fewer than are stored."""
        return max(self.weight_bytes, self.loaded_weight_bytes or 0)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight over all tensors, embeddings included."""
        return 8 * self.weight_bytes / self.parameters


# --- tasks ------------------------------------------------------------------------------------------------------------
class Dataset(Wire):
    """Which documents a pack was rendered from."""

    name: Identifier
    split: Identifier
    source: Title
    sha256: Sha256


class Generation(Wire):
    """How a task's outputs are generated: greedily, until a stop string, EOS or the limit."""

    max_new_tokens: Annotated[int, Field(ge=1, le=65536)]
    stop: tuple[str, ...] = ()


class PackItem(Wire):
    """One question, ready to be put to a model. `choices` are continuations without their leading space."""

    doc_id: Annotated[int, Field(ge=0)]
    doc: dict[str, Any]
    prompt: str
    choices: tuple[str, ...] = ()
    target: str
    """Of a choice task the index of the right choice as a decimal string, else the reference answer."""
    doc_sha256: Sha256 | None = None
    """lm-eval's doc_hash, taken when the pack was rendered: it depends on the order of the keys, which canonical JSON sorts."""


class TaskPack(Wire):
    """A rendered task. Its id is `content_id(pack)`. `task_hash` is lm-eval's, over all documents of the pack."""

    schema_number: int = SCHEMA
    task: Identifier
    version: Identifier
    kind: Literal["choice", "generation"]
    dataset: Dataset
    shots: Annotated[int, Field(ge=0)]
    generation: Generation | None = None
    apply_chat_template: bool = False
    task_hash: Sha256
    items: Annotated[tuple[PackItem, ...], Field(min_length=1, max_length=1_000_000)]


class PackHeader(Wire):
    """A pack without its items: what a record keeps of it."""

    pack_id: Sha256
    task: Identifier
    version: Identifier
    kind: Literal["choice", "generation"]
    dataset: Dataset
    shots: int
    apply_chat_template: bool
    task_hash: Sha256
    size: int


class Grade(Wire):
    """The grader's word on one output: per filter (or metric) the extracted answer and the score."""

    answers: dict[str, str]
    scores: dict[str, float]


# --- runs -------------------------------------------------------------------------------------------------------------
class LatencyPlan(Wire):
    """The latency phase: single stream, no reuse. Prompts are the pack's first ones."""

    prompts: Annotated[int, Field(ge=1, le=1000)] = 5
    new_tokens: Annotated[int, Field(ge=2, le=4096)] = 64
    warmup: Annotated[int, Field(ge=1, le=100)] = 1


class Tuning(Wire):
    """How a board is to be set while a run lasts; what is not named stays as it is. Afterwards all is as before."""

    governor: Annotated[str, Field(pattern=r"^[a-z_]{1,30}$")] | None = None
    power_mode: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]{1,60}$")] | None = None
    """NVIDIA's name or number of it."""
    fixed_clocks: bool = False
    """Every clock at the upper one of its limits."""


class RunSpec(Wire):
    """One run: one artifact, one pack, one device."""

    schema_number: int = SCHEMA
    run_id: Identifier
    artifact_id: Sha256
    pack_id: Sha256
    limit: Annotated[int, Field(ge=1)] | None = None
    latency: LatencyPlan = LatencyPlan()
    idle_s: Annotated[float, Field(ge=0.5, le=600)] | None = None
    """The idle window before the run; None: what the board's profile says."""
    cooldown_s: Annotated[float, Field(ge=0, le=600)] = 1.0
    sample_hz: Annotated[float, Field(gt=0, le=100)] = 10.0
    backend: Identifier | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    context_tokens: Annotated[int, Field(ge=16)] | None = None
    batch_tokens: Annotated[int, Field(ge=16, le=8192)] = 512
    sequences: Annotated[int, Field(ge=1, le=200)] = 16
    report_every_s: Annotated[float, Field(ge=5, le=3600)] = 60.0
    """The board says so often, and not more often, how far the run is; while the latency phase is timed it says nothing."""
    stall_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """The worker is killed when it has said nothing for so long."""
    timeout_s: Annotated[float, Field(gt=0)] = 86_400.0
    """How long all attempts together may last, without what lies between them."""
    variant: Title = ""
    cool_wait_s: Annotated[float, Field(ge=0, le=86_400)] = 600.0
    """How long a board that is too warm to begin may take to cool down."""
    tuning: Tuning | None = None
    anyway: bool = False
    """Begin also while the supply's voltage is too low; where it still is while something is measured, the record is invalid."""


class EngineFacts(Wire):
    """What really ran: filled in by the backend after the model was loaded."""

    backend: Identifier
    engine: Title
    version: Title
    build: Text
    model: Title
    model_sha256: Sha256
    device: Title
    threads: int
    batch_tokens: int
    sequences: int
    context_tokens: int
    kv_type: Title
    flash_attention: bool
    branching: bool
    """False when the model's memory cannot branch, so that every request is decoded whole."""


class Clock(Wire):
    """One anchor between the board's monotonic clock and the wall clock."""

    monotonic_s: float
    wall_s: float
    boot_id: Title


class Phase(Wire):
    """A named window on the monotonic clock."""

    name: Literal["idle", "load", "warmup", "latency", "accuracy", "cooldown"]
    start_s: float
    end_s: float
    sync_s: float | None = None
    """When the sync pin fell for an external analyser; None where no pin marks phases."""


class LatencySample(Wire):
    """One single-stream generation. `token_times_s[i]` is when new token i was known; the first gives the TTFT."""

    doc_id: int
    prompt_tokens: int
    start_s: float
    token_times_s: tuple[float, ...]


class ItemRecord(Wire):
    """One answered question, or the problem that prevented an answer."""

    doc_id: int
    prompt_sha256: Sha256
    end_s: float | None
    """None for an item answered before a reboot: its time was on another clock."""
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    output: str | None = None
    finish: Literal["stop", "length", "eos"] | None = None
    choice_logprobs: tuple[float, ...] | None = None
    choice_greedy: tuple[bool, ...] | None = None
    """Whether every token of the choice was the most likely one (lm-eval's `is_greedy`)."""
    grade: Grade | None = None
    problem: Problem | None = None


Meaning = Literal["wall", "supply", "rail+fit", "rail", "package", "modelled", "unknown"]
"""Where watts were measured, the most inclusive place first. wall: in front of the board's power supply; supply: all that flows into the
board; rail: inside, behind regulators, a lower bound; rail+fit: rails put through a fit; package: the processor alone."""


class Channel(Wire):
    """One column of a trace. `quantity` tells how to read it; `energy` is a running sum, never wrapping."""

    name: Identifier
    quantity: Literal["power", "energy", "temperature", "memory", "frequency", "share", "count", "flag"]
    unit: Literal["W", "J", "Cel", "By", "Hz", "1"]
    source: Title
    meaning: Meaning | None = None
    """For power and energy: what the joules are. `total` channels may be summed into the run's energy; parts may not."""
    total: bool = False


class Trace(Wire):
    """Samples in columns: `values[c][i]` is channel c at `times_s[i]`, None where there is no reading at that tick."""

    channels: tuple[Channel, ...]
    times_s: tuple[float, ...]
    values: tuple[tuple[float | None, ...], ...]
    absent: dict[str, Absent]
    """Sensors that this device does not offer, and why."""
    interval_s: float
    slowed: tuple[tuple[float, float], ...] = ()
    """(time, interval in s from then on), where the sampler changed its interval in a long run; empty: it never did."""
    missed_ticks: int
    read_times_s: tuple[float, ...]
    """How long each tick's reads took: the sampler's own cost."""
    cpu_s: float
    """CPU seconds that the sampling thread used."""


class Verdict(Wire):
    """Whether the numbers may be compared and published; every reason names its evidence."""

    valid: bool
    reasons: tuple[Text, ...] = ()


class DeviceFacts(Wire):
    """What a board is. `profile` names the file in device_profiles/ that matched."""

    device_id: Identifier
    name: Title
    profile: Identifier
    title: Title
    arch: Title
    cpu: Title
    cores: int
    """Those that the agent may use."""
    cores_online: int | None = None
    """Those that run on the whole machine, of which shares of contention are. None where it was not asked."""
    memory_bytes: int
    memory_bandwidth: Metric
    kernel: Title
    operating_system: Title
    governor: Title | None = None
    power_mode: Title | None = None
    clocks: Title | None = None
    """The limits within which frequencies may move, as they were set when the record was made."""
    agent_version: Title
    meters: tuple[Channel, ...] = ()
    absent: dict[str, Absent] = {}


class Summary(Wire):
    """Figures derived from the raw data by `joulemark_agent.summary`; the names are those of `joulemark.metrics`."""

    metrics: dict[str, Metric]


RunEnd = Literal["done", "failed", "cancelled", "interrupted"]
ENDED: tuple[str, ...] = get_args(RunEnd)
"""How a run can have ended."""


class RunRecord(Wire):
    """The whole truth about one run. A run ends in exactly one record."""

    schema_number: int = SCHEMA
    spec: RunSpec
    manifest: Manifest
    pack: PackHeader
    device: DeviceFacts
    status: RunEnd
    clock: Clock
    engine: EngineFacts | None = None
    phases: tuple[Phase, ...] = ()
    latency: tuple[LatencySample, ...] = ()
    items: tuple[ItemRecord, ...] = ()
    trace: Trace | None = None
    summary: Summary | None = None
    verdict: Verdict
    problem: Problem | None = None
    attempts: int = 1
    """How many worker processes it took; more than one after a resume."""
    interruptions: tuple[Problem, ...] = ()
    """Why earlier attempts ended, oldest first."""


class RunState(Wire):
    """A run in flight, as the agent reports it."""

    run_id: Identifier
    status: Literal["queued", "running"] | RunEnd
    phase: str | None = None
    items_done: int = 0
    items_total: int = 0
    message: str = ""
    problem: Problem | None = None
