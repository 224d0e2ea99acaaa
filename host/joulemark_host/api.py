"""The host's HTTP interface: artifacts and packs to pull, records to take, the grid as page, JSON and CSV.

Translates between HTTP and the shelf, the records and the figures; it holds no state. Errors leave as a Problem with a
status, for browsers as a page; a traceback goes to the log only. Writing is not authenticated yet, so the command line
serves loopback only unless it is told otherwise; the Host header is checked against DNS rebinding.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from joulemark import __version__
from joulemark.errors import JoulemarkError, NotFound, http_status, to_problem
from joulemark.wire import SCHEMA, Manifest, Problem
from joulemark_host.figures import Figure, draw, grid_csv
from joulemark_host.grid import Grid
from joulemark_host.intake import spool
from joulemark_host.page import ONLINE_POLICY, STATIC_TYPES, Choice, error_page, online_page, static
from joulemark_host.records import Records
from joulemark_host.shelf import Shelf

LOG = logging.getLogger(__name__)
DEFAULT_METRIC = "accuracy"
BODY_TIMEOUT_S = 120.0
STATUSES = {"too_large": 413, "unsupported_media": 415, "bad_input": 422}
Name = Annotated[str | None, Query(max_length=80)]


def create_app(
    shelf: Shelf, records: Records, allowed_hosts: Sequence[str] = ("*",), body_timeout_s: float = BODY_TIMEOUT_S
) -> FastAPI:
    """The application. `allowed_hosts` are the names under which it may be asked for."""
    app = FastAPI(title="Joulemark host", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts))
    app.add_middleware(_SecurityHeaders)  # the last added is the outermost, so refusals have the headers too
    _add_errors(app)
    _add_shelf(app, shelf)
    _add_records(app, records, body_timeout_s)
    _add_grid(app, shelf, records)
    return app


def _add_errors(app: FastAPI) -> None:
    def answer(request: Request, problem: Problem) -> Response:
        status = STATUSES.get(problem.code) or http_status(problem.code)
        if "text/html" in request.headers.get("accept", "") and request.method == "GET":
            return HTMLResponse(error_page(status, problem.message, problem.hint), status)
        return JSONResponse(problem.model_dump(), status)

    @app.exception_handler(JoulemarkError)
    def expected(request: Request, error: JoulemarkError) -> Response:
        return answer(request, to_problem(error))

    @app.exception_handler(RequestValidationError)
    def wrong_query(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return answer(
            request, Problem(code="bad_input", message=f"{where}: {first['msg']}", hint="correct the address")
        )

    @app.exception_handler(HTTPException)
    def wrong_address(request: Request, error: HTTPException) -> Response:
        problem = Problem(code="not_found", message=f"{request.url.path}: {error.detail}", hint="the heatmap is at /")
        response = answer(request, problem)
        response.status_code = error.status_code
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> Response:
        problem = to_problem(error)
        if problem.code == "internal":  # its text may hold paths; the log has it with the traceback
            LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
            problem = problem.model_copy(update={"message": "the host failed; its log says where"})
        return answer(request, problem)


def _add_shelf(app: FastAPI, shelf: Shelf) -> None:
    @app.get("/healthz")
    def health() -> dict[str, Any]:
        return {"status": "ok", "version": __version__, "schema": SCHEMA}

    @app.get("/api/artifacts")
    def artifacts() -> dict[str, Manifest]:
        return shelf.artifacts()

    @app.get("/api/artifacts/{artifact_id}")
    def artifact(artifact_id: str) -> Manifest:
        return shelf.manifest(artifact_id)

    @app.api_route("/api/files/{sha256}", methods=["GET", "HEAD"], response_class=FileResponse)
    def file(sha256: str) -> FileResponse:
        # The name is the content, so it never changes: If-Range with this tag always resumes the same bytes.
        headers = {"ETag": f'"{sha256}"', "Cache-Control": "public, max-age=31536000, immutable"}
        return FileResponse(shelf.file(sha256), media_type="application/octet-stream", headers=headers)

    @app.get("/api/packs/{pack_id}")
    def pack(pack_id: str) -> Response:
        body = shelf.pack_bytes(pack_id)
        return Response(body, media_type="application/json", headers={"ETag": f'"{pack_id}"'})


def _add_records(app: FastAPI, records: Records, body_timeout_s: float) -> None:
    one_at_a_time = threading.Lock()  # a record is held in memory only while this is held

    def store(body: Any, run_id: str) -> int:
        with body, one_at_a_time:
            return 201 if records.put(body.read(), run_id) == "created" else 200

    @app.put("/api/records/{run_id}", status_code=201)
    async def put(request: Request, run_id: str) -> JSONResponse:
        body = await spool(
            request.stream(),
            request.headers.get("content-length"),
            request.headers.get("content-encoding"),
            records.max_record_bytes,
            body_timeout_s,
        )
        status = await run_in_threadpool(store, body, run_id)
        return JSONResponse({"run_id": run_id, "stored": "created" if status == 201 else "unchanged"}, status)

    @app.get("/api/records/{run_id}")
    def get(run_id: str) -> Response:
        return Response(records.raw(run_id), media_type="application/json")


def _add_grid(app: FastAPI, shelf: Shelf, records: Records) -> None:
    def figure(metric: str | None, task: str | None) -> tuple[Figure | None, Choice]:
        tasks = records.tasks()
        metric = metric or DEFAULT_METRIC
        if not tasks:
            return None, Choice(metric=metric)
        if task is not None and task not in tasks:
            raise NotFound(f"there is no record of task {task!r}", f"there is: {', '.join(tasks)}")
        task = task or tasks[0]
        columns = {key: (manifest.name, manifest.quantization) for key, manifest in shelf.artifacts().items()}
        drawn = draw(records.facts(metrics=[metric]), metric, task, columns)
        return drawn, Choice(tasks=tasks, task=task, metric=metric)

    def needed(metric: str | None, task: str | None) -> Grid:
        drawn, _ = figure(metric, task)
        if drawn is None:
            raise NotFound("there are no records yet", "`joulemark run` evaluates a model on a board")
        return drawn.grid

    @app.get("/api/grid.json")
    def grid_json(metric: Name = None, task: Name = None) -> Grid:
        return needed(metric, task)

    @app.get("/api/grid.csv")
    def grid_as_csv(metric: Name = None, task: Name = None) -> Response:
        grid = needed(metric, task)
        disposition = f'attachment; filename="{grid.metric}-{grid.task}.csv"'
        return Response(grid_csv(grid), media_type="text/csv", headers={"Content-Disposition": disposition})

    @app.get("/", response_class=HTMLResponse)
    def page(metric: Name = None, task: Name = None) -> str:
        drawn, choice = figure(metric, task)
        return online_page([drawn] if drawn else [], choice)

    @app.get("/pages/{name}")
    def pages(name: str) -> Response:
        if name not in STATIC_TYPES:
            raise NotFound(f"there is no page file {name[:80]!r}", f"there is: {', '.join(STATIC_TYPES)}")
        return Response(static(name), media_type=STATIC_TYPES[name], headers={"Cache-Control": "no-cache"})


class _SecurityHeaders:
    """Every answer says: no script but ours, no sniffing, no frames, no referrer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_SECURITY_HEADERS]
            await send(message)

        await self._app(scope, receive, with_headers)


_SECURITY_HEADERS = (
    (b"content-security-policy", ONLINE_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
