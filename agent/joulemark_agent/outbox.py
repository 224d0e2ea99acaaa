"""The outbox: finished records that wait for the host, in one SQLite file; and the sender that delivers them.

Owns what is pending, rejected and dropped, how long it may wait, and when the next try is due. Durable (WAL,
synchronous=FULL) and idempotent: a record added twice is one record, also after it was delivered. Bounded by bytes and
age; when a bound is passed the oldest goes first, rejected ones before pending ones, and what was dropped is written
down. Not aware of what a record says, or of how a sink delivers.

Age is counted in seconds that the agent has run, not by the wall clock: a board without a clock battery may boot in
1970 and jump by decades when the network comes. Seconds since the last change are lost when the agent is killed, so
that a record is never older than it says. Times called wall_s are for people only.
"""

from __future__ import annotations

import hashlib
import logging
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from joulemark import plugins
from joulemark.errors import BadInput, Conflict, JoulemarkError
from joulemark.wire import Wire
from joulemark_agent.database import database_errors, open_database, transaction
from joulemark_agent.host_link import HostLink
from joulemark_agent.sinks import Options, Sink, SinkUnavailable, Vouch

FIRST_DELAY_S = 2.0
LONGEST_DELAY_S = 3600.0
LONGEST_RETRY_AFTER_S = 86_400.0
"""A host may ask for more patience than our own limit, but not for ever."""
KEEP_TRACES = 10_000
"""Delivered and dropped runs that are remembered without their bodies, so that adding them again does nothing."""
HOUSEKEEPING_S = 600.0
PAUSE_POLL_S = 1.0

_TABLES = """
CREATE TABLE IF NOT EXISTS entries (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL UNIQUE, sha256 TEXT NOT NULL,
    size_bytes INTEGER NOT NULL, added_s REAL NOT NULL, state TEXT NOT NULL, reason TEXT, wall_s REAL NOT NULL,
    body BLOB);
CREATE INDEX IF NOT EXISTS by_state ON entries (state, sequence);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
"""

log = logging.getLogger(__name__)


class Entry(Wire):
    """A record on its way."""

    run_id: str
    body: bytes


class Dropped(Wire):
    """A record that was given up undelivered because a bound was passed."""

    run_id: str
    size_bytes: int
    reason: str
    wall_s: float


class Rejected(Wire):
    """A record that the sink refused for good. It is kept aside until a bound is passed, or `retry_rejected`."""

    run_id: str
    size_bytes: int
    reason: str
    wall_s: float


class Outbox:
    """See the module. Safe for several threads. `clock` is monotonic, `jitter` gives numbers from 0 to 1.

    Raises NoSpace or JoulemarkError when the disk refuses. A database that is damaged is moved aside and said: `note`.
    """

    def __init__(
        self,
        path: Path,
        max_bytes: int,
        max_age_s: float,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._clock = clock
        self._wall = wall
        self._jitter = jitter
        self._lock = threading.RLock()
        self._failures = 0
        self._refusals: dict[str, int] = {}
        self._not_before_s = clock()
        self.changed = threading.Event()
        """Set when there may be something new to send."""
        self._database, note = open_database(path, _TABLES)
        self._base_s = float(self._fact("operating_s", 0.0)) - clock()
        self._trimmed_s = float("-inf")
        if note is not None:
            with self._change() as database:
                database.execute("INSERT OR REPLACE INTO facts VALUES ('note', ?)", (note,))

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            with self._change():
                pass  # every change writes down how long the agent has run
            self._database.close()

    # --- adding and counting ------------------------------------------------------------------------------------------
    def add(self, run_id: str, body: bytes) -> None:
        """Keeps a record until it is delivered; durable when this returns. The same record again does nothing.

        Raises Conflict when another record of the run is or was here.
        """
        digest = hashlib.sha256(body).hexdigest()
        with self._change() as database:
            known = database.execute("SELECT sha256 FROM entries WHERE run_id = ?", (run_id,)).fetchone()
            if known is not None:
                if known[0] != digest:
                    raise Conflict(f"run {run_id} has another record already", "a run ends in exactly one record")
                return
            database.execute(
                "INSERT INTO entries (run_id, sha256, size_bytes, added_s, state, wall_s, body)"
                " VALUES (?, ?, ?, ?, 'pending', ?, ?)",
                (run_id, digest, len(body), self._operating_s(), self._wall(), body),
            )
            self._trim(database)
        self.changed.set()

    def pending(self) -> int:
        """Records that wait for delivery."""
        return int(self._rows("SELECT count(*) FROM entries WHERE state = 'pending'")[0][0])

    def waiting_bytes(self) -> int:
        """Bytes of all records that are kept, rejected ones included."""
        return int(self._rows("SELECT coalesce(sum(size_bytes), 0) FROM entries WHERE body IS NOT NULL")[0][0])

    def oldest_age_s(self) -> float | None:
        """How long the oldest pending record has waited, in seconds of the agent's running; None when none waits."""
        row = self._rows("SELECT min(added_s) FROM entries WHERE state = 'pending'")[0]
        return None if row[0] is None else self._operating_s() - float(row[0])

    def dropped(self) -> tuple[Dropped, ...]:
        """What was given up undelivered, oldest first."""
        return tuple(Dropped(**row) for row in self._described("dropped"))

    def rejected(self) -> tuple[Rejected, ...]:
        """What the sink refused for good and is kept aside, oldest first."""
        return tuple(Rejected(**row) for row in self._described("rejected"))

    def note(self) -> str | None:
        """What happened to the database, if it had to be moved aside."""
        found = self._fact("note", None)
        return None if found is None else str(found)

    # --- delivering ---------------------------------------------------------------------------------------------------
    def due(self) -> Entry | None:
        """The record to send now, None when none waits or the back-off has not passed.

        The oldest, but one that the host answered with "not now" lets the others pass.
        """
        with self._lock:
            if self._clock() < self._not_before_s:
                return None
            rows = self._rows("SELECT run_id FROM entries WHERE state = 'pending' ORDER BY sequence")
            if not rows:
                return None
            run_id = min((str(row[0]) for row in rows), key=lambda known: self._refusals.get(known, 0))
            body = self._rows("SELECT body FROM entries WHERE run_id = ?", run_id)[0][0]
            return Entry(run_id=run_id, body=body)

    def wait_s(self) -> float:
        """Seconds until the next try is due."""
        with self._lock:
            return max(0.0, self._not_before_s - self._clock())

    def delivered(self, run_id: str) -> None:
        """The sink has it: the body is forgotten, the run remembered. Ends the back-off."""
        with self._lock:
            self._settle(run_id, "delivered", None)
            self._failures = 0
            self._not_before_s = self._clock()

    def reject(self, run_id: str, reason: str) -> None:
        """The sink refused it for good: it is kept aside with the reason."""
        self._settle(run_id, "rejected", reason)

    def failed(self, run_id: str, retry_after_s: float | None = None, answered: bool = False) -> None:
        """It could not be delivered now: the next try is due after 2, 4, 8 … s, an hour at most, less up to half of it.

        `retry_after_s` is what the host asked for; `answered`: the host is there, so that others may pass this one.
        """
        with self._lock:
            delay_s = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** min(self._failures, 30))
            delay_s *= 1 - self._jitter() / 2
            if retry_after_s is not None:
                delay_s = max(delay_s, min(retry_after_s, LONGEST_RETRY_AFTER_S))
            self._failures += 1
            self._not_before_s = self._clock() + delay_s
            if answered:
                self._refusals[run_id] = self._refusals.get(run_id, 0) + 1

    def retry_now(self) -> None:
        """Forgets the back-off: somebody knows that the host is back."""
        with self._lock:
            self._failures = 0
            self._not_before_s = self._clock()
        self.changed.set()

    def retry_rejected(self) -> int:
        """Puts every rejected record back in line (after an update of the host, say); how many there were."""
        with self._change() as database:
            moved = database.execute("UPDATE entries SET state = 'pending', reason = NULL WHERE state = 'rejected'")
        self.retry_now()
        return moved.rowcount

    def keep_bounds(self) -> None:
        """Drops what became too old, and writes down how long the agent has run; at most every ten minutes."""
        with self._lock:
            if self._clock() - self._trimmed_s < HOUSEKEEPING_S:
                return  # every commit wears the card
            self._trimmed_s = self._clock()
            with self._change() as database:
                self._trim(database)

    def sender(self, link: HostLink | None, paused: Callable[[], bool], vouch: Vouch | None = None) -> Sender:
        """A sender to the host, or one that only keeps the bounds when there is no host. `vouch` signs what is sent."""
        http = plugins.load("joulemark_agent.sinks", "http") if link is not None else None
        sink = (
            http.open_sink(Options(link.url, link=link, vouch=vouch)) if http is not None and link is not None else None
        )
        return Sender(self, sink, paused)

    # --- inside -------------------------------------------------------------------------------------------------------
    def _settle(self, run_id: str, state: str, reason: str | None) -> None:
        # What was dropped while it was on its way and then arrived was delivered; its body is gone, so that it cannot
        # be kept aside any more.
        kept, among = ("body", "('pending')") if state == "rejected" else ("NULL", "('pending', 'dropped')")
        with self._change() as database:
            database.execute(
                f"UPDATE entries SET state = ?, reason = ?, wall_s = ?, body = {kept}"
                f" WHERE run_id = ? AND state IN {among}",
                (state, reason, self._wall(), run_id),
            )
            self._refusals.pop(run_id, None)
            database.execute(
                "DELETE FROM entries WHERE body IS NULL AND sequence <="
                " (SELECT sequence FROM entries WHERE body IS NULL ORDER BY sequence DESC LIMIT 1 OFFSET ?)",
                (KEEP_TRACES,),
            )

    def _trim(self, database: sqlite3.Connection) -> None:
        waiting = database.execute(
            "SELECT run_id, size_bytes, added_s, state FROM entries WHERE body IS NOT NULL"
            " ORDER BY state = 'pending', sequence"
        ).fetchall()
        total = sum(size for _, size, _, _ in waiting)
        for run_id, size_bytes, added_s, state in waiting:
            age_s = self._operating_s() - added_s
            if age_s > self._max_age_s:
                reason = f"older than {self._max_age_s / 86_400:.1f} days"
            elif total > self._max_bytes:
                reason = f"the outbox held {total} bytes, {self._max_bytes} are allowed"
            else:
                continue
            if state == "rejected":
                reason += "; it had been rejected before"
            total -= size_bytes
            database.execute(
                "UPDATE entries SET state = 'dropped', reason = ?, wall_s = ?, body = NULL WHERE run_id = ?",
                (reason, self._wall(), run_id),
            )
            self._refusals.pop(run_id, None)
            log.error("the record of run %s (%d bytes) was dropped undelivered: %s", run_id, size_bytes, reason)

    def _operating_s(self) -> float:
        return self._base_s + self._clock()

    def _described(self, state: str) -> list[dict[str, Any]]:
        rows = self._rows(
            "SELECT run_id, size_bytes, reason, wall_s FROM entries WHERE state = ? ORDER BY wall_s, sequence", state
        )
        return [
            {"run_id": run_id, "size_bytes": size, "reason": reason, "wall_s": wall}
            for run_id, size, reason, wall in rows
        ]

    @contextmanager
    def _change(self) -> Generator[sqlite3.Connection, None, None]:
        with self._lock, database_errors(self._path), transaction(self._database) as database:
            yield database
            database.execute("INSERT OR REPLACE INTO facts VALUES ('operating_s', ?)", (self._operating_s(),))

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, database_errors(self._path):
            return self._database.execute(query, values).fetchall()

    def _fact(self, name: str, default: Any) -> Any:
        rows = self._rows("SELECT value FROM facts WHERE name = ?", name)
        return rows[0][0] if rows else default


class Sender:
    """One thread that delivers what is due, and stays quiet while `paused()` (a run is being measured).

    `sink` None: nothing is delivered, only the bounds are kept.
    """

    def __init__(self, outbox: Outbox, sink: Sink | None, paused: Callable[[], bool]) -> None:
        self._outbox = outbox
        self._sink = sink
        self._paused = paused
        self._stopping = threading.Event()
        self._sending = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="sender", daemon=True)

    def start(self) -> None:
        """Begins to deliver."""
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends after the delivery in flight, if it ends in time; what is not delivered stays for the next start."""
        self._stopping.set()
        self._outbox.changed.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def settle(self, timeout_s: float) -> bool:
        """Waits until no delivery is in flight: for callers that are about to measure and have set `paused`."""
        if self._sending.acquire(timeout=timeout_s):
            self._sending.release()
            return True
        return False

    def step(self) -> float:
        """Delivers one record if one is due. Returns the seconds until there may be something to do again."""
        with self._sending:
            if self._paused():
                return PAUSE_POLL_S
            self._outbox.keep_bounds()
            entry = self._outbox.due() if self._sink is not None else None
            if entry is None or self._sink is None:
                wait_s = self._outbox.wait_s()
                return min(wait_s, HOUSEKEEPING_S) if wait_s else HOUSEKEEPING_S
            self._deliver(self._sink, entry)
            return min(self._outbox.wait_s(), HOUSEKEEPING_S)

    def _deliver(self, sink: Sink, entry: Entry) -> None:
        try:
            sink.put(entry.run_id, entry.body)
        except (BadInput, Conflict) as error:
            log.warning("the record of run %s was rejected and kept aside: %s", entry.run_id, error)
            self._outbox.reject(entry.run_id, error.message)
        except SinkUnavailable as error:
            self._outbox.failed(entry.run_id, error.retry_after_s, error.answered)
            log.warning("%s; next try in %.0f s", error.message, self._outbox.wait_s())
        else:
            self._outbox.delivered(entry.run_id)
            log.info("the record of run %s was delivered", entry.run_id)

    def _work(self) -> None:
        while not self._stopping.is_set():
            self._outbox.changed.clear()
            try:
                wait_s = self.step()
            except JoulemarkError:
                # The disk refuses (full, read-only): records stay where they are, and the thread must live.
                log.exception("the outbox cannot be used now")
                wait_s = HOUSEKEEPING_S
            if wait_s and not self._stopping.is_set():
                self._outbox.changed.wait(wait_s)
        if self._sink is not None:
            self._sink.close()
