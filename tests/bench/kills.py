"""Ten thousand random kills of workers, agents and a host: what was lost, and what was there twice."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench.pairs import Figure
from tests.fixtures.kills import Lost, World

KILLS = 10_000
A_ROUND = 100
A_WORLD = 1000
"""After so many a new host and new boards begin, so that the books do not grow for hours."""


def measure_kills(say: Callable[[str], None], kills: int = KILLS) -> Iterator[Figure]:
    """Counts what is lost or doubled; each world's seed is its number, so that a failure can be had again."""
    lost = done = 0
    began = time.monotonic()
    for number in range((kills + A_WORLD - 1) // A_WORLD):
        with tempfile.TemporaryDirectory(prefix="joulemark-kills-") as folder:
            world = World(Path(folder), number)
            try:
                while sum(world.kills.values()) < min(A_WORLD, kills - done):
                    world.round(A_ROUND)
            except Lost as error:
                lost += 1
                say(f"world {number}: {error}")
            finally:
                world.close()
            done += sum(world.kills.values())
            say(
                f"world {number}: {dict(world.kills)} kills; runs {dict(world.ended)} "
                f"(failed for {dict(world.failures)}), {world.items} items, "
                f"{world.bytes / 1e6:.0f} MB whole; {done} kills in {time.monotonic() - began:.0f} s"
            )
    yield Figure(f"lost or doubled after {done} random kills", lost, 0, "", at_least=False)
