"""Grid cells of every state, and which conditions matter to which metric."""

from __future__ import annotations

from typing import Any

import pytest

from joulemark.errors import BadInput
from joulemark.metrics import METRICS
from joulemark.wire import Absent, LatencyPlan, Measure, Problem
from joulemark_host.compare import Entry, build_grid, label_artifacts, label_devices, names_of_devices
from joulemark_host.conditions import CONDITIONS, Difference, Scope, reference_of
from joulemark_host.facts import RunFacts, facts_of
from joulemark_host.grid import Cell
from tests.fixtures.grids import LAB, PI, QWEN, SMOL_Q4, SMOL_Q8, fleet, run_facts
from tests.fixtures.records import make_manifest, make_pack_header, make_record, make_trace, power_channel


def grid_of(runs: list[RunFacts], metric: str = "decode_rate", **more: Any) -> dict[tuple[str, str], Cell]:
    names = {run.artifact_id: (run.model, run.quantization) for run in runs}
    grid = build_grid(
        runs, metric, "arc_challenge", label_devices(names_of_devices(runs)), label_artifacts(names), **more
    )
    assert len(grid.cells) == len(grid.rows) * len(grid.columns)
    assert [(c.row, c.column) for c in grid.cells] == [(r, c) for r in grid.rows for c in grid.columns]
    return {(cell.row, cell.column): cell for cell in grid.cells}


def differing_fields(a: RunFacts, b: RunFacts, metric: str) -> list[Difference]:
    """In what `a` is not like `b` in a grid of the two."""
    scopes: tuple[Scope, ...] = ("grid", "device") if a.device_id == b.device_id else ("grid",)
    references = [reference_of([b], metric, scope, b) for scope in scopes]
    return [found for reference in references if reference is not None for found in reference.differences(a)]


def test_every_state_of_a_cell():
    cells = grid_of(fleet())
    states = {(row.split()[0], column.split()[-1]): (cell.status, cell.valid) for (row, column), cell in cells.items()}
    assert states == {
        ("Jetson", "Q4_K_M"): ("not_run", None),
        ("Jetson", "Q4_1"): ("measured", True),
        ("Jetson", "Q8_0"): ("unsupported", False),
        ("lab", "Q4_K_M"): ("measured", True),
        ("lab", "Q4_1"): ("measured", True),
        ("lab", "Q8_0"): ("measured", True),
        ("Raspberry", "Q4_K_M"): ("failed", False),
        ("Raspberry", "Q4_1"): ("measured", False),
        ("Raspberry", "Q8_0"): ("not_comparable", True),
    }


def test_cells_explain_themselves():
    cells = {(row.split()[0], column.split()[-1]): cell for (row, column), cell in grid_of(fleet()).items()}
    assert cells["Raspberry", "Q8_0"].why == (
        "latency plan: 2 prompts × 64 tokens after 1 warm-up here, 5 prompts × 64 tokens after 1 warm-up in the rest"
    )
    assert cells["Raspberry", "Q4_1"].why == "throttled for 12 s"
    assert cells["Raspberry", "Q4_K_M"].why == (
        "out_of_memory: the worker was killed by the kernel. Next step: use a smaller model"
    )
    assert cells["Jetson", "Q8_0"].why.startswith("model_rejected: unknown architecture x.")
    measured = cells["lab", "Q4_1"].metric
    assert isinstance(measured, Measure)
    assert (measured.value, measured.unit, measured.n) == (84.2, "tok/s", 20)


def test_an_absent_figure_is_shown_with_its_reason_and_does_not_decide_the_reference():
    absent = Absent(reason="no meter on this board")
    runs = [
        run_facts(1, device=LAB, figures={"energy_per_token": 0.4}),
        run_facts(2, device=PI, figures={"energy_per_token": absent}, trace=make_trace(meaning="wall")),
    ]
    cells = list(grid_of(runs, "energy_per_token").values())
    assert [(c.status, type(c.metric)) for c in cells] == [("measured", Measure), ("measured", Absent)]
    assert cells[1].metric == absent


def test_the_latest_received_run_speaks_for_a_cell_whatever_the_boards_clock_says():
    runs = [
        run_facts(1, figures={"accuracy": 0.3}, wall_s=2_000_000_000.0),
        run_facts(2, figures={"accuracy": 0.5}, wall_s=0.0),
    ]
    for order in (runs, runs[::-1]):
        (cell,) = grid_of(order, "accuracy").values()
        assert cell.run_id == "run-2"


def test_a_cancelled_run_never_hides_an_outcome_but_a_failed_one_does():
    done, failed = run_facts(1), run_facts(2, status="failed")
    cancelled = run_facts(3, status="cancelled", problem=Problem(code="cancelled", message="stopped by a person"))
    (cell,) = grid_of([done, cancelled]).values()
    assert (cell.status, cell.run_id) == ("measured", "run-1")
    (cell,) = grid_of([done, failed, cancelled]).values()
    assert (cell.status, cell.run_id) == ("failed", "run-2")
    (cell,) = grid_of([cancelled]).values()
    assert (cell.status, cell.why) == ("failed", "cancelled: stopped by a person.")


def test_the_majority_is_the_reference_and_of_equals_the_latest():
    def with_limit(sequence: int, manifest: Any, limit: int) -> RunFacts:
        return run_facts(sequence, manifest=manifest, spec={"limit": limit})

    runs = [with_limit(1, QWEN, 10), with_limit(2, SMOL_Q4, 10), with_limit(3, SMOL_Q8, 5)]
    states = {c.run_id: (c.status, c.why) for c in grid_of(runs, "accuracy").values()}
    assert states["run-3"] == ("not_comparable", "number of items: 5 here, 10 in the rest")
    assert states["run-1"][0] == states["run-2"][0] == "measured"
    states = {c.run_id: c.status for c in grid_of(runs[1:], "accuracy").values()}
    assert states == {"run-2": "not_comparable", "run-3": "measured"}
    states = {c.run_id: c.status for c in grid_of(runs, "accuracy", reference=runs[2]).values()}
    assert states == {"run-1": "not_comparable", "run-2": "not_comparable", "run-3": "measured"}


CHANGES: list[tuple[str, dict[str, Any], set[str], set[str]]] = [
    # what changes, in which way, metrics that it touches, metrics that it does not
    ("threads", {"engine": {"threads": 4}}, {"decode_rate", "energy_per_token", "wall_time"}, {"accuracy"}),
    ("governor", {"device": LAB.model_copy(update={"governor": "powersave"})}, {"ttft_p50"}, {"accuracy"}),
    ("power_mode", {"device": LAB.model_copy(update={"power_mode": "7W"})}, {"itl_p95", "idle_power"}, {"accuracy"}),
    ("clocks", {"device": LAB.model_copy(update={"clocks": "cpu fixed at 1.43 GHz"})}, {"itl_p95"}, {"accuracy"}),
    ("build", {"engine": {"build": "generic"}}, {"prefill_rate"}, {"accuracy"}),
    ("items", {"spec": {"limit": 3}}, {"accuracy", "wall_time", "peak_pss"}, {"decode_rate", "ttft_p50", "load_time"}),
    ("latency_plan", {"spec": {"latency": LatencyPlan(prompts=1)}}, {"decode_rate", "peak_pss"}, {"accuracy"}),
    ("power_source", {"trace": make_trace(meaning="wall")}, {"energy_per_correct", "idle_power"}, {"decode_rate"}),
    ("sample_rate", {"spec": {"sample_hz": 1.0}}, {"peak_temperature", "energy_latency"}, {"decode_rate", "accuracy"}),
    ("idle_window", {"spec": {"idle_s": 9.0}}, {"energy_latency_net", "idle_power"}, {"energy_latency"}),
    ("sequences", {"spec": {"sequences": 2}}, {"items_rate", "peak_pss"}, {"accuracy", "decode_rate"}),
    ("batch_tokens", {"spec": {"batch_tokens": 64}}, {"ttft_p50", "items_rate"}, {"accuracy", "load_time"}),
    ("engine", {"engine": {"version": "9.9"}}, {"accuracy", "decode_rate", "load_time"}, set()),
    ("backend", {"engine": {"backend": "onnx"}}, {"accuracy", "decode_rate"}, set()),
    ("compute_device", {"engine": {"device": "CUDA0"}}, {"accuracy", "decode_rate"}, set()),
    ("kv_type", {"engine": {"kv_type": "q8_0"}}, {"accuracy", "peak_pss"}, {"load_time"}),
    ("flash_attention", {"engine": {"flash_attention": True}}, {"accuracy", "decode_rate"}, {"load_time"}),
    ("context", {"spec": {"context_tokens": 512}}, {"accuracy", "peak_pss"}, set()),
    ("variant", {"spec": {"variant": "with fan"}}, {"accuracy", "decode_rate"}, set()),
    (
        "chat_template",
        {"pack": make_pack_header(apply_chat_template=True)},
        {"accuracy", "decode_rate"},
        {"load_time", "idle_power"},
    ),
    ("task_version", {"pack": make_pack_header(version="2.0")}, {"accuracy"}, {"load_time"}),
    ("task_hash", {"pack": make_pack_header(task_hash="1" * 64)}, {"accuracy", "ttft_p50"}, {"load_time"}),
    ("pack", {"pack": make_pack_header(pack_id="2" * 64)}, {"accuracy"}, {"load_time"}),
    ("task", {"pack": make_pack_header("arc_easy")}, {"accuracy"}, {"load_time"}),
]


@pytest.mark.parametrize(("name", "knobs", "touched", "untouched"), CHANGES, ids=[c[0] for c in CHANGES])
def test_a_condition_matters_to_the_metrics_that_depend_on_it(
    name: str, knobs: dict[str, Any], touched: set[str], untouched: set[str]
):
    plain, changed = facts_of(make_record("a")), facts_of(make_record("b", **knobs))
    for metric in touched:
        found = differing_fields(plain, changed, metric)
        assert name in {d.name for d in found}, metric
        (difference,) = (d for d in found if d.name == name)
        assert difference.left == plain.conditions[name]
        assert difference.right == changed.conditions[name]
        assert difference.left != difference.right
    for metric in untouched:
        assert name not in {d.name for d in differing_fields(plain, changed, metric)}, metric


def test_every_condition_is_exercised_above_and_filled_in():
    assert {condition.name for condition in CONDITIONS} == {change[0] for change in CHANGES}
    assert set(facts_of(make_record()).conditions) - {"format"} == {condition.name for condition in CONDITIONS}
    for condition in CONDITIONS:
        assert condition.metrics <= set(METRICS)


def test_the_meaning_of_power_is_that_of_the_channels_that_are_summed():
    trace = make_trace(meaning="rail")
    part = power_channel("modelled", total=False).model_copy(update={"name": "part"})
    both = trace.model_copy(update={"channels": (*trace.channels, part), "values": (*trace.values, trace.values[0])})
    assert facts_of(make_record(trace=both)).conditions["power_source"] == "rail"
    none = trace.model_copy(update={"channels": trace.channels[1:], "values": trace.values[1:]})
    assert facts_of(make_record(trace=none)).conditions["power_source"] == "no meter"


GRAPH = make_manifest(name="smollm2-onnx", quantization="GPTQ-4-g32", format="onnx")
ONNX = {"backend": "onnx", "engine": "onnxruntime", "version": "1.32.0", "build": "ORT", "kv_type": "f32"}


def test_formats_bring_their_engines():
    """GGUF and ONNX stand side by side; of two ONNX artifacts both must have run on the same engine."""
    runs = [run_facts(1, manifest=SMOL_Q4), run_facts(2, manifest=QWEN), run_facts(3, manifest=GRAPH, engine=ONNX)]
    for metric in ("accuracy", "decode_rate", "peak_pss"):
        assert {cell.status for cell in grid_of(runs, metric).values()} == {"measured"}, metric
    assert differing_fields(runs[0], runs[2], "decode_rate") == []
    told = reference_of(runs, "accuracy", "grid")
    assert told is not None
    assert told.shared()["backend"] == "gguf: llamacpp; onnx: onnx"
    assert told.shared()["task"] == "arc_challenge"
    other = make_manifest(name="other-onnx", quantization="RTN-4-g32", format="onnx")
    runs += [run_facts(4, manifest=other, engine={**ONNX, "version": "1.23.2"})]
    states = {cell.run_id: (cell.status, cell.why) for cell in grid_of(runs, "accuracy").values()}
    assert states["run-4"][0] == "measured"  # of equally many the latest speaks
    assert states["run-3"][0] == "not_comparable" and "1.32.0 here" in states["run-3"][1]
    assert states["run-1"][0] == states["run-2"][0] == "measured"
    states = {cell.run_id: cell.status for cell in grid_of(runs, "accuracy", reference=runs[2]).values()}
    assert states == {"run-1": "measured", "run-2": "measured", "run-3": "measured", "run-4": "not_comparable"}
    # What is not the format's still counts over all of them.
    longer = run_facts(5, manifest=other, engine=ONNX, spec={"latency": LatencyPlan(prompts=1)})
    states = {cell.run_id: cell.status for cell in grid_of([*runs[:3], longer]).values()}
    assert states["run-5"] == "not_comparable"


def test_boards_may_differ_in_what_belongs_to_the_board():
    ours = facts_of(make_record("a", device=LAB))
    board = facts_of(make_record("b", device=PI.model_copy(update={"governor": "ondemand"}), engine={"threads": 4}))
    assert differing_fields(ours, board, "decode_rate") == []
    runs = [run_facts(1, device=LAB), run_facts(2, device=PI, engine={"threads": 4})]
    assert {c.status for c in grid_of(runs).values()} == {"measured"}


def test_on_one_board_threads_must_agree_for_speed_but_not_for_accuracy():
    runs = [
        run_facts(1, manifest=SMOL_Q4, engine={"threads": 2}),
        run_facts(2, manifest=SMOL_Q8, engine={"threads": 2}),
        run_facts(3, manifest=QWEN, engine={"threads": 1}),
    ]
    (odd,) = (c for c in grid_of(runs).values() if c.status != "measured")
    assert (odd.run_id, odd.status, odd.why) == ("run-3", "not_comparable", "threads: 1 here, 2 in the rest")
    assert {c.status for c in grid_of(runs, "accuracy").values()} == {"measured"}


def test_unknown_metric_and_doubled_labels_are_refused():
    with pytest.raises(BadInput, match="no metric 'speed'"):
        build_grid([], "speed", "arc_challenge", [], [])
    with pytest.raises(BadInput, match="devices are not unique"):
        build_grid([], "accuracy", "arc_challenge", [Entry("a", "x"), Entry("b", "x")], [])


def test_a_quantization_in_the_name_is_said_once():
    names = {
        "1" * 64: ("m-q4_k_m", "Q4_K_M"),
        "2" * 64: ("m", "Q8_0"),
        "3" * 64: ("Q8_0", "Q8_0"),
        "4" * 64: ("m", "Q4_K_M"),
    }
    labels = {entry.id[0]: entry.label for entry in label_artifacts(names)}
    assert labels["2"] == "m · Q8_0"
    assert labels["3"] == "Q8_0 · Q8_0"
    assert labels["1"] == "m · Q4_K_M (111111111111)"
    assert labels["4"] == "m · Q4_K_M (444444444444)"


def test_labels_are_unique_even_when_a_name_imitates_another():
    names = ["pi", "pi", "pi (dev-a)", "other"]
    runs = [
        run_facts(i, device=LAB.model_copy(update={"device_id": f"dev-{'abcd'[i]}", "name": name}))
        for i, name in enumerate(names)
    ]
    labels = [entry.label for entry in label_devices(names_of_devices(runs))]
    assert len(set(labels)) == 4
    assert "other" in labels
    assert "pi (dev-b)" in labels
