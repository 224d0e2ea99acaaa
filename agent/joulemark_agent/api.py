"""The agent's HTTP interface: health, device, artifacts, packs, runs, metrics, and the OpenAI-compatible part.

Translates between HTTP and the rest; decides nothing. Every body is bounded, every error is a Problem with a status, no traceback leaves.
Every route but /healthz and the two that let callers in asks the gate.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException

from joulemark import __version__
from joulemark.errors import BadInput, Conflict, JoulemarkError, NotFound, Untrusted
from joulemark.packs import MAX_PACK_BYTES
from joulemark.protocol import SIGNATURE_HEADER, Challenge, Entry
from joulemark.statements import MAX_ENVELOPE_BYTES, Envelope, to_base64, write_envelope
from joulemark.wire import SCHEMA, DeviceFacts, Manifest, RunSpec, TaskPack
from joulemark_agent.completions import Completions
from joulemark_agent.gate import Gate
from joulemark_agent.jobs import Jobs
from joulemark_agent.openai_api import create_router
from joulemark_agent.orders import OrderBook
from joulemark_agent.outbox import Outbox
from joulemark_agent.pulling import Puller
from joulemark_agent.store import Store
from joulemark_http.answers import answer_error
from joulemark_http.bodies import arriving, read_body, read_model
from joulemark_http.interface import PROBLEM, described, errors, takes, takes_bytes

JSON_LIMIT = 1024 * 1024
TICKET_LIMIT = 16 * 1024
PACK_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Services:
    """Everything that the endpoints speak to."""

    store: Store
    jobs: Jobs
    outbox: Outbox
    completions: Completions
    puller: Puller
    gate: Gate
    book: OrderBook | None
    """What the host ordered; None on an agent without a host, which takes unsigned things (a trial on loopback)."""
    device: Callable[[], DeviceFacts]
    notes: Callable[[], tuple[str, ...]]
    """What a person should know: the disk refuses, the host does not let the board take part."""
    vouch: Callable[[str, bytes], Envelope | None]
    """This board's word for a record (its run id, its bytes); None on an agent that belongs to no host."""
    start: Callable[[], None]
    stop: Callable[[], None]


def create_app(services: Services) -> FastAPI:
    """The application; `services.start` and `stop` frame its life."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        services.start()
        yield
        await run_in_threadpool(services.stop)

    app = FastAPI(
        title="Joulemark agent",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        responses=errors(PROBLEM),
    )
    for kind in (HTTPException, RequestValidationError, JoulemarkError, OSError, Exception):
        app.add_exception_handler(kind, answer_error)
    reader = APIRouter(dependencies=[Depends(services.gate.guard("viewer", "operator"))])
    operator = APIRouter(dependencies=[Depends(services.gate.guard("operator"))])
    _add_entrance(app, services.gate, services.book is not None)
    _add_state(app, reader, services)
    _add_artifacts(reader, operator, services)
    _add_runs(reader, operator, services)
    operator.include_router(create_router(services.store, services.completions))
    app.include_router(reader)
    app.include_router(operator)
    return app


def _add_entrance(app: FastAPI, gate: Gate, signed: bool) -> None:
    """The only routes that ask nobody who they are."""

    @app.get("/healthz")
    def health() -> Any:
        return {"status": "ok", "version": __version__, "schema": SCHEMA, "signed": signed}

    @app.post("/api/challenge")
    def challenge() -> Challenge:
        return gate.challenge()

    @app.post("/api/entry", status_code=201, openapi_extra=takes(Envelope))
    async def enter(request: Request) -> Entry:
        ticket = await read_model(request, Envelope, TICKET_LIMIT)
        peer = request.client.host if request.client is not None else "unknown"
        return await run_in_threadpool(gate.enter, ticket, peer)


def _add_state(app: FastAPI, reader: APIRouter, services: Services) -> None:
    @reader.get("/openapi.json", include_in_schema=False)
    def interface() -> Any:
        return described(app)

    @reader.get("/api/health")
    def health() -> Any:
        outbox = services.outbox
        state = {
            "pending": outbox.pending(),
            "dropped": [entry.model_dump() for entry in outbox.dropped()],
            "rejected": [entry.model_dump() for entry in outbox.rejected()],
        }
        return {
            "status": "ok",
            "version": __version__,
            "schema": SCHEMA,
            "busy": services.jobs.busy(),
            "outbox": state,
            "notes": services.notes(),
        }

    @reader.get("/api/device")
    def device() -> Any:
        return services.device().model_dump()

    @reader.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        # Imported here: it costs memory that an agent without Prometheus should not pay.
        from joulemark_agent.prometheus import CONTENT_TYPE, exposition

        return PlainTextResponse(exposition(services.jobs, services.outbox), media_type=CONTENT_TYPE)


def refuse_unsigned(services: Services) -> None:
    """An agent that belongs to a host takes only what the host has signed."""
    if services.book is not None:
        raise Untrusted(
            "this agent takes signed orders only", "POST /api/orders with an envelope; `joulemark push` does"
        )


def _add_artifacts(reader: APIRouter, operator: APIRouter, services: Services) -> None:
    store = services.store

    @reader.get("/api/artifacts")
    def artifacts() -> Any:
        return {artifact_id: manifest.model_dump() for artifact_id, manifest in store.artifacts().items()}

    @operator.post("/api/artifacts", openapi_extra=takes(Manifest))
    async def announce(request: Request) -> Any:
        refuse_unsigned(services)
        manifest = await read_model(request, Manifest, JSON_LIMIT)
        artifact_id, missing = await run_in_threadpool(store.announce, manifest)
        return {"artifact_id": artifact_id, "missing": list(missing)}

    @reader.get("/api/artifacts/{artifact_id}")
    def artifact(artifact_id: str) -> Any:
        progress = store.progress(artifact_id)
        problem = services.puller.problem(artifact_id)
        return {**progress.model_dump(), "problem": problem.model_dump() if problem else None}

    @operator.post("/api/artifacts/{artifact_id}/pull", status_code=202)
    def pull(artifact_id: str) -> Any:
        services.puller.start(artifact_id)
        return {"artifact_id": artifact_id}

    @operator.delete("/api/artifacts/{artifact_id}", status_code=204)
    def forget(artifact_id: str) -> None:
        if services.jobs.needs(artifact_id):
            raise Conflict("a queued or running run needs this artifact", "cancel the run, or wait until it is over")
        store.delete(artifact_id)

    @operator.head("/api/files/{sha256}")
    def offset(sha256: str) -> Response:
        return Response(headers={"Upload-Offset": str(store.offset(sha256)), "Cache-Control": "no-store"})

    @operator.put("/api/files/{sha256}", openapi_extra=takes_bytes())
    async def upload(request: Request, sha256: str, offset: Annotated[int, Query(ge=0, le=2**53)] = 0) -> Any:
        limit = store.expected_size(sha256) - offset
        if limit < 0:
            raise BadInput(f"offset {offset} is outside the file", "ask with HEAD where to go on")
        async for chunk in arriving(request, limit):
            offset = await run_in_threadpool(store.append, sha256, offset, chunk)
        complete = await run_in_threadpool(store.finish_if_complete, sha256)
        return {"sha256": sha256, "offset": offset, "complete": complete}

    @operator.put("/api/packs/{pack_id}", openapi_extra=takes(TaskPack))
    async def put_pack(request: Request, pack_id: str) -> Any:
        data = await read_body(request, MAX_PACK_BYTES, PACK_TIMEOUT_S)
        await run_in_threadpool(store.put_pack, pack_id, data)
        return {"pack_id": pack_id}

    @reader.get("/api/packs")
    def list_packs() -> Any:
        return {"packs": list(store.packs())}


def _add_runs(reader: APIRouter, operator: APIRouter, services: Services) -> None:
    jobs = services.jobs

    @operator.post("/api/orders", status_code=201, openapi_extra=takes(Envelope))
    async def order(request: Request) -> Any:
        envelope = await read_model(request, Envelope, MAX_ENVELOPE_BYTES)
        if services.book is None:
            raise NotFound("this agent belongs to no host whose orders count", "enrol it: joulemark enrol HOST_URL")
        done = await run_in_threadpool(services.book.take, envelope)
        if isinstance(done, str):
            return {"artifact_id": done, "missing": list(services.store.missing(services.store.manifest_of(done)))}
        return done.model_dump() if done is not None else {}

    @operator.post("/api/runs", status_code=201, openapi_extra=takes(RunSpec))
    async def create(request: Request) -> Any:
        refuse_unsigned(services)
        spec = await read_model(request, RunSpec, JSON_LIMIT)
        return (await run_in_threadpool(jobs.submit, spec)).model_dump()

    @reader.get("/api/runs")
    def runs() -> Any:
        return {"runs": [state.model_dump() for state in jobs.states()]}

    @reader.get("/api/runs/{run_id}")
    def state(run_id: str) -> Any:
        return jobs.state(run_id).model_dump()

    @operator.delete("/api/runs/{run_id}", status_code=202)
    def cancel(run_id: str) -> Any:
        return jobs.cancel(run_id).model_dump()

    @reader.get("/api/runs/{run_id}/record")
    def record(run_id: str) -> Response:
        body = jobs.record(run_id)
        signature = services.vouch(run_id, body)
        headers = {SIGNATURE_HEADER: to_base64(write_envelope(signature))} if signature is not None else {}
        return Response(body, media_type="application/json", headers=headers)
