"""The page of a sweep: every cell with its latest run, hostile names as text, and no refreshing once all is over."""

from __future__ import annotations

from joulemark.wire import Problem, RunSpec
from joulemark_host.queue_page import queue_page
from joulemark_host.run_queue import QueuedRun, RunStatus

ARTIFACT = "a" * 64


def run(number: int, status: RunStatus, device: str = "pi5", **changes: object) -> QueuedRun:
    spec = RunSpec(run_id=f"r{number}", artifact_id=ARTIFACT, pack_id="b" * 64, limit=changes.pop("limit", None))  # type: ignore[arg-type]
    fields = {"sweep": "night", "device_id": f"dev-{device}", "device": device, "task": "arc_challenge", "phase": None}
    fields |= {"items_done": 0, "items_total": 0, "leases": 1, "problem": None, "queued_at": 0.0, "changed_at": 0.0}
    return QueuedRun(run_id=spec.run_id, spec=spec, status=status, **{**fields, **changes})  # type: ignore[arg-type]


def test_boards_down_models_and_tasks_across():
    page = queue_page(
        "Sweep night",
        [
            run(1, "done", items_done=12, items_total=12),
            run(2, "leased", "jetson", phase="accuracy", items_done=3, items_total=12),
            run(3, "queued", "jetson", limit=50),
        ],
        {ARTIFACT: "smollm2 Q4_0"},
    )
    assert page.count('<th scope="row">') == 2 and page.count('<th scope="col">') == 3
    assert "smollm2 Q4_0, arc_challenge" in page and "first 50" in page
    assert "running: accuracy" in page and "3 of 12" in page and "12 of 12" in page
    assert 'http-equiv="refresh"' in page


def test_of_a_cell_the_latest_run_counts_and_an_end_is_an_end():
    page = queue_page("Sweep night", [run(1, "failed"), run(2, "done")], {})
    assert ">failed<" not in page and ">done<" in page
    assert 'http-equiv="refresh"' not in page and "Every run has ended" in page
    assert "aaaaaaaaaaaa, arc_challenge" in page


def test_what_boards_say_is_text():
    problem = Problem(code="x", message="<script>alert(1)</script>")
    page = queue_page("<b>", [run(1, "failed", "<i>pi</i>", problem=problem)], {ARTIFACT: "<img src=x>"})
    for hostile in ("<script>", "<b>", "<i>", "<img"):
        assert hostile not in page
    assert "&lt;script&gt;" in page


def test_an_empty_queue_says_how_to_fill_it():
    assert "joulemark sweep" in queue_page("What waits", [], {})
