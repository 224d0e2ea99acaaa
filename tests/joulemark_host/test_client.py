"""The client speaks the agent's interface: push by pull or upload, runs, errors; against a scripted agent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from joulemark.errors import BadInput, Conflict, NotFound, Unavailable, error_from
from joulemark.wire import FileEntry, Manifest, Problem, RunState, canonical_json, content_id
from joulemark_host.client import SILENCE_S, AgentClient
from joulemark_host.shelf import StoredFile
from joulemark_host.storage import open_storage
from tests.fixtures.records import digest, make_device, make_manifest, make_record


class Agent:
    """An agent that has part of one file and answers as joulemark_agent.api does."""

    def __init__(self, body: bytes, has: int = 0, host: bool = False, pull_fails: bool = False) -> None:
        self.body, self.stored, self.host, self.pull_fails = body, body[:has], host, pull_fails
        self.asked: list[str] = []
        self.states: list[Any] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        self.asked.append(f"{request.method} {path}")
        if path == "/api/artifacts":
            manifest = Manifest.model_validate_json(request.content)
            complete = len(self.stored) == len(self.body)
            missing = [] if complete else [entry.sha256 for entry in manifest.files]
            return httpx.Response(200, json={"artifact_id": content_id(manifest), "missing": missing})
        if path.endswith("/pull"):
            if not self.host:
                return httpx.Response(400, json=Problem(code="bad_input", message="no host").model_dump())
            if not self.pull_fails:
                self.stored += self.body[len(self.stored) : len(self.stored) + 40]
            return httpx.Response(202, json={})
        if path.startswith("/api/artifacts/"):
            present = len(self.stored)
            if self.host and not self.pull_fails:
                self.stored = self.body[: present + 40]
            problem = {"code": "unavailable", "message": "host gone"} if self.pull_fails else None
            whole = present == len(self.body)
            file = {"path": "m.gguf", "sha256": digest("m"), "size_bytes": len(self.body), "received_bytes": present}
            answer = {"artifact_id": "x", "complete": whole, "files": [{**file, "complete": whole}]}
            return httpx.Response(200, json={**answer, "problem": problem})
        if path.startswith("/api/files/"):
            if request.method == "HEAD":
                return httpx.Response(200, headers={"Upload-Offset": str(len(self.stored))})
            assert int(request.url.params["offset"]) == len(self.stored)
            assert int(request.headers["content-length"]) == len(self.body) - len(self.stored)
            self.stored += request.read()
            return httpx.Response(200, json={})
        if path == "/api/device":
            return httpx.Response(200, content=make_device().model_dump_json())
        if path.startswith("/api/runs/") and request.method == "GET":
            state = self.states.pop(0)
            if isinstance(state, Exception):
                raise state
            return state
        return httpx.Response(200, json={})


def client_of(agent: Any) -> AgentClient:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    return AgentClient(
        "http://agent:1/", None, httpx.Client(transport=httpx.MockTransport(agent)), lambda: now[0], sleep
    )


BODY = bytes(range(250)) * 1
MANIFEST = make_manifest(files=(FileEntry(path="m.gguf", size_bytes=len(BODY), sha256=digest("m")),))


@pytest.mark.parametrize(
    ("agent", "sent"),
    [
        (Agent(BODY), ["POST /api/artifacts", "POST …/pull", "HEAD", "PUT"]),
        (Agent(BODY, has=100), ["POST /api/artifacts", "POST …/pull", "HEAD", "PUT"]),
        (Agent(BODY, has=250), ["POST /api/artifacts"]),
        (Agent(BODY, host=True), ["POST /api/artifacts", "POST …/pull", *["GET"] * 7]),
        (Agent(BODY, has=30, host=True, pull_fails=True), ["POST /api/artifacts", "POST …/pull", "GET", "HEAD", "PUT"]),
    ],
    ids=["upload", "resumed upload", "there already", "pull", "pull fails, upload"],
)
def test_an_artifact_reaches_the_agent(agent: Agent, sent: list[str], tmp_path: Path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "m").write_bytes(BODY)
    file = StoredFile(open_storage(tmp_path), "files/m", len(BODY))
    seen: list[tuple[int, int]] = []
    there_already = agent.stored == BODY
    missing = client_of(agent).push_artifact(
        content_id(MANIFEST), MANIFEST, lambda _: file, lambda done, total: seen.append((done, total))
    )
    assert agent.stored == BODY
    assert missing == (0 if there_already else 1)
    kinds = [
        a if a == "POST /api/artifacts" else "POST …/pull" if a.endswith("/pull") else a.split()[0] for a in agent.asked
    ]
    assert kinds == sent
    assert there_already or seen[-1] == (250, 250)


def test_an_upload_keeps_to_its_rate(tmp_path: Path):
    agent, now = Agent(BODY), [0.0]
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "m").write_bytes(BODY)
    file = StoredFile(open_storage(tmp_path), "files/m", len(BODY))

    def sleep(seconds: float) -> None:
        now[0] += seconds

    http = httpx.Client(transport=httpx.MockTransport(agent))
    client = AgentClient("http://agent", http=http, clock=lambda: now[0], sleep=sleep)
    client.push_artifact(content_id(MANIFEST), MANIFEST, lambda _: file, limit_rate=100.0)
    assert agent.stored == BODY and now[0] == pytest.approx(len(BODY) / 100.0)


def test_problems_become_the_errors_that_they_were():
    for code, kind in (("not_found", NotFound), ("conflict", Conflict), ("unavailable", Unavailable)):
        error = error_from(Problem(code=code, message="m", hint="h", retryable=True))
        assert type(error) is kind
        assert (error.message, error.hint, error.code, error.retryable) == ("m", "h", code, True)
    assert error_from(Problem(code="worker_hung", message="m")).code == "worker_hung"

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(404, json=Problem(code="not_found", message="no run x", hint="list them").model_dump())

    with pytest.raises(NotFound, match="no run x"):
        client_of(answer).run_state("x")


def test_what_is_no_agent_is_said_so():
    with pytest.raises(BadInput, match="not the address"):
        AgentClient("pi5.local:8090")
    with pytest.raises(Unavailable, match="502"):
        client_of(lambda _: httpx.Response(502, text="<html>")).device()
    with pytest.raises(BadInput, match="not a DeviceFacts"):
        client_of(lambda _: httpx.Response(200, text="{}")).device()
    assert client_of(Agent(b"")).device() == make_device()


def state(status: str, done: int) -> httpx.Response:
    return httpx.Response(200, json={"run_id": "r", "status": status, "items_done": done, "items_total": 9})


def test_a_run_is_watched_to_its_end_through_short_silences():
    agent = Agent(b"")
    gone = httpx.ConnectError("refused")
    agent.states = [state("queued", 0), gone, gone, state("running", 4), state("done", 9)]
    seen: list[RunState] = []
    final = client_of(agent).watch("r", seen.append)
    assert [s.items_done for s in seen] == [0, 4, 9]
    assert final.status == "done"
    agent.states = [state("running", 1)] + [gone] * int(SILENCE_S + 5)
    with pytest.raises(Unavailable):
        client_of(agent).watch("r", seen.append)
    agent.states = [httpx.Response(404, json=Problem(code="not_found", message="no such run").model_dump())]
    with pytest.raises(NotFound):
        client_of(agent).watch("r", seen.append)


def test_waiting_ends_when_the_agent_answers_when_its_process_died_and_when_time_is_up():
    tries = 0

    def third_time(_request: httpx.Request) -> httpx.Response:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise httpx.ConnectError("refused")
        return httpx.Response(200, json={})

    client_of(third_time).wait_ready(5)
    assert tries == 3

    def never(_request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(Unavailable, match="does not answer"):
        client_of(never).wait_ready(5)

    def died() -> None:
        raise Conflict("the agent ended with status 1")

    with pytest.raises(Conflict):
        client_of(never).wait_ready(5, died)


def test_a_run_spec_travels_as_it_is():
    seen: list[dict[str, Any]] = []

    def agent(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content))
        return httpx.Response(201, json={"run_id": "run-1", "status": "queued"})

    spec = make_record().spec
    assert client_of(agent).start_run(spec).status == "queued"
    assert seen[0] == json.loads(canonical_json(spec))
