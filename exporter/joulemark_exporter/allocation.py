"""Which tensor gets which type, when only so many bytes are to be had: the least total error, exactly.

Pure: numbers in, choices out. Dynamic programming over bytes, in units that divide all sizes (or, where they would be too many, in larger
ones with sizes rounded up, so that the budget is kept and the optimum missed by less than a unit a tensor).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from joulemark.errors import BadInput

MOST_UNITS = 1 << 17

Candidates = Mapping[str, tuple[int, float]]
"""Of one tensor: type → (bytes, error)."""


def smallest(candidates: Mapping[str, Candidates]) -> int:
    """The bytes that are needed at the least."""
    return sum(min(size for size, _ in options.values()) for options in candidates.values())


def allocate(candidates: Mapping[str, Candidates], budget: int) -> dict[str, str]:
    """The type of every tensor that makes the sum of errors least within `budget` bytes; of equal sums the smaller file's.

    Raises BadInput when the budget is below the smallest possible.
    """
    least = smallest(candidates)
    if budget < least:
        raise BadInput(
            f"a budget of {budget:,} bytes is below the smallest possible, {least:,} bytes",
            "allow more bytes, or smaller types",
        )
    names = list(candidates)
    spare = budget - least
    # Beyond its smallest type a tensor costs a surcharge; only these compete for what is spare.
    surcharges = [_surcharges(candidates[name]) for name in names]
    unit = _unit(surcharges, spare)
    best, decisions = _fill(surcharges, spare // unit, unit)
    return _trace(names, surcharges, decisions, int(np.argmin(best)), unit)


def _surcharges(options: Candidates) -> list[tuple[int, float, str]]:
    least = min(size for size, _ in options.values())
    return sorted((size - least, error, name) for name, (size, error) in options.items())


def _unit(surcharges: Sequence[Sequence[tuple[int, float, str]]], spare: int) -> int:
    exact = math.gcd(*(size for options in surcharges for size, _, _ in options)) or 1
    return max(exact, -(-spare // MOST_UNITS))


def _fill(
    surcharges: Sequence[Sequence[tuple[int, float, str]]], units: int, unit: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """best[u]: the least error with exactly u units spent; decisions[t][u]: the option of tensor t there."""
    best = np.full(units + 1, np.inf)
    best[0] = 0.0
    decisions: list[np.ndarray] = []
    for options in surcharges:
        following = np.full(units + 1, np.inf)
        choice = np.zeros(units + 1, np.uint8)
        for number, (size, error, _) in enumerate(options):
            spent = -(-size // unit)
            if spent > units:
                continue
            reached = best[: units + 1 - spent] + error
            better = reached < following[spent:]
            following[spent:][better] = reached[better]
            choice[spent:][better] = number
        best = following
        decisions.append(choice)
    return best, decisions


def _trace(
    names: Sequence[str],
    surcharges: Sequence[Sequence[tuple[int, float, str]]],
    decisions: Sequence[np.ndarray],
    at: int,
    unit: int,
) -> dict[str, str]:
    chosen: dict[str, str] = {}
    for name, options, choice in reversed(list(zip(names, surcharges, decisions, strict=True))):
        size, _, type_name = options[int(choice[at])]
        chosen[name] = type_name
        at -= -(-size // unit)
    return {name: chosen[name] for name in names}
