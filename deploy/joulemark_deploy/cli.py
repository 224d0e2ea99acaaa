"""The workstation's commands that bring Joulemark onto boards. Reads options, shows progress; `joulemark.__main__` shows errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from joulemark import sources
from joulemark_deploy import cross_engine, wheelhouse
from joulemark_deploy.targets import TARGETS, target_of

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
wheelhouse_app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(wheelhouse_app, name="wheelhouse")


@app.callback()
def joulemark() -> None:
    """Bring Joulemark onto boards."""


@wheelhouse_app.callback()
def wheels() -> None:
    """Wheels for boards, so that no board needs a compiler: llama.cpp is built here, with zig, for the board's processor."""


@contextmanager
def _bars(console: Console) -> Generator[tuple[wheelhouse.Tell, cross_engine.Progress]]:
    """A spinner with the step's name, and a bar while the engine is compiled."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("begin", total=None)

        def tell(words: str) -> None:
            bars.update(task, description=words, total=None, completed=0)

        def progress(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        yield tell, progress


@wheelhouse_app.command()
def build(
    target: Annotated[str, typer.Option(help=f"Which board: {', '.join(TARGETS)}.")],
    out: Annotated[Path | None, typer.Option(help="The folder to make; default: wheelhouse-TARGET.")] = None,
    python: Annotated[
        list[str] | None,
        typer.Option(help="A Python version of the board; may be given again. Default: its usual ones."),
    ] = None,
    own: Annotated[
        Path | None, typer.Option("--joulemark", help="Joulemark's own wheel, when this is no checkout.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the wheelhouse's manifest as JSON.")] = False,
) -> None:
    """Collect every wheel that a board needs, and build the engine for its processor (once: minutes; afterwards from the cache).

    Example: joulemark wheelhouse build --target pi4. Then: joulemark install user@board --wheelhouse wheelhouse-pi4
    """
    found, console = target_of(target), Console(stderr=True)
    folder = (out or Path(f"wheelhouse-{found.name}")).expanduser()
    pythons = tuple(dict.fromkeys(python or found.pythons or tuple(wheelhouse.GLIBC)))
    with _bars(console) as (tell, progress):
        made = wheelhouse.build(found, folder, pythons, sources.default_cache(), own, tell, progress)
    if as_json:
        sys.stdout.write(json.dumps(made.model_dump(mode="json"), indent=2) + "\n")
        return
    size = sum(entry.size_bytes for entry in made.files) / 1e6
    typer.echo(f"✓ {folder}: {len(made.files)} wheels, {size:.0f} MB, for {found.title}, Python {', '.join(pythons)}")


@wheelhouse_app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="A wheelhouse.")],
    target: Annotated[
        str | None, typer.Option(help="The board that is meant; default: the one it was built for.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is wrong as JSON.")] = False,
) -> None:
    """Say whether a board can run every wheel: machine, C library, instructions; and whether a file was changed. Exit status 1 if not."""
    found = wheelhouse.faults(folder.expanduser(), target_of(target) if target is not None else None)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        for fault in found:
            typer.echo(f"✗ {fault}")
        if not found:
            typer.echo("✓ every wheel is as it was built, and the board can run it")
    raise typer.Exit(int(bool(found)))
