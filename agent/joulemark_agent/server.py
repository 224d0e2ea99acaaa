"""Puts the agent together and serves it: folders, store, journal, jobs, outbox, completions, the HTTP application.

The listening socket is bound before anything else, so that a port in use is one clear line and changes nothing.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import sys
import uuid
from pathlib import Path

import uvicorn

from joulemark.errors import BadInput, Conflict, DigestMismatch
from joulemark.wire import Absent, DeviceFacts, Manifest
from joulemark_agent.api import Services, create_app
from joulemark_agent.completions import Completions
from joulemark_agent.jobs import Jobs
from joulemark_agent.journal import Journal
from joulemark_agent.local_run import local_machine
from joulemark_agent.outbox import Outbox
from joulemark_agent.pulling import Puller
from joulemark_agent.settings import Settings
from joulemark_agent.store import Store

log = logging.getLogger(__name__)
CONNECTION_LIMIT = 128
SETTLE_S = 10.0


def serve(settings: Settings, listen: str, allow_unauthenticated: bool) -> None:
    """Serve until SIGINT or SIGTERM. Raises Conflict for a port in use, BadInput for an address that is not allowed."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    listener = bind(listen, allow_unauthenticated)
    address, port = listener.getsockname()[:2]
    app = create_app(assemble(settings))
    log.info("agent %s serves on http://%s:%s, data in %s", settings.name, address, port, settings.data)
    config = uvicorn.Config(
        app, log_level="warning", limit_concurrency=CONNECTION_LIMIT, timeout_keep_alive=5, timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    server.run(sockets=[listener])


def bind(listen: str, allow_unauthenticated: bool) -> socket.socket:
    """A listening socket on `address:port`."""
    address, _, port = listen.rpartition(":")
    try:
        parsed = ipaddress.ip_address(address.strip("[]") or "127.0.0.1")
        number = int(port)
    except ValueError as error:
        raise BadInput(f"{listen!r} is not an address and a port", "for example --listen 127.0.0.1:8090") from error
    if not parsed.is_loopback and not allow_unauthenticated:
        raise BadInput(
            f"{parsed} is reachable from other machines and this agent has no authentication yet",
            "bind to 127.0.0.1, or say --allow-unauthenticated on a network that you trust",
        )
    family = socket.AF_INET6 if parsed.version == 6 else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((str(parsed), number))
    except OSError as error:
        listener.close()
        raise Conflict(
            f"cannot listen on {listen}: {error.strerror}", "choose another port with --listen, or stop what uses it"
        ) from error
    listener.listen(CONNECTION_LIMIT)
    return listener


def assemble(settings: Settings) -> Services:
    """All parts of an agent, not yet started. Raises OSError when the data folder cannot be written."""
    settings.data.mkdir(parents=True, exist_ok=True)
    store = Store(settings.data / "store")
    journal = Journal(settings.data / "journal.sqlite")
    outbox = Outbox(settings.data / "outbox.sqlite", settings.outbox_bytes, settings.outbox_age_s)
    machine = local_machine(settings.roots, device_id(settings.data), settings.name, settings.profile, settings.replay)
    completions = Completions(store, machine, settings.serve_idle_s)

    def make_quiet() -> None:
        completions.unload()
        sender.settle(SETTLE_S)

    def put_aside(manifest: Manifest) -> None:
        for entry in manifest.files:
            # The record says that the file was damaged; what is done about it is the store's affair.
            with contextlib.suppress(DigestMismatch):
                store.verify_file(entry.sha256)

    jobs = Jobs(journal, store, machine, outbox.add, make_quiet, put_aside)
    sender = outbox.sender(settings.host_url, paused=jobs.busy)
    puller = Puller(store, settings.host_url, paused=jobs.busy)

    def device() -> DeviceFacts:
        return machine.facts(Absent(reason="measured at the beginning of a run"))

    def start() -> None:
        completions.start()
        jobs.start()
        sender.start()

    def stop() -> None:
        sender.stop()
        puller.stop()
        jobs.stop()
        completions.close()
        journal.close()
        outbox.close()

    return Services(store, jobs, outbox, completions, puller, device, journal.note, start, stop)


def device_id(data: Path) -> str:
    """This board's lasting identity: made once, kept beside its data."""
    path = data / "device_id"
    if not path.exists():
        temporary = data / ".device_id.part"
        temporary.write_text(f"dev-{uuid.uuid4().hex[:16]}\n")
        temporary.replace(path)
    return path.read_text().strip()
