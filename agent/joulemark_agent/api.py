"""The agent's HTTP interface: health, device, artifacts, packs, runs, metrics, and the OpenAI-compatible part.

Translates between HTTP and the rest; decides nothing. Every body is bounded, every error is a Problem with a status, no traceback leaves.
There is no authentication yet: the command line binds to loopback unless told otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from joulemark import __version__
from joulemark.errors import BadInput, Conflict, JoulemarkError, http_status, to_problem
from joulemark.packs import MAX_PACK_BYTES
from joulemark.wire import SCHEMA, DeviceFacts, Manifest, Problem, RunSpec
from joulemark_agent.completions import Completions
from joulemark_agent.http_body import bounded_chunks, read_body, read_model
from joulemark_agent.jobs import Jobs
from joulemark_agent.openai_api import create_router
from joulemark_agent.outbox import Outbox
from joulemark_agent.pulling import Puller
from joulemark_agent.store import Store

JSON_LIMIT = 1024 * 1024

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Services:
    """Everything that the endpoints speak to."""

    store: Store
    jobs: Jobs
    outbox: Outbox
    completions: Completions
    puller: Puller
    device: Callable[[], DeviceFacts]
    note: str | None
    """What had to be done to open the journal, if anything."""
    start: Callable[[], None]
    stop: Callable[[], None]


def create_app(services: Services) -> FastAPI:
    """The application; `services.start` and `stop` frame its life."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        services.start()
        yield
        await run_in_threadpool(services.stop)

    app = FastAPI(title="Joulemark agent", version=__version__, lifespan=lifespan)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(JoulemarkError, _answer_error)
    app.add_exception_handler(OSError, _answer_error)
    app.add_exception_handler(Exception, _answer_error)
    _add_state(app, services)
    _add_artifacts(app, services)
    _add_runs(app, services)
    app.include_router(create_router(services.store, services.completions))
    return app


async def _answer_http_error(_: Request, error: Exception) -> JSONResponse:
    """What the framework refuses itself (no such path, wrong method) in our shape."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    code = "not_found" if status == 404 else "bad_input"
    detail = str(error.detail) if isinstance(error, HTTPException) else str(error)
    problem = Problem(code=code, message=f"HTTP {status}: {detail}", hint="the endpoints are listed under /docs")
    return JSONResponse(problem.model_dump(), status_code=status)


async def _answer_error(_: Request, error: Exception) -> JSONResponse:
    problem = to_problem(error)
    status = http_status(problem.code)
    if problem.code == "internal":
        log.error("unexpected error in a request", exc_info=error)
    return JSONResponse(problem.model_dump(), status_code=status)


def _add_state(app: FastAPI, services: Services) -> None:
    @app.get("/healthz")
    def health() -> Any:
        outbox = services.outbox
        state = {
            "pending": outbox.pending(),
            "dropped": [entry.model_dump() for entry in outbox.dropped()],
            "rejected": [entry.model_dump() for entry in outbox.rejected()],
        }
        notes = [note for note in (outbox.note(), services.note, services.jobs.trouble()) if note]
        return {
            "status": "ok",
            "version": __version__,
            "schema": SCHEMA,
            "busy": services.jobs.busy(),
            "outbox": state,
            "notes": notes,
        }

    @app.get("/api/device")
    def device() -> Any:
        return services.device().model_dump()

    @app.get("/metrics")
    def metrics() -> Response:
        # Imported here: it costs memory that an agent without Prometheus should not pay.
        from joulemark_agent.prometheus import CONTENT_TYPE, exposition

        return PlainTextResponse(exposition(services.jobs, services.outbox), media_type=CONTENT_TYPE)


def _add_artifacts(app: FastAPI, services: Services) -> None:
    store = services.store

    @app.get("/api/artifacts")
    def artifacts() -> Any:
        return {artifact_id: manifest.model_dump() for artifact_id, manifest in store.artifacts().items()}

    @app.post("/api/artifacts")
    async def announce(request: Request) -> Any:
        manifest = await read_model(request, Manifest, JSON_LIMIT)
        artifact_id, missing = await run_in_threadpool(store.announce, manifest)
        return {"artifact_id": artifact_id, "missing": list(missing)}

    @app.get("/api/artifacts/{artifact_id}")
    def artifact(artifact_id: str) -> Any:
        progress = store.progress(artifact_id)
        problem = services.puller.problem(artifact_id)
        return {**progress.model_dump(), "problem": problem.model_dump() if problem else None}

    @app.post("/api/artifacts/{artifact_id}/pull", status_code=202)
    def pull(artifact_id: str) -> Any:
        services.puller.start(artifact_id)
        return {"artifact_id": artifact_id}

    @app.delete("/api/artifacts/{artifact_id}", status_code=204)
    def forget(artifact_id: str) -> None:
        if services.jobs.needs(artifact_id):
            raise Conflict("a queued or running run needs this artifact", "cancel the run, or wait until it is over")
        store.delete(artifact_id)

    @app.head("/api/files/{sha256}")
    def offset(sha256: str) -> Response:
        return Response(headers={"Upload-Offset": str(store.offset(sha256)), "Cache-Control": "no-store"})

    @app.put("/api/files/{sha256}")
    async def upload(request: Request, sha256: str, offset: int = 0) -> Any:
        limit = store.expected_size(sha256) - offset
        if limit < 0 or offset < 0:
            raise BadInput(f"offset {offset} is outside the file", "ask with HEAD where to go on")
        async for chunk in bounded_chunks(request, limit):
            offset = await run_in_threadpool(store.append, sha256, offset, chunk)
        complete = await run_in_threadpool(store.finish_if_complete, sha256)
        return {"sha256": sha256, "offset": offset, "complete": complete}

    @app.put("/api/packs/{pack_id}")
    async def put_pack(request: Request, pack_id: str) -> Any:
        data = await read_body(request, MAX_PACK_BYTES)
        await run_in_threadpool(store.put_pack, pack_id, data)
        return {"pack_id": pack_id}

    @app.get("/api/packs")
    def list_packs() -> Any:
        return {"packs": list(store.packs())}


def _add_runs(app: FastAPI, services: Services) -> None:
    jobs = services.jobs

    @app.post("/api/runs", status_code=201)
    async def create(request: Request) -> Any:
        spec = await read_model(request, RunSpec, JSON_LIMIT)
        return (await run_in_threadpool(jobs.submit, spec)).model_dump()

    @app.get("/api/runs")
    def runs() -> Any:
        return {"runs": [state.model_dump() for state in jobs.states()]}

    @app.get("/api/runs/{run_id}")
    def state(run_id: str) -> Any:
        return jobs.state(run_id).model_dump()

    @app.delete("/api/runs/{run_id}", status_code=202)
    def cancel(run_id: str) -> Any:
        return jobs.cancel(run_id).model_dump()

    @app.get("/api/runs/{run_id}/record")
    def record(run_id: str) -> Response:
        return Response(jobs.record(run_id), media_type="application/json")
