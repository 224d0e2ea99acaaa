"""Who may do what at the host: credentials in, callers out, and the guards that the routes declare.

A request shows its credential as `Authorization: Bearer jmc.…`; a browser as the cookie that `/enter` sets, which lets it read and no more,
so that no foreign page can make it write. Everything that is not named public needs a caller. An open host (loopback only, for trials)
takes everybody for its operator. Missing, wrong, expired and revoked credentials get one answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from fastapi import Request

from joulemark import credentials
from joulemark.attempts import Attempts
from joulemark.credentials import Credential
from joulemark.errors import Forbidden
from joulemark.protocol import INSTANCE_HEADER
from joulemark_host.credential_book import Role, refused
from joulemark_host.registry import Caller, Registry

COOKIE = "joulemark"
ANYBODY = Caller("operator", "anybody on this machine")
Guard = Callable[[Request], Caller]


class Access:
    """See the module. `registry` None: an open host."""

    def __init__(self, registry: Registry | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry = registry
        self._attempts = Attempts(clock)

    @property
    def registry(self) -> Registry | None:
        """The book of boards and people, if this host has one."""
        return self._registry

    def guard(self, *roles: Role) -> Guard:
        """A dependency that lets these roles pass; boards only once an operator has approved them."""

        def check(request: Request) -> Caller:
            caller = self._known(request, roles)
            if caller.role == "device" and self._registry is not None:
                instance = request.headers.get(INSTANCE_HEADER, "")[:80]
                self._registry.admit(caller.subject, instance, address_of(request))
            return caller

        return check

    def board(self) -> Guard:
        """A dependency for a board that is known, approved or not: to open its session."""

        def check(request: Request) -> Caller:
            return self._known(request, ("device",))

        return check

    def failed(self, request: Request, what: str = "") -> None:
        """Notes a failure of this address (with `what` it tried). Raises TooManyAttempts."""
        self._attempts.failed(f"{address_of(request)} {what}")

    def _known(self, request: Request, roles: tuple[Role, ...]) -> Caller:
        if self._registry is None:
            return ANYBODY
        credential, by_cookie = _shown(request)
        caller = self._registry.caller(credential) if credential is not None else None
        if caller is None:
            self.failed(request, credential.id if credential is not None else "")
            raise refused()
        if by_cookie and "viewer" not in roles:
            raise Forbidden("a browser may look and no more", "use the command line for this")
        if caller.role not in roles:
            raise Forbidden(f"this is not for the role {caller.role!r}", f"it is for: {', '.join(roles)}")
        return caller


def address_of(request: Request) -> str:
    """The peer's address, as far as the socket knows it."""
    return request.client.host if request.client is not None else "unknown"


def _shown(request: Request) -> tuple[Credential | None, bool]:
    """The credential of a request, and whether it came as a cookie."""
    header = request.headers.get("authorization")
    if header is not None:
        kind, _, text = header.partition(" ")
        return (credentials.parse_credential(text) if kind.lower() == "bearer" else None), False
    cookie = request.cookies.get(COOKIE)
    return (credentials.parse_credential(cookie), True) if cookie is not None else (None, False)
