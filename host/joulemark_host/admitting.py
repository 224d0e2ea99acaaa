"""Taking a board in, however its request came (over the network, on a stick), and the answer that makes it belong here."""

from __future__ import annotations

from joulemark import __version__
from joulemark.protocol import EnrolmentAnswer, EnrolmentRequest, HostFacts
from joulemark.statements import DeviceStatement
from joulemark_host.identity import HostIdentity, certify_device
from joulemark_host.registry import Registry


def facts_of(identity: HostIdentity) -> HostFacts:
    """Who this host is."""
    return HostFacts(authority_pem=identity.authority_pem, signing_key=identity.key.public, version=__version__)


def take_in(identity: HostIdentity, registry: Registry, asked: EnrolmentRequest, address: str) -> EnrolmentAnswer:
    """Enrols a board. Raises what `Registry.enrol` raises."""
    device, credential, claimed = registry.enrol(asked, address)
    said = DeviceStatement(
        device_id=device.device_id, name=device.name, public_key=claimed.public_key, issued_at=device.enrolled_at
    )
    return EnrolmentAnswer(
        device_id=device.device_id,
        name=device.name,
        admission=device.admission,
        credential=credential.text(),
        host=facts_of(identity),
        certificate_pem=certify_device(identity, device.device_id, claimed.tls_public_key),
        device=identity.key.sign(said),
    )
