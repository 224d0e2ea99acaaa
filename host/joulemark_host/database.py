"""Databases: opening one by its URL, and transactions that are all or nothing. SQLite by default, PostgreSQL by URL.

Both are made durable (what was acknowledged survives a power cut) and patient with another writer. Who reads and then changes what was read
asks for a `write` transaction: there is one of them at a time, over all processes. Not aware of any table.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import ArgumentError, DatabaseError, DataError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

from joulemark.errors import BadInput, MissingExtra, NoSpace, Unavailable
from joulemark_host.tables import ABOUT, METADATA, RECORDS

LAYOUT = 4
PATIENCE_S = 30
"""How long a transaction waits for another writer."""
_WRITERS = 0x6A6F756C
"""The PostgreSQL advisory lock that a write transaction takes; any number that nobody else in this database uses."""


_TURNS: dict[str, threading.Lock] = {}
RESTORE = "stop the host, move the database aside, restore a copy; boards keep what they send until it is stored"
_UNREADABLE = (UnicodeDecodeError, json.JSONDecodeError)
"""What a damaged SQLite file gives besides errors of its own: garbage in a column, or in SQLite's own sentence about the garbage."""
READERS = 20
"""Connections that are kept; forty threads of a server share them."""


def open_database(url: str) -> Engine:
    """An engine for `url` with the tables made. Raises BadInput (not a database of ours), MissingExtra, Unavailable."""
    engine = _engine(url)
    shown = engine.url.render_as_string(hide_password=True)
    try:
        with _begun(engine, write=True) as connection:  # one process at a time makes the tables
            METADATA.create_all(connection)
            _bring_up_to_date(connection, shown)
    except OperationalError as error:
        raise Unavailable(
            f"the record database {shown} cannot be opened: {_said(error)}",
            "check that its folder exists and is writable, or that the server runs",
        ) from error
    except (DatabaseError, *_UNREADABLE) as error:
        raise BadInput(
            f"{shown} is not a record database, or is damaged: {_said(error)}",
            "move the file aside and restore a copy, or give another one with --database",
        ) from error
    return engine


@contextmanager
def transaction(engine: Engine, write: bool = False) -> Generator[Connection, None, None]:
    """All of it or nothing. `write`: the only one of its kind until it ends, so that what was read stays true until it is changed.

    Raises NoSpace, BadInput for a value that no column can hold, Unavailable when the database does not answer; then nothing was changed.
    """
    try:
        with _begun(engine, write) as connection:
            yield connection
    except OperationalError as error:
        text = _said(error)
        if "full" in text or "No space left" in text:
            raise NoSpace(f"the database cannot grow: {text}", "free some space; nothing is lost") from error
        raise Unavailable(
            f"the database does not answer: {text}", "what was sent is kept by its sender: try again"
        ) from error
    except PoolTimeout as error:
        raise Unavailable("the database is busy: every connection is in use", "try again in a moment") from error
    except (OverflowError, DataError) as error:
        raise BadInput(
            "a number or a text is out of the range that can be kept", f"the database says: {error}"
        ) from error
    except (DatabaseError, *_UNREADABLE) as error:
        # Damage is the base class itself; its other kinds are a row that is there already, or a statement of ours that is wrong.
        if isinstance(error, DatabaseError) and type(error) is not DatabaseError:
            raise
        raise Unavailable(f"the database is damaged: {_said(error)}", RESTORE) from error


@contextmanager
def _begun(engine: Engine, write: bool) -> Generator[Connection, None, None]:
    with _turn(engine) if write else nullcontext(), engine.begin() as connection:
        if write and engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        elif write and engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITERS)))
        yield connection


@contextmanager
def _turn(engine: Engine) -> Generator[None, None, None]:
    """The writers of one process wait for each other here, and not at the database: SQLite would have each of them look again and again,
    and each would keep a connection meanwhile."""
    lock = _TURNS.setdefault(engine.url.render_as_string(hide_password=False), threading.Lock())
    if not lock.acquire(timeout=PATIENCE_S):
        raise Unavailable("the database does not answer: other writers do not end", "try again in a moment")
    try:
        yield
    finally:
        lock.release()


def _engine(url: str) -> Engine:
    try:
        parsed = _with_driver(sa.make_url(url))
        if parsed.get_backend_name() == "sqlite":
            engine = sa.create_engine(parsed, pool_size=READERS)
            event.listen(engine, "connect", _prepare_sqlite)
            return engine
        engine = sa.create_engine(
            parsed, pool_size=READERS, pool_pre_ping=True
        )  # a server may have been restarted meanwhile
    except (ArgumentError, NoSuchModuleError, ValueError) as error:  # ValueError: a port that is no number
        raise BadInput(
            f"{_without_password(url)!r} is not a database URL", "an example is sqlite:////srv/joulemark/records.db"
        ) from error
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"the driver for {_without_password(url)!r} is not installed: {error}", "pip install 'joulemark[postgres]'"
        ) from error
    if engine.dialect.name == "postgresql":
        event.listen(engine, "connect", _prepare_postgresql)
    return engine


def _with_driver(url: URL) -> URL:
    """`postgresql://…` and `postgres://…`, as people write them, mean the driver that we install."""
    if url.drivername in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    return url


def _prepare_sqlite(connection: Any, _entry: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    patience = f"busy_timeout={PATIENCE_S * 1000}"
    for pragma in ("journal_mode=WAL", "synchronous=FULL", patience, "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _prepare_postgresql(connection: Any, _entry: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    cursor.execute(f"SET lock_timeout = '{PATIENCE_S}s'")
    cursor.execute("SET synchronous_commit = on")
    cursor.close()
    connection.commit()


def _bring_up_to_date(connection: Connection, shown: str) -> None:
    """Checks the layout of a database that was there, and changes an older one; all of it or nothing."""
    found = connection.execute(sa.select(ABOUT.c.value).where(ABOUT.c.key == "layout")).scalar()
    if found is None:
        connection.execute(sa.insert(ABOUT).values(key="layout", value=str(LAYOUT)))
        return
    if int(found) > LAYOUT:
        raise BadInput(
            f"{shown} has layout {found}; this host understands up to {LAYOUT}", "update joulemark on this machine"
        )
    if int(found) < 2:  # layout 1 had the bodies among the columns
        connection.execute(
            sa.text("INSERT INTO bodies (run_id, body, signature) SELECT run_id, body, signature FROM records")
        )
        connection.execute(sa.text("DROP INDEX IF EXISTS ix_records_task"))
        for column in ("body", "signature"):
            connection.execute(sa.text(f"ALTER TABLE records DROP COLUMN {column}"))
    if int(found) < 3:  # layout 3 has the boards' clocks
        _add_column(connection, "devices", "clock_ahead_s")
    if int(found) < 4:  # layout 4 has the ends of roll-outs
        _add_column(connection, "rollouts", "ended_at")
    if int(found) < LAYOUT:
        connection.execute(sa.update(ABOUT).where(ABOUT.c.key == "layout").values(value=str(LAYOUT)))
    for index in RECORDS.indexes:
        index.create(connection, checkfirst=True)


def _add_column(connection: Connection, table: str, column: str) -> None:
    """Adds a column of numbers; a table that was only made just now has it."""
    known = sa.inspect(connection)
    if known.has_table(table) and column not in {found["name"] for found in known.get_columns(table)}:
        connection.execute(sa.text(f"ALTER TABLE {table} ADD COLUMN {column} FLOAT"))


def _said(error: Exception) -> str:
    """The server's words in one line."""
    return " ".join(str(error.orig if isinstance(error, DatabaseError) else error).split())


def _without_password(url: str) -> str:
    return re.sub(r"(://[^:@/]*):[^@]*@", r"\1:***@", url)
