"""What is read from rows of logits, whatever the engine. Not a plug-in; backends build on it. numpy comes with an engine's extra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from joulemark.errors import MissingExtra


def import_numpy(hint: str) -> Any:
    """Raises MissingExtra with the engine's own hint."""
    try:
        import numpy
    except ImportError as error:
        raise MissingExtra(f"numpy cannot be loaded: {error}", hint) from error
    return numpy


def log_probability(numpy: Any, vocabulary_size: int) -> Callable[[Any, Sequence[int]], tuple[list[float], int]]:
    """A function (row, targets) → (log-softmax at the targets, arg max), float32 with the maximum subtracted (tasks.md)."""
    # One buffer for all rows: memory of this size comes from the kernel and would be mapped and zeroed anew each time.
    shifted = numpy.empty(vocabulary_size, dtype=numpy.float32)

    def at(row: Any, targets: Sequence[int]) -> tuple[list[float], int]:
        best = int(row.argmax())
        highest = row[best]
        numpy.subtract(row, highest, out=shifted)
        numpy.exp(shifted, out=shifted)
        total = numpy.log(shifted.sum(dtype=numpy.float32))
        return [float(row[target] - highest - total) for target in targets], best

    return at
