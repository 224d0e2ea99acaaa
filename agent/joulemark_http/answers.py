"""Errors as answers: a Problem with a status. No traceback and no text of an unexpected error leaves; the log has them."""

from __future__ import annotations

import logging
import math

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from joulemark.errors import TooManyAttempts, http_status, to_problem
from joulemark.wire import Problem

log = logging.getLogger(__name__)


def problem_of(request: Request, error: Exception) -> tuple[int, Problem, dict[str, str]]:
    """(status, what went wrong, headers) for any exception that a route let through."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return 400, Problem(code="bad_input", message=f"{where}: {first['msg']}", hint="correct the address"), {}
    if isinstance(error, HTTPException):
        code = "not_found" if error.status_code == 404 else "bad_input"
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        problem = Problem(code=code, message=message, hint="what there is is listed under /openapi.json")
        return error.status_code, problem, dict(error.headers or {})
    problem = to_problem(error)
    status = http_status(problem.code)
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    if isinstance(error, TooManyAttempts):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if problem.code == "internal":
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        problem = problem.model_copy(
            update={"message": "this failed for a reason that nobody expected; the log says where"}
        )
    return status, problem, headers


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """An exception handler for every kind of exception."""
    status, problem, headers = problem_of(request, error)
    return JSONResponse(problem.model_dump(), status, headers)
