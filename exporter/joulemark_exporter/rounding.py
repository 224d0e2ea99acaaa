"""Rounding onto a grid by groups: the grid of GPTQ and of plain rounding to nearest, so that the two differ by method alone.

Pure numpy. Scales are rounded to float16 before any integer is chosen, because that is what files store: `GroupQuantized.dequantize` is
what every reader will see. Truth: `quant.py` of IST-DASLab/gptq (Frantar et al. 2022) for the grid and its search."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from joulemark.errors import BadInput
from joulemark_exporter.group_quantized import GroupQuantized

Float32 = NDArray[np.float32]

SEARCH_STEPS = 80
SEARCH_GRID = 100
SEARCH_NORM = 2.4
PIECE = 1 << 18
"""Numbers that are worked on at a time: few enough for the caches, and so many that threads seldom wait for the interpreter."""
SMALLEST = np.float32(2**-24)
"""The smallest float16 above zero."""


@dataclass(frozen=True)
class Rounding:
    """`group_size` −1: one group a row. `search`: scales are shrunk where that makes the error (norm 2.4) smaller."""

    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    search: bool = False

    def size(self, columns: int) -> int:
        """Columns of a group, in a row of so many."""
        return columns if self.group_size == -1 else self.group_size


def scales_and_zeros(groups: Float32, grid: Rounding) -> tuple[Float32, Float32]:
    """Of groups (…, members) float32 the scale (float16 values) and the zero point (whole), both float32 of shape (…).

    Raises BadInput for values that are not finite or whose scale float16 cannot hold.
    """
    # Members first: numpy finds the extremes of many short rows six times as fast along the other axis, the turning included.
    members = np.ascontiguousarray(groups.reshape(-1, groups.shape[-1]).T)
    low = np.minimum(members.min(0), 0).reshape(groups.shape[:-1])
    high = np.maximum(members.max(0), 0).reshape(groups.shape[:-1])
    # A sum is finite only if all of it is; NaN and infinity pass through minimum and maximum.
    if not np.isfinite(low + high).all():
        raise BadInput("a weight is NaN or infinite", "the checkpoint or an adapter is damaged")
    if grid.symmetric:
        high = np.maximum(-low, high)
        low = -high
    if grid.search:
        low, high = _searched(groups, low, high, grid)
    return _from_range(low, high, grid)


def _from_range(low: Float32, high: Float32, grid: Rounding) -> tuple[Float32, Float32]:
    levels = np.float32((1 << grid.bits) - 1)
    with np.errstate(over="ignore"):  # what is too large is found below
        wanted = (high - low) / levels
        scale = wanted.astype(np.float16).astype(np.float32)
    if not np.isfinite(scale).all():
        raise BadInput(
            f"a group reaches from {low.min()} to {high.max()}, too far for a 16-bit scale", "is this checkpoint sound?"
        )
    # A group of zeros has no scale of its own; one too small for float16 takes the smallest there is.
    scale = np.where(wanted == 0, np.float32(1), np.maximum(scale, SMALLEST))
    if grid.symmetric:
        return scale, np.full_like(scale, 1 << (grid.bits - 1))
    return scale, np.clip(np.rint(-low / scale), 0, levels)


def _searched(groups: Float32, low: Float32, high: Float32, grid: Rounding) -> tuple[Float32, Float32]:
    """The range shrunk by 0 … 79 %, whichever gives the smallest Σ|w − ŵ|^2.4."""
    best = np.full(low.shape, np.inf, np.float32)
    best_low, best_high = low.copy(), high.copy()
    for step in range(SEARCH_STEPS):
        share = np.float32(1 - step / SEARCH_GRID)
        scale, zero = _from_range(low * share, high * share, grid)
        error = (np.abs(_nearest(groups, scale, zero, grid) - groups) ** SEARCH_NORM).sum(-1)
        better = error < best
        best[better], best_low[better], best_high[better] = error[better], (low * share)[better], (high * share)[better]
    return best_low, best_high


def _nearest(groups: Float32, scale: Float32, zero: Float32, grid: Rounding) -> Float32:
    levels = (1 << grid.bits) - 1
    integers = np.clip(np.rint(groups / scale[..., None]) + zero[..., None], 0, levels)
    return np.asarray(scale[..., None] * (integers - zero[..., None]), np.float32)


def round_to_grid(weights: Float32, grid: Rounding, threads: int = 1) -> GroupQuantized:
    """Every number to the nearest point of its group's grid: (rows, columns) float32. Raises BadInput (see `scales_and_zeros`)."""
    rows, columns = weights.shape
    size = grid.size(columns)
    groups = -(-columns // size)
    integers = np.empty((rows, columns), np.uint8)
    scales, zeros = np.empty((rows, groups), np.float16), np.empty((rows, groups), np.uint8)
    step = max(1, PIECE // columns)

    def work(start: int) -> None:
        part = slice(start, start + step)
        scales[part], zeros[part] = _round_rows(weights[part], grid, size, integers[part])

    starts = range(0, rows, step)
    if threads <= 1:
        for start in starts:
            work(start)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(work, starts):
                pass
    return GroupQuantized(grid.bits, size, grid.symmetric, integers, scales, zeros)


def _round_rows(weights: Float32, grid: Rounding, size: int, integers: NDArray[np.uint8]) -> tuple[Float32, Float32]:
    rows, columns = weights.shape
    whole = columns // size * size
    parts = [(0, whole, size)] if whole else []
    parts += [(whole, columns, columns - whole)] if whole < columns else []
    scales: list[Float32] = []
    zeros: list[Float32] = []
    levels = np.float32((1 << grid.bits) - 1)
    for start, stop, members in parts:
        grouped = weights[:, start:stop].reshape(rows, -1, members)
        scale, zero = scales_and_zeros(grouped, grid)
        values = grouped / scale[..., None]
        np.rint(values, out=values)
        values += zero[..., None]
        np.clip(values, 0, levels, out=values)
        integers[:, start:stop] = values.reshape(rows, -1)
        scales.append(scale)
        zeros.append(zero)
    return np.concatenate(scales, 1), np.concatenate(zeros, 1)
