"""Requests that nobody planned for, made up by schemathesis from both OpenAPI documents, against real processes: no 500 anywhere."""

from __future__ import annotations

from pathlib import Path

from tests.fixtures import strange_requests


def test_no_request_makes_a_server_fail_and_every_answer_is_as_described(tmp_path: Path):
    with strange_requests.targets(tmp_path) as (found, host, agent):
        outcomes = [strange_requests.run(tmp_path, target, examples=6) for target in found]
        for outcome in outcomes:
            assert outcome.passed, f"{outcome.target.name}:\n{outcome.said[-6000:]}"
        operations = {outcome.target.name: outcome.operations for outcome in outcomes}
        assert operations["host, an operator"] >= 25 and operations["agent"] >= 20
        assert operations["host, a board"] >= 8 and operations["host, a board that begins"] == 1
        assert sum(outcome.cases for outcome in outcomes) > 2000
        # Both are still what they were, and nothing in a log is a defect.
        assert host.client.get("/healthz").is_success and len(host.records.facts()) == 1
        assert agent.client.get("/api/runs/r1").json()["status"] == "done"
        for log in (host.log_text(), agent.data.with_suffix(".log").read_text()):
            assert "Traceback" not in log
