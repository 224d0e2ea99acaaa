"""The workstation's commands that bring Joulemark onto boards. Reads options, shows progress; `joulemark.__main__` shows errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from joulemark import sources
from joulemark.durable import replace_file
from joulemark.errors import Conflict
from joulemark_deploy import cross_engine, installing, release, wheelhouse
from joulemark_deploy.remote import Board
from joulemark_deploy.targets import TARGETS, target_for_processor, target_of

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
wheelhouse_app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
release_app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(wheelhouse_app, name="wheelhouse")
app.add_typer(release_app, name="release")


@app.callback()
def joulemark() -> None:
    """Bring Joulemark onto boards."""


@wheelhouse_app.callback()
def wheels() -> None:
    """Wheels for boards, so that no board needs a compiler: llama.cpp is built here, with zig, for the board's processor."""


@release_app.callback()
def releases() -> None:
    """Releases: one file with everything for a board, whatever its system and its Python are."""


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


@release_app.command(name="build")
def build_release(
    target: Annotated[str, typer.Option(help=f"Which board: {', '.join(TARGETS)}.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write; default: joulemark-VERSION-PROCESSOR.tar.gz here.")
    ] = None,
) -> None:
    """Put Joulemark, an engine for the board's processor, and a Python of its own into one file that needs nothing of the board's system.

    Example: joulemark release build --target jetson-nano. On the board: sh install.sh --release FILE; or: joulemark install --release FILE
    """
    found, console = target_of(target), Console(stderr=True)
    with _bars(console) as (tell, progress):
        made = release.current(found, sources.default_cache(), tell, progress)
    path = (out or Path(made.name)).expanduser()
    if path.exists():
        raise Conflict(f"{path} is there already", "remove it, or choose another name with --out")
    replace_file(path, [made.read_bytes()])
    typer.echo(f"✓ {path}: {path.stat().st_size / 1e6:.0f} MB, for {found.title}")


# --- boards over ssh --------------------------------------------------------------------------------------------------
Destination = Annotated[str, typer.Argument(help="As for ssh: user@address, or a name of its configuration.")]
Port = Annotated[int | None, typer.Option("--port", "-p", min=1, max=65535, help="ssh's port there.")]
SshOption = Annotated[
    list[str] | None,
    typer.Option("--ssh-option", help="An option for ssh, such as -iKEY or -oName=Value; may be given again."),
]


Packed = Annotated[
    Path | None, typer.Option("--release", help="A release; default: one is built for the board and kept in the cache.")
]
Wheels = Annotated[
    Path | None, typer.Option("--wheelhouse", help="Install from these wheels, with the board's own Python.")
]


@app.command()
def install(
    board: Destination,
    packed: Packed = None,
    wheels: Wheels = None,
    host_url: Annotated[
        str | None, typer.Option(help="The host to enrol at, such as https://192.168.1.10:8443.")
    ] = None,
    enrol_key_file: Annotated[
        Path | None, typer.Option(help="The one-time key of `joulemark host token`; removed on the board once used.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What people call the board; default: its host name.")] = None,
    listen: Annotated[
        str | None, typer.Option(help="Address and port to serve on there; default: 127.0.0.1:8090.")
    ] = None,
    port: Port = None,
    ssh_option: SshOption = None,
    upgrade: Annotated[bool, typer.Option("--upgrade", hidden=True)] = False,
) -> None:
    """Install the agent on a board over ssh, as a service. Nothing is compiled there; again brings only what is missing.

    Example: joulemark install pi@raspberrypi.local --host-url https://192.168.1.10:8443 --enrol-key-file board.key
    """
    console = Console(stderr=True)
    if wheels is None:
        installing.refuse_local_name(host_url)
    wishes = installing.Wishes(host_url, enrol_key_file.expanduser() if enrol_key_file else None, listen, name)
    with Board(board, port, ssh_option or ()) as there:
        facts = installing.look(there)
        if upgrade and not facts.installed:
            raise Conflict(f"there is no Joulemark on {board}", f"joulemark install {board}")
        installing.refuse(facts, sys.stdin.isatty(), wheels is not None)
        typer.echo(
            f"{facts.model or board}: {facts.machine}, Python {facts.python}, {facts.installed or 'nothing installed'}"
        )
        if wheels is not None:
            parts, options = installing.parts_of_wheelhouse(wheels.expanduser(), facts)
        else:
            path = packed.expanduser() if packed is not None else _release_for(facts, console)
            parts, options = installing.parts_of_release(path, facts)
        with _byte_bar(console) as (tell, sent):
            installing.stage(there, facts, parts, wishes.key_file, tell, sent)
        installing.install(there, facts, options, wishes, typer.echo)
        for line in installing.warnings(there, facts):
            typer.echo(line)
    if enrol_key_file is not None:
        enrol_key_file.expanduser().unlink()
    typer.echo(f"✓ {board} has Joulemark" + ("; next: `joulemark devices` on the host" if host_url else ""))


@app.command()
def upgrade(
    board: Destination,
    packed: Packed = None,
    wheels: Wheels = None,
    port: Port = None,
    ssh_option: SshOption = None,
) -> None:
    """Bring a board's agent to this version. When the new one does not report that it is ready, the former one runs again.

    Example: joulemark upgrade pi@raspberrypi.local
    """
    install(board, packed, wheels, port=port, ssh_option=ssh_option, upgrade=True)


@app.command()
def uninstall(
    board: Destination,
    purge: Annotated[bool, typer.Option("--purge", help="Remove records, models and keys there too.")] = False,
    port: Port = None,
    ssh_option: SshOption = None,
) -> None:
    """Take the agent off a board over ssh. What it recorded stays, unless --purge.

    Example: joulemark uninstall pi@raspberrypi.local
    """
    with Board(board, port, ssh_option or ()) as there:
        installing.uninstall(there, installing.look(there), purge, typer.echo)
    typer.echo(f"✓ Joulemark is off {board}" + ("" if purge else "; its data stays in /var/lib/joulemark"))


def _release_for(facts: installing.Facts, console: Console) -> Path:
    """A release for this very processor, from the cache or made now."""
    with _bars(console) as (tell, progress):
        return release.current(target_for_processor(facts.hwcap), sources.default_cache(), tell, progress)


@contextmanager
def _byte_bar(console: Console) -> Generator[tuple[installing.Tell, Callable[[int, int], None]]]:
    """A bar over the bytes that the board lacks."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("begin", total=None)

        def tell(words: str) -> None:
            bars.update(task, description=words)

        def sent(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        yield tell, sent
