"""The tables of the commands: figures with units and intervals, verdicts with reasons, absences with theirs."""

from __future__ import annotations

from joulemark.metrics import METRICS
from joulemark.protocol import DeviceRow
from joulemark.wire import Absent, Problem
from joulemark_host.rollout import Board, Plan, Rollout, Stage
from joulemark_host.terminal import (
    absences,
    devices_table,
    explanations,
    records_table,
    result_table,
    rollouts_table,
)
from tests.fixtures.grids import SMOL_Q8, run_facts
from tests.fixtures.screens import shown


def test_results_stand_with_units_and_intervals():
    runs = [run_facts(1, figures={"ttft_p50": 0.25}), run_facts(2, task="gsm8k_cot", reasons=["contended"])]
    text = shown(result_table(runs))
    assert "smollm2-135m-instruct · Q4_1 on lab workstation" in text
    assert "accuracy (the task's primary score) │ 40.0 % (36.0–44.0) │ 40.0 % (36.0–44.0)" in text
    assert "time to first token, median │ 250 ms (225–275) │ 100 ms (90.0–110)" in text
    assert "verdict │ VALID │ NOT VALID" in text
    assert METRICS["truncated_share"].title not in text  # no run has it


def test_reasons_problems_and_absences_are_lines():
    failed = run_facts(3, status="failed", problem=Problem(code="x", message="it fell", hint="lift it"))
    runs = [run_facts(1, reasons=["contended", "throttled"]), failed]
    assert explanations(runs) == [
        "arc_challenge: contended",
        "arc_challenge: throttled",
        "arc_challenge: the run failed",
        "arc_challenge: it fell. Next step: lift it",
    ]
    runs = [
        run_facts(1, figures={"idle_power": Absent(reason="no meter"), "energy_per_correct": Absent(reason="no meter")})
    ]
    meter = [line for line in absences(runs) if line.endswith(": no meter")]
    expected = f"{METRICS['energy_per_correct'].title} / {METRICS['idle_power'].title}"
    assert meter == [f"no figure for {expected}: no meter"]


def test_records_are_listed_with_their_state():
    text = shown(records_table([run_facts(1), run_facts(2, status="failed"), run_facts(3, reasons=["contended"])]))
    assert "valid │ 40.0 % │ 50.0 tok/s" in text
    assert "failed │ – │ –" in text
    assert "not valid" in text


def test_of_a_large_stage_only_some_boards_have_a_line():
    boards = [Board(f"d{number}", f"b{number}", "pending", None) for number in range(1000)]
    plan = Plan(name="r", manifest=SMOL_Q8, stages=(Stage(words="all", device_ids=("d",)),))
    text = shown(rollouts_table([Rollout(plan, "running", 0, "", 600.0, [boards])], 0.0))
    assert "│ all │ 1000 │ 0 │ 0 │ running, 10 min left" in text
    assert "b7 │" in text and "b8 │" not in text and "… 992 more" in text


def test_boards_are_listed_with_their_groups():
    row = DeviceRow(
        device_id="dev-1", name="pi5", admission="approved", problem=None, key_id="ab12", enrolled_at=0.0,
        seen_at=90.0, address="192.0.2.5", facts=None, groups=("canary", "lab"),
    )  # fmt: skip
    assert "pi5 │ approved │ canary, lab │ ab12 │ 10 s ago │ 192.0.2.5" in shown(devices_table([row], 100.0))
