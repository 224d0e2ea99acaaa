"""Every route asks who is there, but for a short list; each role may do its own things; strangers learn nothing and are slowed down."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from joulemark.protocol import EnrolmentAnswer, HostFacts
from joulemark.signing import opened
from joulemark.statements import DeviceStatement
from joulemark.tls import fingerprint
from joulemark.wire import Manifest, content_id
from joulemark_host import identity
from joulemark_host.access import Access
from joulemark_host.api import create_app
from joulemark_host.credential_book import Role
from joulemark_host.dispatch import Dispatch
from joulemark_host.identity import HostIdentity
from joulemark_host.records import Records
from joulemark_host.registry import Registry
from joulemark_host.shelf import Shelf
from tests.fixtures.boards_at_host import Board
from tests.fixtures.gguf_files import llama, whole
from tests.fixtures.grids import SMOL_Q8
from tests.fixtures.records import make_record, record_bytes

PUBLIC = {
    ("GET", "/healthz"),
    ("GET", "/api/identity"),
    ("POST", "/api/enrolment"),
    ("POST", "/api/people"),
    ("GET", "/enter"),
    ("POST", "/enter"),
    ("GET", "/pages/{name}"),
}


@dataclass(frozen=True)
class Host:
    http: TestClient
    registry: Registry
    records: Records
    dispatch: Dispatch
    who: HostIdentity
    sha256: str
    clock: list[float]

    def person(self, role: Role) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.registry.issue_credential(role, f'a-{role}', 'test').text()}"}

    def board(self, name: str = "pi5", approved: bool = True) -> Board:
        board = Board(name)
        key = self.registry.issue_key("device", "test", approved)
        answer = self.http.post("/api/enrolment", content=board.enrolment(key).model_dump_json(by_alias=True))
        assert answer.status_code == 201, answer.text
        from joulemark.credentials import parse_credential

        board.credential = parse_credential(EnrolmentAnswer.model_validate_json(answer.content).credential)
        return board

    def begin(self, board: Board) -> int:
        body = board.session().model_dump_json()
        return self.http.put("/api/device/session", content=body, headers=board.headers).status_code


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    shelf = Shelf(tmp_path / "shelf")
    (tmp_path / "tiny.gguf").write_bytes(whole(llama()))
    _, manifest = shelf.publish_model(tmp_path / "tiny.gguf")
    who = identity.create(tmp_path / "identity")
    url = f"sqlite:///{tmp_path / 'records.db'}"
    records, registry, clock = Records(url), Registry(url, who.fingerprint), [0.0]
    dispatch = Dispatch(url, who.key)
    access = Access(registry, lambda: clock[0])
    app = create_app(shelf, records, access=access, identity=who, dispatch=dispatch)
    http = TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False, follow_redirects=False)
    yield Host(http, registry, records, dispatch, who, manifest.files[0].sha256, clock)
    records.close()
    registry.close()
    dispatch.close()


def routes(host: Host) -> list[tuple[str, str]]:
    app: Any = host.http.app
    return [(method, route.path) for route in _leaves(app.routes) for method in sorted(route.methods)]


def _leaves(found: Any) -> Iterator[APIRoute]:
    for route in found:
        if isinstance(route, APIRoute):
            yield route
        else:
            yield from _leaves(getattr(getattr(route, "original_router", route), "routes", []))


def test_every_route_but_the_listed_ones_asks_who_is_there(host: Host):
    found = routes(host)
    assert set(found) >= PUBLIC and len(found) > len(PUBLIC) + 10
    host.clock[0] = 0.0
    for number, (method, path) in enumerate(found):
        host.clock[0] = 1000.0 * number  # so that nobody has failed too often
        answer = host.http.request(method, path.replace("{", "").replace("}", ""))
        if (method, path) in PUBLIC:
            assert answer.status_code not in (401, 403) or method == "POST", path
        else:
            assert answer.status_code == 401, (method, path, answer.status_code)
            assert answer.headers["www-authenticate"] == "Bearer"


def test_all_strangers_get_the_same_answer(host: Host):
    board = host.board()
    assert board.credential is not None
    host.registry.revoke("pi5", "test")
    good = f"jmc.{board.credential.id}.{'x' * 43}"
    answers = set()
    for header in (None, "", "Bearer", "Bearer x", "Basic abc", f"Bearer {good}", f"Bearer {board.credential.text()}"):
        host.clock[0] += 1000.0
        headers = {"Authorization": header} if header is not None else {}
        answer = host.http.get("/api/artifacts", headers=headers)
        answers.add((answer.status_code, answer.text))
    assert len(answers) == 1


def test_failures_are_slowed_down_and_right_credentials_are_not(host: Host):
    viewer = host.person("viewer")
    statuses = [host.http.get("/api/grid.json", headers={"Authorization": "Bearer x"}).status_code for _ in range(15)]
    assert statuses == [401] * 10 + [429] * 5
    answer = host.http.get("/api/artifacts", headers={"Authorization": "Bearer x"})
    assert 0 < int(answer.headers["retry-after"]) <= 60
    assert host.http.get("/api/artifacts", headers=viewer).status_code == 200
    host.clock[0] += 61
    assert host.http.get("/api/artifacts", headers={"Authorization": "Bearer x"}).status_code == 401


READS = ("/", "/queue", "/api/artifacts", "/api/devices", "/api/runs", "/api/targets", "/openapi.json")


def test_what_each_role_may_do(host: Host):
    operator, viewer = host.person("operator"), host.person("viewer")
    board = host.board()
    assert host.begin(board) == 200
    file, record = f"/api/files/{host.sha256}", record_bytes(make_record(device=board.facts, manifest=SMOL_Q8))
    for path in READS:
        assert (
            host.http.get(path, headers=viewer).status_code == host.http.get(path, headers=operator).status_code == 200
        )
    for path in ("/", "/api/devices", "/openapi.json", "/api/records/run-1"):
        assert host.http.get(path, headers=board.headers).status_code == 403
    assert host.http.get(file, headers=viewer).status_code == 403
    assert host.http.get(file, headers=operator).status_code == 200
    assert host.http.put("/api/records/run-1", content=record, headers=viewer).status_code == 403
    for what in ("approve", "revoke", "rename?to=x"):
        for who in (viewer, board.headers):
            assert host.http.post(f"/api/devices/pi5/{what}", headers=who).status_code == 403
    host.dispatch.push(board.device_id, SMOL_Q8)
    signed = board.vouching("run-1", record)
    assert host.http.put("/api/records/run-1", content=record, headers=signed).status_code == 201
    assert host.http.post("/api/devices/pi5/rename?to=kitchen", headers=operator).json()["name"] == "kitchen"
    assert host.http.get("/api/devices/kitchen", headers=viewer).json()["admission"] == "approved"
    assert host.http.get("/api/devices/pi5", headers=viewer).status_code == 404


def test_a_board_gets_the_files_that_were_issued_to_it_and_learns_nothing_of_others(host: Host):
    one, two = host.board("one"), host.board("two")
    assert host.begin(one) == host.begin(two) == 200
    shelf = host.http.get("/api/artifacts", headers=host.person("viewer")).json()
    (manifest,) = [Manifest.model_validate_json(json.dumps(entry)) for entry in shelf.values()]
    host.dispatch.push(one.device_id, manifest)
    file, nothing, pack = f"/api/files/{host.sha256}", f"/api/files/{'0' * 64}", f"/api/packs/{'0' * 64}"
    for method in ("GET", "HEAD"):
        assert host.http.request(method, file, headers=one.headers).status_code == 200
        assert host.http.request(method, file, headers=two.headers).status_code == 403
    answers = [host.http.get(path, headers=two.headers) for path in (file, nothing, pack)]
    assert {answer.status_code for answer in answers} == {403}  # on the shelf or not: the same
    assert all("was never issued to this board" in answer.json()["message"] for answer in answers)
    for path in ("/api/artifacts", f"/api/artifacts/{content_id(manifest)}"):
        assert host.http.get(path, headers=one.headers).status_code == 403


def test_a_board_speaks_for_itself_only(host: Host):
    one, two = host.board("one"), host.board("two")
    assert host.begin(one) == host.begin(two) == 200
    for board in (one, two):
        host.dispatch.push(board.device_id, SMOL_Q8)
    about_two = record_bytes(make_record(device=two.facts, manifest=SMOL_Q8))
    answer = host.http.put("/api/records/run-1", content=about_two, headers=one.vouching("run-1", about_two))
    assert answer.status_code == 403 and "another board" in answer.json()["message"]
    assert host.records.facts() == []
    mixed = {**one.headers, "Joulemark-Signature": two.vouching("run-1", about_two)["Joulemark-Signature"]}
    assert host.http.put("/api/records/run-1", content=about_two, headers=mixed).status_code == 403
    signed = two.vouching("run-1", about_two)
    assert host.http.put("/api/records/run-1", content=about_two, headers=signed).status_code == 201


def test_a_board_that_nobody_approved_gets_nothing_but_its_session(host: Host):
    board = host.board(approved=False)
    assert host.begin(board) == 200
    for answer in (
        host.http.get(f"/api/files/{host.sha256}", headers=board.headers),
        host.http.get(f"/api/packs/{'0' * 64}", headers=board.headers),
        host.http.put("/api/records/run-1", content=b"{}", headers=board.headers),
    ):
        assert (answer.status_code, answer.json()["code"]) == (403, "pending_approval")


def test_a_board_opens_a_session_first(host: Host):
    board = host.board()
    answer = host.http.get("/api/device/orders", headers=board.headers)
    assert answer.status_code == 409 and "session" in answer.json()["message"]
    assert host.begin(board) == 200
    assert host.http.get("/api/device/orders", headers=board.headers).status_code == 200


def test_what_enrolment_gives_can_be_checked(host: Host):
    facts = HostFacts.model_validate_json(host.http.get("/api/identity").content)
    assert fingerprint(facts.authority_pem, facts.signing_key) == host.who.fingerprint
    board, key = Board(), host.registry.issue_key("device", "test")
    assert key.fingerprint == host.who.fingerprint
    body = board.enrolment(key).model_dump_json(by_alias=True)
    answer = EnrolmentAnswer.model_validate_json(host.http.post("/api/enrolment", content=body).content)
    said = opened(answer.device, DeviceStatement, [facts.signing_key])
    assert (said.device_id, said.public_key) == (board.device_id, board.key.public)
    assert answer.admission == "pending"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"secret":1}', b"\xff\xfe", b"[" * 100_000])
def test_malformed_enrolments_are_refused_in_words(host: Host, body: bytes):
    for path in ("/api/enrolment", "/api/people"):
        answer = host.http.post(path, content=body)
        assert answer.status_code == 400 and answer.json()["hint"]
    assert host.http.post("/api/enrolment", content=b" " * (1 << 20)).status_code == 413


def test_a_browser_enters_with_a_key_looks_and_may_not_write(host: Host):
    answer = host.http.get("/", headers={"Accept": "text/html"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/enter")
    assert "<form" in host.http.get("/enter").text
    key = host.registry.issue_key("operator", "test")
    answer = host.http.post("/enter", data={"name": "ann", "key": key.text()})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert host.http.get("/", headers={"Accept": "text/html"}).status_code == 200
    host.board()
    answer = host.http.post(
        "/api/devices/pi5/revoke"
    )  # the cookie alone, as a foreign page could make a browser send it
    assert answer.status_code == 403 and "browser" in answer.json()["message"]
    answer = host.http.post("/enter", data={"name": "bob", "key": key.text()})
    assert answer.status_code == 403 and "wrong, expired or revoked" in answer.text
    for name, text in (("<script>", key.text()), ("bob", "nonsense"), ("", "")):
        answer = host.http.post("/enter", data={"name": name, "key": text})
        assert answer.status_code == 403 and "<script>" not in answer.text
    for form in ("a=1&" * 20, "\xff\xfe", "key", "=&=&=", "key=%ff%fe&name=%00"):
        answer = host.http.post("/enter", content=form.encode("latin-1"))
        assert answer.status_code == 403 and "<form" in answer.text


def test_whoever_followed_a_link_gets_there_once_let_in(host: Host):
    answer = host.http.get("/queue?a=1&b=%2F%2Fx", headers={"Accept": "text/html"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/enter?to=%2Fqueue%3Fa%3D1%26b%3D%252F%252Fx")
    shown = host.http.get(answer.headers["location"]).text
    assert 'name="to" value="/queue?a=1&amp;b=%2F%2Fx"' in shown
    wrong = host.http.post("/enter", data={"name": "ann", "key": "nonsense", "to": "/queue"})
    assert wrong.status_code == 403 and 'value="/queue"' in wrong.text
    key = host.registry.issue_key("viewer", "test")
    answer = host.http.post("/enter", data={"name": "ann", "key": key.text(), "to": "/queue"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/queue")


@pytest.mark.parametrize(
    "to",
    [
        "//evil.example",
        "https://evil.example",
        "/\\evil.example",
        "javascript:alert(1)",
        "/a\r\nX: y",
        '/"><script>',
        "",
    ],
)
def test_the_way_in_leads_to_no_other_host(host: Host, to: str):
    assert 'name="to" value="/"' in host.http.get("/enter", params={"to": to}).text
    key = host.registry.issue_key("viewer", "test")
    answer = host.http.post("/enter", data={"name": "ann", "key": key.text(), "to": to})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")


def test_an_open_host_takes_everybody_for_its_operator(tmp_path: Path):
    records = Records(f"sqlite:///{tmp_path / 'records.db'}")
    http = TestClient(create_app(Shelf(tmp_path / "shelf"), records), base_url="http://127.0.0.1")
    assert http.get("/api/artifacts").status_code == 200
    assert http.put("/api/records/run-1", content=record_bytes(make_record())).status_code == 201
    assert http.get("/api/identity").status_code == 404
    records.close()
