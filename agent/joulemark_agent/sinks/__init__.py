"""The contract of a sink plug-in: where finished records go. One file in this folder, one function `open_sink`.

    def open_sink(options: Options) -> Sink        raises BadInput for a target that cannot be one

`Sink.put(run_id, body)` returns when the record is safely there, and may be called again with the same record: a sink
is idempotent. Otherwise it raises
    SinkUnavailable     not now: the outbox keeps the record and tries again
    BadInput, Conflict  never: this record is refused; the outbox keeps it aside, visible, and goes on with the next
A sink knows no queue and no retries; the outbox has both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from joulemark.errors import Unavailable
from joulemark.statements import Envelope
from joulemark_agent.host_link import HostLink

Vouch = Callable[[str, bytes], Envelope]


@dataclass(frozen=True)
class Options:
    """Where to: a host's URL, or a folder. `timeout_s` bounds each wait for the other side, not the whole transfer.

    `link` is the way to the host, with what has to be trusted and shown there.
    """

    target: str
    timeout_s: float = 30.0
    link: HostLink | None = None
    vouch: Vouch | None = None
    """Signs a record: the board's word for these bytes goes with them."""


class SinkUnavailable(Unavailable):
    """Not now. `answered`: something answered and refused this record for now, so that others may still pass."""

    def __init__(
        self, message: str, hint: str = "", *, retry_after_s: float | None = None, answered: bool = False
    ) -> None:
        super().__init__(message, hint)
        self.retry_after_s = retry_after_s
        self.answered = answered


class Sink(Protocol):
    """A place for records. Used by one thread."""

    def put(self, run_id: str, body: bytes) -> None:
        """Delivers a record (JSON bytes). Raises SinkUnavailable, BadInput or Conflict."""
        ...

    def close(self) -> None:
        """Releases connections; no put follows."""
        ...
