"""From a model's name to a published artifact: every step in its order, and everything that can be wrong said before hours are spent.

    open → fold adapters → check everything → look at every weight → quantize → write → verify → publish

Owns the order, the working folder and what is left after a failure: an interrupted export is taken up where it stopped, a failed one
publishes nothing. What a step does is in its own module.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from joulemark import __version__, artifact, durable, plugins
from joulemark.errors import BadInput, Conflict, DigestMismatch, NotFound
from joulemark.wire import FileEntry, Manifest, Origin, Step, canonical_json, content_id
from joulemark_exporter import calibration, families, hub_folder, lora, models, recipe, texts, verify
from joulemark_exporter.group_quantized import IntegerForm
from joulemark_exporter.peak_memory import peak_bytes
from joulemark_exporter.probe import opened
from joulemark_exporter.quantizers import Choices, Numbers, Task
from joulemark_exporter.recipe import Recipe
from joulemark_exporter.weights import Model, Weight
from joulemark_exporter.writers import Written, versions

PIECE = 1 << 22
INPUTS = "inputs.json"
TOOLS = ("numpy", "torch", "transformers")
"""Packages that decide about every result; a writer names its own."""

Say = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Request:
    """What to export, and where to. `out` is the artifact's folder; it must not exist, or hold the same artifact."""

    model: str
    recipe: Recipe
    out: Path
    cache: Path
    threads: int
    adapters: tuple[tuple[Path, float], ...] = ()
    checkpoint: Path | None = None
    """Where the same model also goes as a Hugging Face folder; it must not exist."""


@dataclass(frozen=True)
class Exported:
    """What came out. `report` is what was measured; it lies beside the artifact, because times and memory differ from run to run."""

    folder: Path
    artifact_id: str
    manifest: Manifest
    report: Mapping[str, Any]


def export(request: Request, say: Say) -> Exported:
    """Runs all steps. Raises BadInput, NotFound, NoSpace, EngineFailed, Conflict; nothing is published then."""
    chosen = request.recipe
    model = _fold(models.open_model(request.model, request.cache), request)
    quantizer = plugins.load(recipe.QUANTIZERS, chosen.quantizer_name)
    writer = plugins.load(recipe.WRITERS, chosen.writer_name)
    calibrated = quantizer.calibrated(chosen.quantizer)
    origin = _origin(request, model, calibrated, writer.tools(chosen.writer))
    there = _already_there(request, origin)
    if there is not None and request.checkpoint is None:
        return there
    with _working_folder(request, origin) as work:
        task = _task(request, model, work, say)
        numbers: Numbers = quantizer.check(task, chosen.quantizer)
        writer.check(task, chosen.writer, numbers)
        form = numbers if isinstance(numbers, IntegerForm) else None
        if request.checkpoint is not None:
            hub_folder.check(task, request.checkpoint, form, _stored(model))
        probe = calibration.windows(model, probe_text(request), chosen.probe.windows, chosen.probe.tokens, None)
        # A first look, as if a weight took a byte: once written, once published. The writer knows better when types are chosen.
        artifact.check_space(request.out.parent, sum(2 * weight.size for weight in model.weights.values()))
        if calibrated:
            _look_at_weights(model, say)
        with _written(work) as folder:
            choices: Choices = quantizer.quantize(task, chosen.quantizer)
            written: Written = writer.write(task, choices, folder, chosen.writer)
            manifest = _manifest(task, writer, choices, written, origin)
            findings = _verify(request, task, writer.read_back(task, choices, written), written, manifest, probe)
            exported = _publish(request, written, manifest, findings, probe)
            # Last, so that whoever starts again after an interruption finds either both or the artifact alone.
            if request.checkpoint is not None:
                say("writing the checkpoint", 0, 1)
                hub_folder.write(model, request.checkpoint, choices, form, _stored(model))
                say("writing the checkpoint", 1, 1)
            return exported


# --- before ------------------------------------------------------------------------------------------------------------
def _fold(model: Model, request: Request) -> Model:
    named = [(Path(item.path), item.scale) for item in request.recipe.adapters] + list(request.adapters)
    if not named:
        return model
    return lora.fold(model, [(lora.read_adapter(path.expanduser()), scale) for path, scale in named])


def _task(request: Request, model: Model, work: Path, say: Say) -> Task:
    chosen = request.recipe
    return Task(
        name=chosen.name or request.out.name,
        licence=chosen.licence,
        model=model,
        family=families.find(model.model_type),
        calibration=chosen.calibration,
        cache=request.cache,
        threads=request.threads,
        work=work,
        say=say,
    )


def _origin(request: Request, model: Model, calibrated: bool, tools: Mapping[str, str]) -> Origin:
    """Everything that decides about the result: two exports of the same origin and name are the same artifact."""
    steps = list(model.lineage)
    if calibrated:
        text = texts.load(request.recipe.calibration.dataset, request.cache)
        steps.append((f"calibration {text.name}", text.sha256))
    told = tuple(Step(name=name, sha256=sha256) for name, sha256 in steps)
    all_tools = {"joulemark": __version__, **versions(*TOOLS), **tools}
    return Origin(steps=told, recipe=request.recipe.plain(), tools=all_tools)


@contextmanager
def _working_folder(request: Request, origin: Origin) -> Generator[Path]:
    """`.NAME.export` beside the artifact: kept after a failure, and taken up again only by the same inputs. One export at a time."""
    folder = request.out.parent / f".{request.out.name}.export"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(request):
        wanted = canonical_json(origin)
        marker = folder / INPUTS
        if not marker.is_file() or marker.read_bytes() != wanted:
            shutil.rmtree(folder)
            folder.mkdir()
            durable.replace_file(marker, [wanted])
        yield folder
        shutil.rmtree(folder)


@contextmanager
def _locked(request: Request) -> Generator[None]:
    """The kernel drops the lock when its holder dies. The file goes with the holder, so whoever locked one that is gone has no lock."""
    path = request.out.parent / f".{request.out.name}.lock"
    busy = Conflict(f"another export is writing {request.out}", "wait for it, or choose another -o")
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        if not path.exists() or path.stat().st_ino != os.fstat(lock.fileno()).st_ino:
            raise busy
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _stored(model: Model) -> str:
    """The type that most of a checkpoint's floats have."""
    types = Counter(weight.stored for weight in model.weights.values() if weight.stored in hub_folder.TYPES)
    return types.most_common(1)[0][0] if types else "F32"


@contextmanager
def _written(work: Path) -> Generator[Path]:
    """Where files are written before they are published; never kept, because it is large and quickly made again."""
    folder = work / "written"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _look_at_weights(model: Model, say: Say) -> None:
    """Every number is finite. Raises BadInput that names the tensor: better now than after hours."""
    total = sum(weight.size for weight in model.weights.values())
    done = 0
    for weight in model.weights.values():
        for start, stop in _pieces(weight):
            say("looking at the weights", done, total)
            if not np.isfinite(weight.read(start, stop)).all():
                raise BadInput(f"{weight.name} holds NaN or infinity", "the checkpoint is damaged: download it again")
            done += (stop - start) * (weight.size // weight.shape[0])
    say("looking at the weights", total, total)


def _pieces(weight: Weight) -> Sequence[tuple[int, int]]:
    rows = weight.shape[0]
    step = max(1, PIECE * rows // weight.size)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


# --- after -------------------------------------------------------------------------------------------------------------
def _already_there(request: Request, origin: Origin) -> Exported | None:
    """The artifact that these inputs made before. Raises Conflict when something else is in its place, DigestMismatch when it was
    damaged since."""
    if not request.out.exists():
        return None
    if artifact.read_manifest(request.out).origin != origin:
        raise Conflict(f"{request.out} holds another artifact", "choose another -o, or remove that folder")
    manifest = artifact.verify(request.out)
    path = _report_path(request)
    report = json.loads(path.read_text()) if path.is_file() else {}
    return Exported(request.out, content_id(manifest), manifest, report)


def _report_path(request: Request) -> Path:
    return request.out.with_name(f"{request.out.name}.report.json")


def _manifest(task: Task, writer: ModuleType, choices: Choices, written: Written, origin: Origin) -> Manifest:
    """The artifact's description, with its tables among the files."""
    main = written.files[0]
    manifest: Manifest = writer.describe(task, choices, written)
    if written.sha256 is not None and written.sha256 != manifest.files[0].sha256:
        raise DigestMismatch(
            f"{main.name} is not what was written",
            "the disk or the memory of this machine is failing: nothing was published",
        )
    extra: list[FileEntry] = []
    for name, content in sorted(choices.tables.items()):
        durable.replace_file(main.parent / name, [content])
        extra.append(FileEntry(path=name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest()))
    manifest = manifest.model_copy(update={"loaded_weight_bytes": written.loaded_weight_bytes})
    memory = task.family.memory(task.model.config).numbers * written.memory_number_bytes
    changed = {
        "origin": origin,
        "files": (*manifest.files, *extra),
        "required_memory_bytes": manifest.memory_of_weights + manifest.context_tokens * memory,
    }
    return Manifest.model_validate({**dict(manifest), **changed})


def _verify(
    request: Request,
    task: Task,
    read_back: Mapping[str, Weight],
    written: Written,
    manifest: Manifest,
    probe: calibration.Windows,
) -> verify.Findings:
    """Through the engine that boards use. Raises BadInput when a limit of the recipe is not kept."""
    stored = replace(task.model, weights=read_back)
    with opened(written.engine, written.files[0], request.threads) as session:
        verify.check_text(session, task.model)
        verify.check_faithful(session, stored, task.family, probe, written.exact)
        walk, states = verify.reference_states(task.model, task.family, probe.tokens, task.say)
        findings = verify.compare(session, probe, walk, states)
    broken = verify.failures(findings, manifest.bits_per_weight, request.recipe.limits)
    if broken:
        raise BadInput(
            f"the artifact does not keep the recipe's limits: {'; '.join(broken)}",
            "nothing was published: use more bits, another quantizer or a longer calibration, or change [limits]",
        )
    return findings


def probe_text(request: Request) -> texts.Text:
    """What the recipe names; else WikiText-2's test split where the user has it, else novels. Raises BadInput for the calibration's own
    text."""
    named = request.recipe.probe.text
    if named is not None and named == request.recipe.calibration.dataset:
        raise BadInput(
            f"the probe text is the calibration text ({named})",
            "what was calibrated on cannot show what was lost: name another one",
        )
    if named is not None:
        return texts.load(named, request.cache)
    try:
        return texts.load("wikitext-2-test", request.cache)
    except NotFound:
        return texts.load("novels", request.cache)


def _publish(
    request: Request, written: Written, manifest: Manifest, findings: verify.Findings, probe: calibration.Windows
) -> Exported:
    sources = {entry.path: written.files[0].parent / entry.path for entry in manifest.files}
    sources[manifest.files[0].path] = written.files[0]
    windows, tokens = probe.tokens.shape
    about = {
        "text": probe.text,
        "sha256": probe.sha256,
        "windows": windows,
        "tokens": tokens,
        "beginning": probe.beginning,
    }
    report = {
        "artifact_id": content_id(manifest),
        "bits_per_weight": manifest.bits_per_weight,
        "weight_bytes": manifest.weight_bytes,
        "findings": asdict(findings),
        "probe": about,
        "exporter_peak_memory_bytes": peak_bytes(),
    }
    # The report first: an artifact without one would look as if nobody had looked at it.
    durable.replace_file(_report_path(request), [json.dumps(report, indent=1).encode()])
    artifact_id = artifact.publish(request.out, manifest, sources)
    return Exported(request.out, artifact_id, manifest, report)
