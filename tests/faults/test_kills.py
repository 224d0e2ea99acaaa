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
        before = world.ended["done"]
        world.round(1)  # one kill makes no run fail
        assert world.ended["done"] - before >= 6
    finally:
        world.close()
    assert sum(world.kills.values()) == KILLS * ROUNDS + 1 and len(world.kills) == 4
    assert world.ended["done"] >= 6 and world.items >= 6 * 12 and world.bytes > 4_000_000
