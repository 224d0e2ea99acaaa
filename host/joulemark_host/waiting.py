"""Boards that wait for news: a thousand of them cost one small query twice a second, and nothing while nobody waits.

The news may come from another process (a command), so that the database is looked at; who waits is woken as soon as its number has risen.
Not aware of what the numbers count.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool

from joulemark.errors import JoulemarkError

LOG = logging.getLogger(__name__)
LOOK_EVERY_S = 0.5


@dataclass(eq=False)
class _Waiter:
    key: str
    after: int
    news: asyncio.Event = field(default_factory=asyncio.Event)


class Waiting:
    """`look` gives the number of everybody; it is called in a thread. Nobody is kept waiting once `stopping`. For one event loop."""

    def __init__(
        self,
        look: Callable[[], dict[str, int]],
        stopping: Callable[[], bool] = lambda: False,
        every_s: float = LOOK_EVERY_S,
    ) -> None:
        self._look = look
        self._stopping = stopping
        self._every_s = every_s
        self._waiters: set[_Waiter] = set()
        self._task: asyncio.Task[None] | None = None

    async def until(self, key: str, after: int, wait_s: float) -> bool:
        """Whether the number of `key` rose above `after` within `wait_s` seconds."""
        waiter = _Waiter(key, after)
        self._waiters.add(waiter)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._watch())
        try:
            await asyncio.wait_for(waiter.news.wait(), wait_s)
        except asyncio.TimeoutError:
            return False
        finally:
            self._waiters.discard(waiter)
        return True

    async def _numbers(self) -> dict[str, int]:
        try:
            return await run_in_threadpool(self._look)
        except JoulemarkError as error:  # a database that is busy for a moment: the next look is soon
            LOG.warning("cannot look for news: %s", error)
            return {}

    async def _watch(self) -> None:
        while self._waiters:
            numbers = await self._numbers()
            for waiter in tuple(self._waiters):
                if self._stopping() or numbers.get(waiter.key, 0) > waiter.after:
                    waiter.news.set()
            await asyncio.sleep(self._every_s)
