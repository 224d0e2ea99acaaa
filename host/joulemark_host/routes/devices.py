"""Boards: each opens its session here; people see them, operators decide about them."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool

from joulemark.protocol import DeviceRow, SessionAnswer, SessionRequest
from joulemark_host.access import Access, address_of
from joulemark_host.dispatch import Dispatch
from joulemark_host.registry import Caller, Registry
from joulemark_http.bodies import read_model
from joulemark_http.interface import takes


def create_router(registry: Registry, access: Access, dispatch: Dispatch | None) -> APIRouter:
    """What operators decide is under the board's name or id."""
    router = APIRouter()
    board, operator = access.board(), access.guard("operator")
    readers = [Depends(access.guard("viewer", "operator"))]

    @router.put("/api/device/session", openapi_extra=takes(SessionRequest))
    async def begin(request: Request, caller: Caller = Depends(board)) -> SessionAnswer:
        asked = await read_model(request, SessionRequest)
        device = await run_in_threadpool(registry.begin_session, caller.subject, asked, address_of(request))
        if dispatch is not None:
            await run_in_threadpool(dispatch.compare, caller.subject, asked.holds)
        return SessionAnswer(name=device.name, admission=device.admission, host_time=registry.now())

    @router.get("/api/devices", dependencies=readers)
    def devices() -> list[DeviceRow]:
        return registry.devices()

    @router.get("/api/devices/{name}", dependencies=readers)
    def device(name: str) -> DeviceRow:
        return registry.device(name)

    @router.post("/api/devices/{name}/approve")
    def approve(name: str, caller: Caller = Depends(operator)) -> DeviceRow:
        return registry.approve(name, caller.subject)

    @router.post("/api/devices/{name}/rename")
    def rename(name: str, to: str, caller: Caller = Depends(operator)) -> DeviceRow:
        return registry.rename(name, to, caller.subject)

    @router.post("/api/devices/{name}/revoke")
    def revoke(name: str, caller: Caller = Depends(operator)) -> DeviceRow:
        return registry.revoke(name, caller.subject)

    return router
