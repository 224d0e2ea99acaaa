"""The grid: every number goes to the nearest point that the file can hold, and scales are those that the file holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from joulemark.errors import BadInput
from joulemark_exporter.rounding import Rounding, round_to_grid

GRIDS = [
    Rounding(bits, size, symmetric) for bits in (2, 3, 4, 8) for size in (8, 32, -1) for symmetric in (True, False)
]


def weights(seed: int, rows: int = 6, columns: int = 64) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * 0.05).astype(np.float32)


@pytest.mark.parametrize("grid", GRIDS)
def test_each_number_goes_to_the_nearest_point_of_its_group(grid: Rounding) -> None:
    values = weights(1)
    matrix = round_to_grid(values, grid)
    size = grid.size(64)
    for row in range(6):
        for column in range(64):
            scale = np.float32(matrix.scales[row, column // size])
            zero = int(matrix.zeros[row, column // size])
            points = scale * (np.arange(1 << grid.bits) - zero)
            distances = np.abs(points - values[row, column])
            assert distances[matrix.integers[row, column]] <= distances.min() * (1 + 1e-5) + 1e-9


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e3), st.sampled_from(GRIDS))
@settings(max_examples=60, deadline=None)
def test_the_error_is_half_a_step_at_most_within_the_range(seed: int, size: float, grid: Rounding) -> None:
    values = weights(seed) * np.float32(size)
    matrix = round_to_grid(values, grid)
    step = matrix.scales.astype(np.float64).repeat(64 // matrix.scales.shape[1], 1)
    error = np.abs(matrix.dequantize() - values)
    # The symmetric grid has one point fewer above zero; and the 16-bit scale may cut the range by half a unit of its last place,
    # or by its coarseness where it is subnormal.
    slack = 1.0 if grid.symmetric else 0.51
    coarse = (1 << grid.bits) * (2.0**-11 * step + 2.0**-25)
    assert (error <= slack * step + coarse).all()


def test_symmetric_and_asymmetric_ranges_are_those_of_gptq() -> None:
    values = np.array([[-1.0, 0.0, 0.25, 0.5], [0.1, 0.2, 0.3, 0.4]], np.float32)
    symmetric = round_to_grid(values, Rounding(4, 4, True))
    assert symmetric.scales[:, 0] == pytest.approx([2 / 15, 0.8 / 15], rel=1e-3)
    assert (symmetric.zeros == 8).all()
    asymmetric = round_to_grid(values, Rounding(4, 4, False))
    assert asymmetric.scales[:, 0] == pytest.approx([1.5 / 15, 0.4 / 15], rel=1e-3)
    assert asymmetric.zeros[:, 0].tolist() == [10, 0]


def test_the_search_makes_the_error_smaller_where_there_are_outliers() -> None:
    values = weights(3, 40, 64)
    values[:, 5] *= 4
    plain, searched = (round_to_grid(values, Rounding(3, 32, True, search)).dequantize() for search in (False, True))
    assert (np.abs(searched - values) ** 2.4).sum() < 0.9 * (np.abs(plain - values) ** 2.4).sum()


def test_a_last_group_may_be_shorter_and_rows_do_not_meet() -> None:
    values = weights(4, 5, 50)
    matrix = round_to_grid(values, Rounding(4, 32))
    assert matrix.scales.shape == (5, 2)
    alone = round_to_grid(np.ascontiguousarray(values[2:3, 32:]), Rounding(4, 18))
    assert np.array_equal(matrix.integers[2:3, 32:], alone.integers)
    assert matrix.scales[2, 1] == alone.scales[0, 0]


def test_threads_change_nothing() -> None:
    values = weights(5, 3000, 96)
    one, two = (round_to_grid(values, Rounding(4, 32), threads) for threads in (1, 2))
    assert np.array_equal(one.integers, two.integers)
    assert np.array_equal(one.scales, two.scales)


def test_zeros_tiny_and_broken_groups() -> None:
    values = weights(6)
    values[0] = 0
    values[1] = 1e-9
    matrix = round_to_grid(values, Rounding(4, 32, False))
    assert (matrix.dequantize()[0] == 0).all()
    assert np.abs(matrix.dequantize()[1]).max() <= 1e-6
    for broken in (np.nan, np.inf, 3e38):
        values[2, 7] = broken
        with pytest.raises(BadInput):
            round_to_grid(values, Rounding(4, 32))
