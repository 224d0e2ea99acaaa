"""Who may speak to this agent over HTTP: its host's tickets and its own local token; nobody else, except on an open agent.

A board knows no people. It knows the key of its host, so that whoever comes shows a ticket that the host signed for this board and for a
number that the board has just made up (no clock is needed, and an old ticket is worth nothing). For it the caller gets a token that lives
in memory. Whoever can read the agent's own folder may show the token in it: Prometheus, or a client on the board. Times are monotonic.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastapi import Request

from joulemark import credentials, signing
from joulemark.attempts import Attempts
from joulemark.errors import Forbidden, NotAuthenticated
from joulemark.protocol import Challenge, Entry
from joulemark.statements import Envelope, PublicKey, TicketStatement
from joulemark.wire import Identifier

Role = Literal["operator", "viewer"]
NONCE_LIFE_S = 60.0
TOKEN_LIFE_S = 12 * 3600.0
MOST = 256
"""Numbers and tokens that are remembered; the oldest go first."""
LOCAL_TOKEN = "local.token"


@dataclass(frozen=True)
class _Pass:
    role: Role
    ends_s: float


class Gate:
    """See the module. `host_key` None: no host yet, only the local token counts. `open_to_all`: everybody is an operator."""

    def __init__(
        self,
        device_id: Identifier,
        host_key: PublicKey | None,
        local_token: str | None,
        clock: Callable[[], float],
        open_to_all: bool = False,
    ) -> None:
        self._device_id = device_id
        self._host_key = host_key
        self._local = credentials.digest(local_token) if local_token is not None else None
        self._clock = clock
        self._open = open_to_all
        self._attempts = Attempts(clock)
        self._nonces: OrderedDict[str, float] = OrderedDict()
        self._passes: OrderedDict[str, _Pass] = OrderedDict()
        self._lock = threading.Lock()

    def challenge(self) -> Challenge:
        """A new number for a ticket."""
        nonce = secrets.token_hex(32)
        with self._lock:
            self._nonces[nonce] = self._clock() + NONCE_LIFE_S
            while len(self._nonces) > MOST:
                self._nonces.popitem(last=False)
        return Challenge(device_id=self._device_id, nonce=nonce)

    def enter(self, ticket: Envelope, peer: str) -> Entry:
        """A token for whoever shows a ticket for a number that was just given out. Raises Untrusted, NotAuthenticated, TooManyAttempts."""
        said = signing.opened(ticket, TicketStatement, [self._host_key] if self._host_key is not None else [])
        with self._lock:
            ends_s = self._nonces.pop(said.nonce, 0.0)
        if ends_s <= self._clock() or said.device_id != self._device_id:
            self._attempts.failed(peer)
            raise NotAuthenticated("this ticket is for another board, used, or too old", "ask for a new one")
        token = credentials.new_secret()
        with self._lock:
            self._passes[credentials.digest(token)] = _Pass(said.role, self._clock() + TOKEN_LIFE_S)
            while len(self._passes) > MOST:
                self._passes.popitem(last=False)
        return Entry(token=token, expires_in_s=TOKEN_LIFE_S)

    def guard(self, *roles: Role) -> Callable[[Request], None]:
        """A dependency that lets these roles pass."""

        def check(request: Request) -> None:
            if self._open:
                return
            role = self._role(request.headers.get("authorization", ""))
            if role is None:
                self._fail(request)
            elif role not in roles:
                raise Forbidden(f"this is not for the role {role!r}", f"it is for: {', '.join(roles)}")

        return check

    def _fail(self, request: Request) -> None:
        self._attempts.failed(request.client.host if request.client is not None else "unknown")
        hint = "`joulemark push` and `run` get a ticket from the host; on the board itself: the token in identity/local.token"
        raise NotAuthenticated("the token is missing, wrong, expired or revoked", hint)

    def _role(self, header: str) -> Role | None:
        kind, _, token = header.partition(" ")
        if kind.lower() != "bearer" or not token:
            return None
        if self._local is not None and credentials.matches(token, self._local):
            return "operator"
        # Found by its digest: how long the search takes tells nothing about the token.
        with self._lock:
            found = self._passes.get(credentials.digest(token))
        return found.role if found is not None and found.ends_s > self._clock() else None


def local_token(folder: Path) -> str:
    """The token for whoever can read the agent's own folder; made at the first start, mode 0600."""
    path = folder / LOCAL_TOKEN
    if not path.exists():
        signing.write_secret(path, credentials.new_secret() + "\n")
    return path.read_text("ascii").strip()
