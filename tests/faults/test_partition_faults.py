"""The network splits while a board works: nothing passes and nobody is told. Both sides go on, and agree once it is whole again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from joulemark.wire import RunRecord, RunSpec
from joulemark_host.evaluation import Subject
from tests.fixtures.agent_process import AgentProcess
from tests.fixtures.fault_proxy import FaultProxy
from tests.fixtures.fleet import make_subject
from tests.fixtures.host_process import HostProcess, wait_until

ITEMS = 12


@dataclass
class Split:
    host: HostProcess
    board: AgentProcess
    between: FaultProxy
    subject: Subject

    def queue(self, run_id: str, **more: object) -> None:
        fields = {"artifact_id": self.subject.artifact_id, "pack_id": self.subject.packs["arc_challenge"]}
        quick = {"backend": "fake", "idle_s": 0.5, "cooldown_s": 0.0}
        spec = RunSpec.model_validate({"run_id": run_id, **fields, **quick, **more})
        self.host.dispatch.queue(self.host.registry.device("board").device_id, spec, self.subject.manifest)

    def at_board(self, run_id: str) -> str:
        answer = self.board.client.get(f"/api/runs/{run_id}")
        return str(answer.json()["status"]) if answer.is_success else "unknown"

    def at_host(self, run_id: str) -> str:
        """As the host itself sees it, whose leases are short."""
        return next(run["status"] for run in self.host.client.get("/api/runs").json() if run["run_id"] == run_id)


@pytest.fixture
def split(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Split]:
    """A board whose only way to its host leads through a proxy; a lease lasts three seconds, an item 0.3 (or the parameter)."""
    slow = f"slow:{getattr(request, 'param', 0.3)}"
    host = HostProcess(tmp_path / "host", "--lease", "3")
    with FaultProxy(host.port) as between:
        url = f"https://127.0.0.1:{between.port}"
        options = ("--host-url", url, "--enrol-key-file", str(host.key_file(tmp_path / "board.key")), "--name", "board")
        board = AgentProcess(tmp_path / "board", *options, open_to_all=False, JOULEMARK_FAKE_FAULT=slow)
        yield Split(host, board, between, make_subject(host, tmp_path / "files", ITEMS))
        board.stop()
    host.close()


def test_a_run_that_ends_on_the_other_side_of_a_split_is_made_once_and_counted_once(split: Split):
    split.queue("r1")
    split.queue("r2")
    wait_until(lambda: split.at_board("r1") == "running", 60)
    split.between.part()
    wait_until(lambda: split.at_board("r1") == "done", 60)  # a board needs nobody to finish what it began
    wait_until(
        lambda: split.at_host("r1") == "queued", 30
    )  # its host gives up the lease, and nobody else has the order
    assert split.host.records.facts() == []
    time.sleep(3)
    assert split.at_board("r2") == "unknown"  # what it did not hear of it does not do
    split.between.heal()
    wait_until(lambda: [fact.run_id for fact in split.host.records.facts()] == ["r1", "r2"], 120)
    wait_until(lambda: split.at_host("r1") == split.at_host("r2") == "done", 30)
    for run_id in ("r1", "r2"):
        record = RunRecord.model_validate_json(split.host.records.raw(run_id))
        assert [item.doc_id for item in record.items] == list(range(ITEMS)) and record.attempts == 1
    assert split.host.records.quarantined() == []


# Items so slow that the run still goes on when the network is whole again.
@pytest.mark.parametrize("split", [2.0], indirect=True)
def test_a_cancellation_that_a_board_cannot_hear_is_obeyed_once_it_can(split: Split):
    split.queue("r1", report_every_s=5.0)
    wait_until(lambda: split.at_board("r1") == "running", 60)
    split.between.part()
    assert split.host.dispatch.cancel(["r1"]) == 1
    wait_until(lambda: split.at_host("r1") == "cancelled", 30)  # nobody confirms it: it ends on this side
    assert split.at_board("r1") == "running"
    split.between.heal()
    wait_until(lambda: split.at_board("r1") != "running", 60)
    wait_until(lambda: len(split.host.records.facts()) == 1, 60)
    (fact,) = split.host.records.facts()
    assert fact.status == split.at_board("r1") == split.at_host("r1") == "cancelled"
