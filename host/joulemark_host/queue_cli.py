"""The host's commands about its boards' queues: push and run by name, sweep, runs, artifacts. Options in, progress and exit status out.

What is asked for is written down first; these commands then only watch, so that one that is interrupted loses nothing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from joulemark.errors import INTERRUPTED, BadInput, JoulemarkError, NotFound
from joulemark.wishes import tuning_of
from joulemark_host.dispatch import Dispatch
from joulemark_host.evaluation import Subject
from joulemark_host.holdings import Target
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
    hand_down,
    open_dispatch,
    open_shelf,
    subject_of,
    terminal,
)
from joulemark_host.run_queue import QueuedRun

app = commands("The workstation's side: what boards are to do.")
runs_app = typer.Typer(invoke_without_command=True, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(runs_app, name="runs")
LOOK_EVERY_S = 0.5


@app.command()
def sweep(
    models: Annotated[
        list[str] | None, typer.Argument(help="Published models, GGUF files, folders of exported artifacts.")
    ] = None,
    task: Annotated[str, typer.Option(help="Tasks, separated by commas.")] = "arc_challenge",
    to: Annotated[str, typer.Option("--to", help="Boards or groups, separated by commas, or `all`.")] = "all",
    name: Annotated[str, typer.Option(help="The sweep's name; asked for again it adds what is missing.")] = "sweep",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first documents of each task.")] = None,
    backend: Annotated[str | None, typer.Option(help="Engine; default: the board's first that opens the file.")] = None,
    variant: Annotated[str, typer.Option(help="A word for what is special here, such as 'with fan'.")] = "",
    governor: GovernorOption = None,
    power_mode: PowerModeOption = None,
    fix_clocks: FixClocksOption = False,
    anyway: AnywayOption = False,
    retry_failed: Annotated[bool, typer.Option(help="Queue failed runs once more.")] = False,
    wait: Annotated[bool, typer.Option(help="Watch until every run has ended.")] = True,
    cancel: Annotated[bool, typer.Option("--cancel", help="End the sweep of this name instead.")] = False,
    data: DataOption = DEFAULT_DATA,
    shelf_at: ShelfOption = None,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate every model on every task on every board. Ctrl-C ends the watching only; the boards go on.

    Example: joulemark sweep small-q4 small-q8 --task arc_challenge,gsm8k_cot --to all --name night
    """
    from joulemark_host import sweep as sweeps

    console, dispatch = terminal(as_json), open_dispatch(data, database)
    try:
        if cancel:
            found = dispatch.runs(name)
            if not found:
                raise NotFound(
                    f"there is no sweep {name!r}", "`joulemark runs --all --json` names the sweep of every run"
                )
            ended = dispatch.cancel([run.run_id for run in found])
            console.print(f"✓ {ended} runs of {name} are cancelled", markup=False)
            return
        if not models:
            raise BadInput("which models?", "name one at least; `joulemark publish --help` says what can be named")
        devices, shelf = dispatch.devices(to), open_shelf(data, shelf_at)
        subjects = [subject_of(shelf, model, task, console) for model in models]
        options: dict[str, Any] = {"limit": limit, "backend": backend, "variant": variant, "anyway": anyway}
        options["tuning"] = tuning_of(governor, power_mode, fix_clocks)
        added = sweeps.queue(dispatch, name, sweeps.cells(subjects, devices), options, retry_failed)
        console.print(f"✓ {added} runs queued, {len(dispatch.runs(name))} in all", markup=False)
        goes_on = f"the boards go on; `joulemark runs --sweep {name}` shows how far, `joulemark sweep --name {name} --cancel` ends it"
        titles = dispatch.titles()
        runs = watch_runs(console, lambda: dispatch.runs(name), titles, goes_on) if wait else dispatch.runs(name)
    finally:
        dispatch.close()
    _show_runs(runs, titles, as_json)
    if wait and any(run.status != "done" for run in sweeps.latest(runs)):
        raise typer.Exit(1)


@runs_app.callback()
def runs(
    context: typer.Context,
    sweep: Annotated[str | None, typer.Option(help="Only the runs of this sweep.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also those that have ended.")] = False,
    data: DataOption = DEFAULT_DATA,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the runs that wait or are going on. `joulemark runs cancel RUN…` ends some."""
    if hand_down(context, data, database):
        return
    dispatch = open_dispatch(data, database)
    try:
        found, titles = dispatch.runs(sweep, open_only=not everything), dispatch.titles()
    finally:
        dispatch.close()
    _show_runs(found, titles, as_json)


@runs_app.command()
def cancel(
    run_ids: Annotated[list[str], typer.Argument(help="The runs' ids.")],
    data: DataOption = DEFAULT_DATA,
    database: DatabaseOption = None,
) -> None:
    """End runs. One that a board is at ends when the board hears of it; its record says so."""
    dispatch = open_dispatch(data, database)
    try:
        known = {run.run_id for run in dispatch.runs(run_ids=run_ids)}
        if missing := [run_id for run_id in run_ids if run_id not in known]:
            raise NotFound(f"there is no run {missing[0]!r} in a queue", "`joulemark runs --all` lists them")
        ended = dispatch.cancel(run_ids)
    finally:
        dispatch.close()
    terminal().print(f"✓ {ended} of {len(run_ids)} are cancelled; the others had ended", markup=False)


@app.command()
def artifacts(
    device: Annotated[str | None, typer.Option(help="Only this board, or this group's.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Only this artifact (name, name:quantization or id), on all boards.")
    ] = None,
    forget: Annotated[
        bool, typer.Option("--forget", help="Remove the artifact from the board or group (both have to be named).")
    ] = False,
    data: DataOption = DEFAULT_DATA,
    shelf_at: ShelfOption = None,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the artifacts on boards and how far they are: unknown, registered, pending, in_sync, error.

    Example: joulemark artifacts --device pi5
    """
    from joulemark_host.terminal import targets_table

    dispatch, shelf = open_dispatch(data, database), open_shelf(data, shelf_at)
    try:
        chosen = dispatch.devices(device) if device is not None else None
        artifact_id = shelf.resolve(model) if model is not None else None
        if forget:
            if chosen is None or artifact_id is None:
                raise NotFound("--forget needs --device and --model", "name the board and the artifact")
            dispatch.forget(artifact_id, *chosen)
        found, titles = dispatch.targets(artifact_id=artifact_id), dispatch.titles()
    finally:
        dispatch.close()
    found = [target for target in found if chosen is None or target.device_id in chosen]
    if as_json:
        sys.stdout.write(json.dumps([target.plain() for target in found], indent=2) + "\n")
        return
    if artifact_id is not None:  # no board may have been asked to hold it
        titles[artifact_id] = shelf.manifest(artifact_id).title
    shown = targets_table(found, titles) if found else "nothing was pushed yet: `joulemark push`"
    terminal().print(shown, markup=False)


def push_by_name(
    dispatch: Dispatch, subject: Subject, to: str, console: Any, downgrade: bool = False, wait: bool = True
) -> list[Target]:
    """Wants the artifact on the boards that `to` means, and shows how it gets there until every board has it or gave up."""
    devices = dispatch.devices(to)
    for device_id in devices:
        dispatch.push(device_id, subject.manifest, downgrade)

    def targets() -> list[Target]:
        return [t for t in dispatch.targets(artifact_id=subject.artifact_id) if t.device_id in devices]

    return _watch_targets(console, targets) if wait else targets()


def run_by_name(
    dispatch: Dispatch, subject: Subject, to: str, options: dict[str, Any], console: Any
) -> list[QueuedRun]:
    """Queues every task of the subject on the boards that `to` means and watches. Interrupted, the runs are cancelled."""
    from joulemark.wire import RunSpec
    from joulemark_host.dispatch import new_run_id

    run_ids: list[str] = []
    for device_id in dispatch.devices(to):
        for task, pack_id in subject.packs.items():
            spec = RunSpec(run_id=new_run_id(task), artifact_id=subject.artifact_id, pack_id=pack_id, **options)
            dispatch.queue(device_id, spec, subject.manifest, task)
            run_ids.append(spec.run_id)
    try:
        titles = {subject.artifact_id: subject.manifest.title}
        return watch_runs(console, lambda: dispatch.runs(run_ids=run_ids), titles)
    except KeyboardInterrupt:
        dispatch.cancel(run_ids)
        _leave("the runs are cancelled")


def _leave(then: str) -> NoReturn:
    """Ends a command at Ctrl-C and says what becomes of what it watched."""
    sys.stderr.write(f"joulemark: stopped; {then}\n")
    raise SystemExit(INTERRUPTED)


@contextmanager
def _interruptible(then: str | None) -> Generator[None, None, None]:
    try:
        yield
    except KeyboardInterrupt:
        if then is None:
            raise
        _leave(then)


def watch_runs(
    console: Any, look: Callable[[], list[QueuedRun]], models: Mapping[str, str], then: str | None = None
) -> list[QueuedRun]:
    """Shows the runs until all have ended. `models` are names by artifact id."""
    from joulemark_host.sweep import over
    from joulemark_host.terminal import queue_table

    return watch(console, look, lambda found: queue_table(found, models), over, then)


def watch(
    console: Any,
    look: Callable[[], list[Any]],
    table: Callable[[list[Any]], Any],
    over: Callable[[list[Any]], bool],
    then: str | None,
) -> list[Any]:
    """Shows what there is until it is over. `then` is what becomes of it when the person stops watching; None: KeyboardInterrupt is
    raised."""
    from rich.live import Live

    found = look()
    with _interruptible(then), Live(table(found), console=console, transient=True, refresh_per_second=2) as live:
        while not over(found):
            time.sleep(LOOK_EVERY_S)
            found = _patiently(look, found)
            live.update(table(found))
    return found


def _watch_targets(console: Any, look: Callable[[], list[Target]]) -> list[Target]:
    from joulemark_host.holdings import progress
    from joulemark_host.terminal import transfer_bar

    targets = look()
    then = "the boards go on fetching; `joulemark artifacts` shows how far"
    with (
        _interruptible(then),
        transfer_bar(console, f"push to {len(targets)} board{'s' if len(targets) != 1 else ''}") as show,
    ):
        while any(target.state == "pending" for target in targets):
            show(*progress(targets))
            time.sleep(LOOK_EVERY_S)
            targets = _patiently(look, targets)
    return targets


def _patiently(look: Callable[[], list[Any]], before: list[Any]) -> list[Any]:
    """What there is now; a database that is busy for a moment ends no watching that may last a night."""
    try:
        return look()
    except JoulemarkError as error:
        if not error.retryable:
            raise
        return before


def _show_runs(runs: Sequence[QueuedRun], titles: Mapping[str, str], as_json: bool) -> None:
    from joulemark_host.terminal import queue_table

    if as_json:
        sys.stdout.write(json.dumps([run.plain() for run in runs], indent=2) + "\n")
        return
    nothing = "no runs: `joulemark run` or `joulemark sweep` queues some"
    terminal().print(queue_table(runs, titles) if runs else nothing, markup=False)
