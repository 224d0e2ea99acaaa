"""Every figure of a summary against a value worked out by hand, and every reason of a verdict against the least record
that deserves it. The base record is `tests.fixtures.records`: its docstring gives the times and the power used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulemark.metrics import METRICS
from joulemark.wire import (
    Absent,
    Channel,
    ItemRecord,
    LatencySample,
    Measure,
    Metric,
    Phase,
    Problem,
    RunRecord,
    Trace,
)
from joulemark_agent.energy import MEANINGS
from joulemark_agent.summary import summarise
from joulemark_agent.verdict import Limits
from tests.fixtures.records import (
    PHASES,
    START_S,
    make_device,
    make_items,
    make_latency,
    make_manifest,
    make_pack_header,
    make_record,
    make_trace,
)

Values = Sequence[float | None]
ONE_SECOND_STEP = tuple(START_S + i / 10 for i in range(311))


def measure(metric: Metric) -> Measure:
    assert isinstance(metric, Measure), metric
    return metric


def figure(record: RunRecord, name: str) -> Measure:
    return measure(summarise(record)[0].metrics[name])


def reason(record: RunRecord, name: str) -> str:
    metric = summarise(record)[0].metrics[name]
    assert isinstance(metric, Absent), metric
    return metric.reason


def with_columns(trace: Trace, *columns: tuple[Channel, Values], keep: bool = True, **changes: Any) -> Trace:
    """`trace` with further columns, or with these alone."""
    channels = (*(trace.channels if keep else ()), *(channel for channel, _ in columns))
    values = (*(trace.values if keep else ()), *(tuple(column) for _, column in columns))
    return trace.model_copy(update={"channels": channels, "values": values, **changes})


def share(name: str, value: float | None = 0.0, start_s: float = 0.0) -> tuple[Channel, Values]:
    """A contention column: `value` from `start_s` on, 0 before."""
    channel = Channel(name=name, quantity="share", unit="1", source="test")
    return channel, [0.0 if time < start_s else value for time in ONE_SECOND_STEP]


def meter(
    name: str,
    watts: float,
    meaning: Any = "package",
    total: bool = True,
    quantity: Literal["power", "energy"] = "power",
) -> tuple[Channel, list[float | None]]:
    """A constant load as a power column or as a running sum."""
    channel = Channel(
        name=name,
        quantity=quantity,
        unit="W" if quantity == "power" else "J",
        source="test",
        meaning=meaning,
        total=total,
    )
    return channel, [watts if quantity == "power" else watts * (t - START_S) for t in ONE_SECOND_STEP]


def watched_trace(**changes: Any) -> Trace:
    """The base trace with an undisturbed machine around it."""
    return with_columns(make_trace(), share("contention.other_cpu"), share("contention.steal"), **changes)


def clean_record(**changes: Any) -> RunRecord:
    """300 items, half of them right, nothing wrong: VALID."""
    fields: dict[str, Any] = {
        "pack": make_pack_header(size=300),
        "items": make_items("arc_challenge", 300, 150),
        "trace": watched_trace(),
        **changes,
    }
    return make_record(**fields)


def metered(*columns: tuple[Channel, Values], **changes: Any) -> RunRecord:
    """A record whose trace has only these columns."""
    return make_record(trace=with_columns(make_trace(), *columns, keep=False, **changes))


# --- the figures of the base record -----------------------------------------------------------------------------------
def test_every_metric_is_there_with_its_unit() -> None:
    metrics = summarise(make_record())[0].metrics
    assert list(metrics)[: len(METRICS)] == list(METRICS)
    for name, definition in METRICS.items():
        metric = metrics[name]
        assert isinstance(metric, Absent) or metric.unit == definition.unit, name


@pytest.mark.parametrize(
    ("name", "value", "n"),
    [
        ("accuracy", 0.4, 20),
        ("score.acc", 0.4, 20),
        ("score.acc_norm", 0.4, 20),
        ("stderr.acc_norm", (0.24 / 19) ** 0.5, 20),  # variance 20 · 0.4 · 0.6 ÷ 19, ÷ 20
        ("ttft_p50", 0.1, 5),
        ("itl_p50", 0.02, 155),  # 5 prompts of 32 tokens have 5 · 31 steps
        ("itl_p95", 0.02, 155),
        ("itl_p99", 0.02, 155),
        ("prefill_rate", 800.0, 5),  # 80 tokens in 0.1 s
        ("decode_rate", 50.0, 5),
        ("items_rate", 1.0, 20),
        ("bandwidth_utilisation", 0.24, 5),  # 96 MB · 50 ÷ 20 GB/s
        # The sample at 1003.0 s has the new level already: 2.9 s · 5 W + 0.1 s · 10 W over 3 s.
        ("idle_power", 15.5 / 3, 31),
        ("energy_latency", 75.0, 51),
        ("energy_accuracy", 299.5, 201),  # the step at 1030.0 s: 19.9 s · 15 W + 0.1 s · 10 W
        ("energy_latency_net", 75.0 - 5 * 15.5 / 3, 51),
        ("energy_accuracy_net", 299.5 - 20 * 15.5 / 3, 201),
        ("energy_per_token", 75.0 / 160, 51),
        ("energy_per_correct", 299.5 / 8, 8),
        ("peak_pss", 250e6, 311),
        ("peak_temperature", 55.5, 311),  # 40 °C and half a degree a second for 31 s
        ("load_time", 1.0, 1),
        ("wall_time", 20.0, 1),
        ("sampler_read_p95", 0.0004, 311),
        ("sampler_cpu_share", 0.15 / 31.1, 311),
    ],
)
def test_figures_by_hand(name: str, value: float, n: int) -> None:
    found = figure(make_record(), name)
    assert found.value == pytest.approx(value, rel=1e-6)
    assert found.n == n


def test_intervals_by_hand() -> None:
    accuracy = figure(make_record(), "accuracy")
    # Wilson for 8 of 20: (0.4 + 0.096037) ÷ 1.192073 ± 1.644164 · √(0.012 + 0.0024009)
    assert (accuracy.low, accuracy.high) == pytest.approx((0.21881, 0.61342), abs=1e-5)
    per_correct = figure(make_record(), "energy_per_correct")
    assert (per_correct.low, per_correct.high) == pytest.approx(
        (299.5 / (20 * 0.61342), 299.5 / (20 * 0.21881)), rel=1e-4
    )


def sample(prompt_tokens: int, *times: float) -> LatencySample:
    return LatencySample(doc_id=0, prompt_tokens=prompt_tokens, start_s=1005.0, token_times_s=tuple(times))


def test_latency_figures_of_unequal_samples() -> None:
    record = make_record(
        latency=(
            sample(100, 1005.5, 1005.6, 1005.8),  # 200 tok/s prefill, 2 ÷ 0.3 decode, steps 0.1 and 0.2
            sample(30, 1005.1, 1005.2),  # 300 tok/s, 1 ÷ 0.1, step 0.1
            sample(100, 1005.2, 1005.3, 1005.4, 1005.7),  # 500 tok/s, 3 ÷ 0.5, steps 0.1 0.1 0.3
        )
    )
    assert figure(record, "ttft_p50").value == pytest.approx(0.2)
    assert figure(record, "itl_p50").value == pytest.approx(0.1)
    assert figure(record, "itl_p50").n == 6
    prefill, decode = figure(record, "prefill_rate"), figure(record, "decode_rate")
    assert (prefill.value, prefill.low, prefill.high) == pytest.approx((300, 200, 500))
    assert (decode.value, decode.low, decode.high) == pytest.approx((2 / 0.3, 6, 10))
    use = figure(record, "bandwidth_utilisation")
    assert (use.value, use.low, use.high) == pytest.approx((0.032, 0.0288, 0.048))
    assert figure(record, "energy_per_token").value == pytest.approx(75 / 9)


def test_no_percentile_is_invented() -> None:
    record = make_record()
    assert reason(record, "ttft_p95") == "5 times to first token; the 95th percentile needs 20"
    assert "the 99th percentile needs 100" in reason(record, "ttft_p99")
    twenty = make_record(latency=make_latency(prompts=20))
    assert figure(twenty, "ttft_p95").n == 20
    assert "needs 100" in reason(make_record(latency=make_latency(prompts=3, new_tokens=33)), "itl_p99")


def test_one_value_has_no_range() -> None:
    load = figure(make_record(), "load_time")
    assert (load.value, load.n, load.low, load.high, load.source) == (1.0, 1, None, None, "load phase")


def test_no_latency_samples() -> None:
    record = make_record(latency=())
    for name in ("ttft_p50", "itl_p50", "prefill_rate", "decode_rate", "energy_per_token", "bandwidth_utilisation"):
        assert "latency phase" in reason(record, name), name


def test_what_a_model_or_a_machine_does_not_tell_is_absent() -> None:
    unknown = make_record(manifest=make_manifest(bytes_per_token=None))
    assert "bytes of weights" in reason(unknown, "bandwidth_utilisation")
    blind = make_record(device=make_device(memory_bandwidth=Absent(reason="the probe was cancelled")))
    assert "the probe was cancelled" in reason(blind, "bandwidth_utilisation")


# --- scores -----------------------------------------------------------------------------------------------------------
def unanswered(item: ItemRecord) -> ItemRecord:
    problem = Problem(code="too_long", message="the prompt has 9000 tokens, the context 8192")
    return item.model_copy(update={"grade": None, "problem": problem, "choice_logprobs": None})


def test_an_unanswered_item_counts_as_wrong_and_says_so() -> None:
    items = make_items()
    record = make_record(items=(unanswered(items[0]), *items[1:]))
    accuracy = figure(record, "accuracy")
    assert (accuracy.value, accuracy.n) == (0.35, 20)
    assert "1 without an answer count as wrong" in accuracy.source
    assert figure(record, "energy_per_correct").value == pytest.approx(299.5 / 7)


def test_no_answer_at_all_is_no_accuracy() -> None:
    record = make_record(items=tuple(map(unanswered, make_items())))
    assert reason(record, "accuracy") == "none of 20 items was answered"
    assert "no item was graded" in reason(record, "energy_per_correct")


def test_no_correct_answer_has_no_price() -> None:
    record = make_record(correct=0)
    assert figure(record, "accuracy").value == 0
    assert reason(record, "energy_per_correct") == "none of 20 answers is correct"


def test_a_task_that_is_not_installed_here() -> None:
    record = make_record(pack=make_pack_header(task="arc_unheard_of"), items=make_items())
    assert "arc_unheard_of" in reason(record, "accuracy")
    assert figure(record, "score.acc_norm").value == 0.4


def test_a_document_counts_once() -> None:
    items = make_items()
    record = make_record(items=(*items, items[0], items[1]))
    assert figure(record, "accuracy").n == 20


def test_graded_scores_have_a_normal_interval() -> None:
    # 0, 0.5, 0.5, 1: mean 0.5, variance 1/6, standard error √(1/24) = 0.204124.
    items = [
        item.model_copy(update={"grade": item.grade and item.grade.model_copy(update={"scores": {"acc_norm": value}})})
        for item, value in zip(make_items(size=4), (0.0, 0.5, 0.5, 1.0), strict=True)
    ]
    accuracy = figure(make_record(items=tuple(items)), "accuracy")
    assert accuracy.value == 0.5
    assert accuracy.high == pytest.approx(0.5 + 1.959964 * 0.204124, abs=1e-5)
    assert "not a right-or-wrong score" in reason(make_record(items=tuple(items)), "energy_per_correct")


def test_truncated_share() -> None:
    items = make_items("gsm8k_cot")
    cut = tuple(item.model_copy(update={"finish": "length"}) if item.doc_id < 5 else item for item in items)
    assert figure(make_record(task="gsm8k_cot", items=cut), "truncated_share").value == 0.25
    assert figure(make_record(task="gsm8k_cot"), "truncated_share").value == 0
    assert "choice task" in reason(make_record(), "truncated_share")
    assert figure(make_record(task="gsm8k_cot"), "score.exact_match,strict-match").value == 0.4


# --- energy -----------------------------------------------------------------------------------------------------------
def test_packages_are_summed_and_parts_are_not() -> None:
    record = metered(meter("package-0", 10), meter("package-1", 6, quantity="energy"), meter("core", 7, total=False))
    energy = figure(record, "energy_latency")
    assert energy.value == pytest.approx(80)
    assert energy.source.startswith("package-0 of test + package-1 of test (package; ")
    assert "trapezoid" in energy.source
    assert "counter" in energy.source


def test_a_wall_meter_is_preferred_to_the_package() -> None:
    record = metered(meter("package-0", 10), meter("wall", 30, meaning="wall"))
    energy = figure(record, "energy_latency")
    assert energy.value == pytest.approx(150)
    assert "wall of test (wall;" in energy.source


@given(st.sets(st.sampled_from(MEANINGS), min_size=1))
def test_the_joules_of_different_meanings_are_never_mixed(meanings: set[str]) -> None:
    columns = [meter(f"m{index}", 10.0 + index, meaning) for index, meaning in enumerate(sorted(meanings))]
    best = min(meanings, key=MEANINGS.index)
    expected = 5 * (10 + sorted(meanings).index(best))
    energy = figure(metered(*columns), "energy_latency")
    assert energy.value == pytest.approx(expected)
    assert f"({best};" in energy.source


def test_no_meter_says_why() -> None:
    absent = {
        "rapl": Absent(reason="energy_uj may be read by root only"),
        "thermal": Absent(reason="no zones"),
    }
    record = metered(absent=absent)
    for name in ("energy_latency", "energy_accuracy_net", "idle_power", "energy_per_token", "energy_per_correct"):
        assert reason(record, name) == (
            "no meter for the whole board or package (rapl: energy_uj may be read by root only)"
        )
    parts = metered(meter("core", 5, total=False))
    assert "core measure parts only" in reason(parts, "energy_latency")


def test_no_trace_is_no_energy() -> None:
    record = make_record().model_copy(update={"trace": None})
    for name in ("energy_latency", "peak_pss", "sampler_read_p95", "sampler_cpu_share", "peak_temperature"):
        assert reason(record, name) == "the run has no trace"


def without(column: tuple[Channel, list[float | None]], start_s: float, end_s: float) -> tuple[Channel, Values]:
    channel, values = column
    return channel, [None if start_s <= t <= end_s else value for t, value in zip(ONE_SECOND_STEP, values, strict=True)]


def test_a_small_gap_is_taken_at_the_mean_power_and_said() -> None:
    # Readings at 1019.9 and 1020.7 s are 0.8 s apart: more than five ticks, 4 % of the 20 s.
    record = metered(without(meter("package-0", 10), 1019.95, 1020.65))
    energy = figure(record, "energy_accuracy")
    assert energy.value == pytest.approx(200)
    assert energy.low == pytest.approx(192)
    assert "96.0% covered" in energy.source
    assert figure(record, "energy_latency").low is None


def test_a_large_gap_is_absent_with_the_share() -> None:
    record = metered(without(meter("package-0", 10), 1015.05, 1020.05))
    assert "covers 74.5% of the accuracy phase" in reason(record, "energy_accuracy")
    assert "covers 74.5%" in reason(record, "energy_per_correct")
    assert figure(record, "energy_latency").value == pytest.approx(50)


def test_a_slow_meter_is_judged_by_its_own_rhythm() -> None:
    channel, values = meter("package-0", 10)
    slow = [value if index % 10 == 0 else None for index, value in enumerate(values)]
    energy = figure(metered((channel, slow)), "energy_latency")
    assert energy.value == pytest.approx(50)
    assert energy.n == 6


def test_a_phase_with_fewer_than_two_readings_has_no_energy() -> None:
    short = (*PHASES[:3], Phase(name="latency", start_s=1005.0, end_s=1005.05), *PHASES[4:])
    record = metered(meter("package-0", 10)).model_copy(update={"phases": short})
    assert "read 1 times in the latency phase" in reason(record, "energy_latency")


def test_no_idle_window_means_no_net_energy() -> None:
    record = metered(meter("package-0", 10)).model_copy(update={"phases": PHASES[1:]})
    assert "idle power is not known" in reason(record, "energy_latency_net")
    assert figure(record, "energy_latency").value == pytest.approx(50)


# --- a resumed run ----------------------------------------------------------------------------------------------------
def resumed(end_of_first_s: float = 1020.0, gap: bool = False) -> RunRecord:
    """The accuracy phase in two windows, 1010 to `end_of_first_s` and 1022 to 1030 s; ten items in each."""
    phases = (
        *PHASES[:4],
        Phase(name="accuracy", start_s=1010.0, end_s=end_of_first_s),
        Phase(name="load", start_s=1020.0, end_s=1022.0),
        Phase(name="accuracy", start_s=1022.0, end_s=1030.0),
    )
    items = tuple(
        item.model_copy(update={"end_s": 1011.0 + item.doc_id * 0.9 if item.doc_id < 10 else 1010.0 + item.doc_id})
        for item in make_items()
    )
    # items 10 and 11 would end at 1020 and 1021: put them into the second window
    items = tuple(
        item.model_copy(update={"end_s": max(item.end_s, 1022.5)}) if i >= 10 else item for i, item in enumerate(items)
    )
    column = meter("package-0", 10)
    trace = with_columns(make_trace(), without(column, 1012.05, 1014.05) if gap else column, keep=False)
    return make_record(phases=phases, items=items, trace=trace, attempts=2)


def test_windows_of_a_resumed_run_add_up() -> None:
    record = resumed()
    assert figure(record, "energy_accuracy").value == pytest.approx(180)  # 10 s + 8 s at 10 W
    assert figure(record, "wall_time").value == pytest.approx(18)
    assert figure(record, "items_rate").value == pytest.approx(20 / 18)
    assert figure(record, "energy_per_correct").value == pytest.approx(22.5)
    load = figure(record, "load_time")
    assert (load.value, load.low, load.high, load.n) == (1.5, 1.0, 2.0, 2)


def test_every_window_of_a_resumed_run_must_be_covered() -> None:
    # 2.1 s of 18 s would pass neither; of the first window 78.0 % is covered.
    assert "of the accuracy phase" in reason(resumed(gap=True), "energy_accuracy")


def with_phase(record: RunRecord, name: Any, start_s: float, end_s: float) -> RunRecord:
    return record.model_copy(update={"phases": (*record.phases, Phase(name=name, start_s=start_s, end_s=end_s))})


def test_a_window_that_ended_before_the_meter_was_read_twice_is_counted_at_the_mean_power() -> None:
    """An attempt that died as soon as its phase began must not cost the whole run its energy."""
    record = clean_record()
    whole = figure(record, "energy_accuracy")
    again = with_phase(record, "accuracy", 1030.52, 1030.56)
    assert figure(again, "energy_accuracy").value == pytest.approx(whole.value * 20.04 / 20)
    assert "99.8% covered" in figure(again, "energy_accuracy").source
    assert reasons(again) == ()
    for name in ("idle", "latency"):
        assert reasons(with_phase(record, name, 1030.52, 1030.56)) == ()
    # What the windows lack and what is left out of them are one share: 3 % of the long one, and 3 % in a short one, are too much.
    column = meter("package-0", 10)
    holed = [
        None if 1011.05 < time < 1011.65 else value for time, value in zip(ONE_SECOND_STEP, column[1], strict=True)
    ]
    lacking = clean_record(trace=with_columns(make_trace(), (column[0], holed), keep=False))
    assert figure(lacking, "energy_accuracy").value == pytest.approx(200)
    short = [(1030.02 + number * 0.2, 1030.12 + number * 0.2) for number in range(4)]
    for start_s, end_s in short:
        lacking = with_phase(lacking, "accuracy", start_s, end_s)
    assert "was read 1 times" in reason(lacking, "energy_accuracy")
    # A meter that is read once in two seconds: 3 s are no more short than long for it, and too much of 23 s to be guessed.
    column = meter("package-0", 10)
    slow = [value if tick % 20 == 0 else None for tick, value in enumerate(column[1])]
    trace = with_columns(
        make_trace(), (column[0], slow), share("contention.other_cpu"), share("contention.steal"), keep=False
    )
    assert "was read 1 times" in reason(
        with_phase(clean_record(trace=trace), "accuracy", 1024.5, 1027.5), "energy_accuracy"
    )


def test_a_latency_phase_that_was_repeated_counts_once() -> None:
    """The energy's windows are those whose samples are in the record."""
    record = clean_record()
    whole = figure(record, "energy_latency").value
    again = with_phase(record, "latency", 1030.1, 1030.9)
    assert figure(again, "energy_latency").value == whole
    assert figure(again, "energy_latency_net").value == figure(record, "energy_latency_net").value


def test_items_outside_the_recorded_windows_have_no_energy() -> None:
    record = resumed(end_of_first_s=1015.0)  # items 5 to 9 ended at 1015.5 s and later
    assert reason(record, "energy_accuracy").startswith("5 of 20 items were answered outside")
    assert reason(record, "energy_per_correct").startswith("5 of 20 items")
    assert reason(record, "wall_time").startswith("5 of 20 items")
    rate = figure(record, "items_rate")
    assert (rate.value, rate.n) == (pytest.approx(15 / 13), 15)


def test_a_reboot_ends_the_energy() -> None:
    times = (*ONE_SECOND_STEP[:200], *(t - 990 for t in ONE_SECOND_STEP[200:]))
    record = metered(meter("package-0", 10), times_s=times)
    assert "board restarted" in reason(record, "energy_accuracy")


# --- the verdict ------------------------------------------------------------------------------------------------------
def reasons(record: RunRecord, limits: Limits | None = None) -> tuple[str, ...]:
    verdict = summarise(record, limits)[1]
    assert verdict.valid is not bool(verdict.reasons)
    return verdict.reasons


def test_a_clean_run_is_valid() -> None:
    assert reasons(clean_record()) == ()
    assert reasons(clean_record(), Limits(power_w=15.1, temperature_c=55.6)) == ()


def test_a_run_without_a_meter_may_be_valid() -> None:
    trace = with_columns(make_trace(), share("contention.other_cpu"), keep=False)
    assert reasons(clean_record(trace=trace)) == ()


def only(record: RunRecord, expected: str, limits: Limits | None = None) -> None:
    """The record has exactly one reason, and it says `expected`."""
    found = reasons(record, limits)
    assert len(found) == 1, found
    assert expected in found[0]


def disturbed(name: str, value: float | None, start_s: float = 0.0, **changes: Any) -> RunRecord:
    trace = make_trace()
    columns = [share("contention.other_cpu"), share("contention.steal")]
    columns = [column for column in columns if column[0].name != name]
    return clean_record(trace=with_columns(trace, *columns, share(name, value, start_s)), **changes)


@pytest.mark.parametrize("name", ["contention.other_cpu", "contention.steal"])
def test_contended(name: str) -> None:
    # Two cores: a share of 0.026 is 0.052 of a core, 0.05 is allowed.
    found = reasons(disturbed(name, 0.026))
    assert [text.split()[0] for text in found] == ["contended:", "contended:"]
    assert "0.05 of 2 cores on average in the latency phase (51 readings)" in found[0]
    assert "accuracy phase" in found[1]
    assert reasons(disturbed(name, 0.024)) == ()


def test_contended_in_one_phase_only() -> None:
    only(disturbed("contention.other_cpu", 0.5, start_s=1010.05), "1.00 of 2 cores on average in the accuracy phase")
    assert reasons(disturbed("contention.other_cpu", 0.5, start_s=1030.05)) == ()


def test_cores_that_the_engine_leaves_free_forgive_a_little() -> None:
    record = disturbed("contention.other_cpu", 0.04, engine={"threads": 1})
    assert reasons(record) == ()
    assert len(reasons(disturbed("contention.other_cpu", 0.06, engine={"threads": 1}))) == 2


def test_shares_are_of_all_cores_that_run_not_of_those_that_the_agent_may_use() -> None:
    """A container with two of eight cores, both of them the engine's: 0.05 of one is allowed."""
    device = make_device(cores=2, cores_online=8)
    only(
        disturbed("contention.steal", 0.0066, start_s=1010.05, device=device),
        "stole 0.05 of 8 cores on average in the accuracy phase",
    )
    assert reasons(disturbed("contention.steal", 0.006, device=device)) == ()


@pytest.mark.parametrize("name", ["contention.psi_cpu", "contention.psi_memory"])
def test_pressure(name: str) -> None:
    only(disturbed(name, 0.11, start_s=1010.05), "of the accuracy phase (PSI, 201 readings), 10% is allowed")
    assert reasons(disturbed(name, 0.09)) == ()


def test_unknown_contention_is_a_reason() -> None:
    only(disturbed("contention.other_cpu", None, start_s=0.0), "contention not known")
    absent = {"contention": Absent(reason="/proc/stat: not permitted")}
    only(clean_record(trace=make_trace().model_copy(update={"absent": absent})), "(/proc/stat: not permitted)")


def test_throttled_names_the_first_time() -> None:
    flag = Channel(name="throttle.cooling", quantity="flag", unit="1", source="test")
    values = [1.0 if 1012.25 < t < 1020 or t < 1001 else 0.0 for t in ONE_SECOND_STEP]
    record = clean_record(trace=with_columns(watched_trace(), (flag, values)))
    only(record, "throttled: throttle.cooling first at 1012.30 s, 2.30 s into the accuracy phase")
    before = [1.0 if t < 1004.9 else None for t in ONE_SECOND_STEP]
    assert reasons(clean_record(trace=with_columns(watched_trace(), (flag, before)))) == ()


def test_throttle_events_count_only_when_they_grow_in_a_measured_phase() -> None:
    count = Channel(name="throttle.events", quantity="count", unit="1", source="test")
    early = [3.0 if t > 1003 else 0.0 for t in ONE_SECOND_STEP]
    assert reasons(clean_record(trace=with_columns(watched_trace(), (count, early)))) == ()
    late = [value + (1.0 if t > 1006.05 else 0.0) for value, t in zip(early, ONE_SECOND_STEP, strict=True)]
    only(
        clean_record(trace=with_columns(watched_trace(), (count, late))), "first at 1006.10 s, 1.10 s into the latency"
    )


def test_too_few_items() -> None:
    # Wilson's half-width at one half: 1.96 ÷ (1 + z²/n) · √(1/4n + z²/4n²) is 0.0703 for n = 190, 0.0694 for n = 195.
    for size, valid in ((190, False), (196, True)):
        record = clean_record(pack=make_pack_header(size=size), items=make_items("arc_challenge", size, size // 2))
        if valid:
            assert reasons(record) == ()
        else:
            only(record, "too few items: 190 give the accuracy a 95 % interval of ±0.070")


def test_not_above_chance() -> None:
    # 300 at 0.2502: mean 75.06, σ 7.50; 83 is 0.99 σ above (p = 0.16), 90 is 1.93 σ above (p = 0.03).
    only(clean_record(items=make_items("arc_challenge", 300, 83)), "not above chance: 83 of 300 correct")
    assert reasons(clean_record(items=make_items("arc_challenge", 300, 90))) == ()
    only(clean_record(items=make_items("arc_challenge", 300, 30)), "p = 1.000")


def generation_record(cut: int, correct: int, size: int = 300) -> RunRecord:
    items = make_items("gsm8k_cot", size, correct)
    return clean_record(
        task="gsm8k_cot",
        pack=make_pack_header("gsm8k_cot", size=size),
        items=tuple(i.model_copy(update={"finish": "length"}) if i.doc_id >= size - cut else i for i in items),
    )


def test_truncated_outputs() -> None:
    only(generation_record(cut=31, correct=100), "outputs truncated: 31 of 300 outputs ended at the token limit")
    assert reasons(generation_record(cut=30, correct=100)) == ()


def test_zero_with_outputs_cut() -> None:
    only(generation_record(cut=1, correct=0), "score 0 with truncated outputs: 1 of 300")
    assert reasons(generation_record(cut=0, correct=0)) == ()
    assert reasons(generation_record(cut=1, correct=1)) == ()


def test_implausible_speed() -> None:
    # 50 tok/s · 96 MB = 4.8 GB/s; the measured bandwidth's upper end counts.
    def bandwidth(value: float, high: float | None) -> RunRecord:
        probe = Measure(value=value, unit="By/s", n=5, low=None, high=high, source="probe")
        return clean_record(device=make_device(memory_bandwidth=probe))

    only(bandwidth(4.7e9, None), "implausible speed: decoding would read 4.80 GB/s of weights")
    assert reasons(bandwidth(4.7e9, 4.85e9)) == ()
    assert reasons(bandwidth(4.85e9, None)) == ()


def test_power_and_temperature_beyond_the_board() -> None:
    found = reasons(clean_record(), Limits(power_w=14.99))
    assert len(found) == 1, found  # the accuracy phase's mean is 14.975 W, of the step at its end
    assert "15.00 W mean in the latency phase, the board's limit is 14.99 W" in found[0]
    only(clean_record(), "too hot: 55.5 °C", Limits(temperature_c=55.4))


def test_too_warm_at_the_start() -> None:
    """The first readings of the idle window count, of the hottest zone, and not what the run itself made warm."""
    zone = Channel(name="thermal.second", quantity="temperature", unit="Cel", source="test")
    values = [47.5 if time < 1000.3 else 90.0 for time in ONE_SECOND_STEP]
    record = clean_record(trace=with_columns(watched_trace(), (zone, values)))
    assert reasons(record, Limits(start_temperature_c=47.6)) == ()
    only(record, "too warm at the start: 47.5 °C, below 47.5 °C is required", Limits(start_temperature_c=47.5))


def long_metered(power_w: Any, seconds: float, step_s: float = 1.0) -> RunRecord:
    """A clean record whose accuracy phase lasts `seconds`, with `power_w(time)` sampled every `step_s`."""
    record = clean_record()
    end_s = 1010.0 + seconds
    phases = tuple(
        phase.model_copy(update={"end_s": end_s})
        if phase.name == "accuracy"
        else phase.model_copy(update={"start_s": end_s, "end_s": end_s + 1})
        if phase.name == "cooldown"
        else phase
        for phase in record.phases
    )
    times = [START_S + step_s * number for number in range(int((end_s + 2 - START_S) / step_s))]
    channels = (
        Channel(name="meter", quantity="power", unit="W", source="test", meaning="rail", total=True),
        Channel(name="contention.other_cpu", quantity="share", unit="1", source="test"),
    )
    values = (tuple(power_w(time) for time in times), (0.0,) * len(times))
    changes = {"channels": channels, "times_s": tuple(times), "values": values, "interval_s": step_s}
    trace = watched_trace().model_copy(update={**changes, "read_times_s": (1e-4,) * len(times)})
    return record.model_copy(update={"phases": phases, "trace": trace})


def test_a_meter_that_stands_still_under_load_is_stuck() -> None:
    only(
        long_metered(lambda _: 4.125, 70),
        "meter stuck: meter gave the same value in 71 readings over 70 s of the accuracy",
    )
    assert reasons(long_metered(lambda _: 4.125, 55)) == (), "a minute it takes"
    assert reasons(long_metered(lambda time: 4.1 + 0.01 * (int(time) % 50 == 0), 200)) == (), "it moves now and then"
    assert reasons(long_metered(lambda _: 4.125, 110, step_s=2.0)) == (), "too few readings to say so"


def test_a_governor_that_changes_is_named_as_such() -> None:
    flag = Channel(name="throttle.governor_changed", quantity="flag", unit="1", source="test")
    values = [1.0 if time > 1012 else 0.0 for time in ONE_SECOND_STEP]
    only(
        clean_record(trace=with_columns(watched_trace(), (flag, values))), "governor changed: throttle.governor_changed"
    )


def test_items_with_problems() -> None:
    items = make_items("arc_challenge", 300, 150)
    only(
        clean_record(items=(*items[:-1], unanswered(items[-1]))),
        "items with problems: 1 of 300 have no answer and count as wrong (the first: the prompt has 9000 tokens",
    )


def test_items_missing_or_doubled() -> None:
    items = make_items("arc_challenge", 300, 150)
    only(clean_record(items=items[:-1]), "items missing: 299 of 300 were put to the model")
    only(clean_record(items=(*items, items[0])), "items doubled: 1")
    assert reasons(clean_record(items=items[:250], spec={"limit": 250})) == ()


def test_missed_ticks() -> None:
    only(clean_record(trace=watched_trace(missed_ticks=17)), "sampler late: 17 of 328 ticks")  # 5.2 %
    assert reasons(clean_record(trace=watched_trace(missed_ticks=16))) == ()  # 4.9 %


def test_a_trace_with_a_hole() -> None:
    trace = watched_trace()
    kept = [index for index, t in enumerate(trace.times_s) if not 1014.95 < t < 1020.05]
    holed = trace.model_copy(
        update={
            "times_s": tuple(trace.times_s[index] for index in kept),
            "values": tuple(tuple(column[index] for index in kept) for column in trace.values),
        }
    )
    found = reasons(clean_record(trace=holed))
    assert found[0].startswith("trace incomplete: it covers 74.0% of the accuracy phase")
    assert found[1].startswith("energy incomplete though there is a meter: power covers 74.0%")
    assert len(found) == 2


def test_a_meter_that_fails_while_the_rest_goes_on() -> None:
    trace = watched_trace()
    channel, values = trace.channels[0], list(trace.values[0])
    holed = without((channel, values), 1014.95, 1020.05)
    record = clean_record(trace=trace.model_copy(update={"values": (tuple(holed[1]), *trace.values[1:])}))
    only(record, "energy incomplete though there is a meter: power covers")


def test_no_trace_is_a_reason() -> None:
    only(clean_record().model_copy(update={"trace": None}), "no trace")


def test_the_wrong_model() -> None:
    only(clean_record(engine={"model_sha256": "0" * 64}), "wrong model: the engine loaded 000000000000…")
    only(clean_record().model_copy(update={"engine": None}), "the engine's facts are missing")


def test_a_phase_that_never_was() -> None:
    phases = tuple(phase for phase in PHASES if phase.name != "latency")
    found = reasons(clean_record(phases=phases))
    assert found[0] == "the latency phase is missing"


@pytest.mark.parametrize("status", ["failed", "cancelled", "interrupted"])
def test_a_run_that_did_not_end_well(status: str) -> None:
    problem = Problem(code="out_of_memory", message="the worker was killed for memory")
    record = make_record(status=status, problem=problem)
    only(record, f"the run is {status}: the worker was killed for memory")
    assert "the worker was killed for memory" in reason(record, "accuracy")
    assert all(isinstance(metric, Absent) for metric in summarise(record)[0].metrics.values())


def test_the_records_own_summary_and_verdict_are_not_looked_at() -> None:
    record = clean_record(reasons=("an old reason",))
    assert reasons(record) == ()
    assert summarise(record) == summarise(record.model_copy(update={"summary": None}))


# --- memory, temperature, the sampler's cost --------------------------------------------------------------------------
def test_peaks_are_of_the_worker_and_of_the_hottest_zone() -> None:
    def column(name: str, quantity: Any, unit: Any, values: Values) -> tuple[Channel, Values]:
        return Channel(name=name, quantity=quantity, unit=unit, source="test"), values

    rest = [None] * 309
    record = metered(
        column("memory.available", "memory", "By", [9e9, 9e9, *rest]),
        column("memory.worker_pss", "memory", "By", [None, 2e8, *rest]),
        column("thermal.cpu", "temperature", "Cel", [50.0, 51.0, *rest]),
        column("thermal.board", "temperature", "Cel", [60.0, None, *rest]),
    )
    assert (figure(record, "peak_pss").value, figure(record, "peak_pss").n) == (2e8, 1)
    hottest = figure(record, "peak_temperature")
    assert (hottest.value, hottest.source) == (60.0, "thermal.board, highest of 1 readings")
    nothing = metered(absent={"thermal": Absent(reason="no zones in /sys/class/thermal")})
    assert reason(nothing, "peak_temperature") == "thermal: no zones in /sys/class/thermal"
    assert reason(nothing, "peak_pss") == "no memory channel gave a reading"


def test_a_worker_that_never_loaded_the_model_has_no_peak_memory_of_it() -> None:
    column = (
        Channel(name="memory.worker_pss", quantity="memory", unit="By", source="test"),
        [4096.0] * len(ONE_SECOND_STEP),
    )
    record = metered(column)
    assert figure(record, "peak_pss").value == 4096.0
    unloaded = record.model_copy(update={"phases": tuple(phase for phase in record.phases if phase.name == "idle")})
    assert reason(unloaded, "peak_pss") == "the model was never loaded; until then the worker had 0.0 MB at most"


def test_the_samplers_read_time_is_a_tail() -> None:
    slow = make_trace().model_copy(update={"read_times_s": tuple(i / 1000 for i in range(21))})
    assert figure(make_record(trace=slow), "sampler_read_p95").value == pytest.approx(0.019)
    few = make_trace().model_copy(update={"read_times_s": (0.1,) * 19})
    assert "needs 20" in reason(make_record(trace=few), "sampler_read_p95")


def test_a_trace_that_slowed_down_covers_its_phases_and_an_interrupted_one_does_not() -> None:
    whole = make_trace()
    kept = [index for index, time in enumerate(whole.times_s) if time < 1015 or index % 8 == 0]
    thinned = whole.model_copy(
        update={
            "times_s": tuple(whole.times_s[index] for index in kept),
            "values": tuple(tuple(column[index] for index in kept) for column in whole.values),
            "read_times_s": tuple(whole.read_times_s[index] for index in kept),
        }
    )
    slowed = make_record(trace=thinned.model_copy(update={"slowed": ((1015.0, 0.8),)}))
    assert not [reason for reason in summarise(slowed)[1].reasons if "covers" in reason]
    # 15 W until the step at 1030.0 s, which now lies between the readings at 1029.6 and 1030.4 s: half of 0.4 s by the trapezoid.
    assert figure(slowed, "energy_accuracy").value == pytest.approx(15 * 19.6 + (15 + 10) / 2 * 0.4)
    assert figure(slowed, "sampler_cpu_share").value == pytest.approx(0.15 / (thinned.times_s[-1] - thinned.times_s[0]))
    # Before it slowed down, the limit is that of the full rate: a pause of 1.2 s in the latency phase is a gap, in the accuracy phase none.
    for start, name, counts in ((1007.0, "latency", True), (1020.0, "accuracy", False)):
        left = [index for index, time in enumerate(thinned.times_s) if not start < time < start + 1.2]
        holed = thinned.model_copy(
            update={
                "slowed": ((1015.0, 0.8),),
                "times_s": tuple(thinned.times_s[index] for index in left),
                "values": tuple(tuple(column[index] for index in left) for column in thinned.values),
                "read_times_s": tuple(thinned.read_times_s[index] for index in left),
            }
        )
        found = summarise(make_record(trace=holed))[1].reasons
        assert any("covers" in reason and name in reason for reason in found) is counts
    gaps = make_record(trace=thinned)
    assert any("covers" in reason and "accuracy" in reason for reason in summarise(gaps)[1].reasons)
