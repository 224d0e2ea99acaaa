"""Who this host is: its signing key and its certificate authority, in a folder that only its owner can read.

    signing.key     Ed25519: signs what boards are told (`joulemark.signing`)
    authority.key   the certificate authority's key (P-256, which browsers know too)
    authority.pem   its certificate: boards and people trust this one and no other
    server.pem      what the host shows on its socket, certificate and key in one file so that they always belong together; made anew when
                    its addresses change

Made once by `joulemark host init`. Certificates are valid at any time, because a board's clock may say 1970; they are ended by revoking.
Not aware of who enrols.
"""

from __future__ import annotations

import datetime
import ipaddress
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from joulemark import tls
from joulemark.durable import replace_file, synchronise_folder
from joulemark.errors import BadInput, Conflict, NotFound
from joulemark.signing import SigningKey, create_key, read_key
from joulemark.statements import PublicKey
from joulemark.wire import Sha256

ALWAYS = (datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc), datetime.datetime(9999, 12, 31, 23, 59, 59))
"""From the beginning of Unix time to the date that RFC 5280 (4.1.2.5) gives to certificates without an end."""


@dataclass(frozen=True)
class HostIdentity:
    """An initialised host. `fingerprint` is what enrolment keys pin."""

    folder: Path
    key: SigningKey
    authority_pem: str
    fingerprint: Sha256

    @property
    def server_file(self) -> Path:
        """Certificate and key of the host's socket."""
        return self.folder / "server.pem"


def exists(folder: Path) -> bool:
    """Whether `joulemark host init` was done for this folder."""
    return folder.is_dir()


def create(folder: Path) -> HostIdentity:
    """A new identity; whole or not there. Raises Conflict when there is one: its boards trust it, so it is never overwritten."""
    if folder.exists():
        raise Conflict(f"this host has its identity in {folder} already", "its boards trust it: nothing was changed")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.part-", dir=folder.parent))
    try:
        create_key(temporary / "signing.key")
        authority = ec.generate_private_key(ec.SECP256R1())
        replace_file(temporary / "authority.key", [_private_pem(authority)], mode=0o600)
        replace_file(temporary / "authority.pem", [_authority_certificate(authority)])
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    synchronise_folder(folder.parent)
    return read(folder)


def read(folder: Path) -> HostIdentity:
    """The identity in a folder. Raises NotFound before `joulemark host init`, BadInput for a damaged one."""
    if not folder.is_dir():
        raise NotFound(f"this host has no identity in {folder}", "`joulemark host init` makes one, once")
    key = read_key(folder / "signing.key")
    try:
        authority_pem = (folder / "authority.pem").read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"the certificate in {folder} cannot be read: {error}", "restore the folder from a copy"
        ) from error
    return HostIdentity(folder, key, authority_pem, tls.fingerprint(authority_pem, key.public))


def certify_server(identity: HostIdentity, names: Collection[str]) -> None:
    """Makes the socket's certificate for `names` (host names and addresses, for browsers; boards check a fixed name)."""
    wanted = _names([tls.HOST_NAME, *names])
    if _shown_names(identity.server_file) >= set(wanted):
        return
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _leaf(identity, key.public_key(), tls.HOST_NAME, wanted)
    replace_file(identity.server_file, [certificate, _private_pem(key)], mode=0o600)


def _shown_names(path: Path) -> set[x509.GeneralName]:
    """The names in the certificate that is there; none where there is none, or one that is damaged."""
    try:
        shown = x509.load_pem_x509_certificate(path.read_bytes())
        serialization.load_pem_private_key(path.read_bytes(), None)
        return set(shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except (FileNotFoundError, ValueError, x509.ExtensionNotFound):
        return set()


def certify_device(identity: HostIdentity, device_id: str, tls_public_key: PublicKey) -> str:
    """The certificate (PEM) that a board shows on its own socket."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(tls_public_key))
    except ValueError as error:
        raise BadInput("the board's key for TLS is no Ed25519 key", "update joulemark on the board") from error
    name = tls.device_name(device_id)
    return _leaf(identity, key, name, _names([name])).decode()


def _authority_certificate(key: ec.EllipticCurvePrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Joulemark host authority")])
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    built = (
        _builder(name, name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    return built.public_bytes(serialization.Encoding.PEM)


def _leaf(
    identity: HostIdentity,
    public_key: ec.EllipticCurvePublicKey | Ed25519PublicKey,
    common_name: str,
    names: list[x509.GeneralName],
) -> bytes:
    authority = x509.load_pem_x509_certificate(identity.authority_pem.encode())
    key = serialization.load_pem_private_key((identity.folder / "authority.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])
    built = (
        _builder(authority.subject, subject, public_key)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return built.public_bytes(serialization.Encoding.PEM)


def _builder(
    issuer: x509.Name, subject: x509.Name, public_key: ec.EllipticCurvePublicKey | Ed25519PublicKey
) -> x509.CertificateBuilder:
    begin, end = ALWAYS
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _names(texts: Collection[str]) -> list[x509.GeneralName]:
    names: dict[x509.GeneralName, None] = {}
    for text in texts:
        try:
            names[x509.IPAddress(ipaddress.ip_address(text.strip("[]")))] = None
        except ValueError:
            names[x509.DNSName(text)] = None
    return list(names)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
