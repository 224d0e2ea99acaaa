"""`make study`: one model in seven forms, from the exporter through an agent to the host's heatmap, as one table.

Every form is exported by a recipe, verified, published on a shelf, pushed to an agent process and evaluated there. Scores are compared
item by item with the 16-bit form's: the standard error of the paired differences, not of two independent scores. What is there from an
earlier run with the same inputs is kept, so that an interrupted study goes on. Needs a quiet machine for its speeds; a run that was
disturbed says so.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from joulemark import sources
from joulemark.errors import EngineFailed
from joulemark.wire import Measure, RunRecord
from joulemark_agent.machine import cpu_model
from joulemark_agent.sysfs import Roots
from joulemark_exporter import models, pipeline, recipe
from joulemark_host import charts, page
from joulemark_host.demo import Servers, await_delivery, servers
from joulemark_host.evaluation import Subject, push, run_task
from joulemark_host.figures import draw
from joulemark_host.publishing import publish_model, publish_task
from joulemark_host.records import Records
from joulemark_host.shelf import Shelf

MODEL = "smollm2-135m-instruct-q4_1"
TASK = "arc_challenge"
SCORE = "acc_norm"
FIGURES = ("accuracy", "decode_rate", "prefill_rate", "peak_pss")
COMMON = """
[calibration]
samples = 32
tokens = 256
[probe]
windows = 8
tokens = 256
"""
GROUPS = "bits = 4\ngroup_size = 32\n"
EQUAL = "RTN-4"
"""The form whose bytes Lo-Bi is given."""


@dataclass(frozen=True)
class Form:
    """One row. `recipe` is its quantizer and writer, given how many bytes the matrices of the forms before it take."""

    name: str
    recipe: Callable[[Mapping[str, int]], str]


def _fixed(text: str) -> Callable[[Mapping[str, int]], str]:
    return lambda _: text


def _lobi(matrix_bytes: Mapping[str, int]) -> str:
    return f"[quantizer]\nuse = 'lobi'\nbudget_bytes = {matrix_bytes[EQUAL]}\n"


FORMS = (
    Form("F16", _fixed("[quantizer]\nuse = 'none'\ntype = 'F16'\n")),
    Form("Q8_0", _fixed("[quantizer]\nuse = 'kquant'\ntype = 'Q8_0'\nweighted = false\n")),
    Form(EQUAL, _fixed(f"[quantizer]\nuse = 'rtn'\n{GROUPS}")),
    Form("GPTQ-4", _fixed(f"[quantizer]\nuse = 'gptq'\n{GROUPS}")),
    Form("Q4_K_M", _fixed("[quantizer]\nuse = 'kquant'\ntype = 'Q4_K_M'\n")),
    Form("Lo-Bi", _lobi),
    Form("ONNX-int4", _fixed(f"[quantizer]\nuse = 'gptq'\n{GROUPS}[writer]\nuse = 'onnx'\nprecision = 'int4'\n")),
)


@dataclass(frozen=True)
class Row:
    """What is said of one form."""

    name: str
    weight_bytes: int
    bits_per_weight: float
    divergence: float
    perplexity: float
    score: float
    difference: float
    standard_error: float
    prefill_rate: float | None
    decode_rate: float | None
    items_rate: float | None
    peak_memory_bytes: float | None
    valid: bool
    reasons: tuple[str, ...]


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="make study", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("study-output"), help="artifacts, records, table and heatmap")
    parser.add_argument("--limit", type=int, help="only the first questions; default: all 1,172")
    parser.add_argument("--only", help="forms, separated by commas; F16 always comes along")
    given = parser.parse_args(words)
    console = Console()
    wanted = {"F16", *given.only.split(",")} if given.only else {form.name for form in FORMS}
    forms = [form for form in FORMS if form.name in wanted]
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    exported = _export(forms, out, console)
    records = _evaluate(exported, out, given.limit, console)
    rows = [_row(name, item, records[name], records["F16"]) for name, item in exported.items()]
    _report(rows, list(exported.values()), records, out, console)
    return 0


# --- the artifacts ----------------------------------------------------------------------------------------------------
def export_forms(
    forms: Sequence[Form], out: Path, say: Callable[[str, str, int, int], None]
) -> dict[str, pipeline.Exported]:
    """Exports the forms in their order, those that are there already excepted. `say` is told form, step, how far, of how much."""
    base = str(sources.fetch(MODEL, sources.default_cache()))
    weights = models.open_model(base, sources.default_cache()).weights.values()
    vectors = sum(4 * weight.size for weight in weights if len(weight.shape) == 1)
    done: dict[str, pipeline.Exported] = {}
    for form in forms:
        text = form.recipe({name: item.manifest.weight_bytes - vectors for name, item in done.items()})
        chosen = recipe.parse(f"name = 'smollm2-{form.name.lower()}'\n{text}{COMMON}")
        request = pipeline.Request(base, chosen, out / "artifacts" / form.name, sources.default_cache(), threads=2)
        request.out.parent.mkdir(parents=True, exist_ok=True)
        done[form.name] = pipeline.export(request, functools.partial(say, form.name))
    return done


def _export(forms: Sequence[Form], out: Path, console: Console) -> dict[str, pipeline.Exported]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=None)

        def say(form: str, step: str, at: int, of: int) -> None:
            progress.update(bar, description=f"{form}: {step}", completed=at, total=of)

        done = export_forms(forms, out, say)
    for name, item in done.items():
        console.print(f"✓ {name}: {item.manifest.weight_bytes:,} bytes", highlight=False)
    return done


# --- the runs ---------------------------------------------------------------------------------------------------------
def _evaluate(
    exported: Mapping[str, pipeline.Exported], out: Path, limit: int | None, console: Console
) -> dict[str, RunRecord]:
    data = out / "data"
    data.mkdir(exist_ok=True)
    shelf = Shelf(data / "host" / "shelf")
    pack_id = publish_task(shelf, TASK, sources.default_cache())
    found: dict[str, RunRecord] = {}
    with servers(data, console) as running:
        for name, item in exported.items():
            artifact_id, manifest = publish_model(shelf, str(item.folder), sources.default_cache())
            subject = Subject(artifact_id, manifest, {TASK: pack_id})
            path = out / f"record_{name}_{limit or 'all'}.json"
            if not (path.is_file() and _is_of(path, artifact_id, pack_id)):
                path.write_bytes(_run(running, shelf, subject, limit, console))
            found[name] = RunRecord.model_validate_json(path.read_bytes())
    return found


def _is_of(path: Path, artifact_id: str, pack_id: str) -> bool:
    spec = RunRecord.model_validate_json(path.read_bytes()).spec
    return (spec.artifact_id, spec.pack_id) == (artifact_id, pack_id)


def _run(running: Servers, shelf: Shelf, subject: Subject, limit: int | None, console: Console) -> bytes:
    push(running.agent, shelf, subject, console, running.dispatch)
    record = run_task(running.agent, subject, TASK, {"limit": limit}, console, running.dispatch)
    await_delivery(running.records, record, console)
    return record


# --- the table --------------------------------------------------------------------------------------------------------
def _row(name: str, item: pipeline.Exported, record: RunRecord, base: RunRecord) -> Row:
    ours, theirs = _scores(record), _scores(base)
    shared = sorted(ours.keys() & theirs.keys())
    differences = [ours[key] - theirs[key] for key in shared]
    spread = statistics.stdev(differences) / math.sqrt(len(shared)) if len(shared) > 1 else math.nan
    findings = item.report["findings"]
    return Row(
        name=name,
        weight_bytes=item.manifest.weight_bytes,
        bits_per_weight=item.manifest.bits_per_weight,
        divergence=findings["divergence"],
        perplexity=findings["perplexity"],
        score=statistics.fmean(ours.values()),
        difference=statistics.fmean(differences),
        standard_error=spread,
        prefill_rate=_value(record, "prefill_rate"),
        decode_rate=_value(record, "decode_rate"),
        items_rate=_value(record, "items_rate"),
        peak_memory_bytes=_value(record, "peak_pss"),
        valid=record.verdict.valid,
        reasons=record.verdict.reasons,
    )


def _scores(record: RunRecord) -> dict[int, float]:
    """By question. Raises EngineFailed for a run that has not answered all: a mean over the rest would be another figure."""
    found = {item.doc_id: item.grade.scores[SCORE] for item in record.items if item.grade is not None}
    if record.status != "done" or len(found) != len(record.items) or not found:
        raise EngineFailed(
            f"{record.manifest.name}: the run is {record.status}, {len(found)} of {len(record.items)} questions are answered",
            "remove its record_*.json and run the study again",
        )
    return found


def _value(record: RunRecord, name: str) -> float | None:
    metric = record.summary.metrics.get(name) if record.summary else None
    return metric.value if isinstance(metric, Measure) else None


def table(rows: Sequence[Row], text: str, questions: int) -> str:
    """The table in Markdown."""
    head = (
        "form",
        "MB",
        "bits/weight",
        "KL (nats)",
        f"perplexity ({text})",
        f"ARC-C acc_norm, {questions} items",
        "− F16, paired",
        "prefill tok/s",
        "decode tok/s",
        "questions/s",
        "peak MB",
    )
    lines = [" | ".join(head), " | ".join(["---"] + ["---:"] * (len(head) - 1))]
    for row in rows:
        mark = "" if row.valid else " ✗"
        paired = "" if row.name == "F16" else f"{100 * row.difference:+.1f} ± {100 * row.standard_error:.1f}"
        cells = (
            row.name + mark,
            f"{row.weight_bytes / 1e6:.1f}",
            f"{row.bits_per_weight:.2f}",
            f"{row.divergence:.4f}",
            f"{row.perplexity:.2f}",
            f"{100 * row.score:.1f} %",
            paired,
            _number(row.prefill_rate),
            _number(row.decode_rate),
            _number(row.items_rate),
            _number(None if row.peak_memory_bytes is None else row.peak_memory_bytes / 1e6),
        )
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.1f}" if value < 20 else f"{value:.0f}"


def _report(
    rows: Sequence[Row],
    exported: Sequence[pipeline.Exported],
    records: Mapping[str, RunRecord],
    out: Path,
    console: Console,
) -> None:
    probe = exported[0].report["probe"]
    questions = min(len(record.items) for record in records.values())
    text = table(rows, f"{probe['windows'] * probe['tokens']} tokens of {probe['text']}", questions)
    told = f"{text}\nMachine: {cpu_model(Roots())}, {records['F16'].engine.threads if records['F16'].engine else '?'} threads.\n"
    (out / "study.md").write_text(told)
    (out / "study.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    store = Records(f"sqlite:///{out / 'data' / 'host' / 'records.db'}")
    try:
        ours = {item.artifact_id for item in exported}
        runs = [run for run in store.facts(TASK) if run.artifact_id in ours]
    finally:
        store.close()
    figures = [draw(runs, figure, TASK) for figure in FIGURES]
    (out / "heatmap.html").write_text(page.offline_page(figures), "utf-8")
    (out / "heatmap.png").write_bytes(charts.png([figure.chart for figure in figures if figure.chart]))
    console.print(told, markup=False, highlight=False)
    for row in rows:
        if not row.valid:
            console.print(f"✗ {row.name}: {'; '.join(row.reasons)}", markup=False, highlight=False)
    for name in ("study.md", "study.json", "heatmap.html", "heatmap.png"):
        console.print(f"✓ {out / name}", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
