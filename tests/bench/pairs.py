"""Two sides of a ratio timed in turns, in slices so short that a drift of the machine hits both: pure bookkeeping, no engine.

On a shared machine the speed wanders by a tenth within a minute, which a comparison of two long runs takes for a difference. So one slice
of ours stands beside one of theirs, whichever comes first taking turns, and the figure is the median over the pairs' ratios.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Figure:
    """One line of the result. `at_least` False: the measured value must not exceed the required one; `strict`: nor equal it."""

    name: str
    measured: float
    required: float
    unit: str = "×"
    at_least: bool = True
    strict: bool = False
    spread: str = ""

    @property
    def reached(self) -> bool:
        """Whether the requirement holds."""
        if self.strict and self.measured == self.required:
            return False
        return self.measured >= self.required if self.at_least else self.measured <= self.required

    def line(self) -> str:
        """Name, measured, required, and how far the single pairs lay apart."""
        sign = (">" if self.at_least else "<") if self.strict else ("≥" if self.at_least else "≤")
        word = "ok" if self.reached else "SHORT"
        return f"{self.name:<70} {self.measured:>8.3f} {self.unit:<3} {sign} {self.required:<5g} {word:<5} {self.spread}".rstrip()


@dataclass
class Pairs:
    """Rates of both sides, pair by pair."""

    ours: list[float] = field(default_factory=list[float])
    theirs: list[float] = field(default_factory=list[float])

    def add(self, ours: float, theirs: float) -> None:
        """One pair of neighbours in time."""
        self.ours.append(ours)
        self.theirs.append(theirs)

    @property
    def ratios(self) -> list[float]:
        """ours ÷ theirs of every pair."""
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    def figure(self, name: str, required: float) -> Figure:
        """The median ratio. Raises ValueError for fewer than three pairs."""
        ratios = self.ratios
        if len(ratios) < 3:
            raise ValueError(f"{name}: {len(ratios)} pairs, three are the least")
        low, _, high = statistics.quantiles(ratios, n=4)
        return Figure(
            name, statistics.median(ratios), required, spread=f"quartiles {low:.3f} to {high:.3f}, {len(ratios)} pairs"
        )

    def rates(self) -> tuple[float, float]:
        """Median rate of both sides, for the reader."""
        return statistics.median(self.ours), statistics.median(self.theirs)


def take_turns(ours: Callable[[], float], theirs: Callable[[], float], count: int) -> Pairs:
    """`count` pairs after one that does not count; who goes first alternates."""
    ours(), theirs()
    pairs = Pairs()
    for ours_first in itertools.islice(itertools.cycle((True, False)), count):
        if ours_first:
            mine, other = ours(), theirs()
        else:
            other, mine = theirs(), ours()
        pairs.add(mine, other)
    return pairs
