"""Who this agent is and which host it belongs to: a folder that only the agent can read.

    signing.key   Ed25519, made at the first start; the board's id follows from it
    tls.key       Ed25519, for the agent's own socket
    host.json     what enrolment gave: the host's address and keys, and its word for this board
    credential    what the board shows at its host
    tls.pem       the certificate for the agent's own socket, by the host's authority

`host.json` is written last: an agent with it is enrolled. Keys never leave the folder. Not aware of how one enrols.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from joulemark import signing
from joulemark.credentials import parse_credential
from joulemark.durable import synchronise_folder
from joulemark.errors import BadInput
from joulemark.protocol import EnrolmentAnswer, HostFacts
from joulemark.signing import SigningKey, write_secret
from joulemark.statements import Envelope
from joulemark.wire import Identifier, Title, Wire

SIGNING_KEY = "signing.key"
TLS_KEY = "tls.key"
_HOST, _CREDENTIAL, _CERTIFICATE = "host.json", "credential", "tls.pem"


class Membership(Wire):
    """What the board keeps of its host: the content of host.json."""

    host_url: str
    name: Title
    host: HostFacts
    device: Envelope


@dataclass(frozen=True)
class Identity:
    """The board's keys, and its host if it has one."""

    folder: Path
    key: SigningKey
    tls_key: SigningKey
    membership: Membership | None
    credential: str | None = field(repr=False)

    @property
    def device_id(self) -> Identifier:
        """The board's lasting name: it follows from its key."""
        return f"dev-{signing.key_id(self.key.public)}"

    @property
    def tls_files(self) -> tuple[Path, Path] | None:
        """Certificate and key for the agent's own socket; None before it enrolled."""
        return (self.folder / _CERTIFICATE, self.folder / TLS_KEY) if self.membership is not None else None


def is_enrolled(folder: Path) -> bool:
    """Whether this folder's board belongs to a host."""
    return (folder / _HOST).exists()


def load(folder: Path) -> Identity:
    """The identity in a folder; keys are made when there are none. Raises BadInput when something there is damaged."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key, tls_key = (_key(folder / name) for name in (SIGNING_KEY, TLS_KEY))
    try:
        membership = Membership.model_validate_json((folder / _HOST).read_bytes())
        credential = (folder / _CREDENTIAL).read_text("ascii").strip()
    except FileNotFoundError:
        return Identity(folder, key, tls_key, None, None)
    except (ValidationError, UnicodeDecodeError) as error:
        raise BadInput(
            f"what enrolment left in {folder} cannot be read", f"remove {folder / _HOST} and enrol again"
        ) from error
    if parse_credential(credential) is None:
        raise BadInput(f"{folder / _CREDENTIAL} holds no credential", f"remove {folder / _HOST} and enrol again")
    return Identity(folder, key, tls_key, membership, credential)


def keep(identity: Identity, host_url: str, answer: EnrolmentAnswer) -> Identity:
    """Stores what enrolment gave, durably, `host.json` last. Raises OSError."""
    folder = identity.folder
    write_secret(folder / _CREDENTIAL, answer.credential + "\n")
    write_secret(folder / _CERTIFICATE, answer.certificate_pem)
    membership = Membership(host_url=host_url, name=answer.name, host=answer.host, device=answer.device)
    write_secret(folder / _HOST, membership.model_dump_json(by_alias=True))
    return load(folder)


def leave(identity: Identity) -> None:
    """Forgets the host; the keys stay. An agent that starts after this is not enrolled."""
    for name in (_HOST, _CREDENTIAL, _CERTIFICATE):
        (identity.folder / name).unlink(missing_ok=True)
    synchronise_folder(identity.folder)


def _key(path: Path) -> SigningKey:
    return signing.read_key(path) if path.exists() else signing.create_key(path)
