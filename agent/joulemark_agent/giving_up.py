"""When a run is not tried again: too many attempts without an item, a worker that dies before every item, a board that goes down under it.

A run whose worker or agent was stopped is begun again where it was. That must come to an end: a board that its own run takes down would
else come up, begin the run, and go down for ever. What counts is attempts in a row without an item: a run that gets on, if only by an
item at a time, ends anyway, and nobody wants its items thrown away. Not aware of how an attempt is made.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from joulemark.wire import Problem
from joulemark_agent.journal import Attempt

MAX_ATTEMPTS = 10
"""As often in a row may a run be begun and not get an item further, whoever is to blame."""
MAX_FRUITLESS = 2
"""A worker that dies twice in a row before its first item will die a third time."""
MAX_POWER_CUTS = 3
"""As often a board may lose its power in a row before the run's next item: under load its supply may not suffice."""
AGENT_STOPPED = "agent_stopped"
WORKER_HUNG = "worker_hung"
BOARD_WENT_DOWN = "board_went_down"


def why_no_more(attempts: Sequence[Attempt], item_count: Callable[[int], int], boot_id: str) -> Problem | None:
    """Why a run gets no further attempt; None when it does. `item_count` says how many items an attempt finished, `boot_id` is the boot
    of now."""
    if _fruitless(attempts, item_count, lambda _: True) >= MAX_ATTEMPTS:
        return attempts[-1].problem or _given_up(MAX_ATTEMPTS)
    if _fruitless(attempts, item_count, _by_worker) >= MAX_FRUITLESS:
        return attempts[-1].problem
    cuts = _power_cuts(attempts, item_count, boot_id)
    return _went_down(cuts) if cuts >= MAX_POWER_CUTS else None


def _fruitless(attempts: Sequence[Attempt], item_count: Callable[[int], int], counts: Callable[[Attempt], bool]) -> int:
    """How many of the last attempts ended without a single item, up to one that did not or that does not count."""
    streak = itertools.takewhile(lambda attempt: counts(attempt) and not item_count(attempt.number), reversed(attempts))
    return sum(1 for _ in streak)


def _by_worker(attempt: Attempt) -> bool:
    return attempt.problem is not None and attempt.problem.code != AGENT_STOPPED


def _power_cuts(attempts: Sequence[Attempt], item_count: Callable[[int], int], boot_id: str) -> int:
    """How many times in a row the board went down in the middle of the run, without a single item in between."""
    boots: set[str] = set()
    for attempt in reversed(attempts):
        # An attempt that could say why it ended has a problem.
        cut = attempt.problem is None and attempt.clock.boot_id != boot_id
        if not cut or item_count(attempt.number):
            break
        boots.add(attempt.clock.boot_id)
    return len(boots)


def lost() -> Problem:
    """The agent stopped in the middle of an attempt."""
    return Problem(
        code=AGENT_STOPPED,
        message="the agent stopped while the run was going on",
        hint="the run resumes at the next item when the agent starts again",
        retryable=True,
    )


def unsaid(boot_id: str, boot_after: str) -> Problem:
    """Why an attempt ended that left no word; the boots are its own and the next attempt's."""
    if boot_after == boot_id:
        return lost()
    return Problem(
        code=BOARD_WENT_DOWN,
        message="the board went down, or was switched off, while the run was going on",
        hint="the run goes on at the next item; unless somebody switched the board off, look at its power supply",
        retryable=True,
    )


def _given_up(attempts: int) -> Problem:
    return Problem(
        code=AGENT_STOPPED,
        message=f"the agent was stopped in each of the run's last {attempts} attempts, before the next item",
        hint="find out what stops it, then queue the run again",
    )


def _went_down(times: int) -> Problem:
    return Problem(
        code=BOARD_WENT_DOWN,
        message=f"the board went down {times} times in a row in this run, without an item in between",
        hint="look at its power supply and its temperature under load, then queue the run again",
    )
