"""Records: taken from boards, each once and only from the board that it is about; given back whole."""

from __future__ import annotations

import threading
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from joulemark_host.access import Access
from joulemark_host.intake import spool
from joulemark_host.records import Records
from joulemark_host.registry import Caller


def create_router(records: Records, access: Access, body_timeout_s: float) -> APIRouter:
    """A body is spooled to the disk, bounded in bytes and time, before it is looked at."""
    router = APIRouter()
    one_at_a_time = threading.Lock()  # a record is held in memory only while this is held
    sender = access.guard("operator", "device")
    readers = [Depends(access.guard("viewer", "operator"))]

    def store(body: Any, run_id: str, caller: Caller) -> int:
        device_id = caller.subject if caller.role == "device" else None
        with body, one_at_a_time:
            return 201 if records.put(body.read(), run_id, device_id) == "created" else 200

    @router.put("/api/records/{run_id}", status_code=201)
    async def put(request: Request, run_id: str, caller: Caller = Depends(sender)) -> JSONResponse:
        body = await spool(
            request.stream(),
            request.headers.get("content-length"),
            request.headers.get("content-encoding"),
            records.max_record_bytes,
            body_timeout_s,
        )
        status = await run_in_threadpool(store, body, run_id, caller)
        return JSONResponse({"run_id": run_id, "stored": "created" if status == 201 else "unchanged"}, status)

    @router.get("/api/records/{run_id}", dependencies=readers)
    def get(run_id: str) -> Response:
        return Response(records.raw(run_id), media_type="application/json")

    return router
