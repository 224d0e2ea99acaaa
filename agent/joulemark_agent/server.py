"""Serves an agent, and makes it known to a host: with a key that a person gives, that lies on a flashed card, or over a stick.

The listening socket is bound before anything else, so that a port in use is one clear line and changes nothing. What an agent is made of
is in `assembly`.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from joulemark import credentials
from joulemark.bundles import Bundle
from joulemark.errors import BadInput, JoulemarkError, NotFound
from joulemark.wire import Absent
from joulemark_agent import enrolment, hardware, identity, service_manager
from joulemark_agent.api import create_app
from joulemark_agent.assembly import Agent, name_of
from joulemark_agent.host_link import checked_url
from joulemark_agent.identity import Identity
from joulemark_agent.local_run import local_machine
from joulemark_agent.settings import Settings
from joulemark_http import listening, serving

log = logging.getLogger(__name__)
CONNECTION_LIMIT = 128
FIRST_WAIT_S = 2.0
LONGEST_WAIT_S = 300.0
KEY_FILE_BYTES = 4096
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
        app = create_app(Agent(settings, who, listener.getsockname()[:2]).services())
        files = None if listening.is_loopback(listener) else who.tls_files
        url = listening.address_of(listener, "https" if files is not None else "http")
        log.info("agent %s (%s) serves on %s", name_of(settings, who), who.device_id, url)
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
