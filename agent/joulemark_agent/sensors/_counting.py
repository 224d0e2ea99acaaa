"""Counters of events, of which only the new ones count: those since the sensor was opened, of all counters together.

A counter that falls was reset; what happened meanwhile is unknown and not added. Nothing is lost between two readings.
"""

from __future__ import annotations

from joulemark_agent.sysfs import KeptFile


class NewEvents:
    """`counters`: (file, what it held at the start)."""

    def __init__(self, counters: list[tuple[KeptFile, float]]) -> None:
        self.files = [file for file, _ in counters]
        self._last = [count for _, count in counters]
        self._sum = 0.0

    def read(self) -> float | None:
        """New events so far, None when no counter can be read."""
        counts = [file.number() for file in self.files]
        if all(count is None for count in counts):
            return None
        for index, count in enumerate(counts):
            if count is not None:
                self._sum += max(0.0, count - self._last[index])
                self._last[index] = count
        return self._sum
