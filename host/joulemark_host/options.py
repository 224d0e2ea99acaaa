"""What several of the host's commands share: options, and opening what they name. Heavy modules are imported when they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
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
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DEFAULT_DATA = Path("~/.local/share/joulemark/host")


def identity_folder(data: Path) -> Path:
    """Where the host's keys are."""
    return data.expanduser() / "identity"


def host_identity(data: Path) -> HostIdentity | None:
    """The host's identity, if `joulemark host init` made one here."""
    from joulemark_host import identity

    folder = identity_folder(data)
    return identity.read(folder) if identity.exists(folder) else None


def open_shelf(data: Path) -> Shelf:
    """The shelf of this data folder."""
    from joulemark_host.shelf import Shelf

    return Shelf(data.expanduser() / "shelf")


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
