"""Random kills (-9) of workers, agents and the host, all real: nothing is lost, nothing is there twice. `make bench` does ten thousand."""

from __future__ import annotations

from pathlib import Path

from tests.fixtures.kills import World

KILLS, ROUNDS = 30, 2


def test_random_kills_lose_nothing_and_double_nothing(tmp_path: Path):
    world = World(tmp_path, seed=20261127, boards=2)
    try:
        for _ in range(ROUNDS):
            world.round(KILLS)
    finally:
        world.close()
    assert sum(world.kills.values()) == KILLS * ROUNDS and len(world.kills) == 4
    # At least what was left when the killing ended is done; the rest may have failed because its worker was killed too often.
    assert world.ended["done"] >= 2 and world.items >= 2 * 12 and world.bytes > 4_000_000
