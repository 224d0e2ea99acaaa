"""The allocation is the best there is, and never over budget: against trying everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from joulemark.errors import BadInput
from joulemark_exporter import allocation

OPTION = st.tuples(st.integers(1, 40), st.floats(0, 10))
TENSOR = st.dictionaries(st.sampled_from(["Q3_K", "Q4_K", "Q8_0", "F16"]), OPTION, min_size=1, max_size=4)
TENSORS = st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), TENSOR, min_size=1, max_size=4)


def cost(candidates: dict[str, dict[str, tuple[int, float]]], chosen: dict[str, str]) -> tuple[float, int]:
    picked = [candidates[name][kind] for name, kind in chosen.items()]
    return sum(error for _, error in picked), sum(size for size, _ in picked)


@given(TENSORS, st.integers(1, 160))
@settings(max_examples=200, deadline=None)
def test_it_is_the_best_of_all_within_the_budget(
    candidates: dict[str, dict[str, tuple[int, float]]], budget: int
) -> None:
    every = [dict(zip(candidates, kinds, strict=True)) for kinds in itertools.product(*candidates.values())]
    possible = [cost(candidates, chosen) for chosen in every if cost(candidates, chosen)[1] <= budget]
    if not possible:
        with pytest.raises(BadInput, match="below the smallest possible"):
            allocation.allocate(candidates, budget)
        return
    error, size = cost(candidates, allocation.allocate(candidates, budget))
    assert size <= budget
    assert error == pytest.approx(min(error for error, _ in possible), abs=1e-9)


@given(TENSORS)
@settings(max_examples=50, deadline=None)
def test_more_bytes_never_make_it_worse(candidates: dict[str, dict[str, tuple[int, float]]]) -> None:
    least = allocation.smallest(candidates)
    errors = [cost(candidates, allocation.allocate(candidates, least + spare))[0] for spare in range(0, 120, 7)]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(errors))


def test_coarse_units_keep_the_budget_and_nearly_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [("small", 1_000_003, 9.0), ("middle", 1_400_009, 4.0), ("large", 2_000_081, 1.0)]
    candidates = {
        str(tensor): {kind: (size + tensor, error * (tensor + 1)) for kind, size, error in sizes}
        for tensor in range(30)
    }
    budget = 42_000_000
    fine = allocation.allocate(candidates, budget)
    monkeypatch.setattr(allocation, "MOST_UNITS", 1 << 10)
    coarse = allocation.allocate(candidates, budget)
    assert cost(candidates, coarse)[1] <= budget
    assert cost(candidates, coarse)[0] <= cost(candidates, fine)[0] * 1.05
