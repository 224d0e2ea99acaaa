"""What boards are to do: artifacts to hold, runs to make, one at a time for each board; and how far they are.

The wanted state is in the database; a board asks for it whenever its revision has risen and converges to it, so that nothing depends on a
message arriving. Every order is signed once, for one board, with a rising number. A run is leased to its board: the lease is renewed by the
board's reports and returns to the queue when they stay away; a record ends a run whatever was said before. Not aware of HTTP, nor of what
is in an artifact. Times are seconds of the clock that is passed in.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from joulemark.errors import BadInput, Conflict, NotFound
from joulemark.plain_text import printable
from joulemark.protocol import Holding, Orders, Report, ReportAnswer, TargetState
from joulemark.signing import SigningKey
from joulemark.statements import FetchOrder, RunOrder, read_envelope, write_envelope
from joulemark.wire import Manifest, Problem, RunSpec, RunState, content_id
from joulemark_host.fleet_tables import DEVICES, GROUPS, HOLDINGS, RELEASES, RUNS
from joulemark_host.tables import RECORDS, open_database, transaction

LEASE_S = 900.0
ORDER_LIFE_S = 30 * 86_400.0
PENDING_TIMEOUT_S = 7 * 86_400.0
"""A transfer that has made no progress for so long is given up: every state has its end."""
OPEN = ("queued", "leased", "cancelling")
ENDED = ("done", "failed", "cancelled", "interrupted")
RunStatus = Literal["queued", "leased", "cancelling", "done", "failed", "cancelled", "interrupted"]


@dataclass(frozen=True)
class Target:
    """One artifact on one board."""

    device_id: str
    device: str
    artifact_id: str
    state: TargetState
    received_bytes: int
    size_bytes: int
    problem: Problem | None
    changed_at: float

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return dict(vars(self)) | {"problem": self.problem.model_dump() if self.problem is not None else None}


@dataclass(frozen=True)
class QueuedRun:
    """One run in a board's queue. `status` is the record's as soon as there is one."""

    run_id: str
    sweep: str | None
    device_id: str
    device: str
    task: str
    spec: RunSpec
    status: RunStatus
    phase: str | None
    items_done: int
    items_total: int
    leases: int
    problem: Problem | None
    queued_at: float
    changed_at: float

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        values = dict(vars(self))
        return values | {
            "spec": self.spec.model_dump(mode="json"),
            "problem": self.problem.model_dump() if self.problem is not None else None,
        }


class Dispatch:
    """See the module. Safe to use from several threads and processes."""

    def __init__(
        self, url: str, key: SigningKey, clock: Callable[[], float] = time.time, lease_s: float = LEASE_S
    ) -> None:
        self._engine = open_database(url)
        self._key = key
        self._clock = clock
        self._lease_s = lease_s

    def close(self) -> None:
        """Gives the connections back."""
        self._engine.dispose()

    # --- what operators want ------------------------------------------------------------------------------------------
    def devices(self, words: str) -> dict[str, str]:
        """Names by id of the approved boards that `words` means: names, ids or groups, separated by commas, or `all`. Raises NotFound."""
        with transaction(self._engine) as connection:
            approved = sa.select(DEVICES.c.device_id, DEVICES.c.name).where(DEVICES.c.admission == "approved")
            known = {row.device_id: row.name for row in connection.execute(approved)}
            groups: dict[str, list[str]] = {}
            for row in connection.execute(sa.select(GROUPS)):
                groups.setdefault(row.name, []).append(row.device_id)
        if words == "all":
            if not known:
                raise NotFound("no board is approved here", "`joulemark devices` lists them")
            return known
        chosen: dict[str, str] = {}
        for word in filter(None, (part.strip() for part in words.split(","))):
            found = [key for key, name in known.items() if word in (key, name)] or [
                key for key in groups.get(word, ()) if key in known
            ]
            if not found:
                raise NotFound(f"there is no approved board or group {word[:80]!r}", "`joulemark devices` lists them")
            chosen |= {key: known[key] for key in found}
        return chosen

    def group(self, name: str, device_ids: Collection[str], member: bool = True) -> None:
        """Puts boards into a group, or takes them out."""
        with transaction(self._engine, write=True) as connection:
            mine = sa.and_(GROUPS.c.name == name, GROUPS.c.device_id.in_(device_ids))
            connection.execute(sa.delete(GROUPS).where(mine))
            if member:
                rows = [{"name": name, "device_id": device_id} for device_id in device_ids]
                connection.execute(sa.insert(GROUPS), rows)

    def push(self, device_id: str, manifest: Manifest, downgrade: bool = False) -> bool:
        """Wants an artifact on a board; whether that is news. What the board has already stays as it is."""
        with transaction(self._engine, write=True) as connection:
            return self._want(connection, _device(connection, device_id), manifest, downgrade)

    def fetch_order(self, device_id: str, artifact_id: str) -> bytes:
        """The signed order for an artifact that was pushed to this board. Raises NotFound."""
        with transaction(self._engine) as connection:
            row = connection.execute(_holding(device_id, artifact_id)).mappings().first()
        if row is None:
            raise NotFound(f"artifact {artifact_id[:12]}… was never issued to this board", "`joulemark push` it")
        return row["envelope"].encode()

    def issued(self, device_id: str, artifact_id: str) -> bool:
        """Whether this host ever gave the artifact to the board: results about anything else are not believed."""
        with transaction(self._engine) as connection:
            return connection.execute(_holding(device_id, artifact_id)).first() is not None

    def forget(self, device_id: str, artifact_id: str) -> None:
        """Wants an artifact off a board. Raises NotFound, Conflict while a run there needs it."""
        with transaction(self._engine, write=True) as connection:
            device = _device(connection, device_id)
            if connection.execute(_holding(device_id, artifact_id)).first() is None:
                raise NotFound(
                    f"artifact {artifact_id[:12]}… is not on {device['name']!r}", "`joulemark artifacts` lists them"
                )
            open_runs = sa.select(RUNS.c.run_id, RUNS.c.spec).where(
                RUNS.c.device_id == device_id, RUNS.c.status.in_(OPEN)
            )
            needed = [row.run_id for row in connection.execute(open_runs) if row.spec["artifact_id"] == artifact_id]
            if needed:
                raise Conflict(f"run {needed[0]} needs this artifact", "`joulemark runs cancel` it first")
            self._set_holding(connection, device_id, artifact_id, state="forgotten", received_bytes=0, problem=None)
            self._raise_revision(connection, device_id)

    def queue(
        self, device_id: str, spec: RunSpec, manifest: Manifest, task: str = "", sweep: str | None = None
    ) -> None:
        """Puts a run at the end of a board's queue; its artifact is pushed where that was not done. Queueing it again changes
        nothing. `task` is the pack's, for people.

        Raises Conflict when the run id is taken by another run.
        """
        if content_id(manifest) != spec.artifact_id:
            raise BadInput(f"the manifest is not that of artifact {spec.artifact_id[:12]}…", "publish it again")
        plain = spec.model_dump(mode="json")
        with transaction(self._engine, write=True) as connection:
            device = _device(connection, device_id)
            known = connection.execute(sa.select(RUNS).where(RUNS.c.run_id == spec.run_id)).mappings().first()
            if known is not None:
                if known["spec"] != plain or known["device_id"] != device_id:
                    raise Conflict(f"run {spec.run_id} exists with another spec", "choose a new run id")
                return
            # Comparing an older artifact with a newer one is what runs are for.
            self._want(connection, device, manifest, downgrade=True)
            now = self._clock()
            row = {
                "run_id": spec.run_id,
                "sweep": sweep,
                "device_id": device_id,
                "task": task,
                "spec": plain,
                "status": "queued",
            }
            row |= {"leases": 0, "items_done": 0, "items_total": spec.limit or 0, "queued_at": now, "changed_at": now}
            connection.execute(sa.insert(RUNS).values(**row))
            self._raise_revision(connection, device_id)

    def run_order(self, run_id: str) -> bytes:
        """The signed order for a queued run, leased to its board at once: for whoever brings it there. Raises NotFound, Conflict."""
        with transaction(self._engine, write=True) as connection:
            row = connection.execute(sa.select(RUNS).where(RUNS.c.run_id == run_id)).mappings().first()
            if row is None:
                raise NotFound(f"there is no run {run_id!r} in a queue", "`joulemark runs` lists them")
            if row["status"] not in ("queued", "leased"):
                raise Conflict(f"run {run_id} is {row['status']}", "queue another one")
            envelope = row["envelope"] if row["status"] == "leased" else self._lease(connection, row)
        return str(envelope).encode()

    def ordered(self, run_id: str) -> bytes:
        """The order under which a run was made. Raises NotFound."""
        with transaction(self._engine) as connection:
            envelope = connection.execute(sa.select(RUNS.c.envelope).where(RUNS.c.run_id == run_id)).scalar()
        if envelope is None:
            raise NotFound(f"run {run_id!r} was not ordered here", "`joulemark runs --all` lists those that were")
        return str(envelope).encode()

    def cancel(self, run_ids: Collection[str]) -> int:
        """Ends runs that have not ended; those that a board holds end when it hears of it. Returns how many that concerns."""
        with transaction(self._engine, write=True) as connection:
            rows = connection.execute(
                sa.select(RUNS).where(RUNS.c.run_id.in_(run_ids), RUNS.c.status.in_(("queued", "leased")))
            ).mappings()
            found = list(rows)
            for row in found:
                # One that was leased before may be in the board's own journal, also when the lease has returned.
                status = "cancelling" if row["leases"] else "cancelled"
                self._set_run(connection, row["run_id"], status=status)
                self._raise_revision(connection, row["device_id"])
        return len(found)

    # --- what boards ask and say --------------------------------------------------------------------------------------
    def revision(self, device_id: str) -> int:
        """A number that rises whenever there is something new for this board."""
        with transaction(self._engine) as connection:
            return _device(connection, device_id)["revision"]

    def revisions(self) -> dict[str, int]:
        """The same for all boards: one query for everybody who waits."""
        with transaction(self._engine) as connection:
            return {
                row.device_id: row.revision
                for row in connection.execute(sa.select(DEVICES.c.device_id, DEVICES.c.revision))
            }

    def orders(self, device_id: str) -> Orders:
        """What this board is to do now. Leases it the next run when it holds none."""
        self.expire()
        with transaction(self._engine, write=True) as connection:
            device = _device(connection, device_id)
            mine = sa.select(HOLDINGS).where(HOLDINGS.c.device_id == device_id).order_by(HOLDINGS.c.sequence)
            holdings = connection.execute(mine).mappings().all()
            cancelling = sa.select(RUNS.c.run_id).where(RUNS.c.device_id == device_id, RUNS.c.status == "cancelling")
            return Orders(
                revision=device["revision"],
                host_time=self._clock(),
                fetch=tuple(read_envelope(row["envelope"]) for row in holdings if row["state"] == "pending"),
                run=self._leased(connection, device),
                cancel=tuple(connection.execute(cancelling).scalars()),
                forget=tuple(row["artifact_id"] for row in holdings if row["state"] == "forgotten"),
            )

    def report(self, device_id: str, report: Report) -> ReportAnswer:
        """Takes in what has changed on a board; renews the lease of the run that it is at."""
        with transaction(self._engine, write=True) as connection:
            _device(connection, device_id)
            for holding in report.holdings:
                self._take_holding(connection, device_id, holding)
            for state in report.runs:
                self._take_run(connection, device_id, state)
            # Also what was ended here while the board was away, and which it still has in its own journal.
            going_on = [state.run_id for state in report.runs if state.status not in ENDED]
            ended = sa.and_(RUNS.c.run_id.in_(going_on), RUNS.c.status == "cancelled")
            cancelled = sa.select(RUNS.c.run_id).where(
                RUNS.c.device_id == device_id, sa.or_(RUNS.c.status == "cancelling", ended)
            )
            return ReportAnswer(cancel=tuple(connection.execute(cancelled).scalars()), host_time=self._clock())

    def settle(self, run_id: str) -> None:
        """A record of this run has arrived: its board may have the next one."""
        with transaction(self._engine, write=True) as connection:
            row = connection.execute(sa.select(RUNS).where(RUNS.c.run_id == run_id)).mappings().first()
            status = connection.execute(sa.select(RECORDS.c.status).where(RECORDS.c.run_id == run_id)).scalar()
            if row is not None and status is not None and row["status"] not in ENDED:
                self._set_run(connection, run_id, status=status, lease_until=None)
                self._raise_revision(connection, row["device_id"])

    def expire(self) -> list[str]:
        """Returns the runs of boards that vanished to their queues, and gives up transfers that stand still; the runs' ids."""
        now = self._clock()
        late = sa.and_(RUNS.c.status == "leased", RUNS.c.lease_until < now)
        unheard = sa.and_(RUNS.c.status == "cancelling", RUNS.c.changed_at < now - self._lease_s)
        still = sa.and_(HOLDINGS.c.state == "pending", HOLDINGS.c.changed_at < now - PENDING_TIMEOUT_S)
        any_of = sa.or_(*(sa.exists().where(condition) for condition in (late, unheard, still)))
        with transaction(self._engine) as connection:
            if connection.execute(sa.select(sa.literal(1)).where(any_of)).first() is None:
                return []
        lost = Problem(
            code="vanished", message="the board has not been heard of", hint="look at its power and network"
        ).model_dump()
        with transaction(self._engine, write=True) as connection:
            rows = connection.execute(sa.select(RUNS.c.run_id, RUNS.c.device_id).where(late)).all()
            for run_id, device_id in rows:
                self._set_run(connection, run_id, status="queued", lease_until=None, envelope=None, problem=lost)
                self._raise_revision(connection, device_id)
            connection.execute(sa.update(RUNS).where(unheard).values(status="cancelled", problem=lost))
            connection.execute(sa.update(HOLDINGS).where(still).values(state="error", problem=lost, changed_at=now))
        return [run_id for run_id, _ in rows]

    # --- what people look at ------------------------------------------------------------------------------------------
    def targets(self, device_id: str | None = None, artifact_id: str | None = None) -> list[Target]:
        """Artifacts on boards, by board and age. With `artifact_id` every board is there, also those that never heard of it."""
        query = sa.select(HOLDINGS, DEVICES.c.name).join(DEVICES).where(HOLDINGS.c.state != "forgotten")
        if device_id is not None:
            query = query.where(HOLDINGS.c.device_id == device_id)
        if artifact_id is not None:
            query = query.where(HOLDINGS.c.artifact_id == artifact_id)
        with transaction(self._engine) as connection:
            rows = connection.execute(query.order_by(DEVICES.c.name, HOLDINGS.c.sequence)).mappings().all()
            others = (
                connection.execute(sa.select(DEVICES).order_by(DEVICES.c.name)).mappings().all() if artifact_id else ()
            )
        found = [_target(row) for row in rows]
        asked = {target.device_id for target in found}
        for device in others:
            if device["device_id"] not in asked and (device_id is None or device["device_id"] == device_id):
                state: TargetState = "registered" if device["admission"] == "approved" else "unknown"
                found.append(
                    Target(
                        device["device_id"], device["name"], str(artifact_id), state, 0, 0, None, device["enrolled_at"]
                    )
                )
        return found

    def runs(
        self, sweep: str | None = None, run_ids: Collection[str] | None = None, open_only: bool = False
    ) -> list[QueuedRun]:
        """Runs in the order in which they were queued."""
        self.expire()
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
        with transaction(self._engine) as connection:
            return [_queued(row) for row in connection.execute(query.order_by(RUNS.c.number)).mappings()]

    # --- inside -------------------------------------------------------------------------------------------------------
    def _want(self, connection: Connection, device: RowMapping, manifest: Manifest, downgrade: bool) -> bool:
        """Orders an artifact for a board unless it has it, or has an order for it that holds; whether it did."""
        artifact_id, now = content_id(manifest), self._clock()
        known = connection.execute(_holding(device["device_id"], artifact_id)).mappings().first()
        if known is not None and (
            known["state"] == "in_sync" or (known["state"] == "pending" and known["expires_at"] > now)
        ):
            return False
        order = FetchOrder(
            device_id=device["device_id"],
            sequence=self._next_order(connection, device["device_id"]),
            issued_at=now,
            expires_at=now + ORDER_LIFE_S,
            manifest=manifest,
            release=_release(connection, artifact_id, manifest),
            downgrade=downgrade,
        )
        values = {
            "sequence": order.sequence,
            "envelope": write_envelope(self._key.sign(order)).decode(),
            "expires_at": order.expires_at,
            "state": "pending",
            "size_bytes": sum(entry.size_bytes for entry in manifest.files),
            "received_bytes": 0,
            "problem": None,
            "changed_at": now,
        }
        connection.execute(sa.delete(HOLDINGS).where(*_same_holding(device["device_id"], artifact_id)))
        connection.execute(sa.insert(HOLDINGS).values(device_id=device["device_id"], artifact_id=artifact_id, **values))
        self._raise_revision(connection, device["device_id"])
        return True

    def _leased(self, connection: Connection, device: RowMapping) -> Any:
        """The envelope of the run that this board holds; the next one of its queue when it holds none."""
        device_id = device["device_id"]
        mine = sa.select(RUNS).where(RUNS.c.device_id == device_id).order_by(RUNS.c.number)
        held = connection.execute(mine.where(RUNS.c.status.in_(("leased", "cancelling")))).mappings().first()
        if held is not None and held["status"] == "cancelling":
            return None
        row = held or connection.execute(mine.where(RUNS.c.status == "queued")).mappings().first()
        if row is None:
            return None
        return read_envelope(row["envelope"] if held is not None else self._lease(connection, row))

    def _lease(self, connection: Connection, row: RowMapping) -> str:
        """Signs the order for a run and gives its board the lease; the envelope."""
        now = self._clock()
        order = RunOrder(
            device_id=row["device_id"],
            sequence=self._next_order(connection, row["device_id"]),
            issued_at=now,
            expires_at=now + ORDER_LIFE_S,
            spec=RunSpec.model_validate_json(json.dumps(row["spec"])),
        )
        envelope = write_envelope(self._key.sign(order)).decode()
        lease = {"status": "leased", "envelope": envelope, "lease_until": now + self._lease_s}
        self._set_run(connection, row["run_id"], leases=row["leases"] + 1, **lease)
        return envelope

    def _take_holding(self, connection: Connection, device_id: str, holding: Holding) -> None:
        row = connection.execute(_holding(device_id, holding.artifact_id)).mappings().first()
        if row is None or row["state"] == "forgotten":
            return
        problem = _clean(holding.problem)
        self._set_holding(
            connection, device_id, holding.artifact_id,
            state=holding.state, received_bytes=min(holding.received_bytes, row["size_bytes"]), problem=problem,
        )  # fmt: skip

    def _take_run(self, connection: Connection, device_id: str, state: RunState) -> None:
        row = connection.execute(sa.select(RUNS).where(RUNS.c.run_id == state.run_id)).mappings().first()
        if row is None or row["device_id"] != device_id:
            return
        values: dict[str, Any] = {"items_done": state.items_done, "items_total": state.items_total}
        if row["status"] in ENDED:
            if state.status in ENDED:  # the record was faster than this report
                self._set_run(connection, state.run_id, **values)
            return
        values["phase"] = state.phase
        if state.status in ENDED:
            values |= {"status": state.status, "lease_until": None, "problem": _clean(state.problem)}
            self._raise_revision(connection, device_id)
        elif row["status"] != "cancelling":
            values |= {"status": "leased", "lease_until": self._clock() + self._lease_s, "problem": None}
        self._set_run(connection, state.run_id, **values)

    def _next_order(self, connection: Connection, device_id: str) -> int:
        mine = DEVICES.c.device_id == device_id
        connection.execute(sa.update(DEVICES).where(mine).values(last_order=DEVICES.c.last_order + 1))
        return int(connection.execute(sa.select(DEVICES.c.last_order).where(mine)).scalar_one())

    def _raise_revision(self, connection: Connection, device_id: str) -> None:
        mine = DEVICES.c.device_id == device_id
        connection.execute(sa.update(DEVICES).where(mine).values(revision=DEVICES.c.revision + 1))

    def _set_run(self, connection: Connection, run_id: str, **values: Any) -> None:
        connection.execute(sa.update(RUNS).where(RUNS.c.run_id == run_id).values(changed_at=self._clock(), **values))

    def _set_holding(self, connection: Connection, device_id: str, artifact_id: str, **values: Any) -> None:
        same = _same_holding(device_id, artifact_id)
        connection.execute(sa.update(HOLDINGS).where(*same).values(changed_at=self._clock(), **values))


def new_run_id(task: str) -> str:
    """A run id that nobody else makes."""
    return f"{task}-{uuid.uuid4().hex[:12]}"


def _device(connection: Connection, device_id: str) -> RowMapping:
    row = connection.execute(sa.select(DEVICES).where(DEVICES.c.device_id == device_id)).mappings().first()
    if row is None:
        raise NotFound(f"there is no board {device_id!r}", "`joulemark devices` lists them")
    return row


def _same_holding(device_id: str, artifact_id: str) -> tuple[Any, Any]:
    return HOLDINGS.c.device_id == device_id, HOLDINGS.c.artifact_id == artifact_id


def _holding(device_id: str, artifact_id: str) -> Any:
    return sa.select(HOLDINGS).where(*_same_holding(device_id, artifact_id))


def _release(connection: Connection, artifact_id: str, manifest: Manifest) -> int:
    """The artifact's number among those of the same name, format and quantization, given at its first push."""
    known = connection.execute(sa.select(RELEASES.c.number).where(RELEASES.c.artifact_id == artifact_id)).scalar()
    if known is not None:
        return int(known)
    family = f"{manifest.name}:{manifest.quantization}:{manifest.format}"
    last = connection.execute(sa.select(sa.func.max(RELEASES.c.number)).where(RELEASES.c.family == family)).scalar()
    number = int(last or 0) + 1
    connection.execute(sa.insert(RELEASES).values(family=family, number=number, artifact_id=artifact_id))
    return number


def _clean(problem: Problem | None) -> dict[str, Any] | None:
    if problem is None:
        return None
    return problem.model_copy(
        update={"message": printable(problem.message)[:2000], "hint": printable(problem.hint)[:1000]}
    ).model_dump()


def _target(row: RowMapping) -> Target:
    return Target(
        device_id=row["device_id"],
        device=row["name"],
        artifact_id=row["artifact_id"],
        state=row["state"],
        received_bytes=row["received_bytes"],
        size_bytes=row["size_bytes"],
        problem=Problem(**row["problem"]) if row["problem"] else None,
        changed_at=row["changed_at"],
    )


def _queued(row: RowMapping) -> QueuedRun:
    return QueuedRun(
        run_id=row["run_id"],
        sweep=row["sweep"],
        device_id=row["device_id"],
        device=row["name"],
        task=row["task"],
        spec=RunSpec.model_validate_json(json.dumps(row["spec"])),
        status=row["recorded"] or row["status"],
        phase=row["phase"] if row["recorded"] is None else None,
        items_done=row["items_done"],
        items_total=row["items_total"],
        leases=row["leases"],
        problem=Problem(**row["problem"]) if row["problem"] else None,
        queued_at=row["queued_at"],
        changed_at=row["changed_at"],
    )


def progress(targets: Sequence[Target]) -> tuple[int, int]:
    """Bytes received and bytes in all."""
    return sum(t.received_bytes for t in targets), sum(t.size_bytes for t in targets)
