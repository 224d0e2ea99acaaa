"""Records that come from boards, over a network or on a stick: signed by the board that they are about, about what it was given."""

from __future__ import annotations

from joulemark.errors import Forbidden
from joulemark.lineage import check_record
from joulemark.statements import Envelope, write_envelope
from joulemark_host.dispatch import Dispatch
from joulemark_host.records import Origin, Records, parse_record
from joulemark_host.registry import Registry


def origin_of(
    envelope: Envelope, data: bytes, run_id: str, device_id: str, registry: Registry, dispatch: Dispatch
) -> Origin:
    """What is known of a record's origin once its signature was checked. Raises Untrusted, NotFound."""
    check_record(envelope, data, run_id, device_id, registry.public_key(device_id))
    return Origin(device_id, write_envelope(envelope), lambda artifact_id: dispatch.issued(device_id, artifact_id))


def receive(data: bytes, envelope: Envelope, records: Records, registry: Registry, dispatch: Dispatch) -> bool:
    """Takes a record that somebody brought for a board; whether it is new. Raises what `Records.put` raises, Untrusted, Forbidden."""
    record = parse_record(data, records.max_record_bytes)
    run_id, device = record.spec.run_id, registry.device(record.device.device_id)
    if device.admission != "approved":
        raise Forbidden(f"the board {device.name!r} is {device.admission}", "`joulemark devices` says why")
    created = records.put(data, run_id, origin_of(envelope, data, run_id, device.device_id, registry, dispatch))
    wanted = record.pack.size if record.spec.limit is None else min(record.pack.size, record.spec.limit)
    dispatch.settle(run_id, (len(record.items), wanted))
    return created == "created"
