"""The host's book of boards and people: enrolment, sessions, and what operators decide about them; secrets are `credential_book`'s affair.

Every change is one transaction with its event, so that the book can be read later. One identity on two boards is noticed in two ways: the
hardware's digest differs from the one that enrolled, or an instance of the agent speaks that a newer one had already replaced. Not aware of
HTTP. Times are seconds of the clock that is passed in.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from joulemark import credentials, signing
from joulemark.credentials import Credential, EnrolmentKey
from joulemark.errors import BadInput, Conflict, Forbidden, JoulemarkError, NotFound, TooNew, Untrusted
from joulemark.plain_text import printable
from joulemark.protocol import Admission, DeviceRow, EnrolmentRequest, SessionRequest
from joulemark.statements import EnrolmentStatement, PublicKey
from joulemark.wire import SCHEMA, DeviceFacts
from joulemark_host import credential_book
from joulemark_host.credential_book import Person, Role, SpentKey, refused
from joulemark_host.database import open_database, transaction
from joulemark_host.fleet_tables import DEVICES, EVENTS, GROUPS, SESSIONS
from joulemark_host.sightings import Sightings

KEY_LIFE_S = 24 * 3600.0
MAX_NAME = 60


@dataclass(frozen=True)
class Caller:
    """Who asks. `subject` is a device id, or a person's name."""

    role: Role
    subject: str


@dataclass(frozen=True)
class Event:
    """Something that happened to the fleet."""

    at: float
    who: str
    what: str
    about: str
    detail: str


class Registry:
    """See the module. Safe to use from several threads and processes."""

    def __init__(self, url: str, fingerprint: str, clock: Callable[[], float] = time.time) -> None:
        self._engine = open_database(url)
        self._fingerprint = fingerprint
        self._clock = clock
        self._sightings = Sightings(self._engine, clock)

    def close(self) -> None:
        """Writes down when boards were seen, and gives the connections back."""
        with contextlib.suppress(JoulemarkError):  # a database that is away now: nothing but the last seconds is lost
            self._sightings.write()
        self._engine.dispose()

    def now(self) -> float:
        """Seconds since 1970 by the host's clock."""
        return self._clock()

    # --- getting in ---------------------------------------------------------------------------------------------------
    def issue_key(self, role: Role, who: str, approved: bool = False, life_s: float = KEY_LIFE_S) -> EnrolmentKey:
        """A new one-time key, shown once. `approved`: the board that uses it needs no further word of an operator."""
        key = EnrolmentKey(credentials.new_id(), credentials.new_secret(), self._fingerprint)
        with self._change() as connection:
            credential_book.add_key(connection, key, role, approved, self._clock(), life_s)
            self._note(connection, who, "key issued", key.id, f"role {role}, {life_s / 3600:g} h")
        return key

    def enrol(self, request: EnrolmentRequest, address: str) -> tuple[DeviceRow, Credential, EnrolmentStatement]:
        """Takes a board in: its row, its credential, and what it said of itself, checked.

        Burns the one-time key. The same board may repeat its request while the key is valid, because the answer may have been lost: it
        then gets a new credential and the former one ends. Raises NotAuthenticated, Untrusted, or Forbidden for a revoked board.
        """
        said = self._proven(request)
        with self._alarms(said.key_id, said.device_id), self._change() as connection:
            now = self._clock()
            key = credential_book.usable_key(connection, said.key_id, request.secret, "device", said.device_id, now)
            name = self._keep_device(connection, said, request, address, bool(key["approved"]))
            credential_book.burn(connection, key, said.device_id, now)
            credential = credential_book.new_credential(connection, "device", said.device_id, now)
            self._note(connection, said.device_id, "enrolled", said.device_id, f"as {name!r} from {address}")
        return self.device(said.device_id), credential, said

    def enrol_person(self, key: EnrolmentKey, name: str) -> tuple[Credential, Role]:
        """A credential for a person. Raises NotAuthenticated, Conflict for a taken name."""
        with self._alarms(key.id, name), self._change() as connection:
            now = self._clock()
            row = credential_book.usable_key(connection, key.id, key.secret, "person", name, now)
            if credential_book.people(connection, name):
                raise Conflict(
                    f"somebody is known here as {name!r}", "choose another name, such as one for this browser"
                )
            credential_book.burn(connection, row, name, now)
            credential = credential_book.new_credential(connection, row["role"], name, now)
            self._note(connection, name, "signed in", name, f"as {row['role']}")
        return credential, row["role"]

    def issue_credential(self, role: Role, name: str, who: str) -> Credential:
        """A person's credential without a one-time key: for whoever sits at the host."""
        with self._change() as connection:
            credential = credential_book.new_credential(connection, role, name, self._clock())
            self._note(connection, who, "credential issued", name, f"role {role}")
        return credential

    def people(self) -> list[Person]:
        """Who may look or decide, by name."""
        with self._look() as connection:
            return credential_book.people(connection)

    def revoke_person(self, name: str, who: str) -> None:
        """Ends a person's credentials. Raises NotFound."""
        with self._change() as connection:
            if not credential_book.end_person(connection, name, self._clock()):
                raise NotFound(f"nobody is known here as {name[:80]!r}", "`joulemark host people` lists them")
            self._note(connection, who, "revoked", name, "a person's credential")

    # --- who asks -----------------------------------------------------------------------------------------------------
    def caller(self, credential: Credential) -> Caller | None:
        """Who shows this credential; None when nobody does, or no more."""
        with self._look() as connection:
            found = credential_book.holder(connection, credential)
        return Caller(*found) if found is not None else None

    def begin_session(self, device_id: str, request: SessionRequest, address: str) -> DeviceRow:
        """An agent has started. Raises Conflict (`cloned`) when its identity is in use on another board, TooNew for an agent that speaks
        a newer version."""
        if request.schema_number > SCHEMA:
            raise TooNew(
                f"the agent speaks version {request.schema_number}, this host up to {SCHEMA}",
                "update joulemark on the host; the board keeps its records until then",
            )
        with self._change() as connection:
            device = _required(connection, device_id)
            if device["hardware"] and request.hardware and device["hardware"] != request.hardware:
                self._note(
                    connection, device_id, "refused", device_id, f"the same identity on other hardware, {address}"
                )
                refusal = _cloned(f"the identity of {device['name']!r} was enrolled on another board")
            else:
                refusal = self._open_session(connection, device, request, address)
        if refusal is not None:
            raise refusal
        return self.device(device_id)

    def admit(self, device_id: str, instance_id: str, address: str) -> None:
        """Lets an approved board's request pass, or raises Forbidden (`pending_approval`), NotAuthenticated, Conflict (`cloned`)."""
        with self._look() as connection:
            device = _required(connection, device_id)
            latest = connection.execute(_latest_instance(device_id)).scalar()
        if device["admission"] == "approved" and latest != instance_id:
            self._judge_instance(device_id, instance_id)
        if device["admission"] == "revoked":
            raise refused()
        if device["admission"] == "cloned":
            raise _cloned(device["problem"] or "two boards show this identity")
        if device["admission"] == "pending":
            raise Forbidden(
                f"the board {device['name']!r} waits for an operator",
                f"on the host: joulemark devices approve {device['name']}",
                "pending_approval",
            )
        self._sightings.note(device_id, address)

    def public_key(self, device_id: str) -> PublicKey:
        """The key with which a board signs. Raises NotFound."""
        with self._look() as connection:
            return _named(connection, device_id)["public_key"]

    # --- operators ----------------------------------------------------------------------------------------------------
    def devices(self) -> list[DeviceRow]:
        """All boards by name."""
        with self._look() as connection:
            rows = connection.execute(sa.select(DEVICES).order_by(DEVICES.c.name)).mappings().all()
            groups = _groups(connection)
        return [_row(row, groups) for row in rows]

    def device(self, name_or_id: str) -> DeviceRow:
        """One board. Raises NotFound."""
        with self._look() as connection:
            return _row(_named(connection, name_or_id), _groups(connection))

    def approve(self, name_or_id: str, who: str) -> DeviceRow:
        """Lets a board take part; of a cloned identity, the board that speaks next. Raises NotFound, Conflict for a revoked one."""
        with self._change() as connection:
            device = _named(connection, name_or_id)
            if device["admission"] == "revoked":
                raise Conflict(f"{device['name']!r} was revoked", "let it enrol anew, with an empty data folder")
            forget = {"hardware": None} if device["admission"] == "cloned" else {}
            self._set(connection, device, admission="approved", problem=None, approved_at=self._clock(), **forget)
            connection.execute(sa.delete(SESSIONS).where(SESSIONS.c.device_id == device["device_id"]))
            self._note(connection, who, "approved", device["device_id"], device["name"])
        return self.device(device["device_id"])

    def rename(self, name_or_id: str, name: str, who: str) -> DeviceRow:
        """Another name. Raises NotFound, BadInput, Conflict for a taken one."""
        if _clean(name) != name or not name:
            raise BadInput(
                f"{name[:80]!r} cannot be a board's name", "use letters, digits, spaces, dots and dashes, at most 60"
            )
        with self._change() as connection:
            device = _named(connection, name_or_id)
            taken = connection.execute(sa.select(DEVICES.c.device_id).where(DEVICES.c.name == name)).scalar()
            if taken is not None and taken != device["device_id"]:
                raise Conflict(f"another board is called {name!r}", "choose another name")
            self._set(connection, device, name=name)
            self._note(connection, who, "renamed", device["device_id"], f"{device['name']!r} to {name!r}")
        return self.device(device["device_id"])

    def revoke(self, name_or_id: str, who: str) -> DeviceRow:
        """Ends a board's credential for good; its records stay. Raises NotFound."""
        with self._change() as connection:
            device = _named(connection, name_or_id)
            self._set(connection, device, admission="revoked", problem=None)
            credential_book.end_device(connection, device["device_id"], self._clock())
            self._note(connection, who, "revoked", device["device_id"], device["name"])
        return self.device(device["device_id"])

    def events(self, limit: int = 1000) -> list[Event]:
        """What happened, latest last."""
        query = sa.select(EVENTS).order_by(EVENTS.c.number.desc()).limit(limit)
        with self._look() as connection:
            rows = connection.execute(query).mappings().all()
        return [Event(row["at"], row["who"], row["what"], row["about"], row["detail"]) for row in reversed(rows)]

    # --- inside -------------------------------------------------------------------------------------------------------
    def _proven(self, request: EnrolmentRequest) -> EnrolmentStatement:
        """The request's statement, signed by the very key that it is about, for this host."""
        try:
            claimed = EnrolmentStatement.model_validate_json(request.statement.body())
        except ValueError as error:
            raise Untrusted("the enrolment is not signed", "update joulemark on the board") from error
        said = signing.opened(request.statement, EnrolmentStatement, [claimed.public_key])
        if said.host_fingerprint != self._fingerprint:
            raise Untrusted("this enrolment is meant for another host", "use a key that this host printed")
        if said.device_id != device_id_of(said.public_key) or request.facts.device_id != said.device_id:
            raise Untrusted("the board's id is not the one of its key", "update joulemark on the board")
        return said

    @contextmanager
    def _alarms(self, key_id: str, by: str) -> Generator[None, None, None]:
        """Notes a right secret that is used up or too old: somebody has it who should not, or came late. The answer does not tell."""
        try:
            yield
        except SpentKey:
            with self._change() as connection:
                self._note(connection, by[:80], "refused", key_id, "a one-time key was shown after its use or its end")
            raise refused() from None

    def _keep_device(
        self, connection: Connection, said: EnrolmentStatement, request: EnrolmentRequest, address: str, approved: bool
    ) -> str:
        """Writes a board that enrols into the book; the name that it has there. Raises Forbidden for a revoked one."""
        now = self._clock()
        known = _device(connection, said.device_id)
        values: dict[str, Any] = {
            "tls_public_key": said.tls_public_key,
            "hardware": request.hardware,
            "address": address,
            "facts": request.facts.model_dump(mode="json"),
        }
        if approved:  # whoever gave this key to the board has decided, also about one that was stopped as a copy
            values |= {"admission": "approved", "approved_at": now, "problem": None}
        # Enrolling begins a new life of the identity: what spoke before it does not count as a copy.
        connection.execute(sa.delete(SESSIONS).where(SESSIONS.c.device_id == said.device_id))
        if known is None:
            name = _free_name(connection, request.name)
            first = {"device_id": said.device_id, "public_key": said.public_key, "name": name, "enrolled_at": now}
            values = {"admission": "pending", "revision": 0, "last_order": 0, **first, **values}
            connection.execute(sa.insert(DEVICES).values(**values))
            return name
        if known["admission"] == "revoked":
            raise Forbidden(
                f"the board {known['name']!r} was revoked", "give it a new identity: empty its data folder", "revoked"
            )
        self._set(connection, known, **values)
        return known["name"]

    def _open_session(
        self, connection: Connection, device: RowMapping, request: SessionRequest, address: str
    ) -> Conflict | None:
        if device["admission"] == "cloned":
            return _cloned(device["problem"] or "two boards show this identity")
        device_id = device["device_id"]
        latest = connection.execute(_latest_instance(device_id)).scalar()
        if latest != request.instance_id:
            mine = sa.and_(SESSIONS.c.device_id == device_id, SESSIONS.c.instance_id == request.instance_id)
            if connection.execute(sa.select(SESSIONS.c.number).where(mine)).scalar() is not None:
                return self._mark_cloned(connection, device)
            row = {"device_id": device_id, "instance_id": request.instance_id, "boot_id": request.boot_id}
            connection.execute(sa.insert(SESSIONS).values(begun_at=self._clock(), **row))
        learnt = {"hardware": device["hardware"] or request.hardware}
        facts = request.facts.model_dump(mode="json")
        ahead = request.wall_s - self._clock() if request.wall_s is not None else None
        self._set(
            connection, device, facts=facts, seen_at=self._clock(), address=address, clock_ahead_s=ahead, **learnt
        )
        return None

    def _judge_instance(self, device_id: str, instance_id: str) -> None:
        """An instance that is not the latest: one that was replaced is a second board, an unknown one has to open a session."""
        mine = sa.and_(SESSIONS.c.device_id == device_id, SESSIONS.c.instance_id == instance_id)
        with self._change() as connection:
            device = _required(connection, device_id)
            if connection.execute(_latest_instance(device_id)).scalar() == instance_id:
                return
            if connection.execute(sa.select(SESSIONS.c.number).where(mine)).scalar() is None:
                raise Conflict("this agent has no session", "it opens one at its start: PUT /api/device/session")
            refusal = self._mark_cloned(connection, device)
        raise refusal

    def _mark_cloned(self, connection: Connection, device: RowMapping) -> Conflict:
        refusal = _cloned(f"two agents show the identity of {device['name']!r} at the same time")
        self._set(connection, device, admission="cloned", problem=refusal.message)
        self._note(connection, device["device_id"], "cloned", device["device_id"], refusal.message)
        return refusal

    def _set(self, connection: Connection, device: RowMapping, **values: Any) -> None:
        connection.execute(sa.update(DEVICES).where(DEVICES.c.device_id == device["device_id"]).values(**values))

    def _note(self, connection: Connection, who: str, what: str, about: str, detail: str) -> None:
        row = {"who": who, "what": what, "about": about, "detail": printable(detail)[:500]}
        connection.execute(sa.insert(EVENTS).values(at=self._clock(), **row))

    @contextmanager
    def _change(self) -> Generator[Connection, None, None]:
        with transaction(self._engine, write=True) as connection:
            yield connection

    @contextmanager
    def _look(self) -> Generator[Connection, None, None]:
        with transaction(self._engine) as connection:
            yield connection


def device_id_of(public_key: str) -> str:
    """A board's id: it follows from its key, so that nobody can claim another's."""
    return f"dev-{signing.key_id(public_key)}"


def _cloned(message: str) -> Conflict:
    refusal = Conflict(
        message,
        "a copied card needs an identity of its own: empty the copy's data folder and enrol it; then `joulemark devices approve` the board "
        "that keeps the old one",
    )
    refusal.code = "cloned"
    return refusal


def _latest_instance(device_id: str) -> Any:
    mine = sa.select(SESSIONS.c.instance_id).where(SESSIONS.c.device_id == device_id)
    return mine.order_by(SESSIONS.c.number.desc()).limit(1)


def _device(connection: Connection, device_id: str) -> RowMapping | None:
    return connection.execute(sa.select(DEVICES).where(DEVICES.c.device_id == device_id)).mappings().first()


def _required(connection: Connection, device_id: str) -> RowMapping:
    device = _device(connection, device_id)
    if device is None:
        raise refused()
    return device


def _named(connection: Connection, name_or_id: str) -> RowMapping:
    asked = sa.or_(DEVICES.c.name == name_or_id, DEVICES.c.device_id == name_or_id)
    device = connection.execute(sa.select(DEVICES).where(asked)).mappings().first()
    if device is None:
        raise NotFound(f"there is no board {name_or_id[:80]!r}", "`joulemark devices` lists them")
    return device


def _free_name(connection: Connection, wished: str) -> str:
    """The wished name, with a number where another board has it: many boards are called raspberrypi."""
    base = _clean(wished) or "board"
    taken = set(connection.execute(sa.select(DEVICES.c.name)).scalars())
    number, name = 1, base
    while name in taken:
        number += 1
        name = f"{base}-{number}"
    return name


def _clean(name: str) -> str:
    return re.sub(r"[^\w .()-]", "", printable(name), flags=re.ASCII).strip()[:MAX_NAME]


def _groups(connection: Connection) -> dict[str, list[str]]:
    """The groups that each board is in."""
    found: dict[str, list[str]] = {}
    for row in connection.execute(sa.select(GROUPS).order_by(GROUPS.c.name)):
        found.setdefault(row.device_id, []).append(row.name)
    return found


def _row(row: RowMapping, groups: Mapping[str, Sequence[str]]) -> DeviceRow:
    admission: Admission = row["admission"]
    return DeviceRow(
        device_id=row["device_id"],
        name=row["name"],
        admission=admission,
        problem=row["problem"],
        key_id=signing.key_id(row["public_key"]),
        enrolled_at=row["enrolled_at"],
        seen_at=row["seen_at"],
        address=row["address"],
        facts=DeviceFacts.model_validate_json(json.dumps(row["facts"])) if row["facts"] else None,
        clock_ahead_s=row["clock_ahead_s"],
        groups=tuple(groups.get(row["device_id"], ())),
    )
