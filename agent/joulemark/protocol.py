"""What a board and its host say to each other, beside artifacts, packs, runs and records.

    GET  /api/identity          HostFacts: public; an enrolment key's fingerprint confirms it
    POST /api/enrolment         EnrolmentRequest → EnrolmentAnswer: once, with a one-time key
    PUT  /api/device/session    SessionRequest → SessionAnswer: once for each start of the agent
    GET  /api/device/orders     ?after=REVISION&wait_s=…: Orders as soon as there is a higher revision, else 204
    POST /api/device/report     Report → ReportAnswer: what has changed; renews the lease of a run

The other way round, whoever speaks to a board directly shows a ticket that its host signed, because boards know nobody but their host:

    POST /api/challenge         → Challenge
    POST /api/entry             an envelope with a TicketStatement → Entry

Every other request of a board carries its credential (Authorization: Bearer) and its instance (Joulemark-Instance). Pure.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from joulemark.statements import Envelope, PublicKey
from joulemark.wire import SCHEMA, DeviceFacts, Identifier, Problem, RunState, Sha256, Text, Title, Wire

INSTANCE_HEADER = "Joulemark-Instance"
SIGNATURE_HEADER = "Joulemark-Signature"
"""A record's envelope (a RecordStatement) as base64 of its JSON."""
Admission = Literal["pending", "approved", "revoked", "cloned"]
"""Whether a board may take part: not yet, yes, no more, or not while two boards show one identity."""

Certificate = Annotated[str, StringConstraints(max_length=16384)]


class HostFacts(Wire):
    """Who a host is; believed only after its fingerprint was compared."""

    authority_pem: Certificate
    signing_key: PublicKey
    version: Title
    schema_number: int = SCHEMA


class EnrolmentRequest(Wire):
    """A board asks to be taken in. The envelope holds an EnrolmentStatement by the key that it is about."""

    secret: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    statement: Envelope
    name: Title
    hardware: Sha256 | None
    """A digest of what makes this very board: see `joulemark_agent.hardware`."""
    facts: DeviceFacts


class EnrolmentAnswer(Wire):
    """What a board keeps: its credential, the host's keys, its certificate, and the host's word for its key (a DeviceStatement)."""

    device_id: Identifier
    name: Title
    admission: Admission
    credential: Annotated[str, StringConstraints(max_length=200)]
    host: HostFacts
    certificate_pem: Certificate
    device: Envelope


class SessionRequest(Wire):
    """An agent has started. `instance_id` is made anew at every start and never stored, so that copies of a card differ in it."""

    instance_id: Identifier
    boot_id: Title
    hardware: Sha256 | None
    facts: DeviceFacts
    schema_number: int = SCHEMA
    """What this agent speaks. A host takes what is older than itself; what is newer it could misread."""
    wall_s: float | None = None
    """The board's own clock, seconds since 1970: only to be shown, nothing is judged by it."""
    holds: Annotated[tuple[Sha256, ...], Field(max_length=10_000)] = ()
    """The artifacts that are whole on this board: what the host believes to be there and is not, it orders anew when it is needed."""


class SessionAnswer(Wire):
    """How the host sees the board."""

    name: Title
    admission: Admission
    host_time: float
    """Seconds since 1970 by the host's clock, which the board's own may not know."""


class Orders(Wire):
    """What a board is to do now. A board asks with the `revision` that it knows and waits for a higher one."""

    revision: Annotated[int, Field(ge=0)]
    host_time: float
    fetch: tuple[Envelope, ...] = ()
    """FetchOrders that the board has not reported as done."""
    run: Envelope | None = None
    """The RunOrder that this board holds the lease of."""
    cancel: tuple[Identifier, ...] = ()
    """Runs to end."""
    forget: tuple[Sha256, ...] = ()
    """Artifacts to remove."""
    needed: tuple[Sha256, ...] = ()
    """Artifacts that runs in this board's queue are about: they do not give way when the store is full."""


TargetState = Literal["unknown", "registered", "pending", "in_sync", "error"]
"""Where an artifact stands on a board: never heard of it; known but nothing asked; on its way; there and verified; given up."""


class Holding(Wire):
    """How far one artifact is on a board. `evicted`: it gave way to another one, for want of space."""

    artifact_id: Sha256
    state: Literal["pending", "in_sync", "error", "evicted"]
    received_bytes: Annotated[int, Field(ge=0)] = 0
    problem: Problem | None = None


class Refusal(Wire):
    """An order that a board did not accept. `stale`: only its number or its age is wrong, so that the host may sign it anew, with a number
    above `accepted`, the highest that the board has accepted."""

    sequence: Annotated[int, Field(ge=0, le=2**53)]
    stale: bool
    accepted: Annotated[int, Field(ge=0, le=2**53)]
    problem: Problem


class Report(Wire):
    """What has changed on a board since its last report."""

    holdings: Annotated[tuple[Holding, ...], Field(max_length=1000)] = ()
    runs: Annotated[tuple[RunState, ...], Field(max_length=1000)] = ()
    refused: Annotated[tuple[Refusal, ...], Field(max_length=100)] = ()


class ReportAnswer(Wire):
    """What cannot wait until the board asks for orders again: it may be in a run for hours."""

    cancel: tuple[Identifier, ...] = ()
    host_time: float


class PersonRequest(Wire):
    """A person (operator or viewer) exchanges a one-time key for a credential."""

    key: Annotated[str, Field(max_length=400)]
    name: Identifier


class PersonAnswer(Wire):
    """A person's credential."""

    credential: Annotated[str, StringConstraints(max_length=200)]
    role: Literal["operator", "viewer"]


class Challenge(Wire):
    """A board's answer to POST /api/challenge: what a ticket has to repeat."""

    device_id: Identifier
    nonce: Sha256


class Entry(Wire):
    """A board's answer to a ticket (POST /api/entry): what to show from then on, and for how long."""

    token: Annotated[str, StringConstraints(max_length=200)]
    expires_in_s: float


class DeviceRow(Wire):
    """One board as the host lists it. Times are seconds since 1970 by the host's clock."""

    device_id: Identifier
    name: Title
    admission: Admission
    problem: Text | None
    key_id: Identifier
    enrolled_at: float
    seen_at: float | None
    address: Title | None
    facts: DeviceFacts | None
    groups: tuple[Title, ...] = ()
    clock_ahead_s: float | None = None
    """By how much the board's clock was ahead of the host's when its agent started."""
