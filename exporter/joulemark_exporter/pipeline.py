"""From a model's name to a published artifact: every step in its order, and everything that can be wrong said before hours are spent.

    open → fold adapters → check everything → look at every weight → quantize → write → verify → publish

Owns the order, the working folder and what is left after a failure: an interrupted export is taken up where it stopped, a failed one
publishes nothing. What a step does is in its own module.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import resource
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from joulemark import __version__, artifact, durable, plugins
from joulemark.errors import BadInput, Conflict, DigestMismatch, NoSpace, NotFound
from joulemark.wire import FileEntry, Manifest, Origin, Step, content_id
from joulemark_exporter import calibration, configuration, families, lora, models, recipe, texts, verify
from joulemark_exporter.quantizers import Choices, Task
from joulemark_exporter.recipe import Recipe
from joulemark_exporter.weights import Model, Weight
from joulemark_exporter.writers import Written

PIECE = 1 << 22
INPUTS = "inputs.json"
TOOLS = ("gguf", "llama-cpp-python", "numpy", "torch", "transformers")

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
    there = _already_there(request, model)
    if there is not None:
        return there
    quantizer = plugins.load(recipe.QUANTIZERS, chosen.quantizer_name)
    writer = plugins.load(recipe.WRITERS, chosen.writer_name)
    with _working_folder(request, model) as work:
        task = _task(request, model, work, say)
        writer.check(task, chosen.writer, quantizer.check(task, chosen.quantizer))
        probe_text(request)
        _check_space(request.out, model)
        if quantizer.NEEDS:
            _look_at_weights(model, say)
        choices: Choices = quantizer.quantize(task, chosen.quantizer)
        folder = work / "written"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        written: Written = writer.write(task, choices, folder, chosen.writer)
        manifest = _manifest(request, task, choices, written)
        findings = _verify(request, task, choices, written, manifest)
        return _publish(request, task, written, manifest, findings)


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


def inputs(request: Request, model: Model) -> dict[str, Any]:
    """Everything that decides about the result. Two exports of the same inputs are the same artifact."""
    return {"recipe": request.recipe.plain(), "lineage": [list(step) for step in model.lineage], "version": __version__}


@contextmanager
def _working_folder(request: Request, model: Model) -> Generator[Path]:
    """`.NAME.export` beside the artifact: kept after a failure, and taken up again only by the same inputs. One export at a time."""
    folder = request.out.parent / f".{request.out.name}.export"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{request.out.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(f"another export is writing {request.out}", "wait for it, or choose another -o") from error
        wanted = json.dumps(inputs(request, model), sort_keys=True)
        marker = folder / INPUTS
        if not marker.is_file() or marker.read_text() != wanted:
            shutil.rmtree(folder)
            folder.mkdir()
            durable.replace_file(marker, [wanted.encode()])
        yield folder
        shutil.rmtree(folder)
        Path(lock.name).unlink()


def _check_space(out: Path, model: Model) -> None:
    """Room for what is written and for the copy that is published, reckoned as if nothing were made smaller."""
    needed = sum(2 * weight.size for weight in model.weights.values())
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise NoSpace(
            f"exporting needs about {needed / 1e9:.1f} GB in {out.parent}, there are {free / 1e9:.1f} GB",
            "free some space",
        )


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
def _already_there(request: Request, model: Model) -> Exported | None:
    """The artifact that these inputs made before. Raises Conflict when something else is in its place."""
    if not request.out.exists():
        return None
    manifest = artifact.read_manifest(request.out)
    if manifest.origin is None or manifest.origin != _origin(request, model):
        raise Conflict(f"{request.out} holds another artifact", "choose another -o, or remove that folder")
    report = request.out.with_name(f"{request.out.name}.report.json")
    return Exported(
        request.out, content_id(manifest), manifest, json.loads(report.read_text()) if report.is_file() else {}
    )


def _origin(request: Request, model: Model) -> Origin:
    steps = tuple(Step(name=name, sha256=sha256) for name, sha256 in model.lineage)
    return Origin(steps=steps, recipe=request.recipe.plain(), tools=tools())


def tools() -> dict[str, str]:
    """The versions of everything that decides about a result."""
    return {"joulemark": __version__} | {name: metadata.version(name) for name in TOOLS}


def _manifest(request: Request, task: Task, choices: Choices, written: Written) -> Manifest:
    """The artifact's description, with its tables among the files."""
    main = written.files[0]
    manifest = plugins.load(recipe.WRITERS, request.recipe.writer_name).describe(task, choices, written)
    if written.sha256 is not None and written.sha256 != manifest.files[0].sha256:
        raise DigestMismatch(
            f"{main.name} is not what was written",
            "the disk or the memory of this machine is failing: nothing was published",
        )
    extra: list[FileEntry] = []
    for name, content in sorted(choices.tables.items()):
        durable.replace_file(main.parent / name, [content])
        extra.append(FileEntry(path=name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest()))
    changed = {
        "origin": _origin(request, task.model),
        "files": (*manifest.files, *extra),
        "required_memory_bytes": manifest.weight_bytes
        + manifest.context_tokens * memory_bytes_per_token(task.model.config),
    }
    return Manifest.model_validate({**dict(manifest), **changed})


def memory_bytes_per_token(config: Mapping[str, Any]) -> int:
    """Of the key-value memory with 16-bit floats: keys and values of all layers."""
    count = configuration.count
    heads = count(config, "num_attention_heads", "n_head")
    width = count(config, "hidden_size", "n_embd", "n_embed")
    size = count(config, "head_dim", default=width // heads)
    layers = count(config, "num_hidden_layers", "n_layer")
    return 2 * 2 * layers * count(config, "num_key_value_heads", default=heads) * size


def _verify(request: Request, task: Task, choices: Choices, written: Written, manifest: Manifest) -> verify.Findings:
    """Through the engine that boards use. Raises BadInput when a limit of the recipe is not kept."""
    engine, path = written.engine, written.files[0]
    verify.check_text(engine, path, task.model, request.threads)
    asked = request.recipe.probe
    windows = calibration.windows(task.model, probe_text(request), asked.windows, asked.tokens, None)
    writer = plugins.load(recipe.WRITERS, request.recipe.writer_name)
    read_back = replace(task.model, weights=writer.read_back(task, choices, written))
    verify.check_faithful(engine, path, read_back, task.family, windows, request.threads)
    walk, states = verify.reference_states(task.model, task.family, windows.tokens, task.say)
    findings = verify.compare(engine, path, windows, walk, states, request.threads)
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


def _publish(request: Request, task: Task, written: Written, manifest: Manifest, findings: verify.Findings) -> Exported:
    sources = {entry.path: written.files[0].parent / entry.path for entry in manifest.files}
    sources[manifest.files[0].path] = written.files[0]
    report = {
        "artifact_id": content_id(manifest),
        "bits_per_weight": manifest.bits_per_weight,
        "weight_bytes": manifest.weight_bytes,
        "findings": asdict(findings),
        "probe": probe_text(request).name,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    artifact_id = artifact.publish(request.out, manifest, sources)
    text = json.dumps(report, indent=1).encode()
    durable.replace_file(request.out.with_name(f"{request.out.name}.report.json"), [text])
    return Exported(request.out, artifact_id, manifest, report)
