"""Carrying out what the host has ordered: only what it signed, for this board, not twice and not too late.

Keeps what was ordered and is not done yet, and what the host was told already, so that reports are differences. What is ordered before its
artifact or pack is here waits. Not aware of how orders arrive (long poll, a person's upload, a USB stick).
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable

from joulemark import signing
from joulemark.errors import BadInput, Conflict, JoulemarkError, NotFound, Untrusted, to_problem
from joulemark.protocol import Holding, Orders, Refusal, Report
from joulemark.statements import Envelope, FetchOrder, PublicKey, RunOrder
from joulemark.wire import ENDED, Identifier, Problem, RunSpec, RunState, Sha256, content_id
from joulemark_agent.jobs import Jobs
from joulemark_agent.ledger import Ledger, Stale
from joulemark_agent.pulling import Puller
from joulemark_agent.store import Store

MAX_REFUSED = 100
MOST_REPORTED = 1000
"""Of each kind in one report; the others come with the next."""
TRY_AGAIN_S = 30.0
"""After a transfer gave up because the host was away, it is begun again not before so long."""
QUEUE_AGAIN_S = 5.0
"""A run that could not be queued (its pack cannot be had now) is tried again not before so long."""
log = logging.getLogger(__name__)


class OrderBook:
    """See the module. `fetch_pack` gets a pack's bytes from the host."""

    def __init__(
        self,
        device_id: Identifier,
        host_key: PublicKey,
        ledger: Ledger,
        store: Store,
        puller: Puller,
        jobs: Jobs,
        fetch_pack: Callable[[Sha256], bytes],
        clock: Callable[[], float],
    ) -> None:
        self._device_id = device_id
        self._host_key = host_key
        self._ledger = ledger
        self._store = store
        self._puller = puller
        self._jobs = jobs
        self._fetch_pack = fetch_pack
        self._clock = clock
        self._lock = threading.RLock()
        self._holdings: dict[Sha256, float] = {}  # artifact id: when its transfer may be started (again), monotonic
        self._given_up: dict[Sha256, Problem] = {}
        self._evicted: set[Sha256] = set()
        self._needed: frozenset[Sha256] = frozenset()
        self._waiting: dict[Identifier, RunSpec] = {}
        self._runs: set[Identifier] = set()
        self._queue_again_s = 0.0
        self._impossible: dict[Identifier, Problem] = {}
        self._told: dict[str, Holding | RunState] = {}
        self._refused: list[Refusal] = []

    def take(self, envelope: Envelope) -> Sha256 | RunState | None:
        """Accepts one signed order and begins with it: an artifact's id, or the run's state if it could be queued already.

        Raises Untrusted, and what the store and the queue refuse with.
        """
        if envelope.payload_type == FetchOrder.TYPE:
            return self._take_fetch(signing.opened(envelope, FetchOrder, [self._host_key]))
        if envelope.payload_type == RunOrder.TYPE:
            return self._take_run(signing.opened(envelope, RunOrder, [self._host_key]))
        raise Untrusted(
            f"an order of the kind {envelope.payload_type!r} is not known", "update joulemark on this board"
        )

    def follow(self, orders: Orders) -> None:
        """Brings the board to what the host wants now. What cannot be accepted is reported and does not stop the rest."""
        self._ledger.hear_time(orders.host_time)
        self._needed = frozenset(orders.needed)
        envelopes = [*orders.fetch, *([orders.run] if orders.run is not None else [])]
        for envelope in sorted(envelopes, key=_sequence):
            self._follow(envelope)
        for run_id in orders.cancel:
            self.cancel(run_id)
        for artifact_id in orders.forget:
            self._try(lambda artifact_id=artifact_id: self._forget(artifact_id))

    def needs(self, artifact_id: Sha256) -> bool:
        """Whether a run that waits here or at the host is about this artifact. Without the lock: the store asks, holding its own."""
        waiting = tuple(self._waiting.values())
        return artifact_id in self._needed or any(spec.artifact_id == artifact_id for spec in waiting)

    def ordered(self, artifact_id: Sha256) -> bool:
        """Whether the host wants this artifact here and has not heard that it came. Without the lock, as `needs`."""
        return artifact_id in self._holdings

    def evicted(self, artifact_id: Sha256) -> None:
        """The store has given an artifact up for another one: the host has to know."""
        with self._lock:
            self._evicted.add(artifact_id)
            self._holdings[artifact_id] = math.inf

    def cancel(self, run_id: Identifier) -> None:
        """Ends a run, wherever it is; one that this board never had counts as ended."""
        with self._lock:
            self._runs.add(run_id)
            self._waiting.pop(run_id, None)
        with contextlib.suppress(NotFound):
            self._jobs.cancel(run_id)

    def work(self) -> None:
        """What became possible: starts transfers, queues the run whose artifact and pack are here now."""
        with self._lock:
            for artifact_id, next_s in self._holdings.items():
                due = self._clock() >= next_s and artifact_id not in self._given_up
                if due and not self._puller.active(artifact_id) and not self._complete(artifact_id):
                    self._try(lambda artifact_id=artifact_id: self._puller.start(artifact_id))
                    self._holdings[artifact_id] = self._clock() + TRY_AGAIN_S
            waiting = tuple(self._waiting.values()) if self._clock() >= self._queue_again_s else ()
        for spec in waiting:
            if self._complete(spec.artifact_id):
                self._queue_again_s = self._clock() + QUEUE_AGAIN_S
                self._try(lambda spec=spec: self._queue(spec))

    def report(self) -> Report | None:
        """What has changed since the last report that arrived; None when nothing has. `told` says that it has arrived."""
        with self._lock:
            artifact_ids, run_ids = tuple(self._holdings), tuple(self._runs)
        holdings = tuple(self._holding(artifact_id) for artifact_id in artifact_ids)
        states = tuple(self._state(run_id) for run_id in run_ids)
        with self._lock:
            news = Report(
                holdings=tuple(h for h in holdings if self._told.get(h.artifact_id) != h)[:MOST_REPORTED],
                runs=tuple(s for s in states if self._told.get(s.run_id) != s)[:MOST_REPORTED],
                refused=tuple(self._refused),
            )
        return news if news.holdings or news.runs or news.refused else None

    def told(self, report: Report) -> None:
        """This report has arrived."""
        with self._lock:
            self._told |= {holding.artifact_id: holding for holding in report.holdings}
            self._told |= {state.run_id: state for state in report.runs if state.run_id in self._runs}
            self._refused = self._refused[len(report.refused) :]
            for state in report.runs:
                if state.status in ENDED:
                    self._runs.discard(state.run_id)
                    self._impossible.pop(state.run_id, None)
                    self._told.pop(state.run_id, None)
            for holding in report.holdings:
                # While the report was under way the host may have ordered the artifact anew: then it is not over.
                if holding.state != "pending" and self._holding(holding.artifact_id) == holding:
                    self._holdings.pop(holding.artifact_id, None)
                    self._given_up.pop(holding.artifact_id, None)
                    self._evicted.discard(holding.artifact_id)
                    self._told.pop(holding.artifact_id, None)

    def forget_told(self) -> None:
        """A new session: the host may have lost what it was told."""
        with self._lock:
            self._told = {}

    # --- inside -------------------------------------------------------------------------------------------------------
    def _take_fetch(self, order: FetchOrder) -> Sha256:
        self._check(order)
        artifact_id = content_id(order.manifest)
        try:
            self._store.announce(order.manifest)
        except JoulemarkError as error:
            self._note(artifact_id, to_problem(error))
            raise
        self._note(artifact_id, None)
        return artifact_id

    def _note(self, artifact_id: Sha256, problem: Problem | None) -> None:
        """An artifact is ordered. Not noted before the store knows it: a report in between would say that it was removed here."""
        with self._lock:
            if artifact_id in self._evicted:
                self._evicted.remove(artifact_id)
                self._holdings.pop(artifact_id, None)
            self._holdings.setdefault(artifact_id, 0.0)
            self._given_up.pop(artifact_id, None)
            self._told.pop(artifact_id, None)
            if problem is not None:
                self._given_up[artifact_id] = problem

    def _take_run(self, order: RunOrder) -> RunState | None:
        self._check(order)
        with self._lock:
            if order.spec.run_id not in self._runs:
                self._runs.add(order.spec.run_id)
                self._waiting[order.spec.run_id] = order.spec
        if self._complete(order.spec.artifact_id):
            self._queue(order.spec)
        with contextlib.suppress(NotFound):
            return self._jobs.state(order.spec.run_id)
        return None

    def _check(self, order: FetchOrder | RunOrder) -> None:
        if order.device_id != self._device_id:
            raise Untrusted("this order is for another board", "the host signs orders for each board")
        self._ledger.accept(order)

    def _queue(self, spec: RunSpec) -> None:
        try:
            try:
                self._store.pack_path(spec.pack_id)
            except NotFound:
                self._store.put_pack(spec.pack_id, self._fetch_pack(spec.pack_id))
            self._jobs.submit(spec)
        except JoulemarkError as error:
            if error.retryable:
                raise
            with self._lock:
                self._impossible[spec.run_id] = to_problem(error)
                self._waiting.pop(spec.run_id, None)
            raise
        with self._lock:
            self._waiting.pop(spec.run_id, None)

    def _forget(self, artifact_id: Sha256) -> None:
        if self._jobs.needs(artifact_id):
            raise Conflict(f"a run needs artifact {artifact_id[:12]}…", "it is removed when the run is over")
        with self._lock:
            self._holdings.pop(artifact_id, None)
        self._puller.cancel(artifact_id)
        with contextlib.suppress(NotFound):
            self._store.delete(artifact_id)

    def _complete(self, artifact_id: Sha256) -> bool:
        try:
            self._store.manifest(artifact_id)
        except NotFound:
            return False
        return True

    def _holding(self, artifact_id: Sha256) -> Holding:
        if artifact_id in self._evicted:
            return Holding(artifact_id=artifact_id, state="evicted")
        if (given_up := self._given_up.get(artifact_id)) is not None:
            return Holding(artifact_id=artifact_id, state="error", problem=given_up)
        try:
            progress = self._store.progress(artifact_id)
        except NotFound:
            gone = Problem(code="not_found", message="the artifact was removed on the board", hint="push it again")
            return Holding(artifact_id=artifact_id, state="error", problem=gone)
        received = sum(file.received_bytes for file in progress.files)
        problem = self._puller.problem(artifact_id)
        if progress.complete:
            return Holding(artifact_id=artifact_id, state="in_sync", received_bytes=received)
        stuck = problem is not None and not problem.retryable
        return Holding(
            artifact_id=artifact_id, state="error" if stuck else "pending", received_bytes=received, problem=problem
        )

    def _state(self, run_id: Identifier) -> RunState:
        try:
            return self._jobs.state(run_id)
        except NotFound:
            problem = self._impossible.get(run_id)
            if problem is not None:
                return RunState(run_id=run_id, status="failed", problem=problem)
            return RunState(run_id=run_id, status="queued" if run_id in self._waiting else "cancelled")

    def _follow(self, envelope: Envelope) -> None:
        """Takes an order; one that is not accepted is told to the host, which has to know that nothing comes of it."""
        try:
            self.take(envelope)
        except Untrusted as error:
            refusal = Refusal(
                sequence=_sequence(envelope),
                stale=isinstance(error, Stale),
                accepted=self._ledger.accepted(),
                problem=to_problem(error),
            )
            log.warning("an order of the host was not accepted: %s", error)
            with self._lock:
                if refusal not in self._refused and len(self._refused) < MAX_REFUSED:
                    self._refused.append(refusal)
        except (JoulemarkError, OSError) as error:
            log.warning("an order waits: %s", error)  # what it is about has its state in the report

    @staticmethod
    def _try(action: Callable[[], object]) -> None:
        """Something that may become possible later; what it is about has its state in the report."""
        try:
            action()
        except (JoulemarkError, OSError) as error:
            log.warning("not now: %s", error)


def _sequence(envelope: Envelope) -> int:
    """The order's number, unchecked: orders are accepted in their sequence."""
    kind = FetchOrder if envelope.payload_type == FetchOrder.TYPE else RunOrder
    try:
        return kind.model_validate_json(envelope.body()).sequence
    except (ValueError, BadInput):
        return 0
