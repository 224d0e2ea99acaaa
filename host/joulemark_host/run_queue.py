"""Runs of boards: queued, leased one at a time, renewed by reports, returned when a board vanishes, ended by what it says or by a record.

Works on a connection that somebody else opened. Not aware of artifacts being there, nor of what a run is about. Times are seconds of the
clock that is passed in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from joulemark.errors import Conflict, NotFound
from joulemark.plain_text import printable_problem
from joulemark.protocol import Refusal
from joulemark.statements import Envelope, RunOrder, read_envelope
from joulemark.wire import ENDED, Problem, RunEnd, RunSpec, RunState
from joulemark_host.fleet_tables import DEVICES, RUNS
from joulemark_host.issuing import Issuer, raise_revision
from joulemark_host.tables import RECORDS

OPEN = ("queued", "leased", "cancelling")
RunStatus = Literal["queued", "leased", "cancelling"] | RunEnd


@dataclass(frozen=True)
class QueuedRun:
    """One run in a board's queue. `status` is the record's as soon as there is one; `items_total` is None until the board has said it."""

    run_id: str
    sweep: str | None
    device_id: str
    device: str
    task: str
    spec: RunSpec
    status: RunStatus
    phase: str | None
    items_done: int
    items_total: int | None
    leases: int
    problem: Problem | None
    queued_at: float
    changed_at: float

    @property
    def words(self) -> str:
        """Where it stands, for people: a run that a board holds is running, and in which phase."""
        return _standing(self.status, self.phase)

    def what(self, models: Mapping[str, str]) -> str:
        """What is run, for people. `models` are names by artifact id; one that is not on the shelf any more shows its id."""
        spec = self.spec
        name = f"{models.get(spec.artifact_id, spec.artifact_id[:12])}, {self.task or spec.pack_id[:12]}"
        details = [f"first {spec.limit}" if spec.limit else "", spec.backend or "", spec.variant]
        return ", ".join([name, *filter(None, details)])

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return dict(vars(self)) | {
            "spec": self.spec.model_dump(mode="json"),
            "problem": self.problem.model_dump() if self.problem is not None else None,
        }


def in_words(status: RunStatus) -> str:
    """What a person calls a status."""
    return "running" if status == "leased" else status


def row_in_words(row: RowMapping) -> str:
    """Where a run of the table stands, and how far it is."""
    far = f", {row['items_done']} of {row['items_total']}" if row["items_total"] is not None else ""
    return _standing(row["status"], row["phase"]) + far


def _standing(status: RunStatus, phase: str | None) -> str:
    return f"{in_words(status)}: {phase}" if phase is not None else in_words(status)


class RunQueue:
    """See the module."""

    def __init__(self, issuer: Issuer, clock: Callable[[], float], lease_s: float) -> None:
        self._issuer = issuer
        self._clock = clock
        self._lease_s = lease_s

    def known(self, connection: Connection, device_id: str, spec: RunSpec) -> bool:
        """Whether this very run is queued already. Raises Conflict when its id is taken by another."""
        row = _row(connection, spec.run_id)
        if row is not None and (_spec(row) != spec or row["device_id"] != device_id):
            raise Conflict(f"run {spec.run_id} exists with another spec", "choose a new run id")
        return row is not None

    def add(self, connection: Connection, device_id: str, spec: RunSpec, task: str, sweep: str | None) -> None:
        """Puts a run at the end of a board's queue."""
        now = self._clock()
        row = {"run_id": spec.run_id, "device_id": device_id, "spec": spec.model_dump(mode="json"), "task": task}
        row |= {"sweep": sweep, "status": "queued", "leases": 0, "items_done": 0, "queued_at": now, "changed_at": now}
        connection.execute(sa.insert(RUNS).values(**row))
        raise_revision(connection, device_id)

    def order(self, connection: Connection, run_id: str) -> str:
        """The envelope of a queued run's order, leased to its board at once. Raises NotFound, Conflict."""
        row = _row(connection, run_id)
        if row is None:
            raise NotFound(f"there is no run {run_id!r} in a queue", "`joulemark runs` lists them")
        if row["status"] not in ("queued", "leased"):
            raise Conflict(f"run {run_id} is {row['status']}", "queue another one")
        return str(row["envelope"]) if row["status"] == "leased" else self._lease(connection, row)

    def to_lease(self, connection: Connection, device_id: str) -> bool:
        """Whether a board's next run has to be leased, or its order signed anew, before it gets it."""
        mine = sa.select(RUNS).where(RUNS.c.device_id == device_id, RUNS.c.status.in_(OPEN)).order_by(RUNS.c.number)
        rows = connection.execute(mine).mappings().all()
        going_on = [row for row in rows if row["status"] != "queued"]
        if not going_on:
            return bool(rows)
        first = going_on[0]
        return first["status"] == "leased" and self._expired(first)

    def _expired(self, row: RowMapping) -> bool:
        order = RunOrder.model_validate_json(read_envelope(row["envelope"]).body())
        return order.expires_at <= self._clock()

    def held(self, connection: Connection, device_id: str, lease: bool) -> Envelope | None:
        """The order of the run that this board holds; with `lease` the next one of its queue when it holds none."""
        mine = sa.select(RUNS).where(RUNS.c.device_id == device_id).order_by(RUNS.c.number)
        row = connection.execute(mine.where(RUNS.c.status.in_(("leased", "cancelling")))).mappings().first()
        if row is not None and row["status"] == "cancelling":
            return None
        if row is not None:
            return read_envelope(self._lease(connection, row) if lease and self._expired(row) else row["envelope"])
        row = connection.execute(mine.where(RUNS.c.status == "queued")).mappings().first() if lease else None
        return read_envelope(self._lease(connection, row)) if row is not None else None

    def lend(self, connection: Connection, device_id: str, life_s: float) -> list[str]:
        """The envelopes of all runs of a board that have not begun to end, leased for `life_s` seconds."""
        mine = sa.select(RUNS).where(RUNS.c.device_id == device_id, RUNS.c.status.in_(("queued", "leased")))
        lent: list[str] = []
        for row in connection.execute(mine.order_by(RUNS.c.number)).mappings().all():
            lent.append(self._lease(connection, row))  # anew, so that the order lives as long as the lease
            self._set(connection, row["run_id"], lease_until=self._clock() + life_s)
        return lent

    def cancel(self, connection: Connection, run_ids: Collection[str]) -> int:
        """Ends runs that have not ended; those that a board holds end when it hears of it. Returns how many that concerns."""
        waiting = sa.select(RUNS).where(RUNS.c.run_id.in_(run_ids), RUNS.c.status.in_(("queued", "leased")))
        rows = connection.execute(waiting).mappings().all()
        for row in rows:
            # One that was leased before may be in the board's own journal, also when the lease has returned.
            self._set(connection, row["run_id"], status="cancelling" if row["leases"] else "cancelled")
            raise_revision(connection, row["device_id"])
        return len(rows)

    def to_cancel(self, connection: Connection, device_id: str, going_on: Collection[str] = ()) -> tuple[str, ...]:
        """Runs that the board is to end: also those that were ended here while it was away and that it says are `going_on`."""
        ended = sa.and_(RUNS.c.run_id.in_(going_on), RUNS.c.status == "cancelled")
        wanted = sa.or_(RUNS.c.status == "cancelling", ended)
        query = sa.select(RUNS.c.run_id).where(RUNS.c.device_id == device_id, wanted)
        return tuple(connection.execute(query).scalars())

    def take(self, connection: Connection, device_id: str, state: RunState) -> None:
        """What a board says about its run; renews the lease of one that is going on."""
        row = _row(connection, state.run_id)
        if row is None or row["device_id"] != device_id:
            return
        values: dict[str, Any] = {
            "items_done": state.items_done,
            "items_total": state.items_total or row["items_total"],
        }
        if row["status"] in ENDED:
            if state.status in ENDED:  # the record was faster than this report
                self._set(connection, state.run_id, **values)
            return
        values["phase"] = state.phase
        if state.status in ENDED:
            problem = printable_problem(state.problem).model_dump() if state.problem is not None else None
            values |= {"status": state.status, "lease_until": None, "problem": problem}
            raise_revision(connection, device_id)
        elif row["status"] != "cancelling" and row["envelope"] is not None:
            values |= {"status": "leased", "lease_until": self._clock() + self._lease_s, "problem": None}
        self._set(connection, state.run_id, **values)

    def take_refusal(self, connection: Connection, device_id: str, refusal: Refusal) -> None:
        """A board did not accept the order of the run that it holds: a stale one is signed anew, else the run has failed."""
        mine = sa.select(RUNS).where(RUNS.c.device_id == device_id, RUNS.c.status == "leased")
        for row in connection.execute(mine).mappings().all():
            if RunOrder.model_validate_json(read_envelope(row["envelope"]).body()).sequence != refusal.sequence:
                continue
            if refusal.stale:
                self._lease(connection, row)
            else:
                problem = printable_problem(refusal.problem).model_dump()
                self._set(connection, row["run_id"], status="failed", lease_until=None, problem=problem)
            raise_revision(connection, device_id)

    def settle(
        self, connection: Connection, run_id: str, items: tuple[int, int] | None = None
    ) -> tuple[str, str] | None:
        """A record of this run has arrived: its board may have the next one. (board, artifact) of a run that was done, and so was there.
        `items`: how many are in the record, and of how many; where a board reports by itself, it has said that."""
        row = _row(connection, run_id)
        status = connection.execute(sa.select(RECORDS.c.status).where(RECORDS.c.run_id == run_id)).scalar()
        if row is None or status is None:
            return None
        if row["status"] not in ENDED:
            self._set(connection, run_id, status=status, lease_until=None)
            raise_revision(connection, row["device_id"])
        if items is not None:
            self._set(connection, run_id, items_done=items[0], items_total=items[1])
        return (row["device_id"], _spec(row).artifact_id) if status == "done" else None

    def expire(self, connection: Connection, problem: dict[str, Any]) -> list[str]:
        """Returns the runs of boards that vanished to their queues; ends those that nobody will ever confirm as cancelled."""
        rows = connection.execute(sa.select(RUNS.c.run_id, RUNS.c.device_id).where(self.late())).all()
        for run_id, device_id in rows:
            self._set(connection, run_id, status="queued", lease_until=None, problem=problem)
            raise_revision(connection, device_id)
        connection.execute(sa.update(RUNS).where(self.unheard()).values(status="cancelled", problem=problem))
        return [run_id for run_id, _ in rows]

    def late(self) -> Any:
        """The condition for a lease that was not renewed."""
        return sa.and_(RUNS.c.status == "leased", RUNS.c.lease_until < self._clock())

    def unheard(self) -> Any:
        """The condition for a cancellation that the board did not confirm."""
        return sa.and_(RUNS.c.status == "cancelling", RUNS.c.changed_at < self._clock() - self._lease_s)

    def _lease(self, connection: Connection, row: RowMapping) -> str:
        """Signs the order for a run and gives its board the lease; the envelope."""
        _, envelope = self._issuer.run(connection, row["device_id"], _spec(row))
        lease = {"status": "leased", "envelope": envelope, "lease_until": self._clock() + self._lease_s}
        self._set(connection, row["run_id"], leases=row["leases"] + 1, **lease)
        return envelope

    def _set(self, connection: Connection, run_id: str, **values: Any) -> None:
        connection.execute(sa.update(RUNS).where(RUNS.c.run_id == run_id).values(changed_at=self._clock(), **values))


def needing(connection: Connection, device_id: str, artifact_id: str) -> list[str]:
    """Runs of a board that have not ended and need this artifact."""
    query = sa.select(RUNS).where(RUNS.c.device_id == device_id, RUNS.c.status.in_(OPEN))
    return [row["run_id"] for row in connection.execute(query).mappings() if _spec(row).artifact_id == artifact_id]


def needed(connection: Connection, device_id: str) -> tuple[str, ...]:
    """The artifacts that open runs of a board are about."""
    query = sa.select(RUNS).where(RUNS.c.device_id == device_id, RUNS.c.status.in_(OPEN))
    return tuple(sorted({_spec(row).artifact_id for row in connection.execute(query).mappings()}))


def packs(connection: Connection, device_id: str) -> set[str]:
    """The packs of the runs that a board was ever given."""
    asked = sa.select(RUNS.c.spec["pack_id"].as_string()).where(RUNS.c.device_id == device_id).distinct()
    return set(connection.execute(asked).scalars())


def ordered(connection: Connection, run_id: str) -> str:
    """The envelope of the order under which a run was made. Raises NotFound."""
    row = _row(connection, run_id)
    if row is None or row["envelope"] is None:
        raise NotFound(f"run {run_id!r} was not ordered here", "`joulemark runs --all` lists those that were")
    return str(row["envelope"])


def listed(
    connection: Connection, sweep: str | None, run_ids: Collection[str] | None, open_only: bool
) -> list[QueuedRun]:
    """Runs in the order in which they were queued."""
    query = (
        sa.select(RUNS, DEVICES.c.name, RECORDS.c.status.label("recorded"))
        .join(DEVICES)
        .outerjoin(RECORDS, RECORDS.c.run_id == RUNS.c.run_id)
    )
    if sweep is not None:
        query = query.where(RUNS.c.sweep == sweep)
    if run_ids is not None:
        query = query.where(RUNS.c.run_id.in_(run_ids))
    if open_only:
        query = query.where(RUNS.c.status.in_(OPEN))
    return [_queued(row) for row in connection.execute(query.order_by(RUNS.c.number)).mappings()]


def _row(connection: Connection, run_id: str) -> RowMapping | None:
    return connection.execute(sa.select(RUNS).where(RUNS.c.run_id == run_id)).mappings().first()


def _spec(row: RowMapping) -> RunSpec:
    return RunSpec.model_validate_json(json.dumps(row["spec"]))


def _queued(row: RowMapping) -> QueuedRun:
    names = ("run_id", "sweep", "device_id", "task", "items_done", "items_total", "leases", "queued_at", "changed_at")
    return QueuedRun(
        device=row["name"],
        spec=_spec(row),
        status=row["recorded"] or row["status"],
        phase=row["phase"] if row["recorded"] is None else None,
        problem=Problem(**row["problem"]) if row["problem"] else None,
        **{name: row[name] for name in names},
    )
