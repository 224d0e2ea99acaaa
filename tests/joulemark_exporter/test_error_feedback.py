"""GPTQ against its definition: after each column the inverse of what is left is taken anew, in full precision."""

from __future__ import annotations

import numpy as np
import pytest

from joulemark.errors import BadInput
from joulemark_exporter import error_feedback
from joulemark_exporter.rounding import Rounding, round_to_grid, scales_and_zeros

COLUMNS = 96


def problem(seed: int, rows: int = 12, columns: int = COLUMNS) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and the moments of correlated inputs of which one is always zero."""
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((400, 8)) @ random.standard_normal((8, columns)) + 0.3 * random.standard_normal(
        (400, columns)
    )
    inputs[:, 5] = 0
    return (random.standard_normal((rows, columns)) * 0.05).astype(np.float32), inputs.T @ inputs / 400


def by_definition(
    weights: np.ndarray, moments: np.ndarray, grid: Rounding, damping: float, act_order: bool, static: bool
) -> np.ndarray:
    values, moments = weights.astype(np.float64), moments.copy()
    columns = values.shape[1]
    dead = moments.diagonal() == 0
    moments[dead, dead] = 1
    values[:, dead] = 0
    original, size = values.astype(np.float32), grid.size(columns)
    order = np.argsort(-moments.diagonal(), kind="stable") if act_order else np.arange(columns)
    moments += damping * moments.diagonal().mean() * np.eye(columns)
    integers = np.zeros(values.shape, np.uint8)
    grids: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for place, column in enumerate(order):
        left = list(order[place:])
        inverse = np.linalg.inv(moments[np.ix_(left, left)])
        group = (column if static else place) // size
        if group not in grids:
            members = (
                original[:, group * size : (group + 1) * size]
                if static
                else values[:, order[group * size : (group + 1) * size]]
            )
            grids[group] = scales_and_zeros(members.astype(np.float32), grid)
        scale, zero = grids[group]
        chosen = np.clip(np.rint(values[:, column].astype(np.float32) / scale) + zero, 0, (1 << grid.bits) - 1)
        integers[:, column] = chosen
        error = (values[:, column] - scale.astype(np.float64) * (chosen - zero)) / inverse[0, 0]
        values[:, left] -= np.outer(error, inverse[0])
    return integers


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [8, 16, 24, 32, 96, -1])
@pytest.mark.parametrize(("act_order", "static"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("block", [32, 128])
def test_the_integers_are_those_of_the_definition(
    symmetric: bool, group_size: int, act_order: bool, static: bool, block: int
) -> None:
    weights, moments = problem(group_size + 7)
    grid = Rounding(4, group_size, symmetric)
    found = error_feedback.quantize(weights, moments, grid, act_order=act_order, static_groups=static, block=block)
    assert np.array_equal(found.matrix.integers, by_definition(weights, moments, grid, 0.01, act_order, static))
    assert found.dead == 1


def output_error(weights: np.ndarray, moments: np.ndarray, rounded: np.ndarray) -> float:
    difference = (weights - rounded).astype(np.float64)
    return float(np.einsum("oi,ij,oj->", difference, moments, difference))


@pytest.mark.parametrize("grid", [Rounding(4, 32), Rounding(3, 16, False), Rounding(4, -1), Rounding(2, 8)])
def test_the_output_error_is_far_below_rounding_to_nearest(grid: Rounding) -> None:
    weights, moments = problem(1, rows=40)
    found = error_feedback.quantize(weights, moments, grid).matrix.dequantize()
    nearest = round_to_grid(weights, grid).dequantize()
    assert output_error(weights, moments, found) < 0.3 * output_error(weights, moments, nearest)


def test_the_loss_is_half_the_output_error_that_the_damped_moments_predict() -> None:
    weights, moments = problem(2)
    found = error_feedback.quantize(weights, moments, Rounding(4, 32))
    live = weights.copy()
    live[:, 5] = 0
    damped = moments.copy()
    damped[5, 5] = 1
    damped += 0.01 * damped.diagonal().mean() * np.eye(COLUMNS)
    assert found.loss == pytest.approx(output_error(live, damped, found.matrix.dequantize()) / 2, rel=1e-6)


def test_without_correlations_it_is_rounding_to_nearest() -> None:
    weights, _ = problem(3, rows=50)
    moments = np.diag(np.random.default_rng(4).uniform(0.5, 2, COLUMNS))
    for grid in (Rounding(4, 32), Rounding(4, 16, False)):
        assert np.array_equal(
            error_feedback.quantize(weights, moments, grid).matrix.integers, round_to_grid(weights, grid).integers
        )


def test_act_order_says_which_column_is_in_which_group() -> None:
    weights, moments = problem(5)
    dynamic = error_feedback.quantize(weights, moments, Rounding(4, 32), act_order=True).matrix
    static = error_feedback.quantize(weights, moments, Rounding(4, 32), act_order=True, static_groups=True).matrix
    assert static.column_groups is None
    assert dynamic.column_groups is not None
    assert sorted(dynamic.column_groups.tolist()) == sorted(np.repeat(range(3), 32).tolist())
    most = np.argsort(-moments.diagonal(), kind="stable")[:32]
    assert (dynamic.column_groups[most] == 0).all()
    for matrix in (dynamic, static):
        assert (
            output_error(weights, moments, matrix.dequantize())
            < output_error(weights, moments, np.zeros_like(weights)) / 50
        )


def test_singular_moments_are_damped_more_and_said_so() -> None:
    weights, _ = problem(6, columns=32)
    one = np.random.default_rng(0).standard_normal((1, 32))
    found = error_feedback.quantize(weights, one.T @ one, Rounding(4, 32), damping=1e-17)
    assert found.damping > 1e-17
    negative = -np.eye(32)
    with pytest.raises(BadInput, match="not positive definite"):
        error_feedback.quantize(weights, negative, Rounding(4, 32))
    with pytest.raises(BadInput, match="do not fit"):
        error_feedback.quantize(weights, np.eye(31), Rounding(4, 32))
    with pytest.raises(BadInput, match="not finite"):
        error_feedback.quantize(weights, np.full((32, 32), np.nan), Rounding(4, 32))
