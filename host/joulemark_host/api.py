"""Puts the host's HTTP interface together: the routes, what errors look like, and the headers that every answer has.

Errors leave as a Problem with a status, for browsers as a page (without a credential: the page that lets them in); a traceback goes to the
log only. The Host header is checked against DNS rebinding. It holds no state.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from joulemark import __version__
from joulemark.errors import JoulemarkError, TooManyAttempts, http_status, to_problem
from joulemark.wire import SCHEMA, Problem
from joulemark_host.access import Access
from joulemark_host.dispatch import Dispatch
from joulemark_host.identity import HostIdentity
from joulemark_host.page import ONLINE_POLICY, error_page
from joulemark_host.records import Records
from joulemark_host.routes import devices, entrance, grid, orders, shelf
from joulemark_host.routes import records as record_routes
from joulemark_host.shelf import Shelf

LOG = logging.getLogger(__name__)
BODY_TIMEOUT_S = 120.0
STATUSES = {"too_large": 413, "unsupported_media": 415, "bad_input": 422}


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
    app = FastAPI(title="Joulemark host", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.stopping = lambda: False  # whoever serves the application says when it ends
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts))
    app.add_middleware(_SecurityHeaders)  # the last added is the outermost, so refusals have the headers too
    _add_errors(app)
    _add_state(app, access)
    app.include_router(shelf.create_router(artifacts, access))
    app.include_router(record_routes.create_router(records, access, body_timeout_s, dispatch))
    app.include_router(grid.create_router(artifacts, records, access))
    if access.registry is not None and identity is not None:
        app.include_router(entrance.create_router(identity, access.registry, access))
        app.include_router(devices.create_router(access.registry, access))
    if dispatch is not None:
        app.include_router(orders.create_router(dispatch, artifacts, access, lambda: bool(app.state.stopping())))
    return app


def _add_state(app: FastAPI, access: Access) -> None:
    @app.get("/healthz")
    def health() -> dict[str, Any]:
        return {"status": "ok", "version": __version__, "schema": SCHEMA}

    @app.get("/openapi.json", dependencies=[Depends(access.guard("viewer", "operator"))], include_in_schema=False)
    def interface() -> dict[str, Any]:
        return app.openapi()


def _add_errors(app: FastAPI) -> None:
    def answer(request: Request, problem: Problem) -> Response:
        status = STATUSES.get(problem.code) or http_status(problem.code)
        if "text/html" in request.headers.get("accept", "") and request.method == "GET":
            if status == 401:
                return RedirectResponse("/enter", 303)
            return HTMLResponse(error_page(status, problem.message, problem.hint), status)
        return JSONResponse(problem.model_dump(), status)

    @app.exception_handler(JoulemarkError)
    def expected(request: Request, error: JoulemarkError) -> Response:
        response = answer(request, to_problem(error))
        if response.status_code == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        if isinstance(error, TooManyAttempts):
            response.headers["Retry-After"] = str(math.ceil(error.retry_after_s))
        return response

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
