"""Statistics of scores, of times and of sampled power. Pure: numbers in, numbers out.

Not aware of records, metrics or channels. Units: seconds, watts, joules where a name says so, else those of the input.

Truth: percentiles as numpy's default (Hyndman and Fan 1996, type 7: linear interpolation between order statistics);
the score interval of Wilson (1927); lm-eval's standard error (sample standard deviation ÷ √n); the exact binomial tail.

A meter is read at ticks, in rising order of time. What it did between two readings further apart than `max_gap_s` is
not known: such a stretch is left out, and `WindowEnergy.coverage` says how much of the window is known. Nothing is
extrapolated beyond the readings.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Z_95 = 1.959963984540054
"""The two-sided 95 % point of the normal distribution."""


def percentile(values: Sequence[float], percent: float) -> float:
    """The `percent`-th percentile (0 to 100) of `values`, which may come in any order.

    Linear interpolation between order statistics: with h = (n − 1) · percent ÷ 100 it lies between the values of rank
    floor(h) and floor(h) + 1, counted from 0. The caller states n. Raises ValueError for no values or a bad percent.
    """
    if not values:
        raise ValueError("a percentile of no values does not exist")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must lie between 0 and 100, not {percent}")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    low, high = ordered[below], ordered[above]
    # Clamped, since low + (high − low) · 1 can miss `high` by one rounding.
    return min(max(low + (high - low) * (rank - below), low), high)


def supports_percentile(n: int, percent: float) -> bool:
    """Whether n values can say anything about a percentile of the upper half: at least one value is expected beyond it.

    So the 95th needs 20 values and the 99th needs 100. Below that, interpolation only repeats the largest value under
    another name. The median of one value is that value.
    """
    # 100 ÷ (100 − percent) and not n · (1 − q): 1 − 0.99 is not 0.01 in binary.
    return n >= 1 and (percent <= 50 or n * (100 - percent) >= 100)


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean. Raises ValueError for no values."""
    if not values:
        raise ValueError("a mean of no values does not exist")
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """lm-eval's standard error of a mean score: sample standard deviation (n − 1) ÷ √n. Raises ValueError for n < 2."""
    n = len(values)
    if n < 2:
        raise ValueError(f"a standard error needs two values, there are {n}")
    centre = mean(values)
    variance = math.fsum((value - centre) ** 2 for value in values) / (n - 1)
    return math.sqrt(variance / n)


def wilson_interval(successes: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval (low, high) of a share, 95 % by default; it always contains successes ÷ n.

    Raises ValueError when n < 1 or successes lies outside 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} are not a share")
    share = successes / n
    denominator = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / denominator
    half = z / denominator * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and n one border is exactly the share; rounding must not push it past.
    return min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share)


def binomial_tail(successes: int, n: int, chance: float) -> float:
    """P(X ≥ successes) for X ~ Binomial(n, chance): the p-value of "not above chance".

    Exact sum in logarithms (lgamma), so that n of many thousands neither overflows nor underflows to a wrong 0.
    Raises ValueError when chance lies outside 0..1 or successes outside 0..n.
    """
    if n < 0 or not 0 <= successes <= n or not 0 <= chance <= 1:
        raise ValueError(f"P(X ≥ {successes}) for n = {n} and chance {chance} is not defined")
    if successes == 0 or chance == 1:
        return 1.0
    if chance == 0:
        return 0.0
    log_chance, log_rest, log_all = math.log(chance), math.log1p(-chance), math.lgamma(n + 1)
    logs = [
        log_all - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * log_chance + (n - k) * log_rest
        for k in range(successes, n + 1)
    ]
    largest = max(logs)
    return min(1.0, math.exp(largest) * math.fsum(math.exp(value - largest) for value in logs))


@dataclass(frozen=True)
class WindowEnergy:
    """What a meter says about a window: joules over the covered part only, never scaled up to the whole."""

    joules: float
    covered_s: float
    duration_s: float
    readings: int
    """Readings inside the window, its borders included."""

    @property
    def coverage(self) -> float:
        """Covered share of the window, 0 to 1."""
        return min(1.0, self.covered_s / self.duration_s)

    @property
    def mean_power_w(self) -> float | None:
        """Joules ÷ covered seconds; None when nothing is covered."""
        return self.joules / self.covered_s if self.covered_s > 0 else None


def power_energy(
    times_s: Sequence[float], powers_w: Sequence[float | None], start_s: float, end_s: float, max_gap_s: float
) -> WindowEnergy:
    """Energy of [start_s, end_s] by the trapezoid rule over a power column (W; None where a read failed).

    Power at a border is interpolated between the readings around it. A stretch between two successive readings longer
    than `max_gap_s` is not covered. Raises ValueError for columns of unequal length or an empty window.
    """
    return _window(times_s, powers_w, start_s, end_s, max_gap_s, counter=False)


def counter_energy(
    times_s: Sequence[float], totals_j: Sequence[float | None], start_s: float, end_s: float, max_gap_s: float
) -> WindowEnergy:
    """Energy of [start_s, end_s] as the difference of a running sum (J), interpolated linearly at both borders.

    A stretch between two successive readings longer than `max_gap_s` is not covered: sums are kept by software that
    leaves out steps it cannot believe, so that a sum's rise over a gap need not be all that was used. Nor is a stretch
    where the sum falls. Raises ValueError for columns of unequal length or an empty window.
    """
    return _window(times_s, totals_j, start_s, end_s, max_gap_s, counter=True)


def _window(
    times_s: Sequence[float],
    column: Sequence[float | None],
    start_s: float,
    end_s: float,
    max_gap_s: float,
    counter: bool,
) -> WindowEnergy:
    if len(times_s) != len(column):
        raise ValueError(f"{len(times_s)} times and {len(column)} values do not make a column")
    if not end_s > start_s:
        raise ValueError(f"the window from {start_s} s to {end_s} s is empty")
    readings = [(time, value) for time, value in zip(times_s, column, strict=True) if value is not None]
    first = max(0, bisect_left(readings, start_s, key=_time) - 1)
    joules: list[float] = []
    covered: list[float] = []
    for (left_s, left), (right_s, right) in pairwise(readings[first:]):
        if left_s >= end_s:
            break
        low, high = max(left_s, start_s), min(right_s, end_s)
        if high <= low or right_s - left_s > max_gap_s or (counter and right < left):
            continue
        joules.append(_stretch(left_s, left, right_s, right, low, high, counter))
        covered.append(high - low)
    inside = bisect_right(readings, end_s, key=_time) - bisect_left(readings, start_s, key=_time)
    return WindowEnergy(math.fsum(joules), math.fsum(covered), end_s - start_s, inside)


def _stretch(left_s: float, left: float, right_s: float, right: float, low: float, high: float, counter: bool) -> float:
    """Joules between two successive readings, of their part from `low` to `high`."""
    slope = (right - left) / (right_s - left_s)
    if counter:
        return slope * (high - low)
    return (left + slope * (low - left_s) + left + slope * (high - left_s)) / 2 * (high - low)


def _time(reading: tuple[float, float]) -> float:
    return reading[0]


def peak(values: Sequence[float | None]) -> tuple[float, int] | None:
    """The largest reading and how many readings there are; None when every read failed."""
    present = [value for value in values if value is not None]
    return (max(present), len(present)) if present else None
