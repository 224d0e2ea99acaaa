"""Boards follow their host's queue, all real processes over TLS: pushed to, run, swept, cancelled; through restarts and lost leases."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from joulemark.errors import Untrusted
from joulemark.signing import SigningKey, opened
from joulemark.statements import FetchOrder, RecordStatement, RunOrder, read_envelope, write_envelope
from joulemark.wire import RunRecord, RunSpec, content_id
from joulemark_agent import identity as agent_identity
from joulemark_host.client import AgentClient
from joulemark_host.evaluation import Subject, push, run_task
from tests.fixtures.agent_process import AgentProcess
from tests.fixtures.fleet import enrolled, make_subject
from tests.fixtures.host_process import HostProcess, wait_until

QUICK = {"backend": "fake", "idle_s": 0.5, "cooldown_s": 0.0}


@pytest.fixture
def host(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[HostProcess]:
    running = HostProcess(tmp_path / "host", *getattr(request, "param", ()))
    yield running
    running.close()


@pytest.fixture
def board(host: HostProcess, tmp_path: Path) -> Iterator[AgentProcess]:
    agent = enrolled(host, tmp_path / "board", JOULEMARK_FAKE_FAULT="slow:0.1")
    yield agent
    agent.stop()


def joulemark(host: HostProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "joulemark", *arguments, "--data", str(host.data)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def queue(host: HostProcess, subject: Subject, run_id: str, device: str = "board", **changes: object) -> RunSpec:
    fields = {"artifact_id": subject.artifact_id, "pack_id": subject.packs["arc_challenge"], **QUICK, **changes}
    spec = RunSpec.model_validate({"run_id": run_id, **fields})
    host.dispatch.queue(host.registry.device(device).device_id, spec, subject.manifest)
    return spec


def status(host: HostProcess, run_id: str) -> str:
    """Done only with its record: a report may say so before, and the record comes on a way of its own."""
    said = host.dispatch.runs(run_ids=[run_id])[0].status
    recorded = said != "done" or any(run.run_id == run_id for run in host.records.facts())
    return said if recorded else "done, and not recorded yet"


def test_pushed_by_name_and_run_by_name(host: HostProcess, board: AgentProcess, tmp_path: Path):
    subject = make_subject(host, tmp_path / "files")
    pushed = joulemark(host, "push", "tiny", "--to", "board", "--json")
    assert pushed.returncode == 0, pushed.stderr
    (target,) = json.loads(pushed.stdout)
    assert (target["device"], target["state"]) == ("board", "in_sync")
    assert target["received_bytes"] == target["size_bytes"] == sum(e.size_bytes for e in subject.manifest.files)
    queue(host, subject, "first")
    queue(host, subject, "second", limit=5)
    wait_until(lambda: status(host, "second") == "done", 60)
    wanted = [("first", "done", 12), ("second", "done", 5)]
    wait_until(lambda: [(run.run_id, run.status, run.items_done) for run in host.dispatch.runs()] == wanted)
    record = RunRecord.model_validate_json(host.records.raw("first"))
    assert record.status == "done" and [item.doc_id for item in record.items] == list(range(12))
    assert joulemark(host, "devices", "group", "lab", "board").stdout == "lab: board\n"
    again = joulemark(host, "push", "tiny", "--to", "lab", "--json")
    assert [found["state"] for found in json.loads(again.stdout)] == ["in_sync"]
    assert joulemark(host, "devices", "group", "lab", "board", "--remove").stdout == "lab: nobody\n"
    assert joulemark(host, "push", "tiny", "--to", "lab").returncode == 1
    listed = joulemark(host, "artifacts", "--device", "board")
    assert "in_sync" in listed.stdout and "tiny" in listed.stdout


def test_a_full_board_makes_room_and_gets_back_what_a_run_needs(host: HostProcess, tmp_path: Path):
    """Three models on a board that holds two: the least recently used gives way, and comes back with the run that needs it."""
    subjects = [make_subject(host, tmp_path / f"m{n}", 3, f"m{n}", seed=n) for n in range(3)]
    sizes = [sum(entry.size_bytes for entry in subject.manifest.files) for subject in subjects]
    limit = (sum(sizes) - 1) / 1e9
    key = host.key_file(tmp_path / "small.key")
    options = ("--host-url", host.url, "--enrol-key-file", str(key), "--name", "small", "--store-limit", f"{limit:.9f}")
    board = AgentProcess(tmp_path / "small", *options, open_to_all=False)
    try:
        device_id = host.registry.device("small").device_id

        def has(*expected: str) -> bool:
            states = {target.artifact_id: target.state for target in host.dispatch.targets(device_id)}
            return [states.get(subject.artifact_id) for subject in subjects] == list(expected)

        for number, subject in enumerate(subjects):
            assert host.dispatch.push(device_id, subject.manifest)
            want = ["in_sync"] * (number + 1) + [None] * (2 - number)  # type: ignore[list-item]
            if number == 2:
                want = ["registered", "in_sync", "in_sync"]
            wait_until(lambda want=want: has(*want), 60)  # type: ignore[misc]
        assert set(board.client.get("/api/artifacts").json()) == {subject.artifact_id for subject in subjects[1:]}
        queue(host, subjects[0], "again", "small")
        wait_until(lambda: status(host, "again") == "done", 60)
        wait_until(lambda: has("in_sync", "registered", "in_sync"), 60)
        board.kill()
        (
            tmp_path / "small" / "store" / "artifacts" / f"{subjects[2].artifact_id}.json"
        ).unlink()  # a card that lost something
        board.start()
        wait_until(lambda: has("in_sync", "registered", "registered"), 60)
    finally:
        board.stop()


def test_a_model_goes_out_in_stages_and_a_bad_one_stops_at_the_first(
    host: HostProcess, board: AgentProcess, tmp_path: Path
):
    other = enrolled(host, tmp_path / "other")
    try:
        make_subject(host, tmp_path / "files", 3)
        make_subject(host, tmp_path / "more", 3, "second", seed=1)
        assert joulemark(host, "devices", "group", "canary", "board").returncode == 0
        stages = ("--stage", "canary", "--stage", "all", "--backend", "fake", "--json")
        done = joulemark(host, "rollout", "tiny", *stages)
        assert done.returncode == 0, done.stderr
        (rollout,) = json.loads(done.stdout)
        assert (rollout["status"], rollout["stage"]) == ("done", 1)
        assert [[b["state"] for b in stage["boards"]] for stage in rollout["stages"]] == [["in_sync"], ["in_sync"]]
        other.stop()
        stuck = joulemark(host, "rollout", "second", "--stage", "other", "--stage", "all", "--hours", "0.001", "--json")
        assert stuck.returncode == 1, stuck.stderr
        (rollout,) = json.loads(stuck.stdout)
        assert rollout["status"] == "stopped" and "other: it did not get there within 3.6 s" in rollout["problem"]
        (later,) = rollout["stages"][1]["boards"]
        assert (later["device"], later["state"], later["problem"], later["size_bytes"]) == (
            "board",
            "registered",
            "",
            None,
        )
        shown = joulemark(host, "rollout")
        assert "second" in shown.stdout and "tiny" in shown.stdout and "canary" in shown.stdout
    finally:
        other.stop()


def test_who_vouches_for_a_record(host: HostProcess, board: AgentProcess, tmp_path: Path):
    subject = make_subject(host, tmp_path / "files", 3)
    queue(host, subject, "only")
    wait_until(lambda: status(host, "only") == "done", 60)
    device = host.registry.device("board")
    signature = host.records.signature("only")
    assert signature is not None
    said = opened(read_envelope(signature), RecordStatement, [host.registry.public_key("board")])
    assert said.record_sha256 == hashlib.sha256(host.records.raw("only")).hexdigest()
    order = opened(
        read_envelope(host.dispatch.fetch_order(device.device_id, subject.artifact_id)),
        FetchOrder,
        [host.identity.key.public],
    )
    assert order.manifest == subject.manifest
    path = tmp_path / "only.evidence.json"
    assert joulemark(host, "evidence", "only", "-o", str(path)).returncode == 0
    command = [sys.executable, "-m", "joulemark", "verify", str(path)]
    fingerprint = host.identity.fingerprint
    for options, status_, says in (
        (["--host", fingerprint], 0, "every signature and digest holds"),
        ([], 1, fingerprint),
        (["--host", "0" * 64], 1, "by the host"),
    ):
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        assert done.returncode == status_ and says in " ".join((done.stdout + done.stderr).split()), done.stderr
    links = subprocess.run([*command, "--host", fingerprint, "--json"], capture_output=True, text=True, check=False)
    assert links.returncode == 0 and "record of only" in links.stdout
    altered = path.read_text().replace('\\"attempts\\":1', '\\"attempts\\":2')
    assert altered != path.read_text()
    path.write_text(altered)
    assert subprocess.run([*command, "--host", fingerprint], capture_output=True, check=False).returncode == 1


def test_the_host_refuses_what_it_did_not_issue_and_what_is_not_signed(
    host: HostProcess, board: AgentProcess, tmp_path: Path
):
    subject = make_subject(host, tmp_path / "files", 3)
    queue(host, subject, "only")
    wait_until(lambda: status(host, "only") == "done", 60)
    who = agent_identity.load(board.data / "identity")
    assert who.credential is not None
    board.stop()
    body = host.records.raw("only").replace(b'"only"', b'"other"')
    session = {"instance_id": "i-test", "boot_id": "b", "hardware": None, "facts": board_facts(body)}
    shown = {"Authorization": f"Bearer {who.credential}", "Joulemark-Instance": "i-test"}
    assert host.client.put("/api/device/session", json=session, headers=shown).status_code == 200

    def put(data: bytes, key: SigningKey | None, run_id: str = "other") -> httpx.Response:
        headers = dict(shown)
        if key is not None:
            digest = hashlib.sha256(data).hexdigest()
            said = RecordStatement(device_id=who.device_id, run_id="other", record_sha256=digest)
            headers["Joulemark-Signature"] = base64.b64encode(write_envelope(key.sign(said))).decode()
        return host.client.put(f"/api/records/{run_id}", content=data, headers=headers)

    for data, key in ((body, None), (body, SigningKey(bytes(32)))):
        answer = put(data, key)
        assert (answer.status_code, answer.json()["code"]) == (403, "untrusted")
    foreign = body.replace(subject.artifact_id.encode(), b"0" * 64)
    answer = put(foreign, who.key)
    assert answer.status_code == 403 and "never given" in answer.json()["message"]
    altered = RunRecord.model_validate_json(body)
    manifest = altered.manifest.model_copy(update={"name": "another"})
    answer = put(altered.model_copy(update={"manifest": manifest}).model_dump_json().encode(), who.key)
    assert answer.status_code == 403 and "never given" in answer.json()["message"]
    assert len(host.records.facts()) == 1
    assert put(body, who.key).status_code == 201
    board.start()


def board_facts(body: bytes) -> object:
    return json.loads(body)["device"]


def test_an_agent_takes_only_what_its_host_signed_for_it_once_and_in_time(
    host: HostProcess, board: AgentProcess, tmp_path: Path
):
    subject = make_subject(host, tmp_path / "files", 3)
    device = host.registry.device("board")
    for path, body in (("/api/artifacts", subject.manifest.model_dump_json()), ("/api/runs", "{}")):
        answer = board.client.post(path, content=body)
        assert (answer.status_code, answer.json()["code"]) == (403, "untrusted")
    now = time.time()

    def fetch(key: SigningKey = host.identity.key, **changes: object) -> httpx.Response:
        fields = {"device_id": device.device_id, "sequence": 100, "issued_at": now, "expires_at": now + 1000}
        fields |= {"manifest": subject.manifest, "release": 5, **changes}
        order = FetchOrder.model_validate(fields)
        return board.client.post("/api/orders", content=write_envelope(key.sign(order)))

    # A board judges age by its host's time, which it hears with its first orders.
    wait_until(lambda: fetch(sequence=1, expires_at=now - 1).status_code == 403)
    for wrong, says in (
        (fetch(SigningKey(bytes(32))), "signature"),
        (fetch(device_id="dev-other"), "another board"),
        (fetch(expires_at=now - 1), "expired"),
    ):
        assert wrong.status_code == 403 and says in wrong.json()["message"], wrong.text
    assert fetch().status_code == 201
    assert fetch().status_code == 201  # the very same order again: its answer may have been lost
    replay = fetch(sequence=99)
    assert replay.status_code == 403 and "replay" in replay.json()["message"]
    assert "replay" in fetch(issued_at=now + 1).json()["message"]  # another order under a number that was used
    down = fetch(sequence=101, release=4)
    assert down.status_code == 403 and "--downgrade" in down.json()["hint"]
    assert fetch(sequence=102, release=4, downgrade=True).status_code == 201
    board.kill()
    board.start()
    assert "replay" in fetch(sequence=101, release=9).json()["message"]  # also after a restart
    answer = board.client.post("/api/orders", content=b'{"payloadType":"x","payload":"","signatures":[{"sig":""}]}')
    assert (answer.status_code, answer.json()["code"]) == (403, "untrusted")


def device_seen(host: HostProcess) -> bool:
    return host.registry.device("board").seen_at is not None


def test_a_board_that_its_host_cannot_reach_is_served_by_hand(host: HostProcess, board: AgentProcess, tmp_path: Path):
    """The host's process is away: a person with the host's data folder uploads straight to the agent, signed all the same."""
    subject = make_subject(host, tmp_path / "files", 4)
    wait_until(lambda: device_seen(host))
    host.stop()
    from rich.console import Console

    client, console = AgentClient(board.url, host.identity), Console(quiet=True)
    assert push(client, host.shelf, subject, console, host.dispatch) == 1
    record = RunRecord.model_validate_json(run_task(client, subject, "arc_challenge", QUICK, console, host.dispatch))
    assert record.status == "done" and len(record.items) == 4
    client.close()
    with pytest.raises(Untrusted):
        AgentClient(board.url, host.identity).start_run(record.spec)
    host.start()
    wait_until(lambda: len(host.records.facts()) == 1, 60)
    assert status(host, record.spec.run_id) == "done"


def test_what_was_brought_by_hand_does_not_overtake_what_waits(host: HostProcess, board: AgentProcess, tmp_path: Path):
    """Orders are accepted in rising numbers only. One that was overtaken is refused, told, and signed anew by the host."""
    waits = make_subject(host, tmp_path / "waits", 3, "waits")
    wait_until(lambda: device_seen(host))
    host.stop()
    device_id = host.registry.device("board").device_id
    host.dispatch.push(device_id, waits.manifest)  # number 1, which the board cannot fetch now
    by_hand = waits.manifest.model_copy(update={"name": "by-hand"})  # number 2
    host.dispatch.push(device_id, by_hand)
    order = host.dispatch.fetch_order(device_id, content_id(by_hand))
    assert board.client.post("/api/orders", content=order).status_code == 201
    host.start()

    def states() -> dict[str, str]:
        return {target.artifact_id: target.state for target in host.dispatch.targets(device_id)}

    wanted = {waits.artifact_id: "in_sync", content_id(by_hand): "in_sync"}
    wait_until(lambda: states() == wanted, 60)
    again = opened(
        read_envelope(host.dispatch.fetch_order(device_id, waits.artifact_id)), FetchOrder, [host.identity.key.public]
    )
    assert again.sequence == 3


def test_a_sweep_is_asked_for_again_cancelled_and_resumed(host: HostProcess, board: AgentProcess, tmp_path: Path):
    subject = make_subject(host, tmp_path / "files", 160)
    options = {**QUICK, "report_every_s": 5.0}
    second = enrolled(host, tmp_path / "second", JOULEMARK_FAKE_FAULT="slow:0.1")
    from joulemark_host import sweep

    try:
        devices = host.dispatch.devices("all")
        assert sorted(devices.values()) == ["board", "second"]
        wanted = sweep.cells([subject], devices)
        assert sweep.queue(host.dispatch, "night", wanted, options) == 2
        assert sweep.queue(host.dispatch, "night", wanted, options) == 0
        wait_until(lambda: all(run.items_done > 0 for run in host.dispatch.runs("night")), 60)
        assert host.dispatch.cancel([run.run_id for run in host.dispatch.runs("night")]) == 2
        wait_until(lambda: sweep.over(host.dispatch.runs("night")), 90)
        assert sweep.counts(host.dispatch.runs("night")) == {"cancelled": 2}
        assert sweep.queue(host.dispatch, "night", wanted, options) == 2
        wait_until(lambda: sweep.counts(host.dispatch.runs("night")) == {"done": 2}, 90)
        assert sweep.queue(host.dispatch, "night", wanted, options) == 0
    finally:
        second.stop()
    shown = joulemark(host, "runs", "--sweep", "night", "--all", "--json")
    assert sorted(run["status"] for run in json.loads(shown.stdout)) == ["cancelled", "cancelled", "done", "done"]


@pytest.mark.parametrize("host", [("--lease", "5")], indirect=True)
def test_a_board_that_vanishes_returns_its_work_and_takes_it_up_again(
    host: HostProcess, board: AgentProcess, tmp_path: Path
):
    subject = make_subject(host, tmp_path / "files", 40)
    queue(host, subject, "long")
    queue(host, subject, "next", limit=3)
    wait_until(lambda: any(run["items_done"] > 3 for run in board.client.get("/api/runs").json()["runs"]), 60)
    board.kill()
    wait_until(lambda: status(host, "long") == "queued", 30)
    (run, *_) = host.dispatch.runs(run_ids=["long"])
    assert run.problem is not None and run.problem.code == "vanished"
    board.start(JOULEMARK_FAKE_FAULT="slow:0.1")
    wait_until(lambda: status(host, "next") == "done", 120)
    record = RunRecord.model_validate_json(host.records.raw("long"))
    assert record.status == "done" and [item.doc_id for item in record.items] == list(range(40))
    assert record.attempts == 2 and len(host.records.facts()) == 2


def test_a_host_that_dies_loses_nothing(host: HostProcess, board: AgentProcess, tmp_path: Path):
    subject = make_subject(host, tmp_path / "files", 20)
    queue(host, subject, "first")
    wait_until(lambda: status(host, "first") == "leased", 30)
    host.kill()
    queue(host, subject, "second", limit=3)  # a command needs no running host
    time.sleep(4)
    host.start()
    wait_until(lambda: status(host, "second") == "done", 90)
    assert sorted(run.run_id for run in host.records.facts()) == ["first", "second"]


def test_an_impossible_run_fails_with_its_reason_and_the_queue_goes_on(
    host: HostProcess, board: AgentProcess, tmp_path: Path
):
    subject = make_subject(host, tmp_path / "files", 3)
    queue(host, subject, "impossible", backend="nonsense")
    queue(host, subject, "possible")
    wait_until(lambda: status(host, "possible") == "done", 60)
    (run,) = host.dispatch.runs(run_ids=["impossible"])
    assert run.status == "failed" and run.problem is not None and "nonsense" in run.problem.message


def test_run_orders_are_for_one_board(host: HostProcess, board: AgentProcess, tmp_path: Path):
    subject = make_subject(host, tmp_path / "files", 3)
    other = enrolled(host, tmp_path / "other")
    try:
        wait_until(lambda: host.registry.device("other").seen_at is not None)
        other.stop()
        queue(host, subject, "for-other", device="other")
        envelope = host.dispatch.run_order("for-other")
        assert opened(read_envelope(envelope), RunOrder, [host.identity.key.public]).spec.run_id == "for-other"
        answer = board.client.post("/api/orders", content=envelope)
        assert answer.status_code == 403 and "another board" in answer.json()["message"]
    finally:
        if other.process.poll() is None:
            other.stop()
