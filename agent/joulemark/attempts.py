"""Counting failures: whoever fails too often within a window is told to wait, and what it tries is not even looked up.

Right credentials are never held up by others' failures: the count is asked only after a failure. (Boards behind one NAT share an
address: one with a revoked credential must not lock out its neighbours.) The clock is monotonic and passed in; memory is bounded.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable

from joulemark.errors import TooManyAttempts

MAX_PEERS = 4096


class Attempts:
    """At most `limit` failures of one peer in `window_s` seconds. Safe to use from several threads."""

    def __init__(self, clock: Callable[[], float], limit: int = 10, window_s: float = 60.0) -> None:
        self._clock = clock
        self._limit = limit
        self._window_s = window_s
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def failed(self, peer: str) -> None:
        """Notes a failure. Raises TooManyAttempts once the peer has had its share."""
        now = self._clock()
        with self._lock:
            times = self._failures.setdefault(peer, deque(maxlen=self._limit))
            self._failures.move_to_end(peer)
            if len(self._failures) > MAX_PEERS:
                self._failures.popitem(last=False)
            while times and now - times[0] >= self._window_s:
                times.popleft()
            if len(times) < self._limit:
                times.append(now)
                return
            wait_s = self._window_s - (now - times[0])
        raise TooManyAttempts(
            f"too many attempts failed; the next is looked at in {wait_s:.0f} s", "check the credential", wait_s
        )
