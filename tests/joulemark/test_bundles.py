"""A stick is hostile until it was read with bounds: links, pipes, giants, strange names; what is there is whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from joulemark.bundles import Bundle, BundleFacts, Result
from joulemark.errors import BadInput, NotFound, Untrusted
from joulemark.signing import SigningKey
from joulemark.statements import MAX_ENVELOPE_BYTES, RecordStatement

KEY = SigningKey(bytes(32))
FACTS = BundleFacts(device_id="dev-1", device="pi5", host_key="k")
ENVELOPE = KEY.sign(RecordStatement(device_id="dev-1", run_id="r", record_sha256="a" * 64))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle(tmp_path / "stick")


def test_everything_comes_back_in_the_order_of_its_numbers(bundle: Bundle):
    for number in (12, 3, 100):
        bundle.write_order(number, ENVELOPE)
        bundle.write_result(Result(number, b"record %d" % number, ENVELOPE))
    bundle.write_facts(FACTS)
    assert bundle.facts() == FACTS
    assert [number for number, _ in bundle.orders()] == [3, 12, 100]
    assert [(number, bundle.result(number, 100).body) for number in bundle.results()] == [
        (3, b"record 3"),
        (12, b"record 12"),
        (100, b"record 100"),
    ]
    assert bundle.has_result(3) and not bundle.has_result(4)
    bundle.clear_orders()
    assert list(bundle.orders()) == [] and len(bundle.results()) == 3
    with pytest.raises(NotFound):
        bundle.facts()


def test_names_are_plain_enough_for_every_file_system(bundle: Bundle):
    bundle.write_order(1, ENVELOPE)
    bundle.write_result(Result(1, b"x", ENVELOPE))
    bundle.write_facts(FACTS)
    names = [path.name for path in bundle.folder.rglob("*") if path.is_file()]
    assert all(name == name.lower() and len(name) < 64 and not set(name) & set('<>:"\\|?*') for name in names)


def test_what_does_not_belong_there_is_left_alone(bundle: Bundle):
    bundle.write_order(1, ENVELOPE)
    for name in ("2.json", "000000000002.JSON", "000000000002.json.part", "..json", "System Volume Information"):
        (bundle.folder / "orders" / name).write_bytes(b"{")
    assert [number for number, _ in bundle.orders()] == [1]


@pytest.mark.parametrize("name", ["../../etc/passwd", "a" * 63, "A" * 64, "", "a" * 64 + "/x"])
def test_only_a_digest_names_a_file(bundle: Bundle, name: str):
    for path in (bundle.file, bundle.pack):
        with pytest.raises(BadInput):
            path(name)


def test_links_pipes_and_giants_are_not_read(bundle: Bundle, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    folder = bundle.folder / "files"
    folder.mkdir(parents=True)
    (folder / ("a" * 64)).symlink_to(secret)
    os.mkfifo(folder / ("b" * 64))
    (folder / ("c" * 64)).mkdir()
    for digest in ("a" * 64, "b" * 64, "c" * 64):
        with pytest.raises((BadInput, OSError)):
            next(bundle.blocks(digest, 0))
    bundle.write_result(Result(1, bytes(1000), ENVELOPE))
    with pytest.raises(BadInput, match="more than 999"):
        bundle.result(1, 999)
    bundle.write_order(5, ENVELOPE)
    (bundle.folder / "orders" / "000000000005.json").write_bytes(b" " * (MAX_ENVELOPE_BYTES + 1))
    with pytest.raises(BadInput):
        list(bundle.orders())


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\x80\x04pickle", b"[" * 60_000, b'{"format": 2}'])
def test_what_is_no_label_no_order_no_request_is_said_so(bundle: Bundle, body: bytes):
    (bundle.folder / "orders").mkdir(parents=True)
    (bundle.folder / "enrolment").mkdir()
    (bundle.folder / "bundle.json").write_bytes(body)
    (bundle.folder / "orders" / "000000000001.json").write_bytes(body)
    for name in ("request", "answer"):
        (bundle.folder / "enrolment" / f"{name}.json").write_bytes(body)
    for read in (bundle.facts, bundle.request, bundle.answer):
        with pytest.raises(BadInput):
            read()
    with pytest.raises(Untrusted):
        list(bundle.orders())


def test_a_record_without_its_signature_is_not_there(bundle: Bundle):
    bundle.write_result(Result(1, b"x", ENVELOPE))
    (bundle.folder / "results" / "000000000001.signature").unlink()
    with pytest.raises(NotFound):
        bundle.result(1, 100)
