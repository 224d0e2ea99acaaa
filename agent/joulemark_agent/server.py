"""Puts the agent together and serves it: folders, store, journal, jobs, outbox, completions, the HTTP application.

The listening socket is bound before anything else, so that a port in use is one clear line and changes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from joulemark import __version__, credentials, tls
from joulemark.bundles import Bundle
from joulemark.discovery import Announcement
from joulemark.errors import BadInput, DigestMismatch, JoulemarkError, MissingExtra, NotFound
from joulemark.protocol import SessionAnswer, SessionRequest
from joulemark.statements import Envelope, RecordStatement
from joulemark.wire import Absent, DeviceFacts, Manifest
from joulemark_agent import enrolment, hardware, identity, service_manager
from joulemark_agent.announcing import Announcer
from joulemark_agent.api import Services, create_app
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
from joulemark_agent.outbox import Outbox, Sender
from joulemark_agent.pins import Lamp, State
from joulemark_agent.pulling import Puller
from joulemark_agent.session import Session, new_instance_id
from joulemark_agent.settings import Settings
from joulemark_agent.store import Store
from joulemark_http import listening, serving

log = logging.getLogger(__name__)
CONNECTION_LIMIT = 128
SETTLE_S = 10.0
FIRST_WAIT_S = 2.0
LONGEST_WAIT_S = 300.0
KEY_FILE_BYTES = 4096
HOST_MARK = 16
"""So many digits of its host's fingerprint an agent tells the network."""
_NO_HOST = BadInput(
    "{address} is reachable from other machines, and this agent knows no host yet whose word counts",
    "enrol it first: joulemark enrol HOST_URL; or listen on 127.0.0.1",
)


def serve(settings: Settings, listen: str) -> None:
    """Serve until SIGINT or SIGTERM. Raises Conflict for a port in use, BadInput for an address that is not allowed."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    folder = settings.data / "identity"
    known = identity.is_enrolled(folder) or settings.key_file is not None
    with listening.bind(listen, CONNECTION_LIMIT, None if known else _NO_HOST) as listener:
        who = _enrolled(settings, identity.load(folder))
        if who.membership is None and not settings.open_to_all:
            log.warning(
                "this board belongs to no host: `joulemark enrol HOST_URL` makes it known to one; for a trial: --open"
            )
        app = create_app(assemble(settings, who, listener.getsockname()[:2]))
        files = None if listening.is_loopback(listener) else who.tls_files
        url = listening.address_of(listener, "https" if files is not None else "http")
        log.info("agent %s (%s) serves on %s", _name(settings, who), who.device_id, url)
        certificate, key = files or (None, None)
        serving.serve(
            app, listener, CONNECTION_LIMIT, certificate, key, lambda: service_manager.ready(f"serves on {url}")
        )


def enrol(settings: Settings, who: Identity, url: str, key: str) -> Identity:
    """Makes this board known to a host. Raises what `joulemark_agent.enrolment.enrol` raises."""
    machine = local_machine(settings.roots, who.device_id, settings.name, settings.profile, None)
    facts = machine.facts(Absent(reason="measured at the beginning of a run"))
    return enrolment.enrol(who, url, key, settings.name, hardware.digest(settings.roots, who.key.public), facts)


def enrol_by_stick(settings: Settings, who: Identity, url: str, key_text: str, folder: Path) -> Identity | None:
    """Makes this board known to a host over a stick: leaves the request there (None), or takes the answer and clears the stick."""
    bundle, key = Bundle(folder), credentials.parse_enrolment_key(key_text)
    answer = bundle.answer()
    if answer is not None:
        enrolled = enrolment.accept(who, checked_url(url), key, answer)
        bundle.clear_enrolment()
        return enrolled
    machine = local_machine(settings.roots, who.device_id, settings.name, settings.profile, None)
    facts = machine.facts(Absent(reason="measured at the beginning of a run"))
    marks = hardware.digest(settings.roots, who.key.public)
    bundle.write_request(enrolment.request_of(who, key, settings.name, marks, facts))
    return None


def read_key_file(path: Path) -> str:
    """The text of a one-time key in a file. Raises NotFound, BadInput."""
    try:
        with path.open("rb") as file:
            return file.read(KEY_FILE_BYTES).decode("utf-8")
    except FileNotFoundError as error:
        raise NotFound(
            f"there is no enrolment key in {path}", "`joulemark host token --out FILE` writes one"
        ) from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} holds no enrolment key", "`joulemark host token --out FILE` writes one") from error


def _enrolled(settings: Settings, who: Identity) -> Identity:
    """Enrols with the key file of a flashed card, as soon as the host answers; the key is removed once it was used.

    A key that is expired, used or garbled leaves a board that serves without a host and says why: nobody may be near it to start it again.
    """
    if settings.key_file is None:
        return who
    wait_s = FIRST_WAIT_S
    while who.membership is None:
        if settings.host_url is None:
            raise BadInput("an enrolment key was given, but no host", "say --host-url too")
        try:
            who = enrol(settings, who, settings.host_url, read_key_file(settings.key_file))
        except JoulemarkError as error:
            if not error.retryable:
                log.warning("this board could not be enrolled: %s. %s", error.message, error.hint)
                return who
            log.warning("%s; next try in %.0f s", error.message, wait_s)
            service_manager.ready("waits for its host, to enrol there")
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
    settings.key_file.unlink(missing_ok=True)
    return who


@dataclass(frozen=True)
class _AtHost:
    """What an agent has that belongs to a host."""

    ledger: Ledger
    book: OrderBook
    session: Session


def _name(settings: Settings, who: Identity) -> str:
    """What people call this board: what its host calls it, if it has one."""
    return who.membership.name if who.membership is not None else settings.name


def assemble(settings: Settings, who: Identity, address: tuple[str, int] | None = None) -> Services:
    """All parts of an agent that listens on `address`, not yet started. Raises OSError when the data folder cannot be written."""
    settings.data.mkdir(parents=True, exist_ok=True)

    def needed(artifact_id: str) -> bool:
        ordered = at_host is not None and at_host.book.needs(artifact_id)
        return ordered or jobs.needs(artifact_id) or completions.uses(artifact_id)

    def evicted(artifact_id: str) -> None:
        log.info("artifact %s… gave way to another one", artifact_id[:12])
        if at_host is not None:
            at_host.book.evicted(artifact_id)

    def ordered(artifact_id: str) -> bool:
        return at_host is not None and at_host.book.ordered(artifact_id)

    store = Store(
        settings.data / "store", limit_bytes=settings.store_bytes, needed=needed, ordered=ordered, on_evicted=evicted
    )
    journal = Journal(settings.data / "journal.sqlite")
    outbox = Outbox(settings.data / "outbox.sqlite", settings.outbox_bytes, settings.outbox_age_s)
    names = [_name(settings, who)]
    machine = local_machine(
        settings.roots,
        who.device_id,
        lambda: names[-1],
        settings.profile,
        settings.replay,
        settings.data / "set-before.json",
    )
    completions = Completions(store, machine, settings.serve_idle_s)

    def make_quiet() -> None:
        if announcer is not None:
            announcer.be_quiet()
        completions.unload()
        sender.settle(SETTLE_S)
        puller.settle(SETTLE_S)

    def silent() -> bool:
        return jobs.busy() or (at_host is not None and not at_host.session.ready())

    def device() -> DeviceFacts:
        return machine.facts(Absent(reason="measured at the beginning of a run"))

    def stop() -> None:
        if at_host is not None:
            at_host.session.stop()
        for part in (sender, puller, jobs, *(part for part in (announcer, lamp) if part is not None)):
            part.stop()
        for opened in (completions, journal, outbox, *([at_host.ledger] if at_host is not None else [])):
            opened.close()

    jobs = Jobs(journal, store, machine, outbox.add, make_quiet, lambda manifest: _put_aside(store, manifest))
    link = _link(settings, who)
    sender = outbox.sender(link, paused=silent, vouch=lambda run_id, body: _vouch(who, run_id, body))
    puller = Puller(store, link, silent, settings.limit_rate)
    at_host = None
    if link is not None and who.membership is not None:
        at_host = _at_host(settings, who, link, store, puller, jobs, device, lambda answer: names.append(answer.name))
    host_key = who.membership.host.signing_key if who.membership is not None else None
    token = None if settings.open_to_all else local_token(who.folder)
    gate = Gate(who.device_id, host_key, token, time.monotonic, settings.open_to_all)
    announcer = _announcer(settings, who, lambda: names[-1], address, jobs.busy) if address is not None else None
    starting = [completions, jobs, sender, *([at_host.session] if at_host is not None else [])]
    starting += [announcer] if announcer is not None else []
    lamp = _lamp(machine.profile.pins.lamp_gpio, jobs, puller)
    starting += [lamp] if lamp is not None else []
    return Services(
        store,
        jobs,
        outbox,
        completions,
        puller,
        gate,
        at_host.book if at_host is not None else None,
        device,
        notes=lambda: _notes(outbox.note(), journal.note, jobs.trouble(), at_host),
        vouch=lambda run_id, body: _vouch(who, run_id, body) if who.membership is not None else None,
        start=lambda: _start(*starting),
        stop=stop,
    )


def _at_host(
    settings: Settings,
    who: Identity,
    link: HostLink,
    store: Store,
    puller: Puller,
    jobs: Jobs,
    device: Callable[[], DeviceFacts],
    on_answer: Callable[[SessionAnswer], None],
) -> _AtHost:
    assert who.membership is not None
    boot = boot_id(settings.roots)
    ledger = Ledger(settings.data / "ledger.sqlite", time.monotonic)
    host_key = who.membership.host.signing_key
    book = OrderBook(who.device_id, host_key, ledger, store, puller, jobs, link.pack, time.monotonic)

    def presentation() -> SessionRequest:
        return SessionRequest(
            instance_id=link.instance_id,
            boot_id=boot if isinstance(boot, str) else "unknown",
            hardware=hardware.digest(settings.roots, who.key.public),
            facts=device(),
            holds=tuple(store.artifacts()),
            wall_s=time.time(),
        )

    return _AtHost(ledger, book, Session(link, book, presentation, jobs.current, on_answer))


def _announcer(
    settings: Settings, who: Identity, name: Callable[[], str], address: tuple[str, int], busy: Callable[[], bool]
) -> Announcer | None:
    reachable = not ipaddress.ip_address(address[0]).is_loopback
    if not (reachable if settings.announce is None else settings.announce):
        return None

    def what() -> Announcement:
        facts = who.membership.host if who.membership is not None else None
        host = tls.fingerprint(facts.authority_pem, facts.signing_key)[:HOST_MARK] if facts is not None else ""
        return Announcement(who.device_id, name(), __version__, reachable and facts is not None, host)

    try:
        return Announcer(what, address[0], address[1], busy)
    except MissingExtra as error:
        if settings.announce:
            raise
        log.warning("%s", error)
        return None


def _lamp(gpio: int | None, jobs: Jobs, puller: Puller) -> Lamp | None:
    def state() -> State:
        if jobs.busy():
            return "running"
        if jobs.trouble() is not None:
            return "trouble"
        return "fetching" if puller.busy() else "idle"

    return Lamp(gpio, state) if gpio is not None else None


def _start(*parts: Completions | Jobs | Sender | Session | Announcer | Lamp) -> None:
    for part in parts:
        part.start()


def _notes(outbox: str | None, journal: str | None, trouble: str | None, at_host: _AtHost | None) -> tuple[str, ...]:
    found = [outbox, journal, trouble]
    if at_host is not None:
        found += [at_host.ledger.note, at_host.session.note()]
    return tuple(note for note in found if note)


def _put_aside(store: Store, manifest: Manifest) -> None:
    """Has the store look at an artifact's files again. The record says that one was damaged; what is done is the store's affair."""
    for entry in manifest.files:
        with contextlib.suppress(DigestMismatch):
            store.verify_file(entry.sha256)


def _vouch(who: Identity, run_id: str, body: bytes) -> Envelope:
    digest = hashlib.sha256(body).hexdigest()
    return who.key.sign(RecordStatement(device_id=who.device_id, run_id=run_id, record_sha256=digest))


def _link(settings: Settings, who: Identity) -> HostLink | None:
    if who.membership is not None:
        authority = who.membership.host.authority_pem
        return HostLink(who.membership.host_url, who.credential, new_instance_id(), authority_pem=authority)
    if settings.host_url is not None and settings.open_to_all:
        return HostLink(checked_url(settings.host_url))
    return None
