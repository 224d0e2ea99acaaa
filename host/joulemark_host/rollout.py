"""Roll-outs: an artifact to many boards in stages, each begun when the one before went well enough, stopped when too much went wrong.

A stage has gone well when the wanted share of its boards has the artifact, and has made the check run if there is one. A board that
reports an error, takes no part any more, or does not get there in the stage's time counts as an error; more errors than allowed, or
too few successes at the stage's end, stop the roll-out: what the stage still waits for is withdrawn, later stages are not begun. What
is on boards already stays. Works on a connection that somebody else opened; `advance` is asked whenever something has changed. Times are
seconds of the clock that is passed in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from pydantic import Field
from sqlalchemy.engine import Connection, RowMapping

from joulemark.errors import BadInput, Conflict, NotFound
from joulemark.wire import Identifier, Manifest, Problem, RunSpec, Title, Wire, content_id
from joulemark_host import run_queue
from joulemark_host.fleet_tables import DEVICES, ROLLOUTS, RUNS
from joulemark_host.holdings import Holdings, row_of
from joulemark_host.run_queue import RunQueue

Share = Annotated[float, Field(ge=0, le=1)]
BoardState = Literal["registered", "pending", "in_sync", "error"]
RolloutStatus = Literal["running", "done", "stopped"]
STAGE_TIMEOUT_S = 24 * 3600.0


class Stage(Wire):
    """Boards that get the artifact together. `words` is what a person called them."""

    words: Title
    device_ids: Annotated[tuple[Identifier, ...], Field(min_length=1, max_length=10_000)]


class Plan(Wire):
    """What is to happen. `success` and `errors` are shares of a stage's boards; `check` is the run that each board has to make, its run id
    being replaced; `timeout_s` is for each stage."""

    name: Identifier
    manifest: Manifest
    stages: Annotated[tuple[Stage, ...], Field(min_length=1, max_length=100)]
    success: Share = 1.0
    errors: Share = 0.0
    timeout_s: Annotated[float, Field(gt=0, le=30 * 86_400)] = STAGE_TIMEOUT_S
    check: RunSpec | None = None
    task: Title = ""
    downgrade: bool = False


@dataclass(frozen=True)
class Board:
    """One board of a stage, as far as it is. Bytes are None before it was asked, `check` is where its check run stands, if there is one."""

    device_id: str
    device: str
    state: BoardState
    problem: Problem | None
    seen_at: float | None = None
    received_bytes: int | None = None
    size_bytes: int | None = None
    check: str | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return dict(vars(self)) | {"problem": self.problem.message if self.problem is not None else ""}


@dataclass(frozen=True)
class Rollout:
    """How far a roll-out is. `stage` counts from 0; stages after it have not begun. Its boards have until `ends_at`."""

    plan: Plan
    status: RolloutStatus
    stage: int
    problem: str
    ends_at: float
    stages: Sequence[Sequence[Board]]

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        stages = [
            {"words": stage.words, "boards": [board.plain() for board in boards]}
            for stage, boards in zip(self.plan.stages, self.stages, strict=True)
        ]
        about = {"name": self.plan.name, "artifact_id": content_id(self.plan.manifest), "ends_at": self.ends_at}
        return about | {"status": self.status, "stage": self.stage, "problem": self.problem, "stages": stages}


class Rollouts:
    """See the module."""

    def __init__(self, holdings: Holdings, queue: RunQueue, clock: Callable[[], float]) -> None:
        self._holdings = holdings
        self._queue = queue
        self._clock = clock

    def begin(self, connection: Connection, plan: Plan) -> None:
        """Begins a roll-out with its first stage. The very same plan again changes nothing; Conflict when its name is taken by another."""
        given = [device_id for stage in plan.stages for device_id in stage.device_ids]
        if len(set(given)) != len(given):
            raise BadInput("a board is in two stages", "each board gets the artifact once")
        row = _row(connection, plan.name)
        if row is not None:
            if _plan(row) != plan:
                raise Conflict(f"another roll-out is called {plan.name!r}", "choose another name")
            return
        now = self._clock()
        values = {
            "name": plan.name,
            "plan": plan.model_dump(mode="json"),
            "status": "running",
            "problem": "",
            "stage": 0,
        }
        connection.execute(sa.insert(ROLLOUTS).values(begun_at=now, stage_begun_at=now, **values))
        self._begin_stage(connection, plan, 0)

    def resume(self, connection: Connection, name: str) -> None:
        """Takes a stopped roll-out up again at its stage, with new orders for the boards that were in error. Raises NotFound, Conflict."""
        row = _required(connection, name)
        if row["status"] != "stopped":
            raise Conflict(f"the roll-out {name!r} is {row['status']}", "only a stopped one is taken up again")
        plan = _plan(row)
        for run in self._checks(connection, plan, row["stage"]):
            if run["status"] in ("failed", "cancelled", "interrupted"):  # its name is free for another try
                connection.execute(sa.update(RUNS).where(RUNS.c.number == run["number"]).values(sweep=None))
        self._set(connection, name, status="running", problem="", stage_begun_at=self._clock(), ended_at=None)
        self._begin_stage(connection, plan, row["stage"])

    def stop(self, connection: Connection, name: str, why: str) -> None:
        """Ends a roll-out: what its stage waits for is withdrawn. Raises NotFound."""
        row = _required(connection, name)
        if row["status"] != "running":
            return
        plan = _plan(row)
        artifact_id = content_id(plan.manifest)
        self._queue.cancel(connection, [run["run_id"] for run in self._checks(connection, plan, row["stage"])])
        for device_id in plan.stages[row["stage"]].device_ids:
            held = row_of(connection, device_id, artifact_id)
            waits = held is not None and held["state"] == "pending"
            if waits and not run_queue.needing(connection, device_id, artifact_id):  # somebody else's run needs it
                self._holdings.forget(connection, device_id, artifact_id)
        self._set(connection, name, status="stopped", problem=why, ended_at=self._clock())

    def advance(self, connection: Connection) -> None:
        """Looks at every roll-out that is going on: begins its next stage, ends it, or stops it."""
        for row in connection.execute(sa.select(ROLLOUTS).where(ROLLOUTS.c.status == "running")).mappings().all():
            plan, stage = _plan(row), row["stage"]
            while self._advance_stage(connection, plan, stage, row["stage_begun_at"]):
                stage += 1
                row = _required(connection, plan.name)

    def listed(self, connection: Connection, name: str | None = None) -> list[Rollout]:
        """All roll-outs, or the one of this name, in the order in which they began."""
        query = sa.select(ROLLOUTS).order_by(ROLLOUTS.c.begun_at, ROLLOUTS.c.name)
        if name is not None:
            query = query.where(ROLLOUTS.c.name == name)
        return [self._shown(connection, row) for row in connection.execute(query).mappings().all()]

    # --- inside -------------------------------------------------------------------------------------------------------
    def _advance_stage(self, connection: Connection, plan: Plan, stage: int, begun_at: float) -> bool:
        """Judges one stage; whether the next one has begun."""
        if plan.check is not None:
            self._queue_checks(connection, plan, stage, plan.check)
        late = self._clock() > begun_at + plan.timeout_s
        boards = self._boards(connection, plan, stage, begun=True, late=late)
        good = [board for board in boards if board.state == "in_sync"]
        bad = [board for board in boards if board.state == "error"]
        if len(bad) > plan.errors * len(boards):
            self.stop(connection, plan.name, _reason(plan.stages[stage].words, bad, len(boards)))
            return False
        if len(good) < math.ceil(plan.success * len(boards)):
            if len(good) + len(bad) == len(boards):
                self.stop(connection, plan.name, _reason(plan.stages[stage].words, bad, len(boards)))
            return False
        if stage + 1 == len(plan.stages):
            self._set(connection, plan.name, status="done", ended_at=self._clock())
            return False
        self._set(connection, plan.name, stage=stage + 1, stage_begun_at=self._clock())
        self._begin_stage(connection, plan, stage + 1)
        return True

    def _begin_stage(self, connection: Connection, plan: Plan, stage: int) -> None:
        for device_id in plan.stages[stage].device_ids:
            self._holdings.want(connection, device_id, plan.manifest, plan.downgrade)

    def _shown(self, connection: Connection, row: RowMapping) -> Rollout:
        plan = _plan(row)
        # Once it has ended, nobody is late any more; nor in a stage before, which went well without those who are still missing.
        ends_at, now, current = row["stage_begun_at"] + plan.timeout_s, row["ended_at"] or self._clock(), row["stage"]
        stages = [
            self._boards(connection, plan, number, number <= current, number == current and now > ends_at)
            for number in range(len(plan.stages))
        ]
        return Rollout(plan, row["status"], row["stage"], row["problem"], ends_at, stages)

    def _boards(self, connection: Connection, plan: Plan, stage: int, begun: bool, late: bool) -> list[Board]:
        ids = plan.stages[stage].device_ids
        known = connection.execute(sa.select(DEVICES).where(DEVICES.c.device_id.in_(ids))).mappings().all()
        devices = {row["device_id"]: row for row in known}
        checks = {run["device_id"]: run for run in self._checks(connection, plan, stage)}
        return [self._board(connection, plan, i, devices.get(i), checks.get(i), begun, late) for i in ids]

    def _board(
        self,
        connection: Connection,
        plan: Plan,
        device_id: str,
        device: RowMapping | None,
        check: RowMapping | None,
        begun: bool,
        late: bool,
    ) -> Board:
        held = row_of(connection, device_id, content_id(plan.manifest)) if begun else None
        whole = "size_bytes" if held is not None and held["state"] == "in_sync" else "received_bytes"
        state, problem = _state(plan, device, held, check) if begun else ("registered", None)
        if state == "pending" and late:
            why = f"it did not get there within {plan.timeout_s:g} s"
            state, problem = "error", Problem(code="too_late", message=why, hint="is it on?")
        return Board(
            device_id,
            device["name"] if device is not None else device_id,
            state,
            problem,
            seen_at=device["seen_at"] if device is not None else None,
            received_bytes=held[whole] if held is not None else None,
            size_bytes=held["size_bytes"] if held is not None else None,
            check=run_queue.row_in_words(check) if check is not None else None,
        )

    def _queue_checks(self, connection: Connection, plan: Plan, stage: int, check: RunSpec) -> None:
        """Queues the check run of every board of a stage that has the artifact now."""
        artifact_id = content_id(plan.manifest)
        asked = {run["device_id"] for run in self._checks(connection, plan, stage)}
        for device_id in plan.stages[stage].device_ids:
            row = row_of(connection, device_id, artifact_id)
            if row is None or row["state"] != "in_sync" or device_id in asked:
                continue
            before = (
                sa.select(sa.func.count()).select_from(RUNS).where(RUNS.c.run_id.startswith(_prefix(plan, device_id)))
            )
            number = int(connection.execute(before).scalar_one()) + 1
            spec = check.model_copy(update={"run_id": f"{_prefix(plan, device_id)}{number}"})
            self._queue.add(connection, device_id, spec, plan.task, _sweep(plan))

    def _checks(self, connection: Connection, plan: Plan, stage: int) -> Sequence[RowMapping]:
        """The check runs of a stage that count."""
        mine = sa.and_(RUNS.c.sweep == _sweep(plan), RUNS.c.device_id.in_(plan.stages[stage].device_ids))
        return connection.execute(sa.select(RUNS).where(mine).order_by(RUNS.c.number)).mappings().all()

    @staticmethod
    def _set(connection: Connection, name: str, **values: Any) -> None:
        connection.execute(sa.update(ROLLOUTS).where(ROLLOUTS.c.name == name).values(**values))


def _state(
    plan: Plan, device: RowMapping | None, held: RowMapping | None, check: RowMapping | None
) -> tuple[BoardState, Problem | None]:
    """Where a board of a stage that has begun stands, leaving aside how long it took."""
    if device is None or device["admission"] != "approved":
        word = device["admission"] if device is not None else "unknown here"
        return "error", Problem(code="no_part", message=f"the board is {word}", hint="`joulemark devices` says why")
    if held is None or held["state"] == "forgotten":
        return "pending", None
    if held["state"] == "registered":  # once ordered, that is what is left of an artifact that gave way
        why, hint = (
            "the board removed it to make room for another one",
            "give the board a larger store, then `joulemark rollout --resume`",
        )
        return "error", Problem(code="evicted", message=why, hint=hint)
    if held["state"] != "in_sync":
        return held["state"], Problem(**held["problem"]) if held["problem"] else None
    if plan.check is None or (check is not None and check["status"] == "done"):
        return "in_sync", None
    if check is None or check["status"] not in ("failed", "cancelled", "interrupted"):
        return "pending", None
    why = f"its check run was {check['status']}"
    told = Problem(**check["problem"]) if check["problem"] else None
    return "error", told or Problem(code="check_failed", message=why, hint=check["run_id"])


def going_on() -> Any:
    """The condition for a roll-out that is going on."""
    return ROLLOUTS.c.status == "running"


def _sweep(plan: Plan) -> str:
    """Check runs are a sweep of their own, so that its page shows them."""
    return f"rollout-{plan.name}"


def _prefix(plan: Plan, device_id: str) -> str:
    return f"{plan.name[:30]}-{device_id[:30]}-"


def _row(connection: Connection, name: str) -> RowMapping | None:
    return connection.execute(sa.select(ROLLOUTS).where(ROLLOUTS.c.name == name)).mappings().first()


def _required(connection: Connection, name: str) -> RowMapping:
    row = _row(connection, name)
    if row is None:
        raise NotFound(f"there is no roll-out {name!r}", "`joulemark rollout` lists them")
    return row


def _plan(row: RowMapping) -> Plan:
    return Plan.model_validate_json(json.dumps(row["plan"]))


def _message(board: Board) -> str:
    return board.problem.message if board.problem is not None else ""


def _reason(stage: str, bad: Sequence[Board], of: int) -> str:
    first = "; ".join(f"{board.device}: {_message(board) or 'error'}" for board in bad[:3])
    return f"{len(bad)} of {of} boards of {stage!r} went wrong ({first})"[:2000]
