"""Signing what boards are told: each order once, for one board, with a number that rises.

Works on a connection that somebody else opened, so that an order and what it is about are stored together or not at all. Not aware of
queues. Times are seconds of the clock that is passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from joulemark.errors import NotFound
from joulemark.signing import SigningKey
from joulemark.statements import FetchOrder, Order, RunOrder, write_envelope
from joulemark.wire import Manifest, RunSpec, content_id
from joulemark_host.fleet_tables import DEVICES, RELEASES

ORDER_LIFE_S = 30 * 86_400.0
Signed = TypeVar("Signed", bound=Order)


class Issuer:
    """See the module."""

    def __init__(self, key: SigningKey, clock: Callable[[], float]) -> None:
        self._key = key
        self._clock = clock

    def fetch(
        self, connection: Connection, device_id: str, manifest: Manifest, downgrade: bool
    ) -> tuple[FetchOrder, str]:
        """An order to hold an artifact, and its envelope."""
        order = FetchOrder(
            device_id=device_id,
            sequence=_next_number(connection, device_id),
            issued_at=self._clock(),
            expires_at=self._clock() + ORDER_LIFE_S,
            manifest=manifest,
            release=_release(connection, manifest),
            downgrade=downgrade,
        )
        return order, self._envelope(order)

    def run(self, connection: Connection, device_id: str, spec: RunSpec) -> tuple[RunOrder, str]:
        """An order to make a run, and its envelope."""
        order = RunOrder(
            device_id=device_id,
            sequence=_next_number(connection, device_id),
            issued_at=self._clock(),
            expires_at=self._clock() + ORDER_LIFE_S,
            spec=spec,
        )
        return order, self._envelope(order)

    def _envelope(self, order: Order) -> str:
        return write_envelope(self._key.sign(order)).decode()


def device_row(connection: Connection, device_id: str) -> RowMapping:
    """A board's row. Raises NotFound."""
    row = connection.execute(sa.select(DEVICES).where(DEVICES.c.device_id == device_id)).mappings().first()
    if row is None:
        raise NotFound(f"there is no board {device_id!r}", "`joulemark devices` lists them")
    return row


def raise_revision(connection: Connection, device_id: str) -> None:
    """There is something new for this board: who waits for it is woken."""
    mine = DEVICES.c.device_id == device_id
    connection.execute(sa.update(DEVICES).where(mine).values(revision=DEVICES.c.revision + 1))


def count_from(connection: Connection, device_id: str, accepted: int) -> None:
    """The board has accepted orders up to this number (this host may have been restored from a copy): the next ones are higher."""
    behind = sa.and_(DEVICES.c.device_id == device_id, DEVICES.c.last_order < accepted)
    connection.execute(sa.update(DEVICES).where(behind).values(last_order=accepted))


def _next_number(connection: Connection, device_id: str) -> int:
    mine = DEVICES.c.device_id == device_id
    connection.execute(sa.update(DEVICES).where(mine).values(last_order=DEVICES.c.last_order + 1))
    return int(connection.execute(sa.select(DEVICES.c.last_order).where(mine)).scalar_one())


def _release(connection: Connection, manifest: Manifest) -> int:
    """The artifact's number among those of the same name, format and quantization, given at its first push."""
    artifact_id = content_id(manifest)
    known = connection.execute(sa.select(RELEASES.c.number).where(RELEASES.c.artifact_id == artifact_id)).scalar()
    if known is not None:
        return int(known)
    family = f"{manifest.name}:{manifest.quantization}:{manifest.format}"
    last = connection.execute(sa.select(sa.func.max(RELEASES.c.number)).where(RELEASES.c.family == family)).scalar()
    number = int(last or 0) + 1
    connection.execute(sa.insert(RELEASES).values(family=family, number=number, artifact_id=artifact_id))
    return number
