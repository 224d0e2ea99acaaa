"""How boards and people get in: the host's identity, enrolment with a one-time key, and the page where a browser shows a key."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from urllib.parse import parse_qs, urlencode

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from pydantic import TypeAdapter, ValidationError
from starlette.concurrency import run_in_threadpool

from joulemark import credentials
from joulemark.errors import BadInput, JoulemarkError, NotAuthenticated, Untrusted
from joulemark.protocol import EnrolmentAnswer, EnrolmentRequest, HostFacts, PersonAnswer, PersonRequest
from joulemark.wire import Identifier
from joulemark_host.access import COOKIE, Access, address_of
from joulemark_host.admitting import facts_of, take_in
from joulemark_host.identity import HostIdentity
from joulemark_host.page import entrance_page
from joulemark_host.registry import Registry
from joulemark_http.bodies import read_body, read_model
from joulemark_http.interface import takes, takes_form

COOKIE_LIFE_S = 90 * 86_400
_OURS = re.compile(r"/(?!/)[A-Za-z0-9._~/?=&%+:,-]{0,1000}", re.ASCII)


def create_router(identity: HostIdentity, registry: Registry, access: Access) -> APIRouter:
    """All of it is public: whoever comes here has no credential yet. Failures are counted."""
    router = APIRouter()
    facts = facts_of(identity)

    @router.get("/api/identity")
    def host_facts() -> HostFacts:
        return facts

    @router.post("/api/enrolment", status_code=201, openapi_extra=takes(EnrolmentRequest))
    async def enrol(request: Request) -> EnrolmentAnswer:
        asked = await read_model(request, EnrolmentRequest)
        with _counted(access, request):
            return await run_in_threadpool(take_in, identity, registry, asked, address_of(request))

    @router.post("/api/people", status_code=201, openapi_extra=takes(PersonRequest))
    async def sign_in(request: Request) -> PersonAnswer:
        asked = await read_model(request, PersonRequest)
        with _counted(access, request):
            return await run_in_threadpool(_welcome, registry, asked.key, asked.name)

    @router.get("/enter", response_class=HTMLResponse)
    def entrance(to: str = "/") -> str:
        return entrance_page(_page_of_ours(to))

    @router.post("/enter", response_class=HTMLResponse, openapi_extra=takes_form("key", "name"))
    async def enter(request: Request) -> Response:
        body, to = await read_body(request), "/"
        try:
            with _counted(access, request):
                key, name, to = _form(body)
                answer = await run_in_threadpool(_welcome, registry, key, _identifier(name))
        except JoulemarkError as error:
            return HTMLResponse(entrance_page(to, error.message, error.hint), 403)
        response = RedirectResponse(to, 303)
        secure = request.url.scheme == "https"
        response.set_cookie(
            COOKIE, answer.credential, COOKIE_LIFE_S, httponly=True, samesite="strict", secure=secure, path="/"
        )
        return response

    return router


def way_in(request: Request) -> str:
    """Where a browser without a credential is sent, to come back to what it wanted."""
    wanted = _page_of_ours(f"{request.url.path}?{request.url.query}".rstrip("?"))
    return "/enter" if wanted == "/" else f"/enter?{urlencode({'to': wanted})}"


def _page_of_ours(to: str) -> str:
    """A path on this host; anything else that a link may say (another host, a script) becomes the first page."""
    return to if _OURS.fullmatch(to) else "/"


@contextmanager
def _counted(access: Access, request: Request) -> Generator[None, None, None]:
    """Notes a key that was wrong. Raises TooManyAttempts in its place once there were too many."""
    try:
        yield
    except (NotAuthenticated, BadInput) as error:
        if not isinstance(error, Untrusted):  # a signature does not become right by trying
            access.failed(request)
        raise


def _welcome(registry: Registry, key: str, name: str) -> PersonAnswer:
    credential, role = registry.enrol_person(credentials.parse_enrolment_key(key), name)
    assert role != "device"
    return PersonAnswer(credential=credential.text(), role=role)


def _form(body: bytes) -> tuple[str, str, str]:
    """The key, the name and the page to go on to that a browser sends."""
    try:
        fields = parse_qs(body.decode("utf-8", "replace"), max_num_fields=8)
    except ValueError as error:
        raise BadInput("this is not the form that was given", "go back and fill it in again") from error
    key, name, to = (fields.get(field, [""])[0].strip() for field in ("key", "name", "to"))
    return key, name, _page_of_ours(to)


def _identifier(name: str) -> str:
    try:
        return TypeAdapter(Identifier).validate_python(name)
    except ValidationError as error:
        raise BadInput("this cannot be a name", "use letters, digits, dots and dashes") from error
