"""Artifacts on boards: what each is to hold, and how far it is.

Works on a connection that somebody else opened. A row is the order that stands for one artifact on one board; it stays when the artifact is
forgotten, because results about it may still arrive. Of runs it knows only whether one needs an artifact. Times are seconds of the clock
that is passed in, sizes bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from joulemark.plain_text import printable_problem
from joulemark.protocol import Holding, Refusal, TargetState
from joulemark.statements import Envelope, FetchOrder, read_envelope
from joulemark.wire import Manifest, Problem, content_id
from joulemark_host import run_queue
from joulemark_host.fleet_tables import DEVICES, HOLDINGS
from joulemark_host.issuing import Issuer, device_row, raise_revision

PENDING_TIMEOUT_S = 7 * 86_400.0
"""A transfer that has made no progress for so long is given up: every state has its end."""


@dataclass(frozen=True)
class Target:
    """One artifact on one board. Bytes are None where nothing was asked of the board."""

    device_id: str
    device: str
    artifact_id: str
    state: TargetState
    received_bytes: int | None
    size_bytes: int | None
    problem: Problem | None
    changed_at: float

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return dict(vars(self)) | {"problem": self.problem.model_dump() if self.problem is not None else None}


class Holdings:
    """See the module."""

    def __init__(self, issuer: Issuer, clock: Callable[[], float]) -> None:
        self._issuer = issuer
        self._clock = clock

    def want(self, connection: Connection, device_id: str, manifest: Manifest, downgrade: bool) -> bool:
        """Orders an artifact for a board unless it has it, or has an order for it that holds; whether it did. Raises NotFound."""
        device_row(connection, device_id)
        known = row_of(connection, device_id, content_id(manifest))
        holds = known is not None and (known["state"] == "in_sync" or self._stands(known))
        if not holds:
            self._order(connection, device_id, manifest, downgrade)
        return not holds

    def forget(self, connection: Connection, device_id: str, artifact_id: str) -> None:
        """Wants an artifact off a board."""
        self._set(connection, device_id, artifact_id, state="forgotten", received_bytes=0, problem=None)
        raise_revision(connection, device_id)

    def to_sign(self, connection: Connection, device_id: str) -> bool:
        """Whether a board's orders have to be signed anew before it gets them."""
        return any(row["state"] == "pending" and not self._stands(row) for row in _rows(connection, device_id))

    def orders(
        self, connection: Connection, device_id: str, sign: bool
    ) -> tuple[tuple[Envelope, ...], tuple[str, ...]]:
        """Orders that the board has not reported as done, with `sign` signed anew where they expired; artifacts that it is to remove."""
        for row in _rows(connection, device_id) if sign else ():
            if row["state"] == "pending" and not self._stands(row):
                self._sign_anew(connection, row)
        rows = _rows(connection, device_id)
        wanted = tuple(read_envelope(row["envelope"]) for row in rows if row["state"] == "pending")
        return wanted, tuple(row["artifact_id"] for row in rows if row["state"] == "forgotten")

    def held(self, connection: Connection, device_id: str, artifact_ids: Collection[str]) -> list[str]:
        """The envelopes of these artifacts that the board is known to have."""
        rows = [row for row in _rows(connection, device_id) if row["artifact_id"] in artifact_ids]
        return [row["envelope"] for row in rows if row["state"] == "in_sync"]

    def take(self, connection: Connection, device_id: str, holding: Holding) -> None:
        """What a board says about one artifact; what was never asked of it, or is to be forgotten, is not listened to."""
        row = row_of(connection, device_id, holding.artifact_id)
        if row is None or row["state"] == "forgotten":
            return
        if holding.state == "evicted":
            self.gone(connection, row)
            return
        problem = printable_problem(holding.problem).model_dump() if holding.problem is not None else None
        received = min(holding.received_bytes, row["size_bytes"])
        self._set(
            connection, device_id, row["artifact_id"], state=holding.state, received_bytes=received, problem=problem
        )

    def show(self, connection: Connection, device_id: str, artifact_id: str) -> None:
        """A record about an artifact shows that its board has it: boards without a network say it in no other way."""
        row = row_of(connection, device_id, artifact_id)
        if row is not None and row["state"] == "pending":
            received = row["size_bytes"]
            self._set(connection, device_id, artifact_id, state="in_sync", received_bytes=received, problem=None)

    def gone(self, connection: Connection, row: RowMapping) -> None:
        """An artifact is no more on its board: it is ordered anew at once if a run there needs it, else with the next run or push."""
        if run_queue.needing(connection, row["device_id"], row["artifact_id"]):
            self._sign_anew(connection, row)
        else:
            self._set(
                connection, row["device_id"], row["artifact_id"], state="registered", received_bytes=0, problem=None
            )

    def differs(self, connection: Connection, device_id: str, holds: Collection[str]) -> bool:
        """Whether something is believed to be on a board that does not have it."""
        rows = _rows(connection, device_id)
        return any(row["state"] == "in_sync" and row["artifact_id"] not in holds for row in rows)

    def compare(self, connection: Connection, device_id: str, holds: Collection[str]) -> None:
        """A board has begun anew and says what it has: what was believed to be there and is not, is gone."""
        for row in _rows(connection, device_id):
            if row["state"] == "in_sync" and row["artifact_id"] not in holds:
                self.gone(connection, row)

    def take_refusal(self, connection: Connection, device_id: str, refusal: Refusal) -> bool:
        """A board did not accept the order with this number: a stale one is signed anew, another is an error. Whether it is one of ours."""
        mine = sa.and_(HOLDINGS.c.device_id == device_id, HOLDINGS.c.sequence == refusal.sequence)
        row = connection.execute(sa.select(HOLDINGS).where(mine)).mappings().first()
        if row is None or row["state"] != "pending":
            return False
        if refusal.stale:
            self._sign_anew(connection, row)
        else:
            problem = printable_problem(refusal.problem).model_dump()
            self._set(connection, device_id, row["artifact_id"], state="error", problem=problem)
        return True

    def give_up(self, connection: Connection, problem: dict[str, Any]) -> None:
        """Ends transfers that stand still."""
        values = {"state": "error", "problem": problem, "changed_at": self._clock()}
        connection.execute(sa.update(HOLDINGS).where(self.still()).values(**values))

    def still(self) -> Any:
        """The condition for a transfer that stands still."""
        return sa.and_(HOLDINGS.c.state == "pending", HOLDINGS.c.changed_at < self._clock() - PENDING_TIMEOUT_S)

    def _stands(self, row: RowMapping) -> bool:
        """Whether the board still has to follow this order, and may."""
        return row["state"] == "pending" and row["expires_at"] > self._clock()

    def _sign_anew(self, connection: Connection, row: RowMapping) -> None:
        order = _ordered(row["envelope"])
        self._order(connection, row["device_id"], order.manifest, order.downgrade)

    def _order(self, connection: Connection, device_id: str, manifest: Manifest, downgrade: bool) -> None:
        order, envelope = self._issuer.fetch(connection, device_id, manifest, downgrade)
        artifact_id = content_id(manifest)
        values = {
            "sequence": order.sequence,
            "envelope": envelope,
            "expires_at": order.expires_at,
            "state": "pending",
            "size_bytes": sum(entry.size_bytes for entry in manifest.files),
            "received_bytes": 0,
            "problem": None,
            "changed_at": self._clock(),
        }
        connection.execute(sa.delete(HOLDINGS).where(*_same(device_id, artifact_id)))
        connection.execute(sa.insert(HOLDINGS).values(device_id=device_id, artifact_id=artifact_id, **values))
        raise_revision(connection, device_id)

    def _set(self, connection: Connection, device_id: str, artifact_id: str, **values: Any) -> None:
        same = _same(device_id, artifact_id)
        connection.execute(sa.update(HOLDINGS).where(*same).values(changed_at=self._clock(), **values))


def row_of(connection: Connection, device_id: str, artifact_id: str) -> RowMapping | None:
    """The row of one artifact on one board, also a forgotten one."""
    return connection.execute(sa.select(HOLDINGS).where(*_same(device_id, artifact_id))).mappings().first()


def targets(connection: Connection, device_id: str | None, artifact_id: str | None) -> list[Target]:
    """Artifacts on boards, by board and age. With `artifact_id` every board is there, also those that never heard of it."""
    query = sa.select(HOLDINGS, DEVICES.c.name).join(DEVICES).where(HOLDINGS.c.state != "forgotten")
    devices = sa.select(DEVICES).order_by(DEVICES.c.name)
    if device_id is not None:
        query, devices = query.where(HOLDINGS.c.device_id == device_id), devices.where(DEVICES.c.device_id == device_id)
    if artifact_id is not None:
        query = query.where(HOLDINGS.c.artifact_id == artifact_id)
    found = [_target(row) for row in connection.execute(query.order_by(DEVICES.c.name, HOLDINGS.c.sequence)).mappings()]
    if artifact_id is not None:
        asked = {target.device_id for target in found}
        others = [row for row in connection.execute(devices).mappings() if row["device_id"] not in asked]
        found += [_not_asked(row, artifact_id) for row in others]
    return found


def files(connection: Connection, device_id: str) -> set[str]:
    """The digests of the files that a board may fetch: those of every artifact that it was ordered to hold and not to remove."""
    kept = [row["envelope"] for row in _rows(connection, device_id) if row["state"] != "forgotten"]
    return {entry.sha256 for envelope in kept for entry in _ordered(envelope).manifest.files}


def titles(connection: Connection) -> dict[str, str]:
    """What people call the artifacts that any board was ever to hold, by id."""
    one_each = sa.select(HOLDINGS.c.artifact_id, sa.func.max(HOLDINGS.c.envelope).label("envelope"))
    rows = connection.execute(one_each.group_by(HOLDINGS.c.artifact_id)).all()
    return {row.artifact_id: _ordered(row.envelope).manifest.title for row in rows}


def progress(shown: Sequence[Target]) -> tuple[int, int]:
    """Bytes received and bytes in all, of those that were asked for."""
    return sum(t.received_bytes or 0 for t in shown), sum(t.size_bytes or 0 for t in shown)


def _ordered(envelope: str) -> FetchOrder:
    return FetchOrder.model_validate_json(read_envelope(envelope).body())


def _rows(connection: Connection, device_id: str) -> Sequence[RowMapping]:
    mine = sa.select(HOLDINGS).where(HOLDINGS.c.device_id == device_id).order_by(HOLDINGS.c.sequence)
    return connection.execute(mine).mappings().all()


def _same(device_id: str, artifact_id: str) -> tuple[Any, Any]:
    return HOLDINGS.c.device_id == device_id, HOLDINGS.c.artifact_id == artifact_id


def _target(row: RowMapping) -> Target:
    names = ("device_id", "artifact_id", "state", "received_bytes", "size_bytes", "changed_at")
    problem = Problem(**row["problem"]) if row["problem"] else None
    return Target(device=row["name"], problem=problem, **{name: row[name] for name in names})


def _not_asked(device: RowMapping, artifact_id: str) -> Target:
    state: TargetState = "registered" if device["admission"] == "approved" else "unknown"
    return Target(
        device_id=device["device_id"],
        device=device["name"],
        artifact_id=artifact_id,
        state=state,
        received_bytes=None,
        size_bytes=None,
        problem=None,
        changed_at=device["enrolled_at"],
    )
