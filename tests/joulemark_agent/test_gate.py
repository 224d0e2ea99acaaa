"""Who may speak to an agent: tickets of its own host for a fresh number, the local token, and nobody else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient

from joulemark.errors import JoulemarkError, NotAuthenticated, Untrusted, http_status
from joulemark.signing import SigningKey
from joulemark.statements import TicketStatement
from joulemark_agent.gate import MOST, NONCE_LIFE_S, TOKEN_LIFE_S, Gate, local_token

HOST, STRANGER = SigningKey(bytes(range(32))), SigningKey(bytes(32))
LOCAL = "local-token"


@dataclass
class Setting:
    gate: Gate
    http: TestClient
    clock: list[float]

    def ticket(self, key: SigningKey = HOST, **changes: Any) -> Any:
        challenge = self.gate.challenge()
        fields = {"device_id": "dev-1", "nonce": challenge.nonce, "role": "operator", "who": "ann", **changes}
        return key.sign(TicketStatement.model_validate(fields))

    def status(self, path: str, token: str | None) -> int:
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        return self.http.get(path, headers=headers).status_code


def setting(**options: Any) -> Setting:
    clock = [0.0]
    gate = Gate("dev-1", **{"host_key": HOST.public, "local_token": LOCAL, "clock": lambda: clock[0], **options})
    app = FastAPI()

    @app.exception_handler(JoulemarkError)
    def refused(_: Any, error: JoulemarkError) -> Any:
        from fastapi.responses import JSONResponse

        return JSONResponse({}, http_status(error.code))

    @app.get("/look", dependencies=[Depends(gate.guard("viewer", "operator"))])
    def look() -> None: ...

    @app.get("/do", dependencies=[Depends(gate.guard("operator"))])
    def do() -> None: ...

    return Setting(gate, TestClient(app), clock)


def test_a_ticket_for_a_fresh_number_opens_the_gate_for_its_role():
    here = setting()
    operator = here.gate.enter(here.ticket(), "p").token
    viewer = here.gate.enter(here.ticket(role="viewer"), "p").token
    assert (here.status("/look", operator), here.status("/do", operator)) == (200, 200)
    assert (here.status("/look", viewer), here.status("/do", viewer)) == (200, 403)
    assert (here.status("/look", LOCAL), here.status("/do", LOCAL)) == (200, 200)
    for wrong in (None, "", "x", operator[:-1], operator + "x"):
        here.clock[0] += 60
        assert here.status("/look", wrong) == 401


def test_a_ticket_is_good_once_for_this_board_by_this_host_and_soon():
    here = setting()
    used = here.ticket()
    here.gate.enter(used, "p")
    with pytest.raises(NotAuthenticated):
        here.gate.enter(used, "p")
    late = here.ticket()
    here.clock[0] += NONCE_LIFE_S
    for wrong in (late, here.ticket(device_id="dev-2"), here.ticket(nonce="0" * 64)):
        with pytest.raises(NotAuthenticated):
            here.gate.enter(wrong, "p")
    with pytest.raises(Untrusted):
        here.gate.enter(here.ticket(STRANGER), "p")


def test_a_token_ends():
    here = setting()
    token = here.gate.enter(here.ticket(), "p").token
    here.clock[0] += TOKEN_LIFE_S - 1
    assert here.status("/do", token) == 200
    here.clock[0] += 1
    assert here.status("/do", token) == 401


def test_without_a_host_only_the_local_token_counts():
    here = setting(host_key=None)
    with pytest.raises(Untrusted):
        here.gate.enter(here.ticket(), "p")
    assert (here.status("/do", LOCAL), here.status("/do", "x")) == (200, 401)


def test_numbers_and_failures_are_bounded():
    here = setting()
    first = here.ticket()
    for _ in range(MOST):
        here.gate.challenge()
    with pytest.raises(NotAuthenticated):  # pushed out by newer ones
        here.gate.enter(first, "p")
    assert [here.status("/look", "x") for _ in range(12)] == [401] * 10 + [429] * 2
    assert here.status("/look", LOCAL) == 200


def test_an_open_agent_lets_everybody_in():
    here = setting(host_key=None, local_token=None, open_to_all=True)
    assert here.status("/do", None) == 200


def test_the_local_token_is_made_once_for_its_owner_alone(tmp_path: Path):
    token = local_token(tmp_path)
    assert local_token(tmp_path) == token and len(token) >= 43
    assert (tmp_path / "local.token").stat().st_mode & 0o777 == 0o600
