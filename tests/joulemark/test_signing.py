"""Envelopes are DSSE as others read it, keys are files that openssl reads, and nothing that was altered or mixed up passes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope as TheirEnvelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import SSlibKey

from joulemark import signing
from joulemark.errors import BadInput, Conflict, NotFound, Untrusted
from joulemark.signing import SigningKey, create_key, opened, read_key
from joulemark.statements import (
    DeviceStatement,
    Envelope,
    TicketStatement,
    from_base64,
    read_envelope,
    to_base64,
    write_envelope,
)

KEY = SigningKey(bytes(range(32)))
OTHER = SigningKey(bytes(32))
SAID = DeviceStatement(device_id="dev-1", name="Pi", public_key="ab" * 32, issued_at=1.5)


def changed(envelope: Envelope, **values: object) -> Envelope:
    return Envelope.model_validate({**envelope.model_dump(by_alias=False), **values})


def test_the_encoding_is_the_specifications_own_example():
    assert signing._encoding("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_an_independent_implementation_reads_and_verifies_our_envelopes():
    data = json.loads(write_envelope(KEY.sign(SAID)))
    theirs = TheirEnvelope.from_dict(data)
    key = SSlibKey(signing.key_id(KEY.public), "ed25519", "ed25519", {"public": KEY.public})
    accepted = theirs.verify([key], threshold=1)
    assert list(accepted) == [signing.key_id(KEY.public)]
    assert json.loads(theirs.payload) == SAID.model_dump(mode="json")
    data = json.loads(write_envelope(KEY.sign(SAID)))
    data["payload"] = to_base64(theirs.payload.replace(b"Pi", b"Xi"))
    with pytest.raises(VerificationError):
        TheirEnvelope.from_dict(data).verify([key], threshold=1)


def test_what_was_signed_comes_back_and_one_of_several_keys_is_enough():
    envelope = read_envelope(write_envelope(KEY.sign(SAID)))
    assert opened(envelope, DeviceStatement, [OTHER.public, KEY.public]) == SAID
    for trusted in ([], [OTHER.public]):
        with pytest.raises(Untrusted, match="signature"):
            opened(envelope, DeviceStatement, trusted)


def test_nothing_altered_passes():
    envelope = KEY.sign(SAID)
    body, signature = envelope.body(), envelope.signatures[0]
    raw = from_base64(signature.sig)
    for position in range(len(body)):
        bent = body[:position] + bytes([body[position] ^ 1]) + body[position + 1 :]
        with pytest.raises(Untrusted):
            opened(changed(envelope, payload=to_base64(bent)), DeviceStatement, [KEY.public])
    for bent in (raw[:-1], raw + b"x", b"", bytes(64), raw[:10] + bytes([raw[10] ^ 8]) + raw[11:]):
        wrong = signature.model_copy(update={"sig": to_base64(bent)})
        with pytest.raises(Untrusted):
            opened(changed(envelope, signatures=(wrong,)), DeviceStatement, [KEY.public])


def test_a_signature_counts_for_one_kind_of_statement_only():
    ticket = TicketStatement(device_id="dev-1", nonce="0" * 64, role="viewer", who="ann")
    envelope = KEY.sign(ticket)
    with pytest.raises(Untrusted, match="was expected"):
        opened(envelope, DeviceStatement, [KEY.public])
    # Relabelled, the signature no longer fits; with a good signature over the wrong content, the content does not.
    with pytest.raises(Untrusted, match="signature"):
        opened(changed(envelope, payload_type=DeviceStatement.TYPE), DeviceStatement, [KEY.public])


@given(st.binary(max_size=300))
def test_bytes_from_strangers_are_refused_in_words(data: bytes):
    with pytest.raises(Untrusted):
        read_envelope(data)


@given(st.dictionaries(st.sampled_from(["payload", "payloadType", "signatures", "x"]), st.text() | st.lists(st.text())))
def test_json_from_strangers_is_refused_in_words(value: dict[str, object]):
    with pytest.raises(Untrusted):
        opened(read_envelope(json.dumps(value)), DeviceStatement, [KEY.public])


def test_an_envelope_that_is_too_large_or_too_deep_is_not_parsed():
    for data in (b" " * (5 << 20), b"[" * 100_000, b'{"payload":' * 50_000):
        with pytest.raises(Untrusted):
            read_envelope(data)


def test_keys_are_files_for_their_owner_alone_and_never_overwritten(tmp_path: Path):
    path = tmp_path / "deep" / "signing.key"
    key = create_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_key(path).public == key.public
    with pytest.raises(Conflict):
        create_key(path)
    assert read_key(path).public == key.public
    assert create_key(tmp_path / "another.key").public != key.public
    path.chmod(0o640)
    with pytest.raises(BadInput, match="chmod 600"):
        read_key(path)
    with pytest.raises(NotFound):
        read_key(tmp_path / "none.key")
    for text in ("", "x", key.pem().replace("MC4", "MC5"), key.pem()[:60], key.pem() * 100):
        path.write_text(text)
        path.chmod(0o600)
        with pytest.raises(BadInput):
            read_key(path)


def test_openssl_reads_our_key_files(tmp_path: Path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: apt-get install openssl")
    path = tmp_path / "signing.key"
    key = create_key(path)
    command = ["openssl", "pkey", "-in", str(path), "-pubout", "-outform", "DER"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout[-32:].hex() == key.public


def test_a_key_hides_from_logs():
    seed = os.urandom(32)
    key = SigningKey(seed)
    assert seed.hex() not in repr(key) and key.public in repr(key)
