"""What boards are to do: they ask and wait for news, and say what has changed. Artifacts on boards and runs, for people to look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from joulemark.errors import NotFound
from joulemark.protocol import Report, ReportAnswer
from joulemark_host.access import Access
from joulemark_host.dispatch import Dispatch
from joulemark_host.queue_page import queue_page
from joulemark_host.registry import Caller
from joulemark_host.waiting import Waiting
from joulemark_http.bodies import read_model
from joulemark_http.interface import takes

LONGEST_WAIT_S = 55.0
"""Below the minute after which many routers forget a silent connection."""


def create_router(dispatch: Dispatch, access: Access, stopping: Callable[[], bool]) -> APIRouter:
    """For boards, and for people who look. Whoever waits is sent away when the host is `stopping`."""
    router = APIRouter()
    board = access.guard("device")
    readers = [Depends(access.guard("viewer", "operator"))]
    waiting = Waiting(dispatch.revisions, stopping)

    @router.get("/api/device/orders", responses={204: {"description": "Nothing new came in that time"}})
    async def orders(
        caller: Caller = Depends(board),
        after: Annotated[int, Query(ge=-1, le=2**53)] = -1,
        wait_s: Annotated[float, Query(ge=0, le=LONGEST_WAIT_S)] = 0.0,
    ) -> Response:
        revision = await run_in_threadpool(dispatch.revision, caller.subject)
        if revision <= after and not await waiting.until(caller.subject, after, wait_s):
            return Response(status_code=204)
        answer = await run_in_threadpool(dispatch.orders, caller.subject)
        return JSONResponse(answer.model_dump(mode="json", by_alias=True))

    @router.post("/api/device/report", openapi_extra=takes(Report))
    async def report(request: Request, caller: Caller = Depends(board)) -> ReportAnswer:
        said = await read_model(request, Report)
        return await run_in_threadpool(dispatch.report, caller.subject, said)

    @router.get("/api/targets", dependencies=readers)
    def targets(device_id: str | None = None, artifact_id: str | None = None) -> list[dict[str, Any]]:
        found = dispatch.targets(device_id, artifact_id)
        return [target.plain() for target in found]

    @router.get("/queue", response_class=HTMLResponse, dependencies=readers)
    def queue() -> str:
        return queue_page("What waits and what is going on", dispatch.runs(open_only=True), dispatch.titles())

    @router.get("/sweeps/{name}", response_class=HTMLResponse, dependencies=readers)
    def sweep(name: Annotated[str, Path(max_length=80)]) -> str:
        runs = dispatch.runs(name)
        if not runs:
            raise NotFound(f"there is no sweep {name!r}", "`joulemark sweep --name` makes one; /queue shows what waits")
        return queue_page(f"Sweep {name}", runs, dispatch.titles())

    @router.get("/api/runs", dependencies=readers)
    def runs(sweep: str | None = None) -> list[dict[str, Any]]:
        return [run.plain() for run in dispatch.runs(sweep)]

    return router
