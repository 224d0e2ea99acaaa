"""What the agent's commands show on a terminal: progress bars, the result table, the comparison, the doctor's findings.

Only turns values into text; decides nothing. Everything a model or a file said is shown as plain text, never as markup.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from joulemark import artifact, lineage, lmeval, packs, samples, sources, tls
from joulemark.comparison import Comparison, compare
from joulemark.errors import BadInput, NotFound
from joulemark.metrics import METRICS
from joulemark.plain_text import printable
from joulemark.wire import Absent, Measure, Metric, RunRecord, RunSpec, RunState
from joulemark_agent import doctor, local_run
from joulemark_agent.findings import Finding, to_json
from joulemark_agent.sysfs import Roots

# What the table shows, in this order; the record has the rest.
SHOWN = (
    "accuracy",
    "ttft_p50",
    "itl_p50",
    "itl_p95",
    "prefill_rate",
    "decode_rate",
    "items_rate",
    "bandwidth_utilisation",
    "energy_per_token",
    "energy_per_correct",
    "peak_pss",
    "peak_temperature",
    "sampler_cpu_share",
)
_PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def run_and_show(
    model: Path,
    tasks: Sequence[str],
    base: RunSpec,
    output: Path,
    roots: Roots,
    profile: str | None,
    replay: Path | None,
    as_json: bool,
) -> int:
    """The whole of `joulemark eval`. Returns 0 when all runs are done, 1 when one failed."""
    console = Console(stderr=True)
    output.mkdir(parents=True, exist_ok=True)
    with bytes_bar("fetching the data sets", console) as downloaded:
        rendered = local_run.render_packs(tasks, sources.default_cache(), output, downloaded)
    files = local_run.prepare(model, rendered, None)
    note = output / "set-before.json"
    machine = local_run.local_machine(roots, "local", "this machine", profile, replay, note)
    with _run_bars(console) as watch:
        records = local_run.evaluate(files, base, machine, output, watch)
    for record in records:
        if record.status == "done":
            lmeval.write(record, packs.read(rendered[record.spec.pack_id]), output)
    if as_json:
        sys.stdout.write(json.dumps([_plain(record) for record in records], indent=2, ensure_ascii=False) + "\n")
    else:
        show_records(Console(), records)
        Console().print(f"records and lm-eval files are in {escape(str(output))}")
    return 0 if all(record.status == "done" for record in records) else 1


def _plain(record: RunRecord) -> dict[str, Any]:
    keep = {"spec", "manifest", "pack", "status", "engine", "summary", "verdict", "problem", "attempts"}
    return record.model_dump(mode="json", include=keep)


@contextmanager
def bytes_bar(what: str, console: Console | None = None) -> Generator[Callable[[int, int], None], None, None]:
    """A bar for bytes that are fetched or copied: call it with (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console or Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(what, total=None)

        def show(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total or None)

        yield show


@contextmanager
def _run_bars(console: Console) -> Generator[Callable[[RunState, str], None], None, None]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} items"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bars: dict[str, Any] = {}

        def watch(state: RunState, name: str) -> None:
            if state.run_id not in bars:
                bars[state.run_id] = progress.add_task(name, total=state.items_total)
            words = state.phase or state.status
            progress.update(bars[state.run_id], description=f"{name}: {words}", completed=state.items_done)

        yield watch


# --- tables -----------------------------------------------------------------------------------------------------------
def show_records(console: Console, records: Sequence[RunRecord]) -> None:
    """One column a record, one line a figure, the verdicts below."""
    table = Table(title=escape(records[0].manifest.name) if records else None, title_justify="left")
    table.add_column("figure")
    for record in records:
        table.add_column(escape(record.pack.task), justify="right")
    for name in SHOWN:
        cells = [_cell(record, name) for record in records]
        if any(cells):
            table.add_row(METRICS[name].title, *cells)
    table.add_row("items answered", *[str(len(record.items)) for record in records])
    console.print(table)
    for line in absences(records):
        console.print(line, markup=False)
    for record in records:
        for line in _verdict_lines(record):
            console.print(line)


def absences(records: Sequence[RunRecord]) -> list[str]:
    """Why there are dashes: a line for every reason, with the figures that it concerns."""
    titles: dict[str, dict[str, None]] = {}
    for record in records:
        metrics = record.summary.metrics if record.summary else {}
        for name in SHOWN:
            metric = metrics.get(name)
            if isinstance(metric, Absent):
                titles.setdefault(metric.reason, {})[METRICS[name].title] = None
    return [f"— {' / '.join(named)}: {reason}" for reason, named in titles.items()]


def _cell(record: RunRecord, name: str) -> str:
    metric = record.summary.metrics.get(name) if record.summary else None
    return "" if metric is None else escape(show_metric(metric))


def show_metric(metric: Metric) -> str:
    """A figure with unit and interval, or a dash: `absences` has the reasons."""
    if isinstance(metric, Absent):
        return "—"
    interval = ""
    if metric.low is not None and metric.high is not None:
        interval = f" [{show_number(metric.low, metric.unit)}–{show_number(metric.high, metric.unit)}]"
    glue = "" if metric.unit in ("By", "1") else " "
    return f"{show_number(metric.value, metric.unit)}{glue}{_unit(metric)}{interval}"


def _unit(metric: Measure) -> str:
    return {"1": "", "By": "B", "Cel": "°C"}.get(metric.unit, metric.unit)


def show_number(value: float, unit: str) -> str:
    """Three significant digits; bytes with a decimal prefix."""
    if unit == "By":
        for size, prefix in _PREFIXES:
            if abs(value) >= size:
                return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _verdict_lines(record: RunRecord) -> Iterator[str]:
    name = escape(record.pack.task)
    if record.problem is not None:
        yield f"{name}: [bold red]{record.status}[/] {escape(record.problem.message)}"
        if record.problem.hint:
            yield f"  hint: {escape(record.problem.hint)}"
    if record.verdict.valid:
        yield f"{name}: [bold green]VALID[/]"
    else:
        yield f"{name}: [bold yellow]INVALID[/] (not to be compared or published)"
        yield from (f"  - {escape(reason)}" for reason in record.verdict.reasons)


# --- verify -----------------------------------------------------------------------------------------------------------
def show_lineage(thing: Path, fingerprint: str | None, as_json: bool) -> int:
    """Prints the chain of an evidence file or of an artifact's folder after checking it; the exit status."""
    if thing.is_dir():
        manifest = artifact.verify(thing)
        links, record = lineage.origin_links(manifest), None
    else:
        if not thing.is_file():
            raise NotFound(f"there is nothing at {thing}", "give an evidence file or the folder of an artifact")
        if thing.stat().st_size > lineage.MAX_EVIDENCE_BYTES:
            raise BadInput(f"{thing} is too large for evidence", "is this the file that `joulemark evidence` wrote?")
        evidence = lineage.read_evidence(thing.read_bytes())
        if fingerprint is None:
            found = tls.fingerprint(evidence.host.authority_pem, evidence.host.signing_key)
            raise BadInput(
                f"the evidence says it is by the host {found}",
                "compare that with what `joulemark host init` printed there, then say --host and the fingerprint",
            )
        links, record = lineage.check(evidence, fingerprint)
    if as_json:
        found = {"links": [vars(link) for link in links]}
        found |= {"run_id": record.spec.run_id, "verdict": record.verdict.model_dump()} if record is not None else {}
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return 0
    table = Table(header_style="bold")
    for column in ("what", "sha256", "who says so"):
        table.add_column(column, overflow="fold")
    for link in links:
        table.add_row(Text(printable(link.name)), Text(link.sha256[:16]), Text(printable(link.said_by)))
    console = Console()
    console.print(table)
    console.print(
        "✓ every signature and digest holds" if record is not None else "✓ every file is what the manifest says"
    )
    if record is not None and not record.verdict.valid:
        console.print(f"the run itself is INVALID: {'; '.join(record.verdict.reasons)}", markup=False)
    return 0


def show_comparison(ours: Path, against: Path, as_json: bool) -> int:
    """The whole of `joulemark verify`. Returns 0 when the two agree (identical or equivalent)."""
    theirs = samples.read_samples(against)
    result = compare(samples.read_samples(_samples_file(ours, against)), theirs)
    if as_json:
        sys.stdout.write(json.dumps(asdict(result), indent=2, ensure_ascii=False) + "\n")
    else:
        _print_comparison(Console(), result)
    return 0 if result.verdict in ("identical", "equivalent") else 1


def _print_comparison(console: Console, result: Comparison) -> None:
    console.print(f"documents: {result.compared} compared, {result.shared} shared")
    for title, missing in (("only ours", result.only_ours), ("only theirs", result.only_theirs)):
        if missing:
            console.print(f"  {title}: {len(missing)}")
    if result.logprob_max is not None and result.logprob_mean is not None:
        console.print(f"|Δ log p| of a choice: mean {result.logprob_mean:.3g}, largest {result.logprob_max:.3g}")
    if result.scores:
        table = Table("score", "documents", "ours", "theirs", "within one standard error")
        for pair in result.scores:
            ours, theirs = _with_error(pair.ours, pair.ours_error), _with_error(pair.theirs, pair.theirs_error)
            table.add_row(escape(pair.name), str(pair.n), ours, theirs, "yes" if pair.agrees else "[bold red]no[/]")
        console.print(table)
    if result.differences:
        table = Table("document", "differs in", "ours", "theirs", title="the first differences", title_justify="left")
        for item in result.differences[:10]:
            table.add_row(str(item.doc_id), escape(item.what), escape(item.ours[:60]), escape(item.theirs[:60]))
        console.print(table)
    console.print(f"verdict: [bold]{result.verdict}[/]")
    for reason in result.reasons:
        console.print(f"  - {escape(reason)}")


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _samples_file(ours: Path, against: Path) -> Path:
    if not ours.is_dir():
        return ours
    found = sorted(ours.glob("samples_*.jsonl"))
    task = against.name.removeprefix("samples_").rsplit("_", 1)[0]
    same = [path for path in found if path.name.removeprefix("samples_").rsplit("_", 1)[0] == task]
    if not same and len(found) != 1:
        raise BadInput(
            f"{ours} has {len(found)} sample files and none is named for task {task!r}",
            "name the file instead of the folder",
        )
    return (same or found)[-1]


# --- doctor -----------------------------------------------------------------------------------------------------------
_MARKS = {
    "ok": "[green]ok[/]",
    "warning": "[yellow]warning[/]",
    "problem": "[bold red]problem[/]",
    "unknown": "[dim]unknown[/]",
}


def show_findings(roots: Roots, data: Path, as_json: bool) -> int:
    """The whole of `joulemark doctor`. Returns 1 when there is a problem."""
    findings = doctor.examine(roots, data)
    if as_json:
        sys.stdout.write(to_json(findings) + "\n")
    else:
        Console().print(findings_table(findings))
    return 1 if any(finding.status == "problem" for finding in findings) else 0


def findings_table(findings: Sequence[Finding]) -> Table:
    """Area, state, and what was found with what to do about it."""
    table = Table(show_lines=False)
    table.add_column("area")
    table.add_column("state")
    table.add_column("finding", overflow="fold")
    for finding in findings:
        text = escape(finding.text) + (f"\n[bold]→ {escape(finding.fix)}[/]" if finding.fix else "")
        table.add_row(escape(finding.area), _MARKS[finding.status], text)
    return table
