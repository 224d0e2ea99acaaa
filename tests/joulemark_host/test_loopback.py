"""A real host and a real agent as processes, with the fake engine: push, run, deliver, draw; and what failure looks like."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from joulemark import packs, tls
from joulemark.errors import EngineFailed, NotFound
from joulemark.tasks import arc_challenge
from joulemark.wire import Measure, RunRecord
from joulemark_host import demo
from joulemark_host.evaluation import Subject, push, run_task
from joulemark_host.grid import Grid
from joulemark_host.options import database_url
from joulemark_host.registry import Registry
from joulemark_host.shelf import Shelf
from tests.fixtures.gguf_files import write_tiny
from tests.fixtures.records import make_pack

OPTIONS = {"limit": 12, "backend": "fake", "idle_s": 0.5, "cooldown_s": 0.0}


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    pack = make_pack(size=12)
    pack = pack.model_copy(update={"task_hash": packs.task_hash(pack.items, len(arc_challenge.FILTERS))})
    shelf = Shelf(tmp_path / "host" / "shelf")
    artifact_id, manifest = shelf.publish_model(write_tiny(tmp_path / "tiny.gguf"))
    return Subject(artifact_id, manifest, {"arc_challenge": shelf.publish_pack(pack)})


def test_from_the_shelf_over_a_board_to_a_cell(tmp_path: Path, subject: Subject):
    shelf, console = Shelf(tmp_path / "host" / "shelf"), Console(quiet=True)
    with demo.servers(tmp_path, console) as running:
        agent, host_url = running.agent, running.host_url
        authority = tls.pinned(running.identity.authority_pem, tls.HOST_NAME)
        assert push(agent, shelf, subject, console, running.dispatch) == 1  # pulled by the agent from the host
        assert push(agent, shelf, subject, console, running.dispatch) == 0
        body = run_task(agent, subject, "arc_challenge", OPTIONS, console, running.dispatch)
        demo.await_delivery(running.records, body, console)
        record = RunRecord.model_validate_json(body)
        assert (record.status, len(record.items)) == ("done", 12)
        asked = {"metric": "accuracy", "task": "arc_challenge"}
        assert httpx.get(f"{host_url}/api/grid.json", params=asked, verify=authority).status_code == 401
        registry = Registry(database_url(tmp_path / "host", None), running.identity.fingerprint)
        viewer = {"Authorization": f"Bearer {registry.issue_credential('viewer', 'ann', 'test').text()}"}
        answer = httpx.get(f"{host_url}/api/grid.json", params=asked, verify=authority, headers=viewer)
        (cell,) = Grid.model_validate_json(answer.content).cells
        assert record.summary is not None
        assert cell.metric == record.summary.metrics["accuracy"]
        assert isinstance(cell.metric, Measure)
        right = sum(bool(item.grade and item.grade.scores["acc_norm"] == 1) for item in record.items)
        assert cell.metric.value == pytest.approx(right / 12)
        assert cell.run_id == record.spec.run_id
        with pytest.raises(NotFound):
            agent.run_state("no-such-run")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{host_url}/healthz")


def test_servers_are_stopped_also_after_an_error_and_an_interrupt(tmp_path: Path):
    for kind in (KeyboardInterrupt, ValueError):
        with pytest.raises(kind), demo.servers(tmp_path, Console(quiet=True)) as running:
            raise kind
        for url in (running.agent.url, running.host_url):
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/healthz")


def test_a_dead_agent_is_named_with_the_end_of_its_log(tmp_path: Path, subject: Subject):
    console = Console(record=True, quiet=True)
    with pytest.raises(EngineFailed, match="agent ended with status"), demo.servers(tmp_path, console) as running:
        os.kill(running.agent_process.pid, signal.SIGKILL)
        push(running.agent, Shelf(tmp_path / "host" / "shelf"), subject, console)
