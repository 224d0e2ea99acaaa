"""Ed25519 keys in files, and signing and checking envelopes with them.

The cryptography is libsodium's, through PyNaCl (one megabyte in a board's memory, where `cryptography` takes eight); it is imported when
a key is first needed, so that programs without keys do not need it. Key files are PKCS #8 in PEM (RFC 8410), which openssl reads:
`openssl pkey -in signing.key -text`. What is signed is DSSE's pre-authentication encoding. Not aware of who the keys belong to.
"""

from __future__ import annotations

import base64
import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from joulemark.durable import replace_file, synchronise_folder
from joulemark.errors import BadInput, Conflict, MissingExtra, NotFound, Untrusted
from joulemark.statements import Envelope, PublicKey, Signature, Statement, from_base64, to_base64
from joulemark.wire import canonical_json

# RFC 8410, section 7: version, the algorithm 1.3.101.112 (Ed25519), and an octet string in an octet string of 32 bytes.
_PKCS8_PREFIX = bytes.fromhex("302e020100300506032b657004220420")
_PEM_BEGIN, _PEM_END = "-----BEGIN PRIVATE KEY-----", "-----END PRIVATE KEY-----"
_MAX_KEY_FILE = 4096

Said = TypeVar("Said", bound=Statement)


class SigningKey:
    """A private key. Its text never appears in `repr`, so that no log line can hold it."""

    def __init__(self, seed: bytes) -> None:
        self._key = _nacl().SigningKey(seed)
        self.public: PublicKey = bytes(self._key.verify_key).hex()

    def __repr__(self) -> str:
        return f"SigningKey(public={self.public})"

    def sign(self, statement: Statement) -> Envelope:
        """The statement in an envelope with one signature."""
        body = canonical_json(statement)
        signature = self._key.sign(_encoding(statement.TYPE, body)).signature
        signed = Signature(keyid=key_id(self.public), sig=to_base64(signature))
        return Envelope(payload_type=statement.TYPE, payload=to_base64(body), signatures=(signed,))

    def pem(self) -> str:
        """The key as PKCS #8 in PEM, for programs that read files."""
        text = base64.b64encode(_PKCS8_PREFIX + bytes(self._key)).decode()
        return f"{_PEM_BEGIN}\n{text}\n{_PEM_END}\n"


def key_id(public: PublicKey) -> str:
    """A short name for a public key: the first 16 digits of its sha256."""
    return hashlib.sha256(bytes.fromhex(public)).hexdigest()[:16]


def create_key(path: Path) -> SigningKey:
    """A new key in a new file that only its owner can read (mode 0600). Raises Conflict when the file is there."""
    key = SigningKey(os.urandom(32))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError as error:
        raise Conflict(f"there is a key in {path} already", "a key is never overwritten: move it away first") from error
    with os.fdopen(descriptor, "w") as file:
        file.write(key.pem())
        file.flush()
        os.fsync(file.fileno())
    synchronise_folder(path.parent)
    return key


def read_key(path: Path) -> SigningKey:
    """The key in a file. Raises NotFound, or BadInput when others can read it or it is no Ed25519 key."""
    try:
        with path.open("rb") as file:
            readable_by = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(_MAX_KEY_FILE + 1)
    except FileNotFoundError as error:
        raise NotFound(f"there is no key in {path}", "it is made when this machine is set up") from error
    if readable_by & 0o077:
        raise BadInput(f"the key {path} can be read by others (mode {readable_by:04o})", f"chmod 600 {path}")
    lines = data.decode("ascii", "replace").split()
    try:
        text = "".join(lines[3:-3]) if " ".join(lines[:3]) == _PEM_BEGIN else ""
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        raw = b""
    if len(data) > _MAX_KEY_FILE or len(raw) != len(_PKCS8_PREFIX) + 32 or not raw.startswith(_PKCS8_PREFIX):
        raise BadInput(f"{path} is no Ed25519 key in PKCS #8", "restore it from a copy, or set this machine up again")
    return SigningKey(raw[len(_PKCS8_PREFIX) :])


def write_secret(path: Path, text: str) -> None:
    """Replaces a file that only its owner may read, durably."""
    replace_file(path, [text.encode()], mode=0o600)


def opened(envelope: Envelope, kind: type[Said], trusted: Iterable[PublicKey]) -> Said:
    """The statement in an envelope that one of the `trusted` keys signed.

    Raises Untrusted for another kind of statement, for a signature that none of these keys made, and for a payload that is not what its
    type says.
    """
    if envelope.payload_type != kind.TYPE:
        raise Untrusted(
            f"a {kind.__name__} was expected, the envelope holds {envelope.payload_type!r}",
            "a signature counts only for what it was made for",
        )
    body = envelope.body()
    message = _encoding(kind.TYPE, body)
    if not any(_made_by(public, signature, message) for public in trusted for signature in envelope.signatures):
        raise Untrusted(
            f"the signature of this {kind.__name__} is not by a key that counts here",
            "it was altered, or comes from another host or board: enrol again if the host's key has changed",
        )
    try:
        return kind.model_validate_json(body)
    except (ValidationError, RecursionError) as error:
        raise Untrusted(
            f"a signed {kind.__name__} cannot be read",
            "agent and host must be of the same version: update the older one",
        ) from error


def _made_by(public: PublicKey, signature: Signature, message: bytes) -> bool:
    nacl = _nacl()
    sig = from_base64(signature.sig)
    if len(sig) != 64:
        return False
    try:
        nacl.VerifyKey(bytes.fromhex(public)).verify(message, sig)
    except nacl.exc.BadSignatureError:
        return False
    return True


def _encoding(payload_type: str, body: bytes) -> bytes:
    """DSSE's pre-authentication encoding (PAE)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(body), body)


def _nacl() -> Any:
    try:
        import nacl.signing
    except ImportError as error:
        raise MissingExtra(
            "signatures need PyNaCl, which is not installed", "pip install 'joulemark[agent]'"
        ) from error
    return nacl.signing
