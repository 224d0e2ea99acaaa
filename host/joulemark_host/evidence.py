"""Everything that is needed to check a result without asking anybody, put into one file."""

from __future__ import annotations

from joulemark import __version__
from joulemark.errors import NotFound, Untrusted
from joulemark.lineage import Evidence, check
from joulemark.protocol import HostFacts
from joulemark.statements import DeviceStatement, Envelope, read_envelope
from joulemark_host.dispatch import Dispatch
from joulemark_host.identity import HostIdentity
from joulemark_host.records import Records, parse_record
from joulemark_host.registry import Registry


def collect(identity: HostIdentity, registry: Registry, dispatch: Dispatch, records: Records, run_id: str) -> Evidence:
    """The evidence for a run's record, checked. Raises NotFound, Untrusted (the record came unsigned, or something does not hold)."""
    body, signature = records.raw(run_id), records.signature(run_id)
    if signature is None:
        raise Untrusted(
            f"the record of {run_id} was not signed by a board",
            "runs of enrolled boards are; an open agent signs nothing",
        )
    record = parse_record(body)
    device = registry.device(record.device.device_id)
    word = DeviceStatement(
        device_id=device.device_id,
        name=device.name,
        public_key=registry.public_key(device.device_id),
        issued_at=device.enrolled_at,
    )
    evidence = Evidence(
        host=HostFacts(authority_pem=identity.authority_pem, signing_key=identity.key.public, version=__version__),
        device=identity.key.sign(word),
        artifact=read_envelope(dispatch.fetch_order(device.device_id, record.spec.artifact_id)),
        run=_ordered(dispatch, run_id),
        signature=read_envelope(signature),
        record=body.decode(),
    )
    check(evidence, identity.fingerprint)
    return evidence


def _ordered(dispatch: Dispatch, run_id: str) -> Envelope | None:
    try:
        return read_envelope(dispatch.ordered(run_id))
    except NotFound:
        return None
