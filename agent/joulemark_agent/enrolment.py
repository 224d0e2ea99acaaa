"""Making this board known to its host, once, with a one-time key.

The host is believed only when its certificate authority and signing key have the fingerprint that the key names; from then on they are
pinned. The board proves that it holds its own key. An answer that was lost is asked for again with the same key. Not aware of the agent.
"""

from __future__ import annotations

from typing import TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from joulemark import credentials, signing, tls
from joulemark.credentials import EnrolmentKey
from joulemark.errors import BadInput, Untrusted
from joulemark.protocol import EnrolmentAnswer, EnrolmentRequest, HostFacts
from joulemark.statements import DeviceStatement, EnrolmentStatement
from joulemark.wire import DeviceFacts
from joulemark_agent import identity as identities
from joulemark_agent.host_link import HostLink, checked_url, exchange
from joulemark_agent.identity import Identity

ANSWER_BYTES = 256 * 1024
Parsed = TypeVar("Parsed", bound=BaseModel)


def enrol(identity: Identity, url: str, key_text: str, name: str, hardware: str | None, facts: DeviceFacts) -> Identity:
    """The identity after enrolment, stored. `facts` are shown to whoever approves the board.

    Raises BadInput (no key, no address), Untrusted (another host answers), NotAuthenticated (the key is not taken), Unavailable.
    """
    url, key = checked_url(url), credentials.parse_enrolment_key(key_text)
    host = _confirmed_host(url, key)
    request = request_of(identity, key, name, hardware, facts)
    link = HostLink(url, authority_pem=host.authority_pem)
    with link.client() as client:
        answer = _asked(EnrolmentAnswer, client, "POST", "/api/enrolment", request.model_dump_json(by_alias=True))
    return accept(identity, url, key, answer)


def request_of(
    identity: Identity, key: EnrolmentKey, name: str, hardware: str | None, facts: DeviceFacts
) -> EnrolmentRequest:
    """What a board says to the host that printed `key`; it holds that key's secret."""
    said = EnrolmentStatement(
        device_id=identity.device_id,
        public_key=identity.key.public,
        tls_public_key=identity.tls_key.public,
        key_id=key.id,
        host_fingerprint=key.fingerprint,
    )
    return EnrolmentRequest(
        secret=key.secret, statement=identity.key.sign(said), name=name, hardware=hardware, facts=facts
    )


def accept(identity: Identity, url: str, key: EnrolmentKey, answer: EnrolmentAnswer) -> Identity:
    """Stores the answer of the host that printed `key`. Raises Untrusted for anybody else's."""
    _check(identity, key, answer)
    return identities.keep(identity, url, answer)


def _confirmed_host(url: str, key: EnrolmentKey) -> HostFacts:
    """Asks whoever answers for its identity, and believes it only with the fingerprint that the key names."""
    with httpx.Client(base_url=url, verify=tls.unverified(), timeout=30, trust_env=False) as client:
        host = _asked(HostFacts, client, "GET", "/api/identity")
    if tls.fingerprint(host.authority_pem, host.signing_key) != key.fingerprint:
        raise Untrusted(
            f"what answers at {url} is not the host that printed this key",
            "check the address; if it is right, somebody stands between: nothing was sent to them",
        )
    return host


def _check(identity: Identity, key: EnrolmentKey, answer: EnrolmentAnswer) -> None:
    if tls.fingerprint(answer.host.authority_pem, answer.host.signing_key) != key.fingerprint:
        raise Untrusted(
            "the host's answer names other keys than its own", "enrol again; if it happens twice, report it"
        )
    word = signing.opened(answer.device, DeviceStatement, [answer.host.signing_key])
    if word.device_id != identity.device_id or word.public_key != identity.key.public:
        raise Untrusted("the host's word is about another board", "enrol again; if it happens twice, report it")


def _asked(model: type[Parsed], client: httpx.Client, method: str, path: str, body: str | None = None) -> Parsed:
    headers = {"Content-Type": "application/json"} if body is not None else {}
    hint = "check the address and the network, and that `joulemark host` runs"
    whom = f"the host {client.base_url}"
    answer, _ = exchange(client, method, path, ANSWER_BYTES, whom, hint, content=body, headers=headers)
    try:
        return model.model_validate_json(answer)
    except ValidationError as error:
        raise BadInput(
            f"{client.base_url} answers, but not as a Joulemark host", "check the address and what listens there"
        ) from error
