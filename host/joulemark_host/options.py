"""What several of the host's commands share: options, and opening what they name. Heavy modules are imported when they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from joulemark.errors import BadInput

if TYPE_CHECKING:
    from joulemark_host.dispatch import Dispatch
    from joulemark_host.evaluation import Subject
    from joulemark_host.identity import HostIdentity
    from joulemark_host.records import Records
    from joulemark_host.registry import Registry
    from joulemark_host.shelf import Shelf

DataOption = Annotated[
    Path, typer.Option(envvar="JOULEMARK_HOST_DATA", help="Folder that the host owns: identity, shelf and database.")
]
DatabaseOption = Annotated[
    str | None,
    typer.Option(
        envvar="JOULEMARK_DATABASE", help="Database: a file or a URL; default: records.db in the data folder."
    ),
]
ShelfOption = Annotated[
    str | None,
    typer.Option(
        "--shelf",
        envvar="JOULEMARK_SHELF",
        help="Where artifacts lie: a folder, or object storage such as s3://bucket/folder; default: shelf in the data folder.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
GovernorOption = Annotated[
    str | None, typer.Option(help="Frequency governor while the run lasts, such as performance; then as before.")
]
PowerModeOption = Annotated[
    str | None, typer.Option(help="A Jetson's power mode while the run lasts, by name or number; then as before.")
]
FixClocksOption = Annotated[
    bool,
    typer.Option(
        "--fix-clocks",
        help="Processor and graphics clocks at their upper limits while the run lasts; then as before.",
    ),
]
AnywayOption = Annotated[
    bool, typer.Option("--anyway", help="Begin also on a board whose supply's voltage is too low (then INVALID).")
]
DEFAULT_DATA = Path("~/.local/share/joulemark/host")


def commands(about: str) -> typer.Typer:
    """The commands of one file; `about` is what `--help` says of them together."""
    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

    def joulemark() -> None: ...

    app.callback(help=about)(joulemark)  # with a callback a file of one command still has that command's name
    return app


def identity_folder(data: Path) -> Path:
    """Where the host's keys are."""
    return data.expanduser() / "identity"


def host_identity(data: Path) -> HostIdentity | None:
    """The host's identity, if `joulemark host init` made one here."""
    from joulemark_host import identity

    folder = identity_folder(data)
    return identity.read(folder) if identity.exists(folder) else None


def open_shelf(data: Path, where: str | None) -> Shelf:
    """The shelf of this data folder, or the one that was named."""
    from joulemark_host.shelf import Shelf

    if where is not None and "://" not in where:
        where = str(Path(where).expanduser())
    return Shelf(where or data.expanduser() / "shelf")


def open_records(data: Path, database: str | None, max_record_bytes: int | None = None) -> Records:
    """The records of this data folder, or of the database that was named."""
    from joulemark_host.records import MAX_RECORD_BYTES, Records

    return Records(database_url(data, database), max_record_bytes=max_record_bytes or MAX_RECORD_BYTES)


def open_registry(data: Path, database: str | None) -> Registry:
    """The book of boards and people. Raises NotFound before `joulemark host init`."""
    from joulemark_host import identity
    from joulemark_host.registry import Registry

    who = identity.read(identity_folder(data))
    return Registry(database_url(data, database), who.fingerprint)


def hand_down(context: typer.Context, data: Path, database: str | None) -> bool:
    """Whether a sub-command follows, which then gets the group's own --data and --database as its defaults."""
    if context.invoked_subcommand is None:
        return False
    context.default_map = {context.invoked_subcommand: {"data": str(data), "database": database}}
    return True


def open_dispatch(data: Path, database: str | None) -> Dispatch:
    """What boards are to do. Raises NotFound before `joulemark host init`."""
    from joulemark_host import identity
    from joulemark_host.dispatch import Dispatch

    who = identity.read(identity_folder(data))
    return Dispatch(database_url(data, database), who.key)


def subject_of(shelf: Shelf, model: str, tasks: str, console: Any) -> Subject:
    """The model and the tasks that these words mean, published first where they are not yet. Raises BadInput, NotFound."""
    from joulemark import sources
    from joulemark_host.evaluation import Subject
    from joulemark_host.publishing import publish_model, publish_task, task_names
    from joulemark_host.terminal import bar

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    unknown = [name for name in names if name not in task_names()]
    if unknown:
        raise BadInput(f"there is no task {unknown[0]!r}", f"known: {', '.join(task_names())}")
    cache = sources.default_cache()
    with bar(console, f"publish {model}") as progress:
        artifact_id, manifest = publish_model(shelf, model, cache, progress)
    packs: dict[str, str] = {}
    for name in names:
        with bar(console, f"render {name}") as progress:
            packs[name] = publish_task(shelf, name, cache, progress)
    return Subject(artifact_id, manifest, packs)


def database_url(data: Path, database: str | None) -> str:
    """SQLAlchemy's URL of the database that is meant; the data folder is made."""
    if database is None:
        folder = data.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        database = str(folder / "records.db")
    return database if "://" in database else f"sqlite:///{Path(database).expanduser().absolute()}"


def terminal(quiet: bool = False) -> Any:
    """The terminal; with `quiet` (JSON goes to standard output) everything else goes to standard error."""
    from rich.console import Console

    return Console(stderr=quiet)
