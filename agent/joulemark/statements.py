"""What is signed: statements, and the envelopes that carry them.

An envelope is DSSE (https://github.com/secure-systems-lab/dsse, version 1.0.2): the payload's bytes, their type, and signatures over
both, so that a signature made for one kind of statement never counts for another. Payloads are canonical JSON of the models here.
Pure: signing and checking are `joulemark.signing`. Times named *_at are seconds since 1970 by the host's clock.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, StringConstraints, ValidationError

from joulemark.errors import Untrusted
from joulemark.wire import Identifier, Manifest, RunSpec, Sha256, Title, Wire

MAX_ENVELOPE_BYTES = 4 << 20
MAX_SIGNATURES = 8

PublicKey = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""An Ed25519 public key: its 32 bytes in hexadecimal."""
_Base64 = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]*={0,2}$", max_length=MAX_ENVELOPE_BYTES)]


class Signature(Wire):
    """One signature. `keyid` only says which key to try first; it is not itself signed."""

    keyid: Annotated[str, StringConstraints(max_length=128)] = ""
    sig: _Base64


class Envelope(Wire):
    """A signed payload in transit and on disk; the names of its fields are DSSE's."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    payload_type: Annotated[str, Field(alias="payloadType", max_length=200)]
    payload: _Base64
    signatures: Annotated[tuple[Signature, ...], Field(min_length=1, max_length=MAX_SIGNATURES)]

    def body(self) -> bytes:
        """The payload's bytes, unchecked. Raises Untrusted when they are not base64."""
        return from_base64(self.payload)


class Statement(Wire):
    """Something that somebody vouches for. `TYPE` is its DSSE payload type."""

    TYPE: ClassVar[str]


class DeviceStatement(Statement):
    """The host says: this key is the key of this device."""

    TYPE: ClassVar[str] = "application/vnd.joulemark.device.v1+json"

    device_id: Identifier
    name: Title
    public_key: PublicKey
    issued_at: float


class EnrolmentStatement(Statement):
    """A device says: I hold this key, and I enrol with this one-time key at this host."""

    TYPE: ClassVar[str] = "application/vnd.joulemark.enrolment.v1+json"

    device_id: Identifier
    public_key: PublicKey
    tls_public_key: PublicKey
    key_id: Identifier
    host_fingerprint: Sha256


class Order(Statement):
    """Something that the host tells one board to do. `sequence` rises from order to order of a board; an old number is a replay."""

    device_id: Identifier
    sequence: Annotated[int, Field(ge=1)]
    issued_at: float
    expires_at: float


class FetchOrder(Order):
    """Hold this artifact. `release` rises with every artifact that the host gives the same name, format and quantization; a board goes
    back to a lower one only where `downgrade` says so."""

    TYPE: ClassVar[str] = "application/vnd.joulemark.fetch.v1+json"

    manifest: Manifest
    release: Annotated[int, Field(ge=1)]
    downgrade: bool = False


class RunOrder(Order):
    """Evaluate this."""

    TYPE: ClassVar[str] = "application/vnd.joulemark.run.v1+json"

    spec: RunSpec


class RecordStatement(Statement):
    """A board says: this record is mine. `record_sha256` is over the record's bytes as they are sent."""

    TYPE: ClassVar[str] = "application/vnd.joulemark.record.v1+json"

    device_id: Identifier
    run_id: Identifier
    record_sha256: Sha256


class TicketStatement(Statement):
    """The host says to a board: whoever shows this may speak to you in this role. `nonce` is the board's own, used once."""

    TYPE: ClassVar[str] = "application/vnd.joulemark.ticket.v1+json"

    device_id: Identifier
    nonce: Sha256
    role: Literal["operator", "viewer"]
    who: Title


def read_envelope(data: bytes | str) -> Envelope:
    """An envelope from its JSON. Raises Untrusted for anything else; the signature is not checked here."""
    if len(data) > MAX_ENVELOPE_BYTES:
        raise Untrusted(f"a signed envelope of {len(data)} bytes is not taken", "envelopes have at most 4 MiB")
    try:
        return Envelope.model_validate_json(data)
    except (ValidationError, RecursionError) as error:
        raise Untrusted(
            "this is no signed envelope (DSSE)", "it was cut or altered on its way: fetch it again"
        ) from error


def write_envelope(envelope: Envelope) -> bytes:
    """The envelope's JSON."""
    return envelope.model_dump_json(by_alias=True).encode()


def plain(envelope: Envelope) -> dict[str, Any]:
    """The envelope as JSON values, to put into a larger answer."""
    return envelope.model_dump(mode="json", by_alias=True)


def to_base64(data: bytes) -> str:
    """Standard base64 with padding, as DSSE asks for."""
    return base64.b64encode(data).decode()


def from_base64(text: str) -> bytes:
    """The bytes; raises Untrusted."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Untrusted("the envelope is not valid base64", "it was altered on its way: fetch it again") from error
