"""The host's commands for boards without a network: work onto a stick, records from it. Options in, progress and exit status out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from joulemark.errors import NotFound
from joulemark_host.options import (
    DEFAULT_DATA,
    DatabaseOption,
    DataOption,
    JsonOption,
    ShelfOption,
    commands,
    identity_folder,
    open_dispatch,
    open_records,
    open_registry,
    open_shelf,
    terminal,
)

app = commands("The workstation's side: sticks.")


@app.command(name="export-bundle")
def export_bundle(
    to: Annotated[str, typer.Option("--to", help="The board's name or id.")],
    out: Annotated[Path, typer.Option(help="A folder on the stick.")],
    with_models: Annotated[
        bool,
        typer.Option("--with-models", help="Also models that the board is known to have: after its card was changed."),
    ] = False,
    data: DataOption = DEFAULT_DATA,
    shelf_at: ShelfOption = None,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write everything that a board without a network has to do onto a stick: its queue, with the models and tasks for it.

    Example: joulemark sweep a.gguf --to farm --no-wait; joulemark export-bundle --to farm --out /media/stick; on the board:
    joulemark run-bundle /media/stick
    """
    from joulemark_host import bundling, identity
    from joulemark_host.terminal import bar

    registry, dispatch, console = open_registry(data, database), open_dispatch(data, database), terminal(as_json)
    try:
        device = registry.device(next(iter(dispatch.devices(to))))
        who, shelf = identity.read(identity_folder(data)), open_shelf(data, shelf_at)
        with bar(console, f"models to {out}") as progress:
            written = bundling.export(out.expanduser(), device, who, dispatch, shelf, with_models, progress)
    finally:
        registry.close()
        dispatch.close()
    if as_json:
        sys.stdout.write(json.dumps(vars(written)) + "\n")
        return
    console.print(
        f"✓ {written.runs} runs and {written.artifacts} models for {device.name} in {out}\n"
        "next: joulemark run-bundle on the board, then joulemark import-results here",
        markup=False,
        highlight=False,
    )


@app.command(name="import-results")
def import_results(
    stick: Annotated[Path, typer.Argument(help="The folder on the stick that a board put its records on.")],
    data: DataOption = DEFAULT_DATA,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take the records that a stick brings back. They are believed as if they had come over the network: signed by their board.

    Example: joulemark import-results /media/stick
    """
    from joulemark_host import bundling

    registry, dispatch = open_registry(data, database), open_dispatch(data, database)
    records, console = open_records(data, database), terminal(as_json)
    try:
        found = list(bundling.import_results(stick.expanduser(), records, registry, dispatch))
    finally:
        records.close()
        registry.close()
        dispatch.close()
    if not found:
        raise NotFound(f"there are no records in {stick}", "`joulemark run-bundle` on the board puts them there")
    new, refused = sum(result.created for result in found), [result for result in found if result.problem is not None]
    if as_json:
        problems = {result.number: str(result.problem) for result in refused}
        sys.stdout.write(json.dumps({"new": new, "known": len(found) - new - len(refused), "refused": problems}) + "\n")
    else:
        known = len(found) - new - len(refused)
        console.print(f"✓ {new} new record{'s' if new != 1 else ''}, {known} here already", markup=False)
        for result in refused:
            console.print(f"✗ result {result.number}: {result.problem}", markup=False, highlight=False)
    if refused:
        raise typer.Exit(1)
