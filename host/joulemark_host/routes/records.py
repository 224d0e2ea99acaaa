"""Records: taken from boards, each once and only from the board that it is about; given back whole."""

from __future__ import annotations

import threading
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from joulemark.lineage import envelope_of
from joulemark.protocol import SIGNATURE_HEADER
from joulemark.wire import RunRecord
from joulemark_host.access import Access
from joulemark_host.dispatch import Dispatch
from joulemark_host.receiving import origin_of
from joulemark_host.records import Origin, Records
from joulemark_host.registry import Caller
from joulemark_http.bodies import spool
from joulemark_http.interface import takes


def create_router(
    records: Records, access: Access, body_timeout_s: float, dispatch: Dispatch | None = None
) -> APIRouter:
    """A body is spooled to the disk, bounded in bytes and time, before it is looked at. With a `dispatch` (a host that knows its boards) a
    board's record has to be signed by it, and about an artifact that it was given."""
    router = APIRouter()
    one_at_a_time = threading.Lock()  # a record is held in memory only while this is held
    sender = access.guard("operator", "device")
    readers = [Depends(access.guard("viewer", "operator"))]

    def store(body: Any, run_id: str, caller: Caller, signature: str | None) -> int:
        with body, one_at_a_time:
            data = body.read()
            if caller.role != "device":
                created = records.put(data, run_id) == "created"
            else:
                origin = Origin(caller.subject)
                if dispatch is not None and access.registry is not None:
                    envelope = envelope_of(signature)
                    origin = origin_of(envelope, data, run_id, caller.subject, access.registry, dispatch)
                created = records.put(data, run_id, origin) == "created"
        if dispatch is not None:
            dispatch.settle(run_id)
        return 201 if created else 200

    @router.put("/api/records/{run_id}", status_code=201, openapi_extra=takes(RunRecord))
    async def put(request: Request, run_id: str, caller: Caller = Depends(sender)) -> JSONResponse:
        body = await spool(request, records.max_record_bytes, body_timeout_s)
        status = await run_in_threadpool(store, body, run_id, caller, request.headers.get(SIGNATURE_HEADER))
        return JSONResponse({"run_id": run_id, "stored": "created" if status == 201 else "unchanged"}, status)

    @router.get("/api/records/{run_id}", dependencies=readers)
    def get(run_id: str) -> Response:
        return Response(records.raw(run_id), media_type="application/json")

    return router
