"""A host under load on one machine: ten million item rows behind a grid, and a thousand boards that wait, report and send records.

The boards are simulated in a process of their own: each has keys, a credential, a TLS connection of its own, and does what an agent does:
waits for orders in a long poll, reports now and then, sends a signed record. The host is a real process with its real database. All share
the machine's cores, so that the figures are those of a host that has half of them. Times are in seconds.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import ssl
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from joulemark import tls
from joulemark.protocol import Report, SessionRequest
from joulemark.wire import RunState
from tests.bench.pairs import Figure
from tests.fixtures.boards_at_host import Board
from tests.fixtures.grids import PI, SMOL_Q8
from tests.fixtures.host_process import HostProcess
from tests.fixtures.postgresql import PostgresServer, programs
from tests.fixtures.records import make_items, make_record, record_bytes

ITEMS = 1319
"""As many as GSM8K has."""
RECORDS = 7582
"""Times ITEMS: ten million."""
BOARDS_IN_GRID, MODELS_IN_GRID = 50, 20
TASKS = ("gsm8k_cot", "arc_challenge")
METRICS = ("accuracy", "decode_rate", "ttft_p50")
QUERIES = 30
AGENTS = 1000
SECONDS = 90.0
REPORT_EVERY_S = 60.0
RECORDS_A_SECOND = 4.0
WAITING_AFTER_S = 20.0


def measure_grid(say: Callable[[str], None], records: int = RECORDS, database: str | None = None) -> Iterator[Figure]:
    """The grid of one metric on one task, as the host answers it over HTTP, over ten million items."""
    with tempfile.TemporaryDirectory(prefix="joulemark-load-") as folder:
        host = HostProcess(Path(folder) / "host", tls_on=False, database=database)
        try:
            began = time.monotonic()
            for number in range(records):
                host.records.put(_record(number))
                if number % 1000 == 999:
                    say(
                        f"  {number + 1} records, {(number + 1) * ITEMS / 1e6:.1f} million items, {time.monotonic() - began:.0f} s"
                    )
            about = f"{records * ITEMS / 1e6:.1f} million items, {_kind(host)}"
            say(f"  {about}: {records} records, {time.monotonic() - began:.0f} s")
            if database is None:
                size = sum(path.stat().st_size for path in Path(folder).rglob("records.db*"))
                say(f"  {size / 1e6:.0f} MB on disk")
            for path, required in (("/api/grid.json", 0.3), ("/api/grid.csv", 0.3), ("/", 1.0)):
                took: list[float] = []
                for number in range(QUERIES):
                    asked = {"metric": METRICS[number % 3], "task": TASKS[number % 2]}
                    start = time.monotonic()
                    answer = host.client.get(path, params=asked)
                    took.append(time.monotonic() - start)
                    answer.raise_for_status()
                middle, longest = statistics.median(took), max(took)
                spread = f"median {middle:.3f}, longest of {QUERIES} {longest:.3f}; {len(answer.content) / 1e3:.0f} kB"
                name = f"{path}, a grid of 1,000 cells over {about}: p95"
                yield Figure(name, _quantile(took, 0.95), required, "s", at_least=False, spread=spread)
        finally:
            host.close()


def measure_fleet(say: Callable[[str], None], database: str | None = None) -> Iterator[Figure]:
    """A thousand boards that wait and report, in a process of their own; records are sent and timed in this one, which is idle else."""
    with tempfile.TemporaryDirectory(prefix="joulemark-load-") as folder:
        host = HostProcess(Path(folder) / "host", database=database)
        try:
            boards = [_enrolled(host, f"board-{number}") for number in range(AGENTS)]
            say(f"  {AGENTS} boards are enrolled")
            fleet, ours = multiprocessing.get_context("fork").Pipe()
            child = multiprocessing.get_context("fork").Process(target=_live, args=(host, boards, ours))
            child.start()
            say(f"  {AGENTS} sessions are open after {fleet.recv():.0f} s")
            took = _send_records(host, boards)
            counted: _Counted = fleet.recv()
            child.join(60)
            times = f"median {statistics.median(counted.reported):.3f} s, p99 {_quantile(counted.reported, 0.99):.3f} s"
            say(
                f"  {counted.polls} polls answered, {len(counted.reported)} reports ({times}), {counted.failures} failures, "
                f"{len(took)} records of {len(_record(0, boards[0])) / 1e3:.0f} kB in {SECONDS:g} s"
            )
            lost = len(took) - len(host.records.facts())
            yield Figure("records lost, requests failed", lost + counted.failures, 0, "", at_least=False)
            spread = f"median {statistics.median(took):.3f}, longest of {len(took)} {max(took):.3f}"
            name = f"p99 of record ingestion with {AGENTS} boards waiting and reporting ({_kind(host)})"
            yield Figure(name, _quantile(took, 0.99), 1.0, "s", at_least=False, spread=spread)
        finally:
            host.close()


@contextmanager
def postgresql() -> Iterator[str]:
    """An empty database of a PostgreSQL server that flushes its commits, as anybody's would: its URL."""
    server = PostgresServer(programs(), flushing=True)
    try:
        yield server.new_database()
    finally:
        server.close()


def _send_records(host: HostProcess, boards: Sequence[Board]) -> list[float]:
    """Sends a signed record every so often, each as another board; how long each took, in seconds."""
    context = tls.pinned(host.identity.authority_pem, tls.HOST_NAME)
    took: list[float] = []
    ends = time.monotonic() + SECONDS - 2
    number = 0
    with httpx.Client(base_url=host.url, verify=context, timeout=120, trust_env=False) as client:
        while time.monotonic() < ends:
            board, run_id = boards[number % len(boards)], f"run-{number}"
            body = _record(number, board)
            headers = board.vouching(run_id, body)
            start = time.monotonic()
            client.put(f"/api/records/{run_id}", content=body, headers=headers).raise_for_status()
            took.append(time.monotonic() - start)
            number += 1
            time.sleep(max(0.0, 1 / RECORDS_A_SECOND - took[-1]))
    return took


@dataclass
class _Counted:
    """What the boards saw."""

    polls: int = 0
    failures: int = 0
    reported: list[float] = field(default_factory=list[float])


def _live(host: HostProcess, boards: Sequence[Board], say: Any) -> None:
    """The boards' process: all of them on one event loop."""
    fleet = _Fleet(host, boards)
    asyncio.run(fleet.live(say.send))
    say.send(fleet.counted)
    os._exit(0)  # nothing of the parent's is to be closed here


class _Fleet:
    def __init__(self, host: HostProcess, boards: Sequence[Board]) -> None:
        self._host = host
        self._boards = boards
        self._context: ssl.SSLContext = tls.pinned(host.identity.authority_pem, tls.HOST_NAME)
        self._random = random.Random(1)
        self._ends = 0.0
        self.counted = _Counted()

    async def live(self, ready: Callable[[float], None]) -> None:
        """Opens a session for every board, then lets them wait and report for SECONDS."""
        began = time.monotonic()
        clients = [self._client(board) for board in self._boards]
        pairs = list(zip(self._boards, clients, strict=True))
        for start in range(0, len(pairs), 50):  # boards do not all begin in the same moment
            await asyncio.gather(*(self._open(board, client) for board, client in pairs[start : start + 50]))
        # One board after the other begins to wait, as after a host's restart, when each tries again after a time of its own.
        self._ends = time.monotonic() + WAITING_AFTER_S + SECONDS
        living = [asyncio.create_task(self._board(client)) for client in clients]
        await asyncio.sleep(WAITING_AFTER_S)
        ready(time.monotonic() - began)
        await asyncio.gather(*living)
        for client in clients:
            await client.aclose()

    def _client(self, board: Board) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self._host.url,
            verify=self._context,
            headers=board.headers,
            timeout=120,
            trust_env=False,
            limits=httpx.Limits(keepalive_expiry=3.0),  # the host ends idle connections after five seconds
        )

    async def _open(self, board: Board, client: httpx.AsyncClient) -> None:
        request = SessionRequest(instance_id=board.instance_id, boot_id="boot", hardware=None, facts=board.facts)
        (await client.put("/api/device/session", content=request.model_dump_json())).raise_for_status()

    async def _board(self, client: httpx.AsyncClient) -> None:
        await asyncio.sleep(self._random.uniform(0, WAITING_AFTER_S))
        await asyncio.gather(self._poll(client), self._report(client))

    async def _poll(self, client: httpx.AsyncClient) -> None:
        revision = -1
        while (left := self._ends - time.monotonic()) > 0:
            wait_s = min(self._random.uniform(40.0, 50.0), left)
            answer = await client.get("/api/device/orders", params={"after": revision, "wait_s": wait_s})
            self._check(answer)
            if answer.status_code == 200:
                revision = answer.json()["revision"]
            self.counted.polls += 1

    async def _report(self, client: httpx.AsyncClient) -> None:
        await asyncio.sleep(self._random.uniform(0, REPORT_EVERY_S))
        state = RunState.model_validate({"run_id": "run", "status": "running", "phase": "accuracy", "items_done": 3})
        while time.monotonic() < self._ends:
            start = time.monotonic()
            self._check(await client.post("/api/device/report", content=Report(runs=(state,)).model_dump_json()))
            self.counted.reported.append(time.monotonic() - start)
            await asyncio.sleep(REPORT_EVERY_S)

    def _check(self, answer: httpx.Response) -> None:
        if not answer.is_success:
            self.counted.failures += 1
            print(f"  {answer.status_code}: {answer.text[:300]}", flush=True)


def _enrolled(host: HostProcess, name: str) -> Board:
    board = Board(name, hardware=None)
    key = host.registry.issue_key("device", "bench", approved=True)
    _, board.credential, _ = host.registry.enrol(board.enrolment(key), "127.0.0.1")
    host.dispatch.push(board.device_id, SMOL_Q8)
    return board


def _record(number: int, board: Board | None = None) -> bytes:
    """A record with as many items as GSM8K has; of boards and models in turn, or of one board."""
    cell, place = divmod(number, BOARDS_IN_GRID)
    task = TASKS[(cell // MODELS_IN_GRID) % 2]
    if board is not None:
        facts, manifest = board.facts, SMOL_Q8
    else:
        facts = PI.model_copy(update={"device_id": f"dev-{place}", "name": f"board {place}"})
        manifest = SMOL_Q8.model_copy(update={"name": f"model-{cell % MODELS_IN_GRID}"})
    items = make_items(task, ITEMS, correct=number % ITEMS)
    return record_bytes(make_record(f"run-{number}", task=task, device=facts, manifest=manifest, items=items))


def _kind(host: HostProcess) -> str:
    return host.records._engine.dialect.name  # pyright: ignore[reportPrivateUsage]


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
