"""Opening an SQLite file that must survive power cuts, and SQLite's refusals in the words of the error tree.

Owns the settings (WAL, synchronous=FULL: a commit is on the disk when it returns) and what happens to a damaged file:
it is moved aside, never deleted, and a new one begins. Not aware of tables or rows.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from joulemark.errors import JoulemarkError, NoSpace
from joulemark_agent.refusals import storage_errors

BUSY_TIMEOUT_S = 5.0
LEFTOVER_LOG_BYTES = 4 * 1024 * 1024

log = logging.getLogger(__name__)


def open_database(path: Path, tables: str) -> tuple[sqlite3.Connection, str | None]:
    """The open database, its tables made (`tables`: idempotent SQL), and what had to be done to open it, if anything.

    Transactions are the caller's (autocommit mode); the caller also keeps threads apart. Raises NoSpace, or
    JoulemarkError when the file cannot be used or another process holds it.
    """
    with storage_errors(f"cannot make the folder of {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with database_errors(path):
        try:
            return _open(path, tables), None
        except sqlite3.OperationalError:
            raise  # locked, full or not permitted: not the file's fault
        except sqlite3.DatabaseError as error:
            note = _move_aside(path, str(error))
        return _open(path, tables), note


@contextmanager
def database_errors(path: Path) -> Generator[None, None, None]:
    """Turns sqlite3's errors inside into NoSpace or JoulemarkError (not_permitted, storage_failed)."""
    try:
        yield
    except sqlite3.OperationalError as error:
        text = str(error)
        if "full" in text:
            raise NoSpace(f"cannot write {path}: {text}", "free some space on this board") from error
        refused = JoulemarkError(
            f"cannot use {path}: {text}",
            "check the file's owner, whether the disk is read-only, and whether another agent uses it",
        )
        refused.code = "not_permitted" if "readonly" in text or "unable to open" in text else "storage_failed"
        raise refused from error
    except sqlite3.DatabaseError as error:
        damaged = JoulemarkError(
            f"{path} is damaged: {error}", "restart the agent: it moves the file aside and begins a new one"
        )
        damaged.code = "storage_failed"
        raise damaged from error


@contextmanager
def transaction(database: sqlite3.Connection) -> Generator[sqlite3.Connection, None, None]:
    """All of it or nothing; durable when it ends."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield database
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def _open(path: Path, tables: str) -> sqlite3.Connection:
    database = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=BUSY_TIMEOUT_S)
    try:
        found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute(f"PRAGMA journal_size_limit={LEFTOVER_LOG_BYTES}")
        database.executescript(tables)
    except BaseException:
        database.close()
        raise
    return database


def _move_aside(path: Path, why: str) -> str:
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    with storage_errors(f"cannot move the damaged file {path} aside"):
        for suffix in ("", "-wal", "-shm"):
            file = path.with_name(path.name + suffix)
            if file.exists():
                file.replace(aside.with_name(aside.name + suffix))
    note = f"{path} was damaged ({why}); it was moved to {aside} and a new one begins"
    log.error("%s", note)
    return note
