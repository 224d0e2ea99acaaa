"""Who vouches for what: from the base model over adapters and quantizer to the artifact, the board, and the result.

Evidence is one file with everything that has to be checked and nothing that has to be fetched:

    host       the authority's certificate and the signing key; their fingerprint is the only thing to be known beforehand
    device     the host's word for the board's key (DeviceStatement)
    artifact   the host's order to hold this artifact, manifest and origin inside (FetchOrder)
    run        the host's order to evaluate it (RunOrder); null for a run that a person started on an open agent
    signature  the board's word for the record (RecordStatement)
    record     the record's text, byte for byte

All envelopes are DSSE. Pure: bytes in, links or an error out.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from pydantic import ValidationError

from joulemark import signing, tls
from joulemark.errors import BadInput, Untrusted
from joulemark.protocol import HostFacts
from joulemark.statements import (
    DeviceStatement,
    Envelope,
    FetchOrder,
    PublicKey,
    RecordStatement,
    RunOrder,
    from_base64,
    read_envelope,
)
from joulemark.wire import Manifest, RunRecord, Wire, content_id

MAX_EVIDENCE_BYTES = 96 << 20
MAX_HEADER = 8192


class Evidence(Wire):
    """The file. See the module."""

    host: HostFacts
    device: Envelope
    artifact: Envelope
    run: Envelope | None
    signature: Envelope
    record: str


@dataclass(frozen=True)
class Link:
    """One step of the chain: what it is, its digest, and who says so."""

    name: str
    sha256: str
    said_by: str


def read_evidence(data: bytes) -> Evidence:
    """Evidence from its JSON. Raises BadInput."""
    if len(data) > MAX_EVIDENCE_BYTES:
        raise BadInput(
            f"{len(data)} bytes are too many for evidence", "is this the file that `joulemark evidence` wrote?"
        )
    try:
        return Evidence.model_validate_json(data)
    except (ValidationError, RecursionError) as error:
        raise BadInput("this is no evidence", "`joulemark evidence RUN` writes it on the host") from error


def origin_links(manifest: Manifest) -> list[Link]:
    """The steps from the base to the artifact, by what the manifest says; its own id is the last."""
    said = "the exporter, in the manifest" if manifest.origin is not None else ""
    links = (
        [Link(step.name, step.sha256, said) for step in manifest.origin.steps] if manifest.origin is not None else []
    )
    name = f"artifact {manifest.name} {manifest.quantization}"
    return [*links, Link(name, content_id(manifest), "the manifest itself")]


def check(evidence: Evidence, fingerprint: str) -> tuple[list[Link], RunRecord]:
    """The links from the base to the result, each signed by who may say it. `fingerprint` is the host that is trusted.

    Raises Untrusted with the first link that does not hold, BadInput when the record cannot be read.
    """
    found = tls.fingerprint(evidence.host.authority_pem, evidence.host.signing_key)
    if found != fingerprint:
        raise Untrusted(f"the evidence is by the host {found}", f"not by {fingerprint}, whose word was asked for")
    host = f"host {found[:16]}"
    device = signing.opened(evidence.device, DeviceStatement, [evidence.host.signing_key])
    held = signing.opened(evidence.artifact, FetchOrder, [evidence.host.signing_key])
    body = evidence.record.encode()
    said = check_record(evidence.signature, body, None, device.device_id, device.public_key)
    try:
        record = RunRecord.model_validate_json(body)
    except ValidationError as error:
        raise BadInput("the record cannot be read", "agent and host must be of the same version") from error
    if held.device_id != device.device_id or record.device.device_id != device.device_id:
        raise Untrusted("artifact, record and board do not belong together", "the evidence was put together wrongly")
    artifact_id = content_id(held.manifest)
    if {record.spec.artifact_id, content_id(record.manifest)} != {artifact_id} or said.run_id != record.spec.run_id:
        raise Untrusted("the record is about another artifact or run", "the evidence was put together wrongly")
    loaded = record.engine.model_sha256 if record.engine is not None else None
    if loaded is not None and loaded not in {entry.sha256 for entry in held.manifest.files}:
        raise Untrusted("the engine loaded a file that is not the artifact's", "the board's store was tampered with")
    links = origin_links(held.manifest)
    links[-1] = Link(links[-1].name, artifact_id, host)
    links.append(Link(f"board {device.name} ({device.device_id})", signing.key_id(device.public_key), host))
    if evidence.run is not None:
        order = signing.opened(evidence.run, RunOrder, [evidence.host.signing_key])
        if order.device_id != device.device_id or order.spec != record.spec:
            raise Untrusted("the host ordered another run", "the evidence was put together wrongly")
        links.append(Link(f"run {record.spec.run_id}", hashlib.sha256(evidence.run.body()).hexdigest(), host))
    by = f"board {device.device_id}"
    links.append(Link(f"record of {record.spec.run_id}", said.record_sha256, by))
    return links, record


def check_record(
    envelope: Envelope, body: bytes, run_id: str | None, device_id: str, key: PublicKey
) -> RecordStatement:
    """The board's word for exactly these bytes (and this run, if one is named). Raises Untrusted."""
    said = signing.opened(envelope, RecordStatement, [key])
    if said.device_id != device_id or (run_id is not None and said.run_id != run_id):
        raise Untrusted(
            "the signature is about another run or board", "the record was mixed up on its way: send it again"
        )
    if said.record_sha256 != hashlib.sha256(body).hexdigest():
        raise Untrusted("the record is not the one that its board signed", "it was altered on its way: send it again")
    return said


def envelope_of(header: str | None) -> Envelope:
    """The envelope in the header of a record. Raises Untrusted when there is none."""
    if header is None or len(header) > MAX_HEADER:
        raise Untrusted("the record is not signed by its board", "update joulemark on the board")
    return read_envelope(from_base64(header))
