"""Who vouches for what: a record by its board, the board and the artifact by the host. Pure: envelopes and keys in, words out."""

from __future__ import annotations

import hashlib

from joulemark import signing
from joulemark.errors import Untrusted
from joulemark.statements import Envelope, PublicKey, RecordStatement, from_base64, read_envelope

MAX_HEADER = 8192


def envelope_of(header: str | None) -> Envelope:
    """The envelope in the header of a record. Raises Untrusted when there is none."""
    if header is None or len(header) > MAX_HEADER:
        raise Untrusted("the record is not signed by its board", "update joulemark on the board")
    return read_envelope(from_base64(header))


def check_record(envelope: Envelope, body: bytes, run_id: str, device_id: str, key: PublicKey) -> RecordStatement:
    """The board's word for exactly these bytes. Raises Untrusted."""
    said = signing.opened(envelope, RecordStatement, [key])
    if (said.device_id, said.run_id) != (device_id, run_id):
        raise Untrusted(
            "the signature is about another run or board", "the record was mixed up on its way: send it again"
        )
    if said.record_sha256 != hashlib.sha256(body).hexdigest():
        raise Untrusted("the record is not the one that its board signed", "it was altered on its way: send it again")
    return said
