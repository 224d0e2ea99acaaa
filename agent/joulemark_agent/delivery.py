"""Hands things to a function in a thread of its own, so that a slow disk does not hold up whoever makes them.

Owns: the order (as put), and what happens when the function fails: it is logged, counted, told at the end, and the next
thing is handed over all the same. Not aware of what is delivered.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from joulemark.errors import JoulemarkError

_LOG = logging.getLogger(__name__)
_FAILURES = (JoulemarkError, OSError, ValueError, ArithmeticError, LookupError, RuntimeError, TypeError)
Thing = TypeVar("Thing")


class Delivery(Generic[Thing]):
    """One thread that calls `receive` with every thing that is put, in order."""

    def __init__(self, receive: Callable[[Thing], None]) -> None:
        self._receive = receive
        self._queue: queue.SimpleQueue[tuple[Thing] | None] = queue.SimpleQueue()
        self._failed = 0
        self._last = ""
        self._thread = threading.Thread(target=self._run, name="joulemark-delivery", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def put(self, thing: Thing) -> None:
        """Queues one thing; never waits."""
        self._queue.put((thing,))

    def stop(self, patience_s: float) -> str | None:
        """Waits for what is on its way; what went wrong, if anything."""
        self._queue.put(None)
        if self._thread.ident is not None:
            self._thread.join(patience_s)
        if self._thread.is_alive():
            return f"not everything was stored within {patience_s:g} s"
        return f"{self._failed} parts could not be stored, the last: {self._last}" if self._failed else None

    def _run(self) -> None:
        while (thing := self._queue.get()) is not None:
            self._hand_over(thing[0])

    def _hand_over(self, thing: Thing) -> None:
        try:
            self._receive(thing)
        except _FAILURES as error:
            self._failed += 1
            self._last = f"{type(error).__name__}: {error}"
            _LOG.warning("a part could not be stored: %s", self._last)
