"""A board without any network: enrolled, given work and read back over a stick, by the commands that people type; all real processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from joulemark.wire import RunRecord
from joulemark_host.evaluation import Subject
from tests.fixtures.agent_process import AgentProcess
from tests.fixtures.fleet import make_subject
from tests.fixtures.host_process import HostProcess

URL = "https://host.invalid:8443"
"""Where the host would be, if there were a way."""


def joulemark(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "joulemark", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)


@dataclass
class AirGap:
    host: HostProcess
    board: AgentProcess
    stick: Path
    data: Path
    subject: Subject

    def at_host(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return joulemark(*arguments, "--data", str(self.host.data))

    def at_board(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return joulemark(*arguments, "--data", str(self.data), "--agent", self.board.url)

    def queue(self, name: str) -> None:
        done = self.at_host("sweep", "tiny", "--task", "arc_challenge", "--to", "farm", "--name", name, "--no-wait")
        assert done.returncode == 0, done.stderr


@pytest.fixture
def gap(tmp_path: Path) -> Iterator[AirGap]:
    """A board that has never seen its host."""
    host = HostProcess(tmp_path / "host")
    host.stop()  # nobody could reach it
    stick, data = tmp_path / "stick", tmp_path / "farm"
    stick.mkdir()
    key = host.key_file(stick / "board.key")
    enrol = ("enrol", URL, "--key-file", str(key), "--stick", str(stick), "--name", "farm", "--data", str(data))
    first = joulemark(*enrol)
    assert first.returncode == 0 and "devices admit" in first.stdout, first.stderr
    admitted = joulemark("devices", "admit", str(stick), "--data", str(host.data))
    assert admitted.returncode == 0 and "farm" in admitted.stdout and "approved" in admitted.stdout, admitted.stderr
    second = joulemark(*enrol)
    assert second.returncode == 0 and "enrolled" in second.stdout, second.stderr
    assert [path for path in stick.rglob("*") if path.is_file()] == []  # no secret stays on it
    board = AgentProcess(data, open_to_all=False)
    yield AirGap(host, board, stick, data, make_subject(host, tmp_path / "models", 3))
    board.stop()
    host.start()
    host.close()


def queue_fake(gap: AirGap, run_id: str) -> None:
    from joulemark.wire import RunSpec

    fields = {"artifact_id": gap.subject.artifact_id, "pack_id": gap.subject.packs["arc_challenge"], "backend": "fake"}
    spec = RunSpec.model_validate({"run_id": run_id, "idle_s": 0.5, "cooldown_s": 0.0, **fields})
    gap.host.dispatch.queue(gap.host.registry.device("farm").device_id, spec, gap.subject.manifest)


def test_work_goes_out_and_records_come_back_on_a_stick(gap: AirGap):
    nothing = gap.at_host("export-bundle", "--to", "farm", "--out", str(gap.stick))
    assert nothing.returncode == 1 and "nothing to do" in nothing.stderr
    for run_id in ("one", "two"):
        queue_fake(gap, run_id)
    out = gap.at_host("export-bundle", "--to", "farm", "--out", str(gap.stick), "--json")
    assert out.returncode == 0 and json.loads(out.stdout) | {"size_bytes": 0} == {
        "artifacts": 1,
        "runs": 2,
        "size_bytes": 0,
    }
    assert gap.at_host("import-results", str(gap.stick)).returncode == 1  # not yet
    there = gap.at_board("run-bundle", str(gap.stick))
    assert there.returncode == 0 and "2 records are on the stick" in there.stdout, there.stderr
    assert gap.at_board("run-bundle", str(gap.stick)).returncode == 0  # again: nothing changes
    back = gap.at_host("import-results", str(gap.stick))
    assert back.returncode == 0 and "2 new records" in back.stdout, back.stderr
    again = gap.at_host("import-results", str(gap.stick))
    assert again.returncode == 0 and "0 new records, 2 here already" in again.stdout
    assert {run.run_id: run.status for run in gap.host.dispatch.runs()} == {"one": "done", "two": "done"}
    assert {(run.items_done, run.items_total) for run in gap.host.dispatch.runs()} == {(3, 3)}
    for run_id in ("one", "two"):
        record = RunRecord.model_validate_json(gap.host.records.raw(run_id))
        assert [item.doc_id for item in record.items] == [0, 1, 2]
        assert gap.host.records.signature(run_id) is not None
    evidence = gap.at_host("evidence", "one", "-o", str(gap.stick / "one.evidence.json"))
    assert evidence.returncode == 0, evidence.stderr  # the whole chain holds as if it had come over the network
    # The model is there now: another run needs no file, unless the card was changed.
    queue_fake(gap, "three")
    shutil.rmtree(gap.stick / "files")
    assert gap.at_host("export-bundle", "--to", "farm", "--out", str(gap.stick)).returncode == 0
    assert list((gap.stick / "files").iterdir()) == []
    assert gap.at_board("run-bundle", str(gap.stick)).returncode == 0
    assert "1 new record," in gap.at_host("import-results", str(gap.stick)).stdout
    queue_fake(gap, "four")
    whole = gap.at_host("export-bundle", "--to", "farm", "--out", str(gap.stick), "--with-models", "--json")
    assert json.loads(whole.stdout)["artifacts"] == 1 and len(list((gap.stick / "files").iterdir())) == 1


def test_a_stick_is_believed_no_more_than_a_network(gap: AirGap, tmp_path: Path):
    queue_fake(gap, "one")
    assert gap.at_host("export-bundle", "--to", "farm", "--out", str(gap.stick)).returncode == 0
    clean = tmp_path / "clean"
    shutil.copytree(gap.stick, clean)

    def refused(words: str) -> None:
        done = gap.at_board("run-bundle", str(gap.stick), "--no-wait")
        assert done.returncode == 1 and words in done.stderr, (words, done.stderr)
        shutil.rmtree(gap.stick)
        shutil.copytree(clean, gap.stick)

    label = gap.stick / "bundle.json"
    label.write_text(label.read_text().replace("dev-", "dev-0"))
    refused("for the board")
    (order, *_) = sorted((gap.stick / "orders").iterdir())
    order.write_text(order.read_text().replace('"sig":"', '"sig":"AAAA'))
    refused("sign")
    (model,) = (gap.stick / "files").iterdir()
    model.write_bytes(model.read_bytes()[:-1] + b"\x01")
    refused("sha256")
    model.unlink()
    refused("not there")
    (pack,) = (gap.stick / "packs").iterdir()
    pack.write_bytes(pack.read_bytes() + b" ")
    refused("pack")
    assert gap.at_board("run-bundle", str(gap.stick)).returncode == 0
    (record,) = (gap.stick / "results").glob("*.json")
    good = record.read_bytes()
    record.write_bytes(good.replace(b'"attempts":1', b'"attempts":2'))
    back = gap.at_host("import-results", str(gap.stick))
    assert back.returncode == 1 and "0 new records" in back.stdout and "✗" in back.stdout
    assert gap.host.records.facts() == []
    record.write_bytes(good)
    gap.host.registry.revoke("farm", "test")
    assert gap.at_host("import-results", str(gap.stick)).returncode == 1
    assert gap.host.records.facts() == []


def test_a_damaged_record_does_not_stop_the_others(gap: AirGap):
    for run_id in ("one", "two", "three"):
        queue_fake(gap, run_id)
    assert gap.at_host("export-bundle", "--to", "farm", "--out", str(gap.stick)).returncode == 0
    assert gap.at_board("run-bundle", str(gap.stick)).returncode == 0
    first, second, _ = sorted((gap.stick / "results").glob("*.signature"))
    first.unlink()
    second.write_bytes(b"{")
    back = gap.at_host("import-results", str(gap.stick))
    assert back.returncode == 1 and "1 new record," in back.stdout and back.stdout.count("✗") == 2
    assert [run.run_id for run in gap.host.records.facts()] == ["three"]
    assert {run.run_id for run in gap.host.dispatch.runs(open_only=True)} == {"one", "two"}


def test_a_stick_that_is_full_is_said_so_and_what_was_there_stays(gap: AirGap, namespace: tuple[str, ...]):
    """Two pages of memory are the stick: the label of an earlier export fits, the model does not."""
    queue_fake(gap, "one")
    small = 'mount -t tmpfs -o size=8k none "$0" && echo mine > "$0/notes.txt" && "$@"; code=$?; find "$0" -type f; exit $code'
    export = ("export-bundle", "--to", "farm", "--out", str(gap.stick), "--data", str(gap.host.data))
    inside = [*namespace, "sh", "-c", small, str(gap.stick), sys.executable, "-m", "joulemark", *export]
    done = subprocess.run(inside, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1 and "the disk is full" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout.split() == [
        str(gap.stick / "notes.txt")
    ]  # neither half a model nor a label that says that all is there
    assert gap.at_host("export-bundle", "--to", "farm", "--out", str(gap.stick)).returncode == 0  # a larger one


def test_a_stick_that_is_pulled_out_is_taken_up_where_it_was(gap: AirGap):
    queue_fake(gap, "one")
    assert gap.at_host("export-bundle", "--to", "farm", "--out", str(gap.stick)).returncode == 0
    (model,) = (gap.stick / "files").iterdir()
    body = model.read_bytes()
    model.write_bytes(body[:100])  # what a pulled stick left
    cut = gap.at_board("run-bundle", str(gap.stick), "--no-wait")
    assert cut.returncode == 1 and f"100 bytes of {len(body)}" in cut.stderr and "export-bundle" in cut.stderr
    model.write_bytes(body)
    assert gap.at_board("run-bundle", str(gap.stick), "--no-wait").returncode == 0
    gap.board.kill()
    gap.board.start()
    there = gap.at_board("run-bundle", str(gap.stick))
    assert there.returncode == 0 and "1 record is on the stick" in there.stdout, there.stderr
