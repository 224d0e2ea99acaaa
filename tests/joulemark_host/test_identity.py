"""The host's identity: whole or not there, readable by its owner only, and certificates that hold whatever the clock and the address."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import threading
from pathlib import Path

import pytest
from cryptography import x509

from joulemark import tls
from joulemark.errors import BadInput, Conflict, NotFound
from joulemark.signing import SigningKey, create_key
from joulemark_host import identity


def handshake(certificate: Path, key: Path, client: ssl.SSLContext) -> str:
    """The TLS version that both sides agree on over a real socket; raises what the client raises."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            try:
                context.wrap_socket(connection, server_side=True).close()
            except (ssl.SSLError, OSError):
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            # The address is given as HTTP clients give it: the pinned context has to check its own name all the same.
            plain = socket.create_connection(listener.getsockname())
            with plain, client.wrap_socket(plain, server_hostname="127.0.0.1") as secured:
                return str(secured.version())
        finally:
            thread.join()


def test_it_is_made_once_and_for_its_owner_alone(tmp_path: Path):
    folder = tmp_path / "host" / "identity"
    with pytest.raises(NotFound, match="host init"):
        identity.read(folder)
    made = identity.create(folder)
    assert identity.read(folder).fingerprint == made.fingerprint
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(Conflict):
        identity.create(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["identity"]
    assert folder.stat().st_mode & 0o077 == 0
    for name in ("signing.key", "authority.key"):
        assert (folder / name).stat().st_mode & 0o077 == 0
    assert identity.create(tmp_path / "another").fingerprint != made.fingerprint


def test_the_fingerprint_covers_both_keys(tmp_path: Path):
    one, two = identity.create(tmp_path / "one"), identity.create(tmp_path / "two")
    mixed = {tls.fingerprint(a.authority_pem, b.key.public) for a in (one, two) for b in (one, two)}
    assert len(mixed) == 4 and {one.fingerprint, two.fingerprint} < mixed


def test_an_interrupted_init_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(identity, "replace_file", full)
    with pytest.raises(OSError, match="No space"):
        identity.create(tmp_path / "identity")
    assert list(tmp_path.iterdir()) == []


def test_boards_check_the_host_by_its_name_and_not_by_its_address(tmp_path: Path):
    host, stranger = identity.create(tmp_path / "host"), identity.create(tmp_path / "stranger")
    for who in (host, stranger):
        identity.certify_server(who, [])
    assert handshake(host.server_file, host.server_file, tls.pinned(host.authority_pem, tls.HOST_NAME)) == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(stranger.server_file, stranger.server_file, tls.pinned(host.authority_pem, tls.HOST_NAME))
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(host.server_file, host.server_file, tls.pinned(host.authority_pem, "dev-1.joulemark.internal"))


def test_a_board_cannot_pose_as_the_host_nor_as_another_board(tmp_path: Path):
    host = identity.create(tmp_path / "host")
    key = create_key(tmp_path / "tls.key")
    (tmp_path / "tls.pem").write_text(identity.certify_device(host, "dev-1", key.public))
    files = (tmp_path / "tls.pem", tmp_path / "tls.key")
    assert handshake(*files, tls.pinned(host.authority_pem, tls.device_name("dev-1"))) == "TLSv1.3"
    assert handshake(*files, tls.pinned(host.authority_pem, None)) == "TLSv1.3"
    for name in (tls.HOST_NAME, tls.device_name("dev-2")):
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(*files, tls.pinned(host.authority_pem, name))


def test_a_board_cannot_certify_others(tmp_path: Path):
    host = identity.create(tmp_path / "host")
    pem = identity.certify_device(host, "dev-1", SigningKey(bytes(32)).public)
    shown = x509.load_pem_x509_certificate(pem.encode())
    constraints = shown.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical and not constraints.value.ca


def test_certificates_hold_at_a_boards_clock_of_1970_and_in_a_century(tmp_path: Path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: apt-get install openssl")
    host = identity.create(tmp_path / "host")
    identity.certify_server(host, ["192.0.2.7"])
    for when in ("1", "4102444800"):
        command = ["openssl", "verify", "-attime", when, "-CAfile", str(host.folder / "authority.pem")]
        done = subprocess.run([*command, str(host.server_file)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_servers_certificate_is_made_anew_only_for_new_addresses(tmp_path: Path):
    host = identity.create(tmp_path / "host")
    identity.certify_server(host, ["192.0.2.7", "workstation"])
    first = host.server_file.read_bytes()
    identity.certify_server(host, ["workstation"])
    assert host.server_file.read_bytes() == first
    identity.certify_server(host, ["192.0.2.8"])
    assert host.server_file.read_bytes() != first
    assert host.server_file.stat().st_mode & 0o077 == 0


def test_a_damaged_or_half_written_certificate_is_made_anew(tmp_path: Path):
    host = identity.create(tmp_path / "host")
    identity.certify_server(host, ["workstation"])
    whole = host.server_file.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole.replace(b"PRIVATE", b"PUBLIC"), b"nonsense"):
        host.server_file.write_bytes(damaged)
        identity.certify_server(host, ["workstation"])
        pinned = tls.pinned(host.authority_pem, tls.HOST_NAME)
        assert handshake(host.server_file, host.server_file, pinned) == "TLSv1.3"


def test_what_is_no_key_gets_no_certificate(tmp_path: Path):
    host = identity.create(tmp_path / "host")
    with pytest.raises(BadInput):
        identity.certify_device(host, "dev-1", "ab" * 31)
    os.truncate(host.folder / "authority.pem", 10)
    with pytest.raises(BadInput):
        identity.read(host.folder)
