"""Ten thousand random kills of workers, agents and hosts: what was lost, and what was there twice."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tests.bench.pairs import Figure
from tests.fixtures.kills import Lost, World

KILLS = 10_000
A_ROUND = 250
"""Of a round's time about a minute is rest, in which everything arrives; so many kills come before it."""
A_WORLD = 1000
"""After so many a new host and new boards begin, so that the books do not grow for hours."""
WORLDS_AT_ONCE = 3


def measure_kills(say: Callable[[str], None], kills: int = KILLS) -> Iterator[Figure]:
    """Counts what is lost or doubled; each world's seed is its number, so that a failure can be had again."""
    lost, done = 0, Counter[str]()
    began = time.monotonic()
    with ThreadPoolExecutor(WORLDS_AT_ONCE) as pool:
        worlds = [
            pool.submit(_live, number, min(A_WORLD, kills - first), say)
            for number, first in enumerate(range(0, kills, A_WORLD))
        ]
        for ended in as_completed(worlds):
            text, found, error = ended.result()
            lost += error is not None
            done += found
            say(
                f"{text}; {done.total()} kills in {time.monotonic() - began:.0f} s{f'; LOST: {error}' if error else ''}"
            )
    yield Figure(f"lost or doubled after {done.total()} random kills {dict(done)}", lost, 0, "", at_least=False)


def _live(number: int, kills: int, say: Callable[[str], None]) -> tuple[str, Counter[str], Lost | None]:
    """One world until it has been killed so often: what to say of it, its kills, and what was lost."""
    lost = None
    with tempfile.TemporaryDirectory(prefix="joulemark-kills-") as folder:
        world = World(Path(folder), number)
        try:
            while (left := kills - world.kills.total()) > 0:
                world.round(min(A_ROUND, left))
                say(f"  world {number}: {world.kills.total()} kills")
        except Lost as error:
            lost = error
        finally:
            world.close()
    text = (
        f"world {number}: {dict(world.kills)} kills; runs {dict(world.ended)} (failed for {dict(world.failures)}), "
        f"{world.items} items, {world.bytes / 1e6:.0f} MB whole"
    )
    return text, world.kills, lost
