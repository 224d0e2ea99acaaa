"""TLS between a host and its boards: the host's own certificate authority is the only one that counts, under fixed names.

Addresses change (DHCP, NAT, a laptop in another room), so that certificates are checked against a name that stands for the peer and not
for its address: `HOST_NAME`, or `device_name(device_id)`. A board's clock may say 1970: the certificates are valid at any time, and are
ended by revoking the board at the host, or by a new authority. Standard library only; making certificates is the host's affair.
"""

from __future__ import annotations

import hashlib
import ssl
from typing import Any

from joulemark.errors import BadInput
from joulemark.statements import PublicKey
from joulemark.wire import Identifier

# ".internal" is set aside for private use (ICANN, 2024): no public name can ever collide.
HOST_NAME = "host.joulemark.internal"


def device_name(device_id: Identifier) -> str:
    """The name in a board's certificate. Dots and underscores cannot stand in one label of a name."""
    return f"{device_id.lower().replace('.', '-').replace('_', '-')}.joulemark.internal"


def fingerprint(authority_pem: str, signing_key: PublicKey) -> str:
    """sha256 over the authority's certificate and the host's signing key: what an enrolment key pins, both at once."""
    return hashlib.sha256(_der(authority_pem) + bytes.fromhex(signing_key)).hexdigest()


def why_silent(error: Exception, url: str) -> str:
    """Why nobody answered at `url`, in words: that one side speaks TLS and the other does not is not to be guessed from OpenSSL's."""
    text = str(error) or type(error).__name__
    if "WRONG_VERSION_NUMBER" in text or "RECORD_LAYER_FAILURE" in text:
        return f"what answers there speaks plain HTTP: say http:// instead of https:// ({text})"
    if url.startswith("http://") and type(error).__name__ == "RemoteProtocolError":
        return f"the connection was closed without an answer: it may want https:// ({text})"
    return text


def pinned(authority_pem: str, name: str | None) -> ssl.SSLContext:
    """A client's context that trusts this authority and no other, and takes only the peer called `name`, whatever its address.

    None: any peer that the authority certified.
    """
    _der(authority_pem)
    context = _Named(ssl.PROTOCOL_TLS_CLIENT)
    context.name = name
    context.check_hostname = name is not None
    context.minimum_version = ssl.TLSVersion.TLSv1_3  # both ends are ours
    context.load_verify_locations(cadata=authority_pem)
    return context


class _Named(ssl.SSLContext):
    """Asks for, and checks, one name; HTTP clients would give the address from the URL."""

    name: str | None

    def wrap_socket(self, *arguments: Any, **options: Any) -> ssl.SSLSocket:
        return super().wrap_socket(*arguments, **{**options, "server_hostname": self.name})

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        return super().wrap_bio(incoming, outgoing, server_side, self.name, session)


def unverified() -> ssl.SSLContext:
    """A client's context that takes any certificate: only to ask for the identity that a fingerprint then confirms."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _der(authority_pem: str) -> bytes:
    """The one certificate's bytes. Raises BadInput."""
    try:
        return ssl.PEM_cert_to_DER_cert(authority_pem.strip())
    except ValueError as error:
        raise BadInput("the host's certificate cannot be read", "is that the address of a Joulemark host?") from error
