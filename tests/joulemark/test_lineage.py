"""Evidence holds only as a whole: every part that is exchanged for another valid one, and every altered byte, is noticed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from joulemark import tls
from joulemark.errors import BadInput, JoulemarkError, Untrusted
from joulemark.lineage import Evidence, check, origin_links, read_evidence
from joulemark.protocol import HostFacts
from joulemark.signing import SigningKey, key_id
from joulemark.statements import DeviceStatement, Envelope, FetchOrder, RecordStatement, RunOrder
from joulemark.wire import Manifest, Origin, RunRecord, Step, content_id
from joulemark_host import identity
from tests.fixtures.grids import PI, SMOL_Q8
from tests.fixtures.records import make_record

BOARD, OTHER = SigningKey(bytes(range(32))), SigningKey(bytes(32))
STEPS = (Step(name="checkpoint smollm2", sha256="1" * 64), Step(name="adapter law", sha256="2" * 64))
MANIFEST = SMOL_Q8.model_copy(
    update={"origin": Origin(steps=(*STEPS, Step(name="gptq", sha256="3" * 64)), recipe={}, tools={})}
)


class Host:
    """A host's keys, and the parts of an evidence that it signs; each can be made differently."""

    def __init__(self, folder: Path) -> None:
        self.who = identity.create(folder)
        self.facts = HostFacts(authority_pem=self.who.authority_pem, signing_key=self.who.key.public, version="test")

    def device(self, key: SigningKey = BOARD, **changes: Any) -> Envelope:
        fields = {"device_id": f"dev-{key_id(key.public)}", "name": "pi5", "public_key": key.public, "issued_at": 1.0}
        return self.who.key.sign(DeviceStatement.model_validate({**fields, **changes}))

    def artifact(self, manifest: Manifest = MANIFEST, key: SigningKey = BOARD) -> Envelope:
        times = {"sequence": 1, "issued_at": 1.0, "expires_at": 2.0}
        device_id = f"dev-{key_id(key.public)}"
        return self.who.key.sign(FetchOrder(device_id=device_id, manifest=manifest, release=1, **times))  # type: ignore[arg-type]

    def run(self, record: RunRecord, key: SigningKey = BOARD) -> Envelope:
        times = {"sequence": 2, "issued_at": 1.0, "expires_at": 2.0}
        return self.who.key.sign(RunOrder(device_id=f"dev-{key_id(key.public)}", spec=record.spec, **times))  # type: ignore[arg-type]


def make(run_id: str = "run-1", manifest: Manifest = MANIFEST, key: SigningKey = BOARD) -> RunRecord:
    device = PI.model_copy(update={"device_id": f"dev-{key_id(key.public)}"})
    record = make_record(run_id, device=device, manifest=manifest)
    assert record.engine is not None
    engine = record.engine.model_copy(update={"model_sha256": manifest.files[0].sha256})
    spec = record.spec.model_copy(update={"artifact_id": content_id(manifest)})
    return record.model_copy(update={"engine": engine, "spec": spec})


def signed(record: RunRecord, key: SigningKey = BOARD, run_id: str | None = None) -> tuple[str, Envelope]:
    text = record.model_dump_json()
    digest = hashlib.sha256(text.encode()).hexdigest()
    said = RecordStatement(
        device_id=f"dev-{key_id(key.public)}", run_id=run_id or record.spec.run_id, record_sha256=digest
    )
    return text, key.sign(said)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "identity")


@pytest.fixture
def evidence(host: Host) -> Evidence:
    record = make()
    text, signature = signed(record)
    return Evidence(
        host=host.facts,
        device=host.device(),
        artifact=host.artifact(),
        run=host.run(record),
        signature=signature,
        record=text,
    )


def test_the_chain_from_base_to_result(host: Host, evidence: Evidence):
    read = read_evidence(evidence.model_dump_json(by_alias=True).encode())
    links, record = check(read, host.who.fingerprint)
    assert record.spec.run_id == "run-1"
    names = [link.name for link in links]
    assert names[:3] == ["checkpoint smollm2", "adapter law", "gptq"]
    assert names[3].startswith("artifact smollm2") and names[4].startswith("board pi5")
    assert names[5:] == ["run run-1", "record of run-1"]
    assert [link.said_by[:4] for link in links[3:]] == ["host", "host", "host", "boar"]
    assert links[3].sha256 == content_id(MANIFEST)
    assert check(read.model_copy(update={"run": None}), host.who.fingerprint)[0][-1] == links[-1]


def test_another_host_is_not_believed(host: Host, evidence: Evidence, tmp_path: Path):
    stranger = Host(tmp_path / "stranger")
    with pytest.raises(Untrusted, match="by the host"):
        check(evidence, stranger.who.fingerprint)
    mixed = HostFacts(authority_pem=host.facts.authority_pem, signing_key=stranger.facts.signing_key, version="test")
    for facts in (stranger.facts, mixed):
        with pytest.raises(Untrusted):
            check(evidence.model_copy(update={"host": facts}), host.who.fingerprint)
    assert tls.fingerprint(mixed.authority_pem, mixed.signing_key) != host.who.fingerprint


def test_no_part_can_be_exchanged_for_another_valid_one(host: Host, evidence: Evidence, tmp_path: Path):
    other_manifest = SMOL_Q8.model_copy(update={"name": "other"})
    other_text, other_signature = signed(make("run-2"))
    foreign_text, foreign_signature = signed(make(manifest=other_manifest))
    swapped_engine = make().model_copy(
        update={"engine": make().engine.model_copy(update={"model_sha256": "9" * 64})}  # type: ignore[union-attr]
    )
    engine_text, engine_signature = signed(swapped_engine)
    stranger = Host(tmp_path / "stranger")
    for changes in (
        {"device": host.device(OTHER)},
        {"device": stranger.device()},
        {"artifact": host.artifact(other_manifest)},
        {"artifact": host.artifact(key=OTHER)},
        {"artifact": stranger.artifact()},
        {"run": host.run(make("run-2"))},
        {"run": host.run(make(), OTHER)},
        {"run": stranger.run(make())},
        {"signature": other_signature},
        {"signature": signed(make(), OTHER)[1]},
        {"signature": signed(make(), run_id="run-2")[1]},
        {"record": other_text},
        {"record": other_text, "signature": other_signature},
        {"record": foreign_text, "signature": foreign_signature},
        {"record": engine_text, "signature": engine_signature},
        {"record": evidence.record + " "},
        {"record": evidence.record.replace('"attempts":1', '"attempts":2')},
        {"device": evidence.artifact},
    ):
        with pytest.raises(Untrusted):
            check(evidence.model_copy(update=changes), host.who.fingerprint)


def test_every_altered_character_is_noticed(host: Host, evidence: Evidence):
    data = evidence.model_dump_json(by_alias=True)
    noticed = tried = 0
    for position in range(0, len(data), max(1, len(data) // 400)):
        bent = data[:position] + ("A" if data[position] != "A" else "B") + data[position + 1 :]
        tried += 1
        try:
            again = read_evidence(bent.encode())
            if again == evidence or again.model_copy(update={"host": evidence.host}) == evidence:
                continue  # in a field's name that is ignored, or the version: nothing that anybody vouches for
            check(again, host.who.fingerprint)
        except JoulemarkError:
            noticed += 1
    assert noticed > 0.9 * tried


@pytest.mark.parametrize("data", [b"", b"{}", b"[" * 100_000, b"\xff", json.dumps({"host": 1}).encode()])
def test_what_is_no_evidence_is_refused_in_words(data: bytes):
    with pytest.raises(BadInput):
        read_evidence(data)


def test_an_artifact_that_came_as_a_file_has_itself_alone():
    assert [link.sha256 for link in origin_links(SMOL_Q8)] == [content_id(SMOL_Q8)]
