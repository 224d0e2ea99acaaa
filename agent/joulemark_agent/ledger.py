"""What this board has accepted from its host, durably: orders by number, releases by name, and the latest time that the host has told.

An order is accepted when its number is higher than all before it, or when it is the very order that was accepted under that number (a
board asks again after a crash). Everything else is a replay. Expiry is judged by the host's time, carried on by the monotonic clock, and
never runs backwards over a restart: the board's own wall clock may say 1970. Not aware of what orders do. Times are seconds.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

from joulemark.errors import Untrusted
from joulemark.statements import FetchOrder, Order
from joulemark.wire import canonical_json
from joulemark_agent.database import database_errors, open_database, transaction

_TABLES = """
CREATE TABLE IF NOT EXISTS accepted (sequence INTEGER PRIMARY KEY, kind TEXT NOT NULL, sha256 TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS releases (family TEXT PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID;
"""


class Stale(Untrusted):
    """An order whose number or age is wrong and nothing else: its host may sign it anew."""


KEEP = 10_000
"""Accepted orders that are remembered; lower numbers than these are replays in any case."""
WRITE_TIME_EVERY_S = 600.0


class Ledger:
    """See the module. Safe for several threads. `clock` is monotonic."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._database, self.note = open_database(path, _TABLES)
        found = self._database.execute("SELECT value FROM facts WHERE name = 'host_time'").fetchone()
        self._written = float(found[0]) if found else 0.0
        self._anchor = (self._written, self._clock())

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._database.close()

    def hear_time(self, host_time: float) -> None:
        """The host has told its time. It may have gone back (somebody set that clock right), but not before what is written here."""
        with self._lock:
            told = max(host_time, self._written)
            self._anchor = (told, self._clock())
            if told - self._written < WRITE_TIME_EVERY_S:
                return
            with database_errors(self._path), transaction(self._database) as database:
                database.execute("INSERT OR REPLACE INTO facts VALUES ('host_time', ?)", (told,))
            self._written = told

    def host_time(self) -> float:
        """The host's time now, as far as this board can know; 0 before it has heard any."""
        told, at = self._anchor
        return told + (self._clock() - at) if told else 0.0

    def accepted(self) -> int:
        """The highest number that was accepted; 0 before the first."""
        with self._lock, database_errors(self._path):
            return int(self._database.execute("SELECT coalesce(max(sequence), 0) FROM accepted").fetchone()[0])

    def accept(self, order: Order) -> None:
        """Accepts an order whose signature was checked, or raises Stale (it has expired, or is a replay) or Untrusted (a downgrade)."""
        if order.expires_at <= self.host_time():
            raise Stale(f"order {order.sequence} has expired", "the host signs it anew when it hears of this")
        digest = hashlib.sha256(order.TYPE.encode() + canonical_json(order)).hexdigest()
        with self._lock, database_errors(self._path), transaction(self._database) as database:
            known = database.execute("SELECT sha256 FROM accepted WHERE sequence = ?", (order.sequence,)).fetchone()
            if known is not None and known[0] == digest:
                return
            last = database.execute("SELECT coalesce(max(sequence), 0) FROM accepted").fetchone()[0]
            if order.sequence <= last:
                raise Stale(
                    f"order {order.sequence} is a replay: this board is at {last}",
                    "if its host means it, it signs it anew when it hears of this",
                )
            if isinstance(order, FetchOrder):
                family = f"{order.manifest.name}:{order.manifest.quantization}:{order.manifest.format}"
                held = database.execute("SELECT number FROM releases WHERE family = ?", (family,)).fetchone()
                if held is not None and order.release < held[0] and not order.downgrade:
                    raise Untrusted(
                        f"{family} release {order.release} is older than {held[0]}, which this board has had",
                        "`joulemark push --downgrade` goes back on purpose",
                    )
                database.execute("INSERT OR REPLACE INTO releases VALUES (?, ?)", (family, order.release))
            database.execute("INSERT INTO accepted VALUES (?, ?, ?)", (order.sequence, order.TYPE, digest))
            database.execute("DELETE FROM accepted WHERE sequence <= ?", (order.sequence - KEEP,))
