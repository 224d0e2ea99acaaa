"""A slow source is read by a thread of its own, so that no tick of the sampler waits for it.

Owns: the thread, its pace, and how slow the source was. The sensor hands each reading over once, at the first tick after it was
made: it is late by one tick at most (0.1 s at 10 Hz), which shifts a power curve and changes no energy of a window of seconds.
A source that hangs gives no readings and holds nobody up: whoever reads must have a time-out of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from joulemark.wire import Channel
from joulemark_agent.sensors import Values
from joulemark_agent.sysfs import Unreadable

Reader = Callable[[], Values | Unreadable]
_JOIN_S = 0.2


class Poller:
    """Calls `reader` every `interval_s` seconds; after a read that took longer, at once. `clock` is monotonic."""

    def __init__(self, reader: Reader, interval_s: float, clock: Callable[[], float]) -> None:
        self._reader = reader
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._fresh: Values | None = None
        self._failures = 0
        self._reads = 0
        self._slowest_s = 0.0
        self._last: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="joulemark-poller", daemon=True)
        self._thread.start()

    def take(self) -> Values | None:
        """The reading that was made since the last call, None when there was none."""
        with self._lock:
            fresh, self._fresh = self._fresh, None
            return fresh

    def explanation(self) -> str | None:
        """What went wrong: reads without a value with the last reason, and reads slower than the interval. None: nothing."""
        with self._lock:
            reasons: list[str] = []
            if self._failures:
                reasons.append(f"{self._failures} of {self._reads} reads gave nothing, the last because {self._last}")
            if self._slowest_s > self._interval_s:
                reasons.append(
                    f"the slowest read took {self._slowest_s:.2f} s, one was due every {self._interval_s:g} s"
                )
        return "; ".join(reasons) or None

    def close(self) -> None:
        """Asks the thread to end; one that hangs in a read is left behind and records nothing more."""
        self._stop.set()
        self._thread.join(_JOIN_S)

    def _run(self) -> None:
        while not self._stop.is_set():
            started_s = self._clock()
            got = self._read()
            took_s = self._clock() - started_s
            if self._stop.is_set():
                return
            with self._lock:
                self._reads += 1
                self._slowest_s = max(self._slowest_s, took_s)
                if isinstance(got, Unreadable):
                    self._failures += 1
                    self._last = str(got)
                else:
                    self._fresh = got
            self._stop.wait(max(0.0, self._interval_s - took_s))

    def _read(self) -> Values | Unreadable:
        try:
            return self._reader()
        except (OSError, ValueError, ArithmeticError, LookupError, RuntimeError, TypeError) as error:
            return Unreadable("the source", "read error", f"{type(error).__name__}: {error}"[:200])


class PolledSensor:
    """A sensor whose every reading comes from such a thread. What went wrong is noted at the channel `noted`, by default the first;
    `release` is called once, after the thread was asked to end."""

    def __init__(
        self,
        channels: tuple[Channel, ...],
        reader: Reader,
        interval_s: float,
        clock: Callable[[], float],
        noted: str | None = None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self.channels = channels
        self._noted = noted or channels[0].name
        self._release = release
        self._closed = False
        self._poller = Poller(reader, interval_s, clock)

    def read(self) -> Values:
        """The reading that was made since the last tick, else none."""
        return self._poller.take() or (None,) * len(self.channels)

    def notes(self) -> dict[str, str]:
        """What went wrong."""
        why = self._poller.explanation()
        return {self._noted: why} if why else {}

    def close(self) -> None:
        """Ends the thread and releases the source."""
        if not self._closed:
            self._closed = True
            self._poller.close()
            self._release()
