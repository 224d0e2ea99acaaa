"""Puts an agent together: store, journal, jobs, outbox, completions, what belongs to a host, and who hears of whom.

The parts know little of one another: the store asks whether an artifact may go, jobs ask for quiet before they measure, the sender and the
puller ask whether they may use the network now. Who answers is here. Not aware of HTTP, nor of how a board comes to its host.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import logging
import time
from dataclasses import dataclass

from joulemark import __version__, tls
from joulemark.discovery import Announcement
from joulemark.errors import DigestMismatch, MissingExtra
from joulemark.protocol import SessionAnswer, SessionRequest
from joulemark.statements import Envelope, RecordStatement
from joulemark.wire import Absent, DeviceFacts, Manifest
from joulemark_agent import hardware
from joulemark_agent.announcing import Announcer
from joulemark_agent.api import Services
from joulemark_agent.completions import Completions
from joulemark_agent.gate import Gate, local_token
from joulemark_agent.host_link import HostLink, checked_url
from joulemark_agent.identity import Identity
from joulemark_agent.jobs import Jobs
from joulemark_agent.journal import Journal
from joulemark_agent.ledger import Ledger
from joulemark_agent.local_run import local_machine
from joulemark_agent.machine import boot_id
from joulemark_agent.orders import OrderBook
from joulemark_agent.outbox import Outbox
from joulemark_agent.pins import Lamp, State
from joulemark_agent.pulling import Puller
from joulemark_agent.session import Session, new_instance_id
from joulemark_agent.settings import Settings
from joulemark_agent.store import Store

log = logging.getLogger(__name__)
SETTLE_S = 10.0
"""So long a transfer has to come to an end before a run begins."""
HOST_MARK = 16
"""So many digits of its host's fingerprint an agent tells the network."""


@dataclass(frozen=True)
class _AtHost:
    """What an agent has that belongs to a host."""

    ledger: Ledger
    book: OrderBook
    session: Session


def name_of(settings: Settings, who: Identity) -> str:
    """What people call this board: what its host calls it, if it has one."""
    return who.membership.name if who.membership is not None else settings.name


class Agent:
    """All parts of an agent that listens on `address`, not yet started. Raises OSError when the data folder cannot be written."""

    def __init__(self, settings: Settings, who: Identity, address: tuple[str, int] | None = None) -> None:
        self._settings = settings
        self._who = who
        self._name = name_of(settings, who)
        data = settings.data
        data.mkdir(parents=True, exist_ok=True)
        self._store = Store(
            data / "store",
            limit_bytes=settings.store_bytes,
            needed=self._needs,
            ordered=self._is_ordered,
            on_evicted=self._evicted,
        )
        self._journal = Journal(data / "journal.sqlite")
        self._outbox = Outbox(data / "outbox.sqlite", settings.outbox_bytes, settings.outbox_age_s)
        self._machine = local_machine(
            settings.roots,
            who.device_id,
            lambda: self._name,
            settings.profile,
            settings.replay,
            data / "set-before.json",
        )
        self._completions = Completions(self._store, self._machine, settings.serve_idle_s)
        self._jobs = Jobs(
            self._journal, self._store, self._machine, self._outbox.add, self._make_quiet, self._put_aside
        )
        link = _link(settings, who)
        self._sender = self._outbox.sender(link, paused=self._is_silent, vouch=self._vouch)
        self._puller = Puller(self._store, link, self._is_silent, settings.limit_rate)
        self._at_host = self._belonging_to_host(link) if link is not None and who.membership is not None else None
        self._announcer = self._new_announcer(address) if address is not None else None
        gpio = self._machine.profile.pins.lamp_gpio
        self._lamp = Lamp(gpio, self._state) if gpio is not None else None

    def services(self) -> Services:
        """What the HTTP interface speaks to."""
        settings, who = self._settings, self._who
        host_key = who.membership.host.signing_key if who.membership is not None else None
        token = None if settings.open_to_all else local_token(who.folder)
        return Services(
            self._store,
            self._jobs,
            self._outbox,
            self._completions,
            self._puller,
            Gate(who.device_id, host_key, token, time.monotonic, settings.open_to_all),
            self._at_host.book if self._at_host is not None else None,
            self._facts,
            notes=self._notes,
            vouch=lambda run_id, body: self._vouch(run_id, body) if who.membership is not None else None,
            start=self.start,
            stop=self.stop,
        )

    def start(self) -> None:
        """Begin working: first what earlier runs left, then the talk with the host."""
        session = self._at_host.session if self._at_host is not None else None
        for part in (self._completions, self._jobs, self._sender, session, self._announcer, self._lamp):
            if part is not None:
                part.start()

    def stop(self) -> None:
        """End what runs, and close what is open; unfinished runs stay in the journal."""
        session, ledger = (self._at_host.session, self._at_host.ledger) if self._at_host is not None else (None, None)
        for part in (session, self._sender, self._puller, self._jobs, self._announcer, self._lamp):
            if part is not None:
                part.stop()
        for opened in (self._completions, self._journal, self._outbox, ledger):
            if opened is not None:
                opened.close()

    # --- what the parts ask -------------------------------------------------------------------------------------------
    def _needs(self, artifact_id: str) -> bool:
        at_host = self._at_host is not None and self._at_host.book.needs(artifact_id)
        return at_host or self._jobs.needs(artifact_id) or self._completions.uses(artifact_id)

    def _is_ordered(self, artifact_id: str) -> bool:
        return self._at_host is not None and self._at_host.book.ordered(artifact_id)

    def _evicted(self, artifact_id: str) -> None:
        log.info("artifact %s… gave way to another one", artifact_id[:12])
        if self._at_host is not None:
            self._at_host.book.evicted(artifact_id)

    def _put_aside(self, manifest: Manifest) -> None:
        """Has the store look at an artifact's files again. The record says that one was damaged; what is done is the store's affair."""
        for entry in manifest.files:
            with contextlib.suppress(DigestMismatch):
                self._store.verify_file(entry.sha256)

    def _make_quiet(self) -> None:
        if self._announcer is not None:
            self._announcer.be_quiet()
        self._completions.unload()
        self._sender.settle(SETTLE_S)
        self._puller.settle(SETTLE_S)

    def _is_silent(self) -> bool:
        return self._jobs.busy() or (self._at_host is not None and not self._at_host.session.ready())

    def _state(self) -> State:
        """What the lamp shows."""
        if self._jobs.busy():
            return "running"
        if self._jobs.trouble() is not None:
            return "trouble"
        return "fetching" if self._puller.busy() else "idle"

    def _facts(self) -> DeviceFacts:
        return self._machine.facts(Absent(reason="measured at the beginning of a run"))

    def _notes(self) -> tuple[str, ...]:
        found = [self._outbox.note(), self._journal.note, self._jobs.trouble()]
        if self._at_host is not None:
            found += [self._at_host.ledger.note, self._at_host.session.note()]
        return tuple(note for note in found if note)

    def _vouch(self, run_id: str, body: bytes) -> Envelope:
        digest = hashlib.sha256(body).hexdigest()
        return self._who.key.sign(RecordStatement(device_id=self._who.device_id, run_id=run_id, record_sha256=digest))

    # --- what belongs to a host, and to the network -------------------------------------------------------------------
    def _belonging_to_host(self, link: HostLink) -> _AtHost:
        settings, who = self._settings, self._who
        assert who.membership is not None
        boot = boot_id(settings.roots)
        ledger = Ledger(settings.data / "ledger.sqlite", time.monotonic)
        host_key = who.membership.host.signing_key
        book = OrderBook(
            who.device_id, host_key, ledger, self._store, self._puller, self._jobs, link.pack, time.monotonic
        )

        def presentation() -> SessionRequest:
            return SessionRequest(
                instance_id=link.instance_id,
                boot_id=boot if isinstance(boot, str) else "unknown",
                hardware=hardware.digest(settings.roots, who.key.public),
                facts=self._facts(),
                holds=tuple(self._store.artifacts()),
                wall_s=time.time(),
            )

        def answered(answer: SessionAnswer) -> None:
            self._name = answer.name

        return _AtHost(ledger, book, Session(link, book, presentation, self._jobs.current, answered))

    def _new_announcer(self, address: tuple[str, int]) -> Announcer | None:
        settings, who = self._settings, self._who
        reachable = not ipaddress.ip_address(address[0]).is_loopback
        if not (reachable if settings.announce is None else settings.announce):
            return None

        def what() -> Announcement:
            facts = who.membership.host if who.membership is not None else None
            host = tls.fingerprint(facts.authority_pem, facts.signing_key)[:HOST_MARK] if facts is not None else ""
            return Announcement(who.device_id, self._name, __version__, reachable and facts is not None, host)

        try:
            return Announcer(what, address[0], address[1], self._jobs.busy)
        except MissingExtra as error:
            if settings.announce:
                raise
            log.warning("%s", error)
            return None


def _link(settings: Settings, who: Identity) -> HostLink | None:
    if who.membership is not None:
        authority = who.membership.host.authority_pem
        return HostLink(who.membership.host_url, who.credential, new_instance_id(), authority_pem=authority)
    if settings.host_url is not None and settings.open_to_all:
        return HostLink(checked_url(settings.host_url))
    return None
