"""GPTQ's core: columns are rounded one after the other, and each one's error is fed back into those that are not rounded yet.

Minimizes ‖(W − Ŵ)X‖² for the second moments H of X. Pure numpy, float64. Owns the arithmetic; where H comes from is not known here.
Truth: Frantar et al. 2022 (arXiv 2210.17323), algorithm 1. Unlike the published code, a group's grid is always taken from weights that
carry all feedback so far, also where groups are smaller than the blocks of the lazy updates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from joulemark.errors import BadInput
from joulemark_exporter.group_quantized import GroupQuantized
from joulemark_exporter.rounding import Rounding, scales_and_zeros

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]

BLOCK = 128
"""Columns whose feedback reaches the rest of the matrix at once, by one matrix product."""
STRIP = 16
"""Columns whose feedback reaches the rest of their block at once."""
ATTEMPTS = 4
"""Each with ten times the damping of the one before."""


@dataclass(frozen=True)
class Feedback:
    """`loss` is Σ (w − ŵ)² / U_ii² / 2: half of the output error that the moments predict. `dead` inputs were always zero."""

    matrix: GroupQuantized
    loss: float
    dead: int
    damping: float
    """What the diagonal was raised by, as a share of its mean: more than asked for where the moments were singular."""


def quantize(
    weights: Float32,
    hessian: Float64,
    grid: Rounding,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    block: int = BLOCK,
) -> Feedback:
    """(rows, columns) float32 with moments (columns, columns) → integers in the columns' own order.

    `act_order` takes the columns with the largest moments first; then groups follow that order, unless they are `static`. Raises BadInput
    for moments that are not finite or of another shape, and for weights that the grid refuses."""
    columns = weights.shape[1]
    if hessian.shape != (columns, columns) or not np.isfinite(hessian).all():
        raise BadInput(
            f"second moments of shape {hessian.shape} do not fit {columns} columns, or are not finite",
            "calibrate again",
        )
    moments = np.array(hessian, np.float64)
    dead = moments.diagonal() == 0
    moments[dead, dead] = 1
    live = np.where(dead, np.float32(0), weights)
    order = np.argsort(-moments.diagonal(), kind="stable") if act_order else np.arange(columns)
    upper, used = factor(moments[np.ix_(order, order)], damping)
    size = grid.size(columns)
    static = _static_grids(live, grid, size) if static_groups else None
    work = _Work(
        np.ascontiguousarray(live[:, order].T, np.float64), upper, grid, size, static, order, _steps(size, block)
    )
    work.run()
    inverse = np.argsort(order)
    groups = None if static_groups or not act_order else (np.arange(columns, dtype=np.int32) // np.int32(size))[inverse]
    matrix = GroupQuantized(
        grid.bits,
        size,
        grid.symmetric,
        np.ascontiguousarray(work.integers[inverse].T),
        work.scales.astype(np.float16),
        work.zeros.astype(np.uint8),
        groups,
    )
    return Feedback(matrix, work.loss, int(dead.sum()), used)


def factor(moments: Float64, damping: float) -> tuple[Float64, float]:
    """(U, the damping that was needed): U upper triangular with UᵀU = (H + damping·mean(diag H)·I)⁻¹.

    From H = R Rᵀ with R upper triangular follows U = R⁻¹, so that H itself is never inverted. Raises BadInput.
    """
    mean = moments.diagonal().mean()
    for attempt in range(ATTEMPTS):
        share = damping * 10**attempt
        raised = moments + share * mean * np.eye(len(moments))
        try:
            reversed_lower = np.linalg.cholesky(raised[::-1, ::-1])
        except np.linalg.LinAlgError:
            continue
        return np.triu(np.linalg.inv(reversed_lower[::-1, ::-1])), share
    raise BadInput("the second moments are not positive definite", "calibrate on more text, or raise damping")


def _static_grids(weights: Float32, grid: Rounding, size: int) -> tuple[Float32, Float32]:
    """Scales and zero points (rows, groups) of the columns in their own order, before any feedback."""
    parts = [scales_and_zeros(weights[:, start : start + size], grid) for start in range(0, weights.shape[1], size)]
    return np.stack([scale for scale, _ in parts], 1), np.stack([zero for _, zero in parts], 1)


def _steps(size: int, block: int) -> tuple[int, int]:
    """(block, strip) such that a group never begins where feedback is still outstanding: of group, block and strip the smaller one always
    divides the larger one."""
    outer = block // size * size if size <= block else _divisor(size, block)
    return outer, next(
        strip
        for strip in range(min(STRIP, outer), 0, -1)
        if not outer % strip and (not size % strip or not strip % size)
    )


def _divisor(number: int, most: int) -> int:
    return next(value for value in range(most, 0, -1) if not number % value)


class _Work:
    """A matrix on its way, columns first: row i of `values` is column i of the weights, in the order of rounding."""

    def __init__(
        self,
        values: Float64,
        upper: Float64,
        grid: Rounding,
        size: int,
        static: tuple[Float32, Float32] | None,
        order: NDArray[np.intp],
        steps: tuple[int, int],
    ) -> None:
        self._values, self._upper, self._grid, self._size, self._static, self._order = (
            values,
            upper,
            grid,
            size,
            static,
            order,
        )
        self._block, self._strip = steps
        columns, rows = values.shape
        groups = -(-columns // size)
        self.integers = np.empty((columns, rows), np.uint8)
        self.scales, self.zeros = (np.empty((rows, groups), np.float32) for _ in range(2)) if static is None else static
        self.loss = 0.0

    def run(self) -> None:
        """Round everything."""
        columns = len(self._values)
        for start in range(0, columns, self._block):
            stop = min(start + self._block, columns)
            errors = self._round_block(start, stop)
            self._values[stop:] -= self._upper[start:stop, stop:].T @ errors

    def _round_block(self, start: int, stop: int) -> Float64:
        errors = np.empty((stop - start, self._values.shape[1]))
        for first in range(start, stop, self._strip):
            last = min(first + self._strip, stop)
            for column in range(first, last):
                error = self._round_column(column)
                errors[column - start] = error
                if column + 1 < last:
                    self._values[column + 1 : last] -= self._upper[column, column + 1 : last, None] * error
            self._values[last:stop] -= self._upper[first:last, last:stop].T @ errors[first - start : last - start]
        return errors

    def _round_column(self, column: int) -> Float64:
        """Chooses the integers of a column; returns its error as it is fed back."""
        group = (column if self._static is None else int(self._order[column])) // self._size
        if self._static is None and column % self._size == 0:
            members = self._values[column : column + self._size].T.astype(np.float32)
            self.scales[:, group], self.zeros[:, group] = scales_and_zeros(members, self._grid)
        scale, zero = self.scales[:, group], self.zeros[:, group]
        values = self._values[column]
        # In float32, as rounding to nearest does: without feedback both must choose the same integers.
        integers = np.clip(np.rint(values.astype(np.float32) / scale) + zero, 0, (1 << self._grid.bits) - 1)
        self.integers[column] = integers
        difference = values - scale.astype(np.float64) * (integers - zero)
        error = difference / self._upper[column, column]
        self.loss += float(error @ error) / 2
        return error
