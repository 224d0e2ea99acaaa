"""The host's command about roll-outs: an artifact to many boards in stages. Options in, a table and an exit status out.

What is asked for is written down first; the command then only watches, so that one that is interrupted stops nothing.
"""

from __future__ import annotations

import getpass
import json
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from joulemark.errors import BadInput, NotFound
from joulemark_host.dispatch import Dispatch
from joulemark_host.options import (
    DEFAULT_DATA,
    DatabaseOption,
    DataOption,
    JsonOption,
    ShelfOption,
    commands,
    open_dispatch,
    open_shelf,
    subject_of,
    terminal,
)
from joulemark_host.queue_cli import watch
from joulemark_host.rollout import Rollout
from joulemark_host.shelf import Shelf

app = commands("The workstation's side: roll-outs.")


@app.command()
def rollout(
    model: Annotated[
        str | None,
        typer.Argument(help="A published model, a GGUF file or an artifact's folder. Without it: how roll-outs stand."),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            help="Boards or groups, separated by commas, or `all`: one option for each stage, in their order."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The roll-out's name; default: the model's.")] = None,
    success: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of a stage's boards that must have it before the next one begins."),
    ] = 1.0,
    errors: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a stage's boards that may go wrong before everything stops.")
    ] = 0.0,
    hours: Annotated[
        float, typer.Option(min=0.001, max=720, help="A board that is not there by then has gone wrong.")
    ] = 24.0,
    check: Annotated[
        str | None, typer.Option(help="A task that every board has to make with it before it counts.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first documents of the check.")] = None,
    backend: Annotated[str | None, typer.Option(help="Engine of the check; default: the board's first.")] = None,
    downgrade: Annotated[
        bool, typer.Option("--downgrade", help="Also where a board had a newer one of this name.")
    ] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the roll-out of this name instead.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Take the stopped one of this name up again instead.")
    ] = False,
    wait: Annotated[bool, typer.Option(help="Watch until it has ended.")] = True,
    data: DataOption = DEFAULT_DATA,
    shelf_at: ShelfOption = None,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a model to many boards in stages; too many errors stop it by themselves. Ctrl-C ends the watching only.

    Example: joulemark rollout small-q4 --stage canary --stage lab,attic --stage all --check arc_challenge --limit 20
    """
    console, dispatch = terminal(as_json), open_dispatch(data, database)
    try:
        if model is not None and not (stop or resume):
            name = _begin_rollout(
                dispatch, open_shelf(data, shelf_at), console, model, stage or ["all"], name, check,
                {"limit": limit, "backend": backend},
                {"success": success, "errors": errors, "timeout_s": hours * 3600, "downgrade": downgrade},
            )  # fmt: skip
        elif stop or resume:
            if name is None:
                raise BadInput("which roll-out?", "say --name; `joulemark rollout` lists them")
            dispatch.stop_rollout(name, getpass.getuser()) if stop else dispatch.resume_rollout(name)
        watched = wait and name is not None and not stop
        found = _look(dispatch, console, name, watched)
    finally:
        dispatch.close()
    if as_json:
        sys.stdout.write(json.dumps([rollout.plain() for rollout in found], indent=2) + "\n")
    else:
        terminal().print(_table(found) if found else "no roll-outs yet", markup=False)
    if watched and any(rollout.status == "stopped" for rollout in found):
        raise typer.Exit(1)


def _look(dispatch: Dispatch, console: Any, name: str | None, watched: bool) -> list[Rollout]:
    """How all roll-outs stand, or the one of this name, which may be `watched` until it has ended. Raises NotFound."""
    found = dispatch.rollouts(name)
    if name is not None and not found:
        raise NotFound(f"there is no roll-out {name!r}", "`joulemark rollout` lists them")
    then = f"the roll-out goes on; `joulemark rollout --name {name}` shows it, --stop stops it"
    return watch(console, lambda: dispatch.rollouts(name), _table, _settled, then) if watched else found


def _table(found: Sequence[Rollout]) -> Any:
    from joulemark_host.terminal import rollouts_table

    return rollouts_table(found, time.time())


def _settled(rollouts: Sequence[Rollout]) -> bool:
    return all(rollout.status != "running" for rollout in rollouts)


def _begin_rollout(
    dispatch: Dispatch,
    shelf: Shelf,
    console: Any,
    model: str,
    stages: Sequence[str],
    name: str | None,
    check: str | None,
    run: dict[str, Any],
    options: dict[str, Any],
) -> str:
    """Begins a roll-out; its name. A board is in the first stage that names it. `run` are fields of RunSpec, `options` of Plan."""
    from joulemark.wire import RunSpec
    from joulemark_host.rollout import Plan, Stage

    subject = subject_of(shelf, model, check or "", console)
    found: list[Stage] = []
    given: set[str] = set()
    for words in stages:
        ids = tuple(device_id for device_id in dispatch.devices(words) if device_id not in given)
        given.update(ids)
        if ids:
            found.append(Stage(words=words, device_ids=ids))
    name = name or subject.manifest.name
    spec = None
    if check is not None:
        spec = RunSpec(run_id=name, artifact_id=subject.artifact_id, pack_id=subject.packs[check], **run)
    dispatch.roll_out(
        Plan(name=name, manifest=subject.manifest, stages=tuple(found), check=spec, task=check or "", **options)
    )
    return name
