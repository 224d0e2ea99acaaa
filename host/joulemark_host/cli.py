"""The host's commands: publish, push, run, records, heatmap, demo. Options in, progress and exit status out.

Exit status: 0 done, 1 it failed (the message says why and what to do), 2 wrong usage. Heavy modules are imported by the
command that needs them, so that `--help` is quick.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from joulemark.errors import NotFound
from joulemark.wishes import tuning_of
from joulemark_host.options import (
    DEFAULT_DATA,
    AnywayOption,
    DatabaseOption,
    DataOption,
    FixClocksOption,
    GovernorOption,
    JsonOption,
    PowerModeOption,
    ShelfOption,
    commands,
    host_identity,
    open_records,
    open_shelf,
    subject_of,
    terminal,
)

if TYPE_CHECKING:
    from joulemark_host.dispatch import Dispatch
    from joulemark_host.evaluation import Subject
    from joulemark_host.records import Records

app = commands("The workstation's side: publish models, send them to boards, collect records, draw device × model.")

ToOption = Annotated[
    str,
    typer.Option(
        "--to", "--agent", help="Boards or groups by name, separated by commas, or `all`; or the address of an agent."
    ),
]
DEFAULT_AGENT = "http://127.0.0.1:8090"


@app.command()
def publish(
    things: Annotated[
        list[str], typer.Argument(help="GGUF files, folders of exported artifacts, known models, tasks.")
    ],
    data: DataOption = DEFAULT_DATA,
    shelf_at: ShelfOption = None,
    name: Annotated[str | None, typer.Option(help="Name of the (one) model; default: its file name.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Put models and task packs on the host's shelf. Publishing again changes nothing.

    Example: joulemark publish model-q4_k_m.gguf exported/smollm2-gptq4 arc_challenge gsm8k_cot
    """
    from joulemark import sources
    from joulemark_host.publishing import publish_model, publish_task, task_names
    from joulemark_host.terminal import bar

    shelf, console, cache = open_shelf(data, shelf_at), terminal(as_json), sources.default_cache()
    published: dict[str, str] = {}
    for thing in things:
        with bar(console, f"publish {thing}") as progress:
            if thing in task_names():
                published[thing] = publish_task(shelf, thing, cache, progress)
            else:
                published[thing], _ = publish_model(shelf, thing, cache, progress, name)
    if as_json:
        sys.stdout.write(json.dumps(published, indent=2) + "\n")
        return
    for thing, content in published.items():
        console.print(f"{content}  {thing}", markup=False, highlight=False)


@app.command()
def push(
    model: Annotated[
        str,
        typer.Argument(help="A published model (name, name:quantization or id), a GGUF file or an artifact's folder."),
    ],
    task: Annotated[str, typer.Option(help="Tasks to bring too, separated by commas.")] = "",
    to: ToOption = DEFAULT_AGENT,
    downgrade: Annotated[
        bool, typer.Option("--downgrade", help="Also where the board had a newer one of this name.")
    ] = False,
    wait: Annotated[bool, typer.Option(help="Watch until every board has it.")] = True,
    limit_rate: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            help="Upload at so many MB/s at most, to an address. Boards that fetch have `joulemark agent --limit-rate`.",
        ),
    ] = None,
    data: DataOption = DEFAULT_DATA,
    shelf_at: ShelfOption = None,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a model to boards. Only what they lack is sent; a cut transfer goes on where it stopped.

    Boards that enrolled are meant by name, by group or all, and fetch it from the host. An address means the agent that answers there: what
    its host cannot give it is uploaded.

    Example: joulemark push smollm2-135m-instruct-q4_1 --to pi5,kitchen; joulemark push model.gguf --to https://pi5.local:8090
    """
    from joulemark_host import evaluation
    from joulemark_host.client import AgentClient

    shelf, console = open_shelf(data, shelf_at), terminal(as_json)
    if not _is_address(to):
        _push_by_name(data, database, subject_of(shelf, model, task, console), to, downgrade, wait, as_json)
        return
    client, dispatch = AgentClient(to, host_identity(data)), _signing_dispatch(data, database)
    try:
        subject, rate = subject_of(shelf, model, task, console), limit_rate * 1e6 if limit_rate is not None else None
        missing = evaluation.push(client, shelf, subject, console, dispatch, downgrade, rate)
    finally:
        client.close()
        if dispatch is not None:
            dispatch.close()
    console.print("sent" if missing else "nothing to send: the agent has it already")


@app.command(name="run")
def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="A published model (name, name:quantization or id), a GGUF file or an artifact's folder."),
    ],
    task: Annotated[str, typer.Option(help="Tasks, separated by commas.")] = "arc_challenge",
    to: ToOption = DEFAULT_AGENT,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first documents of each task.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Engine threads; default: all usable cores.")] = None,
    sequences: Annotated[int, typer.Option(min=1, max=200, help="Answers generated side by side.")] = 16,
    context: Annotated[int | None, typer.Option(min=16, help="Context length; default: the model's own.")] = None,
    backend: Annotated[str | None, typer.Option(help="Engine; default: the board's first that opens the file.")] = None,
    variant: Annotated[str, typer.Option(help="A word for what is special here, such as 'with fan'.")] = "",
    governor: GovernorOption = None,
    power_mode: PowerModeOption = None,
    fix_clocks: FixClocksOption = False,
    anyway: AnywayOption = False,
    data: DataOption = DEFAULT_DATA,
    shelf_at: ShelfOption = None,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a model on a board and wait: publish, push, run, keep the record, show the figures.

    Example: joulemark run model-q4_k_m.gguf --task arc_challenge,gsm8k_cot --limit 100 --to pi5
    """
    from joulemark_host import evaluation
    from joulemark_host.client import AgentClient
    from joulemark_host.records import parse_record

    shelf, records, console = open_shelf(data, shelf_at), open_records(data, database), terminal(as_json)
    options: dict[str, Any] = {"limit": limit, "threads": threads, "sequences": sequences, "variant": variant}
    options |= {"context_tokens": context, "backend": backend, "anyway": anyway}
    options["tuning"] = tuning_of(governor, power_mode, fix_clocks)
    run_ids: list[str] = []
    dispatch = _signing_dispatch(data, database)
    try:
        subject = subject_of(shelf, model, task, console)
        if not _is_address(to):
            run_ids += _run_by_name(data, database, subject, to, options, console)
        else:
            with closing(AgentClient(to, host_identity(data))) as client:
                evaluation.push(client, shelf, subject, console, dispatch, downgrade=True)
                for name in subject.packs:
                    body = evaluation.run_task(client, subject, name, options, console, dispatch)
                    records.put(body)
                    run_ids.append(parse_record(body).spec.run_id)
        _show_runs(records, run_ids, as_json)
    finally:
        if dispatch is not None:
            dispatch.close()
        records.close()


@app.command(name="records")
def listopen_records(
    task: Annotated[str | None, typer.Option(help="Only records of this task.")] = None,
    data: DataOption = DEFAULT_DATA,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the records that the host has, latest last, and those that were set aside because their run id was taken."""
    from joulemark_host.terminal import records_table

    records, console = open_records(data, database), terminal()
    try:
        runs, aside = records.facts(task), records.quarantined()
    finally:
        records.close()
    if as_json:
        sys.stdout.write(json.dumps([_plain(run) for run in runs], indent=2) + "\n")
        return
    console.print(records_table(runs) if runs else "no records yet: `joulemark run` makes one", markup=False)
    for other in aside:
        line = f"in quarantine: another record of {other.run_id}, sha256 {other.sha256[:12]}, {other.size_bytes} bytes"
        console.print(line, markup=False)


@app.command()
def heatmap(
    metric: Annotated[list[str] | None, typer.Option(help="A figure to draw; may be given several times.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task; may be given several times; default: all.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page: one file that needs no network.")] = Path(
        "heatmap.html"
    ),
    png: Annotated[Path | None, typer.Option(help="Also the same charts as a picture.")] = None,
    dark: Annotated[bool, typer.Option(help="Draw the picture for a dark background.")] = False,
    data: DataOption = DEFAULT_DATA,
    database: DatabaseOption = None,
) -> None:
    """Draw device × model as an HTML page that opens from disk, and as PNG.

    Example: joulemark heatmap --metric accuracy --metric decode_rate -o heatmap.html --png heatmap.png
    """
    from joulemark_host import charts, page
    from joulemark_host.figures import draw

    records, console = open_records(data, database), terminal()
    try:
        runs, known = records.facts(), records.tasks()
    finally:
        records.close()
    if not known:
        raise NotFound(
            "there are no records to draw", "`joulemark run` evaluates a model on a board and keeps its record"
        )
    for name in task or ():
        if name not in known:
            raise NotFound(f"there is no record of task {name!r}", f"there is: {', '.join(known)}")
    with console.status("draw"):
        figures = [draw(runs, figure, name) for figure in metric or ("accuracy",) for name in task or known]
        out.write_text(page.offline_page(figures), "utf-8")
        if png is not None:
            theme = "dark" if dark else "light"
            png.write_bytes(charts.png([charts.heatmap(figure.grid, theme) for figure in figures]))
    for path in (out, png):
        if path is not None:
            console.print(f"✓ {path}", markup=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for heatmap.html and heatmap.png.")] = Path("demo-output"),
    limit: Annotated[int, typer.Option(min=1, help="Documents of each task.")] = 36,
    keep: Annotated[Path | None, typer.Option(help="Keep shelf, records, journal and logs in this folder.")] = None,
) -> None:
    """The whole path on this machine: fetch a model and tasks, start host and agent, evaluate, draw the heatmap."""
    import signal

    from joulemark_host.demo import demonstrate

    # As Ctrl-C: what was started is stopped. Child processes lead their own sessions and would otherwise stay.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    demonstrate(out, limit, keep, terminal())


def _is_address(to: str) -> bool:
    return to.startswith(("http://", "https://"))


def _signing_dispatch(data: Path, database: str | None) -> Dispatch | None:
    """Who signs orders, if this host has an identity."""
    from joulemark_host.options import open_dispatch

    return open_dispatch(data, database) if host_identity(data) is not None else None


def _push_by_name(
    data: Path, database: str | None, subject: Subject, to: str, downgrade: bool, wait: bool, as_json: bool
) -> None:
    from joulemark_host.options import open_dispatch
    from joulemark_host.queue_cli import push_by_name
    from joulemark_host.terminal import targets_table

    with closing(open_dispatch(data, database)) as dispatch:
        targets = push_by_name(dispatch, subject, to, terminal(as_json), downgrade, wait)
    if as_json:
        sys.stdout.write(json.dumps([target.plain() for target in targets], indent=2) + "\n")
    else:
        titles = {subject.artifact_id: subject.manifest.title}
        terminal().print(targets_table(targets, titles), markup=False)
    if any(target.state == "error" for target in targets):
        raise typer.Exit(1)


def _run_by_name(
    data: Path, database: str | None, subject: Subject, to: str, options: dict[str, Any], console: Any
) -> list[str]:
    """Runs by way of the boards' queues; the ids of those that left a record."""
    from joulemark_host.options import open_dispatch
    from joulemark_host.queue_cli import run_by_name

    with closing(open_dispatch(data, database)) as dispatch:
        runs = run_by_name(dispatch, subject, to, options, console)
    for run in runs:
        if run.problem is not None:
            console.print(f"✗ {run.device}: {run.problem.message}\n  hint: {run.problem.hint}", markup=False)
    return [run.run_id for run in runs]


def _show_runs(records: Records, run_ids: Sequence[str], as_json: bool) -> None:
    from joulemark_host.terminal import absences, explanations, result_table

    runs = [run for run in records.facts() if run.run_id in run_ids]
    if as_json:
        sys.stdout.write(json.dumps([_plain(run) for run in runs], indent=2) + "\n")
        return
    console = terminal()
    console.print(result_table(runs))
    for line in (*explanations(runs), *absences(runs)):
        console.print(f"  {line}", markup=False, highlight=False)


def _plain(facts: Any) -> dict[str, Any]:
    """Facts as JSON values."""
    plain = asdict(facts)
    plain["metrics"] = {name: metric.model_dump() for name, metric in facts.metrics.items()}
    plain["problem"] = facts.problem.model_dump() if facts.problem else None
    return plain
