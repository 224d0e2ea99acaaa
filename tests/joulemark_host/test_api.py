"""The HTTP interface: ranges, idempotent records, bounds, errors as problems, and nothing of ours on foreign names."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from joulemark.wire import Manifest, Problem, canonical_json
from joulemark_host.api import create_app
from joulemark_host.grid import Grid
from joulemark_host.page import ONLINE_POLICY
from joulemark_host.records import Records
from joulemark_host.server import bind
from joulemark_host.shelf import Shelf
from joulemark_http.serving import make_server
from tests.fixtures.gguf_files import llama, whole
from tests.fixtures.grids import PI, SMOL_Q8
from tests.fixtures.records import make_pack, make_record, record_bytes

LIMIT = 200_000


@dataclass(frozen=True)
class Host:
    http: TestClient
    shelf: Shelf
    records: Records
    artifact_id: str
    sha256: str
    body: bytes


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    shelf = Shelf(tmp_path / "shelf")
    model = tmp_path / "tiny.gguf"
    model.write_bytes(whole(llama()))
    artifact_id, manifest = shelf.publish_model(model)
    records = Records(f"sqlite:///{tmp_path / 'records.db'}", max_record_bytes=LIMIT)
    app = create_app(shelf, records, ("127.0.0.1",), body_timeout_s=0.5)
    http = TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)
    yield Host(http, shelf, records, artifact_id, manifest.files[0].sha256, model.read_bytes())
    records.close()


# --- shelf ------------------------------------------------------------------------------------------------------------
def test_artifacts_and_packs_are_served_as_they_are(host: Host):
    assert host.http.get("/healthz").json()["status"] == "ok"
    listed = host.http.get("/api/artifacts").json()
    assert list(listed) == [host.artifact_id]
    answer = host.http.get(f"/api/artifacts/{host.artifact_id}").content
    assert Manifest.model_validate_json(answer) == host.shelf.manifest(host.artifact_id)
    pack_id = host.shelf.publish_pack(make_pack())
    assert host.http.get(f"/api/packs/{pack_id}").content == canonical_json(make_pack())
    for path in ("artifacts", "packs", "files"):
        for name in ("0" * 64, "..%2f..%2fetc%2fpasswd", "x"):
            answer = host.http.get(f"/api/{path}/{name}")
            assert answer.status_code == 404
            assert Problem.model_validate_json(answer.content).code == "not_found"


SIZE = len(whole(llama()))


@pytest.mark.parametrize(
    ("headers", "status", "start", "end"),
    [
        ({}, 200, 0, SIZE),
        ({"Range": "bytes=0-0"}, 206, 0, 1),
        ({"Range": "bytes=100-"}, 206, 100, SIZE),
        ({"Range": "bytes=100-199"}, 206, 100, 200),
        ({"Range": f"bytes=100-{SIZE + 1000}"}, 206, 100, SIZE),
        ({"Range": "bytes=-10"}, 206, SIZE - 10, SIZE),
        ({"Range": f"bytes=-{SIZE + 10}"}, 206, 0, SIZE),
        ({"Range": f"bytes={SIZE - 1}-"}, 206, SIZE - 1, SIZE),
        ({"Range": f"bytes={SIZE}-"}, 416, 0, 0),
        ({"Range": "bytes=99999999999-"}, 416, 0, 0),
        ({"Range": "bytes=200-100"}, 400, 0, 0),
        ({"Range": "lines=1-2"}, 400, 0, 0),
        ({"Range": "bytes=100-", "If-Range": "OURS"}, 206, 100, SIZE),
        ({"Range": "bytes=100-", "If-Range": '"another"'}, 200, 0, SIZE),
        ({"Range": "bytes=100-", "If-Range": "W/OURS"}, 200, 0, SIZE),
    ],
)
def test_ranges(host: Host, headers: dict[str, str], status: int, start: int, end: int):
    sent = {name: value.replace("OURS", f'"{host.sha256}"') for name, value in headers.items()}
    answer = host.http.get(f"/api/files/{host.sha256}", headers=sent)
    assert answer.status_code == status
    if status in (200, 206):
        assert answer.content == host.body[start:end]
        assert answer.headers["content-length"] == str(end - start)
        assert answer.headers["etag"] == f'"{host.sha256}"'
        assert answer.headers["accept-ranges"] == "bytes"
    if status == 206:
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"
    if status == 416:
        assert answer.headers["content-range"] == f"bytes */{SIZE}"


def test_head_says_the_size(host: Host):
    answer = host.http.head(f"/api/files/{host.sha256}")
    assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, str(SIZE), b"")


# --- records ----------------------------------------------------------------------------------------------------------
def test_a_record_is_taken_once_and_given_back_whole(host: Host):
    body = record_bytes(make_record())
    answer = host.http.put("/api/records/run-1", content=body)
    assert (answer.status_code, answer.json()) == (201, {"run_id": "run-1", "stored": "created"})
    answer = host.http.put("/api/records/run-1", content=body)
    assert (answer.status_code, answer.json()) == (200, {"run_id": "run-1", "stored": "unchanged"})
    assert host.http.get("/api/records/run-1").content == body
    answer = host.http.put("/api/records/run-1", content=record_bytes(make_record(attempts=2)))
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    assert len(host.records.quarantined()) == 1


GOOD = record_bytes(make_record())


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"{", {}, 400, "bad_input"),
        (GOOD.replace(b'"attempts":1', b'"attempts":NaN'), {}, 400, "bad_input"),
        (b"[" * 150_000, {}, 400, "bad_input"),
        (GOOD.replace(b'{"schema_number":1', b'{"schema_number":2', 1), {}, 400, "bad_input"),
        (GOOD.replace(b'"run-1"', b'"run-2"'), {}, 400, "bad_input"),
        (b"", {}, 400, "bad_input"),
        (b" " * (LIMIT + 1), {}, 413, "too_large"),
        (b"\x1f\x8b" + bytes(100), {"Content-Encoding": "gzip"}, 415, "unsupported_media"),
    ],
)
def test_what_is_no_record_is_refused(host: Host, body: bytes, headers: dict[str, str], status: int, code: str):
    answer = host.http.put("/api/records/run-1", content=body, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.json()["hint"]
    assert host.records.facts() == []


def test_over_a_real_socket_a_lying_length_and_a_stalled_body_are_ended(host: Host):
    server = make_server(host.http.app, 16)
    with bind("127.0.0.1:0", False) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            head = b"PUT /api/records/run-1 HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            for headers, body, status in (
                (b"Content-Length: 999999999\r\n\r\n", b"x", b"413"),
                (b"Transfer-Encoding: chunked\r\n\r\n", b"40000\r\n" + bytes(0x40000) + b"\r\n", b"413"),
                (b"Content-Length: 100\r\n\r\n", b"{", b"503"),
            ):
                with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                    connection.sendall(head + headers + body)
                    assert connection.recv(4096).split()[1] == status
            assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
        finally:
            server.should_exit = True
            thread.join(10)
    assert host.records.facts() == []


# --- grid -------------------------------------------------------------------------------------------------------------
def test_the_grid_as_page_json_and_csv(host: Host):
    assert host.http.get("/api/grid.json").status_code == 404
    assert "No records yet" in host.http.get("/").text
    for number, (task, device) in enumerate((("arc_challenge", None), ("gsm8k_cot", PI))):
        record = make_record(f"run-{number}", task=task, device=device, manifest=SMOL_Q8)
        assert host.http.put(f"/api/records/run-{number}", content=record_bytes(record)).status_code == 201
    grid = Grid.model_validate_json(host.http.get("/api/grid.json?metric=decode_rate&task=gsm8k_cot").content)
    assert (grid.metric, grid.task) == ("decode_rate", "gsm8k_cot")
    assert grid.rows == ("lab workstation", "Raspberry Pi 5 (8 GB)")
    assert len(grid.columns) == 2  # the run's model and the one on the shelf that was not run yet
    assert [cell.status for cell in grid.cells] == ["not_run", "not_run", "measured", "not_run"]
    answer = host.http.get("/api/grid.csv?metric=decode_rate&task=gsm8k_cot")
    assert answer.headers["content-type"].startswith("text/csv")
    assert "decode_rate-gsm8k_cot.csv" in answer.headers["content-disposition"]
    assert len(answer.text.splitlines()) == 5
    page = host.http.get("/?metric=decode_rate&task=gsm8k_cot")
    assert page.headers["content-security-policy"] == ONLINE_POLICY
    assert "unsafe" not in ONLINE_POLICY
    assert "50.0 tok/s" in page.text
    for name, kind in (("vega.js", "text/javascript"), ("charts.js", "text/javascript"), ("joulemark.css", "text/css")):
        answer = host.http.get(f"/pages/{name}")
        assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == (200, kind)
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert host.http.get("/pages/..%2fapi.py").status_code == 404


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/grid.json?metric=nonsense", 400),
        ("/?task=nonsense", 404),
        ("/?metric=" + "x" * 200, 400),
        ("/no/such/page", 404),
        ("/pages/secret", 404),
    ],
)
def test_errors_are_problems_and_for_browsers_pages(host: Host, path: str, status: int):
    host.http.put("/api/records/run-1", content=GOOD)
    answer = host.http.get(path)
    assert answer.status_code == status
    assert Problem.model_validate_json(answer.content).message
    answer = host.http.get(path, headers={"Accept": "text/html,*/*"})
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("text/html")
    assert "Joulemark" in answer.text


def test_no_traceback_and_no_path_leaves(host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def broken(*_: object) -> None:
        raise ValueError("/secret/path")

    monkeypatch.setattr(host.shelf, "artifacts", broken)
    answer = host.http.get("/api/artifacts")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert answer.json()["code"] == "internal"
    assert "/secret/path" in caplog.text


def test_a_foreign_host_name_and_a_wrong_method_are_refused(host: Host):
    answer = host.http.get("/", headers={"Host": "evil.example"})
    assert answer.status_code == 400
    assert answer.headers["content-security-policy"] == ONLINE_POLICY
    answer = host.http.delete("/api/records/run-1")
    assert answer.status_code == 405
    assert json.loads(answer.content)["message"]
    assert answer.headers["allow"]
