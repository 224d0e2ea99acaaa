"""One-time keys and credentials in the host's database: made, used up, replaced, ended.

Works on a connection that somebody else opened. Secrets are stored as digests and compared in constant time, also where there is no such
row, so that an id that exists takes no longer than one that does not. Not aware of boards. Times are seconds of the host's clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from joulemark import credentials
from joulemark.credentials import Credential, EnrolmentKey
from joulemark.errors import NotAuthenticated
from joulemark_host.fleet_tables import CREDENTIALS, ENROLMENT_KEYS

Role = Literal["device", "operator", "viewer"]
_NO_DIGEST = "0" * 64


class SpentKey(Exception):
    """A one-time key with the right secret, used already or too old: somebody has it who should not, or came late."""


@dataclass(frozen=True)
class Person:
    """Somebody with a credential that is valid."""

    name: str
    role: Role
    issued_at: float


def refused() -> NotAuthenticated:
    """The one answer to everybody who is not known."""
    return NotAuthenticated(
        "the credential is missing, wrong, expired or revoked",
        "enrol again: `joulemark host token` on the host prints a key",
    )


# --- one-time keys ----------------------------------------------------------------------------------------------------
def add_key(connection: Connection, key: EnrolmentKey, role: Role, approved: bool, now: float, life_s: float) -> None:
    """Stores a new key."""
    row = {"id": key.id, "digest": credentials.digest(key.secret), "role": role, "approved": approved}
    connection.execute(sa.insert(ENROLMENT_KEYS).values(issued_at=now, expires_at=now + life_s, **row))


def usable_key(
    connection: Connection, key_id: str, secret: str, kind: Literal["device", "person"], by: str, now: float
) -> RowMapping:
    """The key's row. A board may show its key again while it is valid. Raises NotAuthenticated, SpentKey."""
    row = connection.execute(sa.select(ENROLMENT_KEYS).where(ENROLMENT_KEYS.c.id == key_id)).mappings().first()
    right = credentials.matches(secret, row["digest"] if row is not None else _NO_DIGEST)
    if row is None or not right or (row["role"] == "device") != (kind == "device"):
        raise refused()
    repeated = kind == "device" and row["used_by"] == by
    if now >= row["expires_at"] or (row["used_at"] is not None and not repeated):
        raise SpentKey
    return row


def burn(connection: Connection, key: RowMapping, by: str, now: float) -> None:
    """Uses a key up. Raises NotAuthenticated when another was faster."""
    unused = sa.or_(ENROLMENT_KEYS.c.used_at.is_(None), ENROLMENT_KEYS.c.used_by == by)
    used = sa.update(ENROLMENT_KEYS).where(ENROLMENT_KEYS.c.id == key["id"], unused)
    if connection.execute(used.values(used_at=key["used_at"] or now, used_by=by)).rowcount != 1:
        raise refused()


# --- credentials ------------------------------------------------------------------------------------------------------
def new_credential(connection: Connection, role: Role, subject: str, now: float) -> Credential:
    """A credential for somebody; the one that they had in this role ends."""
    new = Credential(credentials.new_id(), credentials.new_secret())
    mine = sa.and_(CREDENTIALS.c.subject == subject, CREDENTIALS.c.role == role, CREDENTIALS.c.revoked_at.is_(None))
    connection.execute(sa.update(CREDENTIALS).where(mine).values(revoked_at=now))
    row = {"id": new.id, "digest": credentials.digest(new.secret), "role": role, "subject": subject}
    connection.execute(sa.insert(CREDENTIALS).values(issued_at=now, **row))
    return new


def holder(connection: Connection, credential: Credential) -> tuple[Role, str] | None:
    """Role and subject of whoever shows this credential; None when nobody does, or no more."""
    query = sa.select(CREDENTIALS).where(CREDENTIALS.c.id == credential.id)
    row = connection.execute(query).mappings().first()
    right = credentials.matches(credential.secret, row["digest"] if row is not None else _NO_DIGEST)
    return (row["role"], row["subject"]) if row is not None and right and row["revoked_at"] is None else None


def end_device(connection: Connection, device_id: str, now: float) -> None:
    """Ends a board's credentials."""
    mine = sa.and_(CREDENTIALS.c.subject == device_id, CREDENTIALS.c.role == "device")
    connection.execute(sa.update(CREDENTIALS).where(mine).values(revoked_at=now))


def people(connection: Connection, name: str | None = None) -> list[Person]:
    """People whose credentials are valid (or only the one called `name`), by name."""
    query = sa.select(CREDENTIALS).where(_valid_person(name)).order_by(CREDENTIALS.c.subject, CREDENTIALS.c.issued_at)
    return [Person(row.subject, row.role, row.issued_at) for row in connection.execute(query)]


def end_person(connection: Connection, name: str, now: float) -> bool:
    """Ends a person's credentials; whether there were any."""
    return connection.execute(sa.update(CREDENTIALS).where(_valid_person(name)).values(revoked_at=now)).rowcount > 0


def _valid_person(name: str | None) -> Any:
    named = CREDENTIALS.c.subject == name if name is not None else sa.true()
    return sa.and_(CREDENTIALS.c.role != "device", CREDENTIALS.c.revoked_at.is_(None), named)
