"""Roll-outs in stages: the next one begins when the one before went well enough, errors stop everything, and every state has an end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from rich import filesize

from joulemark.errors import BadInput, Conflict, NotFound
from joulemark.protocol import Holding, Report
from joulemark.signing import SigningKey
from joulemark.wire import Problem, RunSpec, RunState, content_id
from joulemark_host.dispatch import ADVANCE_EVERY_S, Dispatch
from joulemark_host.registry import Registry
from joulemark_host.rollout import Plan, Stage
from joulemark_host.terminal import rollouts_table
from tests.fixtures.boards_at_host import Board
from tests.fixtures.clocks import Clock
from tests.fixtures.grids import SMOL_Q8
from tests.fixtures.screens import shown

ARTIFACT = content_id(SMOL_Q8)
FULL = Problem(code="no_space", message="the card is full", hint="use a larger one")


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Fleet:
    """Five boards, what they say, and the roll-out `r` as far as it is."""

    def __init__(self, database: str, clock: Clock) -> None:
        self.clock = clock
        self.registry = Registry(database, "ab" * 32, clock)
        self.dispatch = Dispatch(database, SigningKey(bytes(range(32))), clock)
        self.ids = [self._board(f"b{number}") for number in range(5)]

    def _board(self, name: str) -> str:
        board = Board(name)
        self.registry.enrol(board.enrolment(self.registry.issue_key("device", "test", approved=True)), "192.0.2.5")
        return board.device_id

    def plan(self, *stages: Sequence[int], **changes: object) -> Plan:
        found = tuple(
            Stage(words=f"s{number}", device_ids=tuple(self.ids[n] for n in boards))
            for number, boards in enumerate(stages)
        )
        return Plan.model_validate({"name": "r", "manifest": SMOL_Q8, "stages": found, **changes})

    def says(self, number: int, state: str, problem: Problem | None = None) -> None:
        holding = Holding.model_validate({"artifact_id": ARTIFACT, "state": state, "problem": problem})
        self.dispatch.report(self.ids[number], Report(holdings=(holding,)))

    def ran(self, number: int, status: str) -> None:
        """The board's check run ends so."""
        (run,) = [r for r in self.dispatch.runs("rollout-r", open_only=True) if r.device_id == self.ids[number]]
        self.dispatch.orders(self.ids[number])
        state = RunState.model_validate(
            {"run_id": run.run_id, "status": status, "problem": FULL if status == "failed" else None}
        )
        self.dispatch.report(self.ids[number], Report(runs=(state,)))

    def asked(self) -> list[int]:
        """The boards that have an order to fetch."""
        return [number for number, device_id in enumerate(self.ids) if self.dispatch.orders(device_id).fetch]

    def now(self) -> tuple[str, int, list[list[str]]]:
        (rollout,) = self.dispatch.rollouts("r")
        return rollout.status, rollout.stage, [[board.state for board in stage] for stage in rollout.stages]

    def close(self) -> None:
        self.registry.close()
        self.dispatch.close()


@pytest.fixture
def fleet(database: str, clock: Clock) -> Iterator[Fleet]:
    made = Fleet(database, clock)
    yield made
    made.close()


def test_stages_follow_each_other_and_only_the_current_one_is_asked(fleet: Fleet):
    fleet.dispatch.roll_out(fleet.plan([0], [1, 2], [3, 4]))
    assert fleet.asked() == [0]
    assert fleet.now() == ("running", 0, [["pending"], ["registered"] * 2, ["registered"] * 2])
    fleet.says(0, "in_sync")
    assert fleet.asked() == [1, 2]
    fleet.says(2, "in_sync")
    assert fleet.asked() == [1] and fleet.now()[:2] == ("running", 1)
    fleet.says(1, "in_sync")
    assert fleet.asked() == [3, 4]
    fleet.says(3, "in_sync")
    fleet.says(4, "in_sync")
    assert fleet.now() == ("done", 2, [["in_sync"], ["in_sync"] * 2, ["in_sync"] * 2])


def test_an_error_in_the_first_stage_stops_everything_and_says_which_board(fleet: Fleet):
    fleet.dispatch.roll_out(fleet.plan([0, 1], [2, 3, 4]))
    fleet.says(0, "error", FULL)
    status, stage, states = fleet.now()
    assert (status, stage, states[1]) == ("stopped", 0, ["registered"] * 3)
    assert fleet.asked() == []  # what board 1 was still waiting for is withdrawn
    (rollout,) = fleet.dispatch.rollouts()
    assert "b0: the card is full" in rollout.problem and "1 of 2" in rollout.problem
    fleet.says(1, "in_sync")
    assert fleet.now()[:2] == ("stopped", 0)
    for board in (2, 3, 4):
        assert fleet.dispatch.targets(fleet.ids[board]) == []


def test_what_is_on_boards_already_stays_there(fleet: Fleet):
    fleet.dispatch.roll_out(fleet.plan([0, 1]))
    fleet.says(0, "in_sync")
    fleet.says(1, "error", FULL)
    assert fleet.now() == ("stopped", 0, [["in_sync", "error"]])
    assert fleet.dispatch.targets(fleet.ids[0])[0].state == "in_sync"


def test_a_board_that_made_room_again_is_not_waited_for(fleet: Fleet):
    fleet.dispatch.roll_out(fleet.plan([0, 1], [2]))
    fleet.says(0, "in_sync")
    fleet.says(0, "evicted")
    status, stage, states = fleet.now()
    assert (status, stage, states[0]) == ("stopped", 0, ["error", "pending"])
    (rollout,) = fleet.dispatch.rollouts()
    assert "b0: the board removed it to make room" in rollout.problem and fleet.asked() == []


@pytest.mark.parametrize(
    ("success", "errors", "bad", "good", "status"),
    [
        (0.5, 0.5, 1, 1, "running"),  # one error of four is allowed; two successes are wanted
        (0.5, 0.5, 1, 2, "done"),
        (0.5, 0.5, 2, 1, "running"),
        (0.5, 0.5, 2, 2, "done"),
        (0.5, 0.5, 3, 0, "stopped"),
        (0.75, 0.5, 2, 2, "stopped"),  # all have answered, too few successes
        (0.0, 1.0, 0, 0, "done"),
        (1.0, 0.0, 0, 3, "running"),
        (0.51, 1.0, 0, 2, "running"),  # a share is rounded up: three of four
        (0.51, 1.0, 0, 3, "done"),
    ],
)
def test_thresholds_are_shares_of_a_stages_boards(
    fleet: Fleet, success: float, errors: float, bad: int, good: int, status: str
):
    fleet.dispatch.roll_out(fleet.plan([0, 1, 2, 3], success=success, errors=errors))
    for number in range(good):
        fleet.says(number, "in_sync")
    for number in range(4 - bad, 4):
        fleet.says(number, "error", FULL)
    assert fleet.now()[0] == status


def test_a_board_that_does_not_get_there_in_time_is_an_error_also_when_nobody_says_anything(fleet: Fleet, clock: Clock):
    fleet.dispatch.roll_out(fleet.plan([0], [1, 2], timeout_s=100.0))
    clock.now += 90.0
    fleet.says(0, "in_sync")
    clock.now += 90.0  # each stage has its own time
    assert fleet.now()[:2] == ("running", 1)
    clock.now += ADVANCE_EVERY_S + 11.0
    fleet.dispatch.expire()  # as with the next board that asks for anything
    (rollout,) = fleet.dispatch.rollouts("r")
    assert rollout.status == "stopped" and "within 100 s" in rollout.problem


def test_a_board_that_takes_no_part_any_more_is_an_error(fleet: Fleet):
    fleet.dispatch.roll_out(fleet.plan([0], [1]))
    fleet.registry.revoke("b0", "ann")
    assert fleet.now() == ("stopped", 0, [["error"], ["registered"]])


CHECK = RunSpec(run_id="x", artifact_id=ARTIFACT, pack_id="b" * 64, limit=20)


def test_with_a_check_a_board_counts_once_it_has_run_it(fleet: Fleet):
    fleet.dispatch.roll_out(fleet.plan([0], [1], check=CHECK, task="arc_challenge"))
    assert fleet.dispatch.runs("rollout-r") == []
    fleet.says(0, "in_sync")
    (run,) = fleet.dispatch.runs("rollout-r")
    assert (run.device, run.spec.limit, run.spec.artifact_id, run.task) == ("b0", 20, ARTIFACT, "arc_challenge")
    assert fleet.now()[:2] == ("running", 0) and len(fleet.dispatch.runs("rollout-r")) == 1
    fleet.ran(0, "done")
    assert fleet.now()[:2] == ("running", 1) and fleet.asked() == [1]
    fleet.says(1, "in_sync")
    fleet.ran(1, "failed")
    status, stage, states = fleet.now()
    assert (status, stage, states) == ("stopped", 1, [["in_sync"], ["error"]])


def test_of_a_board_that_is_waited_for_it_is_shown_what_it_is_at(fleet: Fleet, clock: Clock):
    check = RunSpec(run_id="x", artifact_id=ARTIFACT, pack_id="ab" * 32)
    fleet.dispatch.roll_out(fleet.plan([0, 1, 2], [3], check=check, task="arc_challenge", timeout_s=600))
    size = sum(entry.size_bytes for entry in SMOL_Q8.files)
    fleet.dispatch.report(
        fleet.ids[1], Report(holdings=(Holding(artifact_id=ARTIFACT, state="pending", received_bytes=size // 2),))
    )
    fleet.says(2, "in_sync")
    fleet.dispatch.orders(fleet.ids[2])
    (run,) = fleet.dispatch.runs("rollout-r")
    fields = {"run_id": run.run_id, "status": "running", "phase": "accuracy", "items_done": 3, "items_total": 20}
    fleet.dispatch.report(fleet.ids[2], Report(runs=(RunState.model_validate(fields),)))
    (rollout,) = fleet.dispatch.rollouts("r")
    assert rollout.ends_at == clock() + 600
    untouched, half, checked = rollout.stages[0]
    assert (untouched.received_bytes, untouched.size_bytes, untouched.check) == (0, size, None)
    assert (half.received_bytes, half.check) == (size // 2, None)
    assert (checked.state, checked.check) == ("pending", "running: accuracy, 3 of 20")
    assert rollout.stages[1][0].size_bytes is None
    assert rollout.plain()["stages"][0]["boards"][2]["check"] == "running: accuracy, 3 of 20"

    text = shown(rollouts_table([rollout], clock() + 100))
    assert "running, 8 min left" in text and "b0" in text and "b3" not in text
    assert f"{filesize.decimal(size // 2)} of {filesize.decimal(size)}" in text
    assert "has it; check: running: accuracy, 3 of 20" in text


def test_looking_changes_nothing(fleet: Fleet):
    fleet.dispatch.roll_out(fleet.plan([0, 1], check=CHECK))
    fleet.says(0, "in_sync")
    fleet.dispatch.stop_rollout("r", "ann")
    before = (fleet.dispatch.runs("rollout-r"), fleet.asked())
    assert fleet.now()[0] == "stopped" and fleet.now()[0] == "stopped"
    assert (fleet.dispatch.runs("rollout-r"), fleet.asked()) == before
    assert [run.status for run in before[0]] == ["cancelled"] and before[1] == []


def test_what_a_run_of_somebody_else_needs_is_not_withdrawn(fleet: Fleet):
    fleet.dispatch.roll_out(fleet.plan([0, 1], check=CHECK))
    mine = CHECK.model_copy(update={"run_id": "mine"})
    fleet.dispatch.queue(fleet.ids[1], mine, SMOL_Q8)
    fleet.dispatch.stop_rollout("r", "ann")
    assert fleet.asked() == [1]
    assert [run.status for run in fleet.dispatch.runs(run_ids=["mine"])] == ["leased"]


def test_a_stopped_one_is_taken_up_again_where_it_was(fleet: Fleet, clock: Clock):
    plan = fleet.plan([0, 1], [2], check=CHECK, timeout_s=100.0)
    fleet.dispatch.roll_out(plan)
    fleet.says(0, "in_sync")
    fleet.ran(0, "failed")
    fleet.says(1, "error", FULL)
    assert fleet.now()[:2] == ("stopped", 0)
    clock.now += 1000.0
    fleet.dispatch.resume_rollout("r")
    assert fleet.now() == ("running", 0, [["pending", "pending"], ["registered"]])
    assert fleet.asked() == [1]
    fleet.ran(0, "done")
    fleet.says(1, "in_sync")
    fleet.ran(1, "done")
    assert fleet.now()[:2] == ("running", 1)
    with pytest.raises(Conflict, match="running"):
        fleet.dispatch.resume_rollout("r")


def test_whoever_is_missing_when_it_is_stopped_was_not_late(fleet: Fleet, clock: Clock):
    fleet.dispatch.roll_out(fleet.plan([0, 1], [2], timeout_s=60))
    fleet.says(0, "in_sync")
    clock.now += 30
    fleet.dispatch.stop_rollout("r", "somebody")
    clock.now += 10_000
    assert fleet.now() == ("stopped", 0, [["in_sync", "pending"], ["registered"]])
    fleet.dispatch.resume_rollout("r")
    assert fleet.now() == ("running", 0, [["in_sync", "pending"], ["registered"]])
    clock.now += 61
    late = fleet.now()
    assert late == ("stopped", 0, [["in_sync", "error"], ["registered"]])
    clock.now += 10_000
    assert fleet.now() == late


def test_a_book_without_the_ends_of_roll_outs_is_brought_up_to_date(fleet: Fleet, database: str, clock: Clock):
    """Layout 3 had none."""
    fleet.dispatch.roll_out(fleet.plan([0]))
    with fleet.dispatch._engine.begin() as old:
        old.exec_driver_sql("ALTER TABLE rollouts DROP COLUMN ended_at")
        old.exec_driver_sql("UPDATE about SET value = '3' WHERE key = 'layout'")
    for _ in range(2):
        again = Dispatch(database, SigningKey(bytes(range(32))), clock)
        assert [rollout.status for rollout in again.rollouts()] == ["running"]
        again.close()
    fleet.dispatch.stop_rollout("r", "somebody")
    assert fleet.now() == ("stopped", 0, [["pending"]])


def test_a_board_that_an_earlier_stage_went_well_without_is_not_late(fleet: Fleet, clock: Clock):
    fleet.dispatch.roll_out(fleet.plan([0, 1], [2, 3], timeout_s=60, success=0.5, errors=0.5))
    fleet.says(0, "in_sync")
    fleet.says(2, "in_sync")
    clock.now += 10_000
    assert fleet.now() == ("done", 1, [["in_sync", "pending"], ["in_sync", "pending"]])


def test_one_whose_time_is_over_is_taken_up_again_though_nobody_looked(fleet: Fleet, clock: Clock):
    fleet.dispatch.roll_out(fleet.plan([0], timeout_s=60))
    clock.now += 61
    fleet.dispatch.resume_rollout("r")
    assert fleet.now() == ("running", 0, [["pending"]]) and fleet.asked() == [0]


def test_the_same_plan_again_is_the_same_roll_out_and_mistakes_are_refused(fleet: Fleet):
    plan = fleet.plan([0], [1])
    fleet.dispatch.roll_out(plan)
    fleet.dispatch.roll_out(plan)
    assert len(fleet.dispatch.rollouts()) == 1
    with pytest.raises(Conflict, match="called 'r'"):
        fleet.dispatch.roll_out(fleet.plan([0]))
    with pytest.raises(BadInput, match="two stages"):
        fleet.dispatch.roll_out(fleet.plan([2, 3], [3]).model_copy(update={"name": "other"}))
    for ask in (fleet.dispatch.resume_rollout, lambda name: fleet.dispatch.stop_rollout(name, "ann")):
        with pytest.raises(NotFound):
            ask("nothing")
    unknown = Plan(name="u", manifest=SMOL_Q8, stages=(Stage(words="x", device_ids=("dev-nobody",)),))
    with pytest.raises(NotFound):
        fleet.dispatch.roll_out(unknown)
    assert [rollout.plan.name for rollout in fleet.dispatch.rollouts()] == ["r"]
