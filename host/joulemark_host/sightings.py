"""When boards were last seen, and from where: kept in memory and written for all of them together, whoever comes first.

A thousand boards that each wrote at every request would leave no time for their records. Times are seconds of the clock that is passed in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from joulemark_host.database import transaction
from joulemark_host.fleet_tables import DEVICES

SEEN_EVERY_S = 5.0
"""`seen_at` is written at most this often, for all boards together: a thousand of them poll."""


class Sightings:
    """See the module. Safe for several threads."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock
        self._lock = threading.Lock()
        self._unwritten: dict[str, tuple[float, str]] = {}
        self._written_at = 0.0

    def note(self, device_id: str, address: str) -> None:
        """A board was seen now; what is known of all is written if the last time was SEEN_EVERY_S ago."""
        with self._lock:
            self._unwritten[device_id] = (self._clock(), address)
            due = self._clock() - self._written_at >= SEEN_EVERY_S
            if due:
                self._written_at = self._clock()
        if due:
            self.write()

    def write(self) -> None:
        """Writes what is not written yet, in one transaction."""
        with self._lock:
            seen, self._unwritten = self._unwritten, {}
        if not seen:
            return
        with transaction(self._engine, write=True) as connection:
            for device_id, (at, address) in seen.items():
                mine = DEVICES.c.device_id == device_id
                connection.execute(sa.update(DEVICES).where(mine).values(seen_at=at, address=address))
