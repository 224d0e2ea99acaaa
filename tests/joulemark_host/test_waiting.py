"""A thousand that wait cost one query at a time, hear their own news and nobody else's, and are let go when the host stops."""

from __future__ import annotations

import asyncio
import time

from joulemark.errors import Unavailable
from joulemark_host.waiting import Waiting


def test_each_hears_its_own_news_at_once():
    numbers, looks = {"a": 1, "b": 1}, [0]

    def look() -> dict[str, int]:
        looks[0] += 1
        return dict(numbers)

    async def scene() -> tuple[bool, bool, float]:
        waiting = Waiting(look, every_s=0.02)
        begun = time.monotonic()
        a = asyncio.create_task(waiting.until("a", 1, 5.0))
        b = asyncio.create_task(waiting.until("b", 1, 0.5))
        await asyncio.sleep(0.1)
        numbers["a"] = 2
        heard = await a
        after = time.monotonic() - begun
        return heard, await b, after

    heard, missed, after = asyncio.run(scene())
    assert heard and not missed and after < 0.4
    assert looks[0] < 40


def test_a_thousand_waiters_share_one_look():
    looks = [0]

    def look() -> dict[str, int]:
        looks[0] += 1
        return {}

    async def scene() -> list[bool]:
        waiting = Waiting(look, every_s=0.1)
        found = await asyncio.gather(*(waiting.until(str(number), 0, 0.5) for number in range(1000)))
        await asyncio.sleep(0.3)
        quiet = looks[0]
        await asyncio.sleep(0.3)
        assert looks[0] == quiet  # nobody waits, nothing is looked at
        return found

    assert asyncio.run(scene()) == [False] * 1000
    assert looks[0] <= 8


def test_nobody_is_kept_when_the_host_stops():
    stopping = [False]

    async def scene() -> float:
        waiting = Waiting(dict, lambda: stopping[0], every_s=0.02)
        begun = time.monotonic()
        task = asyncio.create_task(waiting.until("a", 0, 30.0))
        await asyncio.sleep(0.1)
        stopping[0] = True
        await task
        return time.monotonic() - begun

    assert asyncio.run(scene()) < 2


def test_a_look_that_fails_once_does_not_end_the_watch():
    calls = [0]

    def look() -> dict[str, int]:
        calls[0] += 1
        if calls[0] == 1:
            raise Unavailable("the database is busy", "")
        return {"a": 5}

    async def scene() -> bool:
        return await Waiting(look, every_s=0.02).until("a", 0, 2.0)

    assert asyncio.run(scene())
