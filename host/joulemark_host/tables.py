"""The layout of the record database, for any engine that SQLAlchemy speaks to; and how such an engine is opened.

`records` keeps the body of a record whole, beside columns that listings and grids filter by; `metrics` is one row for
each run × figure; `quarantine` keeps bodies that claimed a run id which another body had already. Derived columns may
be rebuilt from the bodies at any time. Times are seconds of the host's wall clock.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry

from joulemark.errors import BadInput, MissingExtra, NoSpace, Unavailable

LAYOUT = 1
METADATA = sa.MetaData()

ABOUT = sa.Table("about", METADATA, sa.Column("key", sa.Text, primary_key=True), sa.Column("value", sa.Text))

RECORDS = sa.Table(
    "records",
    METADATA,
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("run_id", sa.Text, nullable=False, unique=True),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.Integer, nullable=False),
    sa.Column("received_at", sa.Float, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("signature", sa.LargeBinary),
    sa.Column("facts_version", sa.Integer, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("valid", sa.Boolean, nullable=False),
    sa.Column("device_id", sa.Text, nullable=False, index=True),
    sa.Column("device_name", sa.Text, nullable=False),
    sa.Column("device_profile", sa.Text, nullable=False),
    sa.Column("artifact_id", sa.Text, nullable=False, index=True),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("quantization", sa.Text, nullable=False),
    sa.Column("weight_bytes", sa.BigInteger, nullable=False),
    sa.Column("pack_id", sa.Text, nullable=False),
    sa.Column("task", sa.Text, nullable=False, index=True),
    sa.Column("task_hash", sa.Text, nullable=False),
    sa.Column("variant", sa.Text, nullable=False),
    sa.Column("finished_at", sa.Float),
    sa.Column("problem", sa.JSON),
    sa.Column("reasons", sa.JSON, nullable=False),
    sa.Column("conditions", sa.JSON, nullable=False),
    sqlite_autoincrement=True,
)

METRICS_TABLE = sa.Table(
    "metrics",
    METADATA,
    sa.Column("run_id", sa.Text, sa.ForeignKey("records.run_id", ondelete="CASCADE"), primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Float),
    sa.Column("unit", sa.Text),
    sa.Column("n", sa.Integer),
    sa.Column("low", sa.Float),
    sa.Column("high", sa.Float),
    sa.Column("source", sa.Text),
    sa.Column("absent", sa.Text),
)

QUARANTINE = sa.Table(
    "quarantine",
    METADATA,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("run_id", sa.Text, nullable=False, index=True),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.Integer, nullable=False),
    sa.Column("received_at", sa.Float, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.UniqueConstraint("run_id", "sha256"),
)


def open_database(url: str) -> Engine:
    """An engine for `url` with the tables made. Raises BadInput (not a database of ours), MissingExtra, Unavailable."""
    try:
        engine = sa.create_engine(url)
    except (ArgumentError, NoSuchModuleError) as error:
        raise BadInput(
            f"{url!r} is not a database URL: {error}", "an example is sqlite:////srv/joulemark/records.db"
        ) from error
    except ModuleNotFoundError as error:
        raise MissingExtra(f"the driver for {url!r} is not installed: {error}", f"pip install {error.name}") from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
    shown = engine.url.render_as_string(hide_password=True)
    try:
        METADATA.create_all(engine)
        _check_layout(engine, shown)
    except OperationalError as error:
        raise Unavailable(
            f"the record database {shown} cannot be opened: {error.orig}",
            "check that its folder exists and is writable, or that the server runs",
        ) from error
    except DatabaseError as error:
        raise BadInput(
            f"{shown} is not a record database: {error.orig}",
            "move the file aside, or give another one with --database",
        ) from error
    return engine


@contextmanager
def transaction(engine: Engine, write: bool = False) -> Generator[Connection, None, None]:
    """All of it or nothing. `write`: SQLite's lock is taken at the beginning, so that what was read stays true until it is changed.

    Raises NoSpace, or Unavailable when the database does not answer; then nothing was changed.
    """
    try:
        with engine.begin() as connection:
            if write and engine.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection
    except OperationalError as error:
        text = str(error.orig)
        if "full" in text:
            raise NoSpace(f"the database cannot grow: {text}", "free some space; nothing is lost") from error
        raise Unavailable(
            f"the database does not answer: {text}", "what was sent is kept by its sender: try again"
        ) from error


def _prepare_sqlite(connection: Any, _entry: ConnectionPoolEntry) -> None:
    """Durable (a record that was acknowledged survives a power cut) and patient with a second writer."""
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=30000", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _check_layout(engine: Engine, shown: str) -> None:
    with engine.begin() as connection:
        found = connection.execute(sa.select(ABOUT.c.value).where(ABOUT.c.key == "layout")).scalar()
        if found is None:
            connection.execute(sa.insert(ABOUT).values(key="layout", value=str(LAYOUT)))
        elif int(found) > LAYOUT:
            raise BadInput(
                f"{shown} has layout {found}; this host understands up to {LAYOUT}", "update joulemark on this machine"
            )
