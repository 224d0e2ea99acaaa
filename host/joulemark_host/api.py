"""Puts the host's HTTP interface together: the routes, what errors look like, and the headers that every answer has.

Errors leave as a Problem with a status, for browsers as a page (without a credential: the page that lets them in); a traceback goes to the
log only. The Host header is checked against DNS rebinding. It holds no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from joulemark import __version__
from joulemark.errors import JoulemarkError
from joulemark.wire import SCHEMA
from joulemark_host.access import Access
from joulemark_host.dispatch import Dispatch
from joulemark_host.identity import HostIdentity
from joulemark_host.page import ONLINE_POLICY, error_page
from joulemark_host.records import Records
from joulemark_host.routes import devices, entrance, grid, orders, shelf
from joulemark_host.routes import records as record_routes
from joulemark_host.shelf import Shelf
from joulemark_http.answers import problem_of
from joulemark_http.interface import PROBLEM, described, errors

BODY_TIMEOUT_S = 120.0


def create_app(
    artifacts: Shelf,
    records: Records,
    allowed_hosts: Sequence[str] = ("*",),
    body_timeout_s: float = BODY_TIMEOUT_S,
    access: Access | None = None,
    identity: HostIdentity | None = None,
    dispatch: Dispatch | None = None,
) -> FastAPI:
    """The application. `allowed_hosts` are the names under which it may be asked for. Without `access` the host is open."""
    access = access or Access(None)
    app = FastAPI(
        title="Joulemark host",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        responses=errors(PROBLEM, "text/html"),
    )
    app.state.stopping = lambda: False  # whoever serves the application says when it ends
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts))
    app.add_middleware(_SecurityHeaders)  # the last added is the outermost, so refusals have the headers too
    _add_errors(app)
    _add_state(app, access)
    app.include_router(shelf.create_router(artifacts, access, dispatch))
    app.include_router(record_routes.create_router(records, access, body_timeout_s, dispatch))
    app.include_router(grid.create_router(artifacts, records, access))
    if access.registry is not None and identity is not None:
        app.include_router(entrance.create_router(identity, access.registry, access))
        app.include_router(devices.create_router(access.registry, access, dispatch))
    if dispatch is not None:
        app.include_router(orders.create_router(dispatch, access, lambda: bool(app.state.stopping())))
    return app


def _add_state(app: FastAPI, access: Access) -> None:
    @app.get("/healthz")
    def health() -> dict[str, Any]:
        return {"status": "ok", "version": __version__, "schema": SCHEMA}

    @app.get("/openapi.json", dependencies=[Depends(access.guard("viewer", "operator"))], include_in_schema=False)
    def interface() -> dict[str, Any]:
        return described(app)


def _add_errors(app: FastAPI) -> None:
    def answer(request: Request, error: Exception) -> Response:
        status, problem, headers = problem_of(request, error)
        if "text/html" in request.headers.get("accept", "") and request.method == "GET":  # a person, not a program
            if status == 401:
                return RedirectResponse(entrance.way_in(request), 303)
            return HTMLResponse(error_page(status, problem.message, problem.hint), status, headers)
        return JSONResponse(problem.model_dump(), status, headers)

    for kind in (HTTPException, RequestValidationError, JoulemarkError, Exception):
        app.add_exception_handler(kind, answer)


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
