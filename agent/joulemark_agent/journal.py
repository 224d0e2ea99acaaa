"""The journal: everything about runs that must survive a crash or a power cut, in one SQLite file.

An item row is committed when the item is done (WAL, synchronous=FULL), so a killed run resumes at the next item. Knows rows and their
order, not what to do about them. One connection behind a lock: callers may be on any thread.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from joulemark.errors import Conflict, NotFound
from joulemark.wire import Clock, EngineFacts, ItemRecord, LatencySample, Phase, Problem, RunSpec, RunState, Trace
from joulemark_agent.database import database_errors, open_database, transaction

Status = Literal["queued", "running", "done", "failed", "cancelled", "interrupted"]

_TABLES = """
CREATE TABLE IF NOT EXISTS runs (
    run_id TEXT PRIMARY KEY, position INTEGER NOT NULL, spec TEXT NOT NULL, status TEXT NOT NULL,
    items_total INTEGER NOT NULL, problem TEXT, engine TEXT, record BLOB);
CREATE TABLE IF NOT EXISTS attempts (
    run_id TEXT NOT NULL, attempt INTEGER NOT NULL, clock TEXT NOT NULL, problem TEXT, trace TEXT,
    PRIMARY KEY (run_id, attempt));
CREATE TABLE IF NOT EXISTS phases (
    run_id TEXT NOT NULL, attempt INTEGER NOT NULL, name TEXT NOT NULL, start_s REAL NOT NULL, end_s REAL,
    PRIMARY KEY (run_id, attempt, name));
CREATE TABLE IF NOT EXISTS sync_edges (
    run_id TEXT NOT NULL, attempt INTEGER NOT NULL, name TEXT NOT NULL, sync_s REAL NOT NULL,
    PRIMARY KEY (run_id, attempt, name));
CREATE TABLE IF NOT EXISTS items (
    run_id TEXT NOT NULL, doc_id INTEGER NOT NULL, attempt INTEGER NOT NULL, item TEXT NOT NULL,
    PRIMARY KEY (run_id, doc_id));
CREATE TABLE IF NOT EXISTS latency (
    run_id TEXT NOT NULL, attempt INTEGER NOT NULL, number INTEGER NOT NULL, sample TEXT NOT NULL,
    PRIMARY KEY (run_id, attempt, number));
CREATE TABLE IF NOT EXISTS samples (
    run_id TEXT NOT NULL, attempt INTEGER NOT NULL, chunk INTEGER NOT NULL, rows TEXT NOT NULL,
    PRIMARY KEY (run_id, attempt, chunk));
"""


@dataclass(frozen=True)
class Attempt:
    """One worker process's part of a run."""

    number: int
    clock: Clock
    problem: Problem | None
    trace: Trace | None
    phases: tuple[Phase, ...]
    open_phase: tuple[str, float] | None
    """A phase that began and never ended, with its start: the attempt died in it."""
    latency: tuple[LatencySample, ...]


class Journal:
    """See the module. Raises NoSpace or JoulemarkError when the disk refuses. `note` says if a damaged file was moved aside."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._database, self.note = open_database(path, _TABLES)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    @contextmanager
    def _change(self) -> Generator[sqlite3.Connection, None, None]:
        with self._lock, database_errors(self._path), transaction(self._database) as database:
            yield database

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, database_errors(self._path):
            return self._database.execute(query, values).fetchall()

    # --- runs ---------------------------------------------------------------------------------------------------------
    def add_run(self, spec: RunSpec, items_total: int) -> bool:
        """Queue a run. False when the same spec is here already; Conflict when the id is taken by another."""
        text = spec.model_dump_json()
        with self._change() as database:
            known = database.execute("SELECT spec FROM runs WHERE run_id = ?", (spec.run_id,)).fetchone()
            if known is not None:
                if RunSpec.model_validate_json(known[0]) != spec:
                    raise Conflict(f"run {spec.run_id} exists with another spec", "choose a new run_id")
                return False
            database.execute(
                "INSERT INTO runs (run_id, position, spec, status, items_total) "
                "VALUES (?, (SELECT coalesce(max(position), 0) + 1 FROM runs), ?, 'queued', ?)",
                (spec.run_id, text, items_total),
            )
        return True

    def runs(self, *statuses: Status) -> tuple[RunSpec, ...]:
        """Specs in queue order; all runs when no status is given."""
        marks = ",".join("?" * len(statuses))
        where = f"WHERE status IN ({marks})" if statuses else ""
        rows = self._rows(f"SELECT spec FROM runs {where} ORDER BY position", *statuses)
        return tuple(RunSpec.model_validate_json(row[0]) for row in rows)

    def state(self, run_id: str) -> RunState:
        """Where a run stands. Raises NotFound."""
        rows = self._rows("SELECT status, items_total, problem FROM runs WHERE run_id = ?", run_id)
        if not rows:
            raise NotFound(f"there is no run {run_id}", "list the runs with GET /api/runs")
        status, total, problem = rows[0]
        done = self._rows("SELECT count(*) FROM items WHERE run_id = ?", run_id)[0][0]
        phase = self._rows(
            "SELECT name FROM phases WHERE run_id = ? AND end_s IS NULL ORDER BY attempt DESC, start_s DESC LIMIT 1",
            run_id,
        )
        return RunState(
            run_id=run_id,
            status=status,
            phase=phase[0][0] if phase and status == "running" else None,
            items_done=done,
            items_total=total,
            problem=Problem.model_validate_json(problem) if problem else None,
        )

    def set_status(self, run_id: str, status: Status, problem: Problem | None = None) -> None:
        """Record a change of state."""
        with self._change() as database:
            database.execute(
                "UPDATE runs SET status = ?, problem = ? WHERE run_id = ?",
                (status, problem.model_dump_json() if problem else None, run_id),
            )

    def set_engine(self, run_id: str, engine: EngineFacts) -> None:
        """Keep what really ran."""
        with self._change() as database:
            database.execute("UPDATE runs SET engine = ? WHERE run_id = ?", (engine.model_dump_json(), run_id))

    def engine(self, run_id: str) -> EngineFacts | None:
        """What really ran, if an attempt came so far."""
        rows = self._rows("SELECT engine FROM runs WHERE run_id = ?", run_id)
        return EngineFacts.model_validate_json(rows[0][0]) if rows and rows[0][0] else None

    def set_record(self, run_id: str, status: Status, problem: Problem | None, record: bytes) -> None:
        """Keep the run's one record together with its final state."""
        with self._change() as database:
            database.execute(
                "UPDATE runs SET status = ?, problem = ?, record = ? WHERE run_id = ?",
                (status, problem.model_dump_json() if problem else None, record, run_id),
            )

    def record(self, run_id: str) -> bytes:
        """The record's bytes. Raises NotFound while there is none."""
        rows = self._rows("SELECT record FROM runs WHERE run_id = ?", run_id)
        if not rows or rows[0][0] is None:
            raise NotFound(f"run {run_id} has no record yet", "a record is made when the run ends")
        return cast(bytes, rows[0][0])

    # --- attempts -----------------------------------------------------------------------------------------------------
    def begin_attempt(self, run_id: str, clock: Clock) -> int:
        """Number (from 1) of a new attempt."""
        with self._change() as database:
            number = database.execute(
                "SELECT coalesce(max(attempt), 0) + 1 FROM attempts WHERE run_id = ?", (run_id,)
            ).fetchone()[0]
            database.execute(
                "INSERT INTO attempts (run_id, attempt, clock) VALUES (?, ?, ?)",
                (run_id, number, clock.model_dump_json()),
            )
        return int(number)

    def end_attempt(self, run_id: str, attempt: int, problem: Problem | None, trace: Trace | None) -> None:
        """Close an attempt: its whole trace replaces the chunks that were kept meanwhile."""
        with self._change() as database:
            database.execute(
                "UPDATE attempts SET problem = ?, trace = ? WHERE run_id = ? AND attempt = ?",
                (
                    problem.model_dump_json() if problem else None,
                    trace.model_dump_json() if trace else None,
                    run_id,
                    attempt,
                ),
            )
            if trace is not None:
                database.execute("DELETE FROM samples WHERE run_id = ? AND attempt = ?", (run_id, attempt))

    def start_phase(self, run_id: str, attempt: int, name: str, start_s: float) -> None:
        """A phase began."""
        with self._change() as database:
            database.execute("INSERT INTO phases VALUES (?, ?, ?, ?, NULL)", (run_id, attempt, name, start_s))

    def end_phase(self, run_id: str, attempt: int, phase: Phase) -> None:
        """A phase is over."""
        with self._change() as database:
            database.execute(
                "UPDATE phases SET end_s = ? WHERE run_id = ? AND attempt = ? AND name = ?",
                (phase.end_s, run_id, attempt, phase.name),
            )
            # A table of its own: an older agent, to which an update may go back, writes phases of five columns.
            if phase.sync_s is not None:
                edge = (run_id, attempt, phase.name, phase.sync_s)
                database.execute("INSERT OR REPLACE INTO sync_edges VALUES (?, ?, ?, ?)", edge)

    def add_item(self, run_id: str, attempt: int, item: ItemRecord) -> None:
        """Commit an item. An item that is here already stays as it was first recorded: none is doubled."""
        with self._change() as database:
            database.execute(
                "INSERT OR IGNORE INTO items VALUES (?, ?, ?, ?)",
                (run_id, item.doc_id, attempt, item.model_dump_json()),
            )

    def items(self, run_id: str) -> tuple[tuple[int, ItemRecord], ...]:
        """All items of a run by document, each with the number of the attempt that answered it."""
        rows = self._rows("SELECT attempt, item FROM items WHERE run_id = ? ORDER BY doc_id", run_id)
        return tuple((attempt, ItemRecord.model_validate_json(item)) for attempt, item in rows)

    def done(self, run_id: str) -> tuple[int, ...]:
        """The documents that are answered."""
        return tuple(row[0] for row in self._rows("SELECT doc_id FROM items WHERE run_id = ? ORDER BY doc_id", run_id))

    def item_count(self, run_id: str, attempt: int) -> int:
        """How many items an attempt added."""
        return int(self._rows("SELECT count(*) FROM items WHERE run_id = ? AND attempt = ?", run_id, attempt)[0][0])

    def add_latency(self, run_id: str, attempt: int, number: int, sample: LatencySample) -> None:
        """Commit a latency sample."""
        with self._change() as database:
            database.execute(
                "INSERT INTO latency VALUES (?, ?, ?, ?)", (run_id, attempt, number, sample.model_dump_json())
            )

    def add_samples(self, run_id: str, attempt: int, chunk: int, rows: Trace) -> None:
        """Keep a part of the trace while the attempt runs, so that a power cut loses seconds, not the trace."""
        with self._change() as database:
            database.execute(
                "INSERT INTO samples VALUES (?, ?, ?, ?)", (run_id, attempt, chunk, rows.model_dump_json())
            )

    def sample_chunks(self, run_id: str, attempt: int) -> tuple[Trace, ...]:
        """The parts of a trace whose attempt never ended."""
        rows = self._rows("SELECT rows FROM samples WHERE run_id = ? AND attempt = ? ORDER BY chunk", run_id, attempt)
        return tuple(Trace.model_validate_json(row[0]) for row in rows)

    def attempts(self, run_id: str) -> tuple[Attempt, ...]:
        """All attempts of a run, oldest first."""
        rows = self._rows(
            "SELECT attempt, clock, problem, trace FROM attempts WHERE run_id = ? ORDER BY attempt", run_id
        )
        return tuple(self._attempt(run_id, row) for row in rows)

    def _attempt(self, run_id: str, row: Sequence[Any]) -> Attempt:
        number, clock, problem, trace = row
        phases = self._rows(
            "SELECT name, start_s, end_s FROM phases WHERE run_id = ? AND attempt = ? ORDER BY start_s", run_id, number
        )
        samples = self._rows(
            "SELECT sample FROM latency WHERE run_id = ? AND attempt = ? ORDER BY number", run_id, number
        )
        edges = dict(self._rows("SELECT name, sync_s FROM sync_edges WHERE run_id = ? AND attempt = ?", run_id, number))
        unfinished = [(name, start) for name, start, end in phases if end is None]
        return Attempt(
            number=number,
            clock=Clock.model_validate_json(clock),
            problem=Problem.model_validate_json(problem) if problem else None,
            trace=Trace.model_validate_json(trace) if trace else None,
            phases=tuple(
                Phase(name=name, start_s=start, end_s=end, sync_s=edges.get(name))
                for name, start, end in phases
                if end is not None
            ),
            open_phase=unfinished[-1] if unfinished else None,
            latency=tuple(LatencySample.model_validate_json(sample[0]) for sample in samples),
        )
