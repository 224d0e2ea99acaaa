"""The figures here were worked out by hand or with exact fractions, never copied from the module's output."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulemark_agent import statistics as stats

finite = st.floats(min_value=-1e6, max_value=1e6)


# --- percentiles ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([15, 20, 35, 40, 50], 40, 29.0),  # rank 4 · 0.4 = 1.6: 20 + 0.6 · 15
        ([1, 2, 3, 4], 50, 2.5),
        ([4, 1, 3, 2], 25, 1.75),  # rank 0.75: 1 + 0.75
        ([10, 20], 95, 19.5),
        ([7], 99, 7.0),
        ([3, 1, 2], 0, 1.0),
        ([3, 1, 2], 100, 3.0),
        (list(range(1, 101)), 95, 95.05),  # rank 99 · 0.95 = 94.05: 95 + 0.05
        (list(range(1, 101)), 99, 99.01),
    ],
)
def test_percentile_by_hand(values: list[float], percent: float, expected: float) -> None:
    assert stats.percentile(values, percent) == pytest.approx(expected, abs=1e-12)


def test_percentile_refuses_what_does_not_exist() -> None:
    with pytest.raises(ValueError, match="no values"):
        stats.percentile([], 50)
    with pytest.raises(ValueError, match="between 0 and 100"):
        stats.percentile([1.0], 101)


@given(st.lists(finite, min_size=1, max_size=40), st.floats(0, 100), st.floats(0, 100))
def test_percentile_is_bounded_and_rises(values: list[float], one: float, two: float) -> None:
    low, high = stats.percentile(values, min(one, two)), stats.percentile(values, max(one, two))
    assert min(values) <= low <= max(values)
    assert low <= high + 1e-9 * max(1, abs(high))


@pytest.mark.parametrize(
    ("n", "percent", "supported"),
    [(0, 50, False), (1, 50, True), (19, 95, False), (20, 95, True), (99, 99, False), (100, 99, True)],
)
def test_a_tail_percentile_needs_one_value_beyond_it(n: int, percent: float, supported: bool) -> None:
    assert stats.supports_percentile(n, percent) is supported


# --- scores -----------------------------------------------------------------------------------------------------------
def test_standard_error_is_that_of_lm_eval() -> None:
    # 3 right of 4: mean 0.75, squared deviations 3 · 1/16 + 9/16 = 3/4, ÷ 3 = 1/4, √ = 1/2, ÷ √4 = 1/4.
    assert stats.standard_error([1, 1, 1, 0]) == pytest.approx(0.25, abs=1e-15)
    with pytest.raises(ValueError, match="two values"):
        stats.standard_error([1.0])


def test_wilson_by_hand() -> None:
    # Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662; 15 of 148 gives 0.0624 to 0.1605; 0 of 20 0 to 0.1611.
    assert stats.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert stats.wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert stats.wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert stats.wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_share_and_is_symmetric(case: tuple[int, int]) -> None:
    right, n = case
    low, high = stats.wilson_interval(right, n)
    assert 0 <= low <= right / n <= high <= 1
    mirrored = stats.wilson_interval(n - right, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize(("right", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_what_is_no_share(right: int, n: int) -> None:
    with pytest.raises(ValueError, match="not a share"):
        stats.wilson_interval(right, n)


def exact_tail(successes: int, n: int, chance: Fraction) -> Fraction:
    return sum(
        (math.comb(n, k) * chance**k * (1 - chance) ** (n - k) for k in range(successes, n + 1)), start=Fraction(0)
    )


def test_binomial_tail_by_hand() -> None:
    # P(X ≥ 3) of 4 coins = (4 + 1) ÷ 16; P(X ≥ 1) of 2 at a quarter = 1 − 9/16.
    assert stats.binomial_tail(3, 4, 0.5) == pytest.approx(5 / 16, rel=1e-12)
    assert stats.binomial_tail(1, 2, 0.25) == pytest.approx(7 / 16, rel=1e-12)
    assert stats.binomial_tail(0, 10, 0.25) == 1.0
    assert stats.binomial_tail(1, 10, 0.0) == 0.0
    assert stats.binomial_tail(10, 10, 1.0) == 1.0


@given(st.integers(0, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([2, 4, 5, 100]))
def test_binomial_tail_equals_exact_fractions(case: tuple[int, int], parts: int) -> None:
    successes, n = case
    expected = exact_tail(successes, n, Fraction(1, parts))
    assert stats.binomial_tail(successes, n, 1 / parts) == pytest.approx(float(expected), rel=1e-9)


def test_binomial_tail_of_ten_thousand_neither_overflows_nor_vanishes() -> None:
    # Mean 2500, standard deviation √1875 = 43.3; 2600 is 2.298 σ above with continuity correction: 1 − Φ = 0.01078.
    assert stats.binomial_tail(2600, 10_000, 0.25) == pytest.approx(0.01078, rel=0.03)
    assert stats.binomial_tail(10_000, 10_000, 0.99) == pytest.approx(0.99**10_000, rel=1e-9)


@pytest.mark.parametrize(("successes", "n", "chance"), [(5, 4, 0.5), (-1, 4, 0.5), (1, 4, 1.5), (1, 4, -0.1)])
def test_binomial_tail_refuses_nonsense(successes: int, n: int, chance: float) -> None:
    with pytest.raises(ValueError, match="not defined"):
        stats.binomial_tail(successes, n, chance)


# --- energy -----------------------------------------------------------------------------------------------------------
def test_trapezoid_by_hand() -> None:
    # 0→1 s rises from 0 to 10 W (5 J), 1→3 s falls from 10 to 4 W (14 J).
    whole = stats.power_energy([0, 1, 3], [0, 10, 4], 0, 3, max_gap_s=5)
    assert (whole.joules, whole.coverage, whole.readings) == (pytest.approx(19), 1.0, 3)
    assert whole.mean_power_w == pytest.approx(19 / 3)


def test_trapezoid_interpolates_power_at_both_borders() -> None:
    # At 0.5 s 5 W, at 2 s 7 W: (5 + 10)/2 · 0.5 + (10 + 7)/2 · 1 = 3.75 + 8.5.
    part = stats.power_energy([0, 1, 3], [0, 10, 4], 0.5, 2, max_gap_s=5)
    assert (part.joules, part.coverage, part.readings) == (pytest.approx(12.25), 1.0, 1)


def test_a_window_between_two_readings_is_covered() -> None:
    inside = stats.power_energy([0, 4], [8, 4], 1, 2, max_gap_s=5)
    assert (inside.joules, inside.coverage, inside.readings) == (pytest.approx(6.5), 1.0, 0)


def test_failed_reads_within_the_gap_limit_are_bridged() -> None:
    bridged = stats.power_energy([0, 1, 2, 3], [10, None, 20, 20], 0, 3, max_gap_s=2)
    assert (bridged.joules, bridged.coverage) == (pytest.approx(50), 1.0)  # 15 · 2 + 20 · 1


def test_a_long_gap_is_left_out_and_said() -> None:
    gap = stats.power_energy([0, 1, 2, 3, 4], [10, 10, None, None, 10], 0, 4, max_gap_s=2)
    assert (gap.joules, gap.coverage, gap.mean_power_w) == (pytest.approx(10), 0.25, pytest.approx(10))


def test_nothing_is_extrapolated_beyond_the_readings() -> None:
    late = stats.power_energy([2, 3], [10, 10], 0, 4, max_gap_s=2)
    assert (late.joules, late.coverage) == (pytest.approx(10), 0.25)


def test_no_reading_means_no_power() -> None:
    for column in ([None, None], [5.0, None]):
        nothing = stats.power_energy([0, 1], column, 0, 1, max_gap_s=2)
        assert (nothing.joules, nothing.coverage, nothing.mean_power_w) == (0, 0, None)


def test_counter_difference_by_hand() -> None:
    # 100 J at 0 s, 110 J at 1 s, 130 J at 2 s: at 0.5 s 105 J, at 1.5 s 120 J.
    part = stats.counter_energy([0, 1, 2], [100, 110, 130], 0.5, 1.5, max_gap_s=2)
    assert (part.joules, part.coverage) == (pytest.approx(15), 1.0)


def test_what_a_counter_says_over_a_long_gap_is_not_believed() -> None:
    times, totals = [0, 1, 9, 10], [0, 5, 85, 90]
    inside = stats.counter_energy(times, totals, 0, 10, max_gap_s=2)
    assert (inside.joules, inside.coverage) == (pytest.approx(10), 0.2)
    across = stats.counter_energy(times, totals, 0, 5, max_gap_s=2)
    assert (across.joules, across.coverage) == (pytest.approx(5), 0.2)


def test_a_counter_that_falls_back_is_not_believed() -> None:
    reset = stats.counter_energy([0, 1, 2, 3], [100, 110, 3, 13], 0, 3, max_gap_s=2)
    assert (reset.joules, reset.coverage) == (pytest.approx(20), pytest.approx(2 / 3))


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        stats.power_energy([0, 1], [1, 1], 1, 1, max_gap_s=2)
    with pytest.raises(ValueError, match="column"):
        stats.power_energy([0, 1], [1], 0, 1, max_gap_s=2)


sample_times = st.lists(st.integers(1, 1000), min_size=0, max_size=30, unique=True).map(
    lambda inner: [0.0, *sorted(tick / 100 for tick in inner), 10.01]
)


@given(sample_times, st.floats(0, 500), st.floats(0, 10), st.floats(0, 10))
def test_constant_power_gives_power_times_time(times: list[float], power: float, one: float, two: float) -> None:
    start, end = min(one, two), max(one, two)
    if end - start < 1e-6:
        return
    energy = stats.power_energy(times, [power] * len(times), start, end, max_gap_s=20)
    assert energy.joules == pytest.approx(power * (end - start), rel=1e-9, abs=1e-12)
    assert energy.coverage == pytest.approx(1)


@given(
    st.lists(st.tuples(st.integers(1, 400), st.none() | st.floats(0, 100)), min_size=2, max_size=25),
    st.lists(st.integers(0, 4000), min_size=3, max_size=3, unique=True),
    st.booleans(),
)
def test_adjacent_windows_add_up(steps: list[tuple[int, float | None]], borders: list[int], counter: bool) -> None:
    times, column, now, total = [], [], 0.0, 0.0
    for step, value in steps:
        now += step / 100
        total += value or 0.0
        times.append(now)
        column.append(None if value is None else total if counter else value)
    start, middle, end = (border / 100 for border in sorted(borders))
    measure = stats.counter_energy if counter else stats.power_energy
    whole = measure(times, column, start, end, max_gap_s=2)
    left, right = measure(times, column, start, middle, max_gap_s=2), measure(times, column, middle, end, max_gap_s=2)
    assert left.joules + right.joules == pytest.approx(whole.joules, rel=1e-9, abs=1e-9)
    assert left.covered_s + right.covered_s == pytest.approx(whole.covered_s, rel=1e-9, abs=1e-9)


@given(sample_times, st.floats(0.1, 100), st.floats(0, 4.9), st.floats(5, 10))
def test_power_and_counter_agree_on_a_steady_load(times: list[float], power: float, start: float, end: float) -> None:
    by_power = stats.power_energy(times, [power] * len(times), start, end, max_gap_s=20)
    by_counter = stats.counter_energy(times, [1e4 + power * time for time in times], start, end, max_gap_s=20)
    assert by_power.joules == pytest.approx(by_counter.joules, rel=1e-6)


def test_peak_ignores_failed_reads() -> None:
    assert stats.peak([1.0, None, 5.0, 2.0]) == (5.0, 3)
    assert stats.peak([None, None]) is None
