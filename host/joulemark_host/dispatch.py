"""What boards are to do: artifacts to hold, runs to make, one at a time for each board; and how far they are.

The wanted state is in the database; a board asks for it whenever its revision has risen and converges to it, so that nothing depends on a
message arriving. Orders are signed by `issuing`, artifacts on boards are in `holdings`, runs in `run_queue`; here they change together, in
one transaction. Not aware of HTTP, nor of what is in an artifact. Times are seconds of the clock that is passed in.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Collection

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from joulemark.errors import BadInput, Conflict, Forbidden, NotFound
from joulemark.protocol import Orders, Report, ReportAnswer
from joulemark.signing import SigningKey
from joulemark.statements import write_envelope
from joulemark.wire import ENDED, Manifest, Problem, RunSpec, content_id
from joulemark_host import holdings, rollout, run_queue
from joulemark_host.database import open_database, transaction
from joulemark_host.fleet_tables import DEVICES, GROUPS
from joulemark_host.holdings import Holdings, Target
from joulemark_host.issuing import ORDER_LIFE_S, Issuer, count_from, device_row
from joulemark_host.rollout import Plan, Rollout, Rollouts
from joulemark_host.run_queue import QueuedRun, RunQueue

LEASE_S = 900.0
ADVANCE_EVERY_S = 1.0
GROUP_NAME = re.compile(r"[\w.()-]([\w .()-]{0,58}[\w.()-])?", re.ASCII)
"""Where boards are named, commas separate and blanks around a name are cut off."""
_VANISHED = Problem(code="vanished", message="the board has not been heard of", hint="look at its power and network")


class Dispatch:
    """See the module. Safe to use from several threads and processes."""

    def __init__(
        self, url: str, key: SigningKey, clock: Callable[[], float] = time.time, lease_s: float = LEASE_S
    ) -> None:
        self._engine = open_database(url)
        self._clock = clock
        self._advanced_at = 0.0
        issuer = Issuer(key, clock)
        self._holdings = Holdings(issuer, clock)
        self._queue = RunQueue(issuer, clock, lease_s)
        self._rollouts = Rollouts(self._holdings, self._queue, clock)

    def close(self) -> None:
        """Gives the connections back."""
        self._engine.dispose()

    # --- which boards -------------------------------------------------------------------------------------------------
    def devices(self, words: str) -> dict[str, str]:
        """Names by id of the approved boards that `words` means: names, ids or groups, separated by commas, or `all`. Raises NotFound, and
        BadInput for a word that means two things: a board may have taken a group's name."""
        with transaction(self._engine) as connection:
            approved = sa.select(DEVICES.c.device_id, DEVICES.c.name).where(DEVICES.c.admission == "approved")
            known = {row.device_id: row.name for row in connection.execute(approved)}
            members = connection.execute(sa.select(GROUPS.c.name, GROUPS.c.device_id)).all()
        chosen: dict[str, str] = dict(known) if words == "all" else {}
        for word in (part.strip() for part in words.split(",") if part.strip() and words != "all"):
            found = [key for key, name in known.items() if word in (key, name)]
            grouped = [device_id for group, device_id in members if group == word and device_id in known]
            if found and grouped:
                raise BadInput(f"{word[:80]!r} is a board and a group", "give the board's id, or rename it")
            found = found or grouped
            if not found:
                raise NotFound(f"there is no approved board or group {word[:80]!r}", "`joulemark devices` lists them")
            chosen |= {key: known[key] for key in found}
        if not chosen:
            raise NotFound("no board is approved here", "`joulemark devices` lists them")
        return chosen

    def groups(self) -> dict[str, list[str]]:
        """The names of the boards in each group."""
        query = sa.select(GROUPS.c.name, DEVICES.c.name).join(DEVICES).order_by(GROUPS.c.name, DEVICES.c.name)
        found: dict[str, list[str]] = {}
        with transaction(self._engine) as connection:
            for group, device in connection.execute(query):
                found.setdefault(group, []).append(device)
        return found

    def group(self, name: str, device_ids: Collection[str], member: bool = True) -> None:
        """Puts boards into a group, or takes them out. Raises BadInput for a name that could not be given where boards are named."""
        with transaction(self._engine, write=True) as connection:
            taken = connection.execute(sa.select(DEVICES.c.name).where(DEVICES.c.name == name)).first() is not None
            if member and (taken or name == "all" or not GROUP_NAME.fullmatch(name)):
                why = "a board is called so" if taken else "up to 60 letters, digits, spaces, dots, dashes; not `all`"
                raise BadInput(f"a group cannot be called {name[:80]!r}", why)
            mine = sa.and_(GROUPS.c.name == name, GROUPS.c.device_id.in_(device_ids))
            connection.execute(sa.delete(GROUPS).where(mine))
            if member:
                rows = [{"name": name, "device_id": device_id} for device_id in device_ids]
                connection.execute(sa.insert(GROUPS), rows)

    # --- what operators want ------------------------------------------------------------------------------------------
    def push(self, device_id: str, manifest: Manifest, downgrade: bool = False) -> bool:
        """Wants an artifact on a board; whether that is news. What the board has already stays as it is."""
        with transaction(self._engine, write=True) as connection:
            return self._holdings.want(connection, device_id, manifest, downgrade)

    def fetch_order(self, device_id: str, artifact_id: str) -> bytes:
        """The signed order for an artifact that was pushed to this board. Raises NotFound."""
        with transaction(self._engine) as connection:
            row = holdings.row_of(connection, device_id, artifact_id)
        if row is None:
            raise NotFound(f"artifact {artifact_id[:12]}… was never issued to this board", "`joulemark push` it")
        return row["envelope"].encode()

    def issued(self, device_id: str, artifact_id: str) -> bool:
        """Whether this host ever gave the artifact to the board: results about anything else are not believed."""
        with transaction(self._engine) as connection:
            return holdings.row_of(connection, device_id, artifact_id) is not None

    def may_fetch(self, device_id: str, sha256: str) -> bool:
        """Whether a board may have this file or pack: it is in an artifact that the board was ordered to hold, or is a run's pack."""
        with transaction(self._engine) as connection:
            return sha256 in holdings.files(connection, device_id) or sha256 in run_queue.packs(connection, device_id)

    def forget(self, artifact_id: str, *device_ids: str) -> None:
        """Wants an artifact off those of these boards that were to hold it, or off none. Raises NotFound for a board that is not known, and
        when none of them was to hold it; Conflict while a run needs it."""
        found = False
        with transaction(self._engine, write=True) as connection:
            for device_id in device_ids:
                name = device_row(connection, device_id)["name"]
                if needed := run_queue.needing(connection, device_id, artifact_id):
                    hint = "`joulemark runs cancel` it first; nothing was removed"
                    raise Conflict(f"run {needed[0]} on {name!r} needs this artifact", hint)
                row = holdings.row_of(connection, device_id, artifact_id)
                if row is not None and row["state"] != "forgotten":
                    self._holdings.forget(connection, device_id, artifact_id)
                    found = True
        if not found:
            raise NotFound(
                f"artifact {artifact_id[:12]}… is on none of these boards", "`joulemark artifacts` lists where it is"
            )

    def queue(
        self, device_id: str, spec: RunSpec, manifest: Manifest, task: str = "", sweep: str | None = None
    ) -> None:
        """Puts a run at the end of a board's queue; its artifact is pushed where that was not done. Queueing it again changes
        nothing. `task` is the pack's, for people.

        Raises NotFound, BadInput, Conflict when the run id is taken by another run.
        """
        if content_id(manifest) != spec.artifact_id:
            raise BadInput(f"the manifest is not that of artifact {spec.artifact_id[:12]}…", "publish it again")
        with transaction(self._engine, write=True) as connection:
            device_row(connection, device_id)
            if not self._queue.known(connection, device_id, spec):
                # Comparing an older artifact with a newer one is what runs are for.
                self._holdings.want(connection, device_id, manifest, downgrade=True)
                self._queue.add(connection, device_id, spec, task, sweep)

    def run_order(self, run_id: str) -> bytes:
        """The signed order for a queued run, leased to its board at once: for whoever brings it there. Raises NotFound, Conflict."""
        with transaction(self._engine, write=True) as connection:
            return self._queue.order(connection, run_id).encode()

    def ordered(self, run_id: str) -> bytes:
        """The order under which a run was made. Raises NotFound."""
        with transaction(self._engine) as connection:
            return run_queue.ordered(connection, run_id).encode()

    def cancel(self, run_ids: Collection[str]) -> int:
        """Ends runs that have not ended; those that a board holds end when it hears of it. Returns how many that concerns."""
        with transaction(self._engine, write=True) as connection:
            return self._queue.cancel(connection, run_ids)

    def roll_out(self, plan: Plan) -> None:
        """Begins a roll-out. Raises NotFound for an unknown board, BadInput, Conflict."""
        with transaction(self._engine, write=True) as connection:
            self._rollouts.begin(connection, plan)

    def stop_rollout(self, name: str, who: str) -> None:
        """Stops a roll-out. Raises NotFound."""
        with transaction(self._engine, write=True) as connection:
            self._rollouts.stop(connection, name, f"stopped by {who}")

    def resume_rollout(self, name: str) -> None:
        """Takes a stopped roll-out up again at its stage. Raises NotFound, Conflict."""
        with transaction(self._engine, write=True) as connection:
            self._rollouts.advance(connection)  # one whose time is over may not have been looked at since
            self._rollouts.resume(connection, name)

    # --- what boards ask and say --------------------------------------------------------------------------------------
    def revision(self, device_id: str) -> int:
        """A number that rises whenever there is something new for this board."""
        with transaction(self._engine) as connection:
            return device_row(connection, device_id)["revision"]

    def revisions(self) -> dict[str, int]:
        """The same for all boards: one query for everybody who waits."""
        query = sa.select(DEVICES.c.device_id, DEVICES.c.revision)
        with transaction(self._engine) as connection:
            return {row.device_id: row.revision for row in connection.execute(query)}

    def orders(self, device_id: str) -> Orders:
        """What this board is to do now. Leases it the next run when it holds none. Raises Forbidden for a board that is not approved: it
        may have been revoked while it waited for news."""
        self.expire()
        with transaction(
            self._engine
        ) as connection:  # most askers get what was signed before: no reason to wait for writers
            if not self._holdings.to_sign(connection, device_id) and not self._queue.to_lease(connection, device_id):
                return self._orders(connection, device_id, sign=False)
        with transaction(self._engine, write=True) as connection:
            return self._orders(connection, device_id, sign=True)

    def _orders(self, connection: Connection, device_id: str, sign: bool) -> Orders:
        # The revision is read first: what changes meanwhile raises it, and the board asks again.
        if (device := device_row(connection, device_id))["admission"] != "approved":
            raise Forbidden(f"the board {device['name']!r} takes no part now", "`joulemark devices` says why")
        fetch, forget = self._holdings.orders(connection, device_id, sign)
        run = self._queue.held(connection, device_id, sign)
        return Orders(
            revision=device["revision"] if not sign else device_row(connection, device_id)["revision"],
            host_time=self._clock(),
            fetch=fetch,
            run=run,
            cancel=self._queue.to_cancel(connection, device_id),
            forget=forget,
            needed=run_queue.needed(connection, device_id),
        )

    def lend(self, device_id: str, with_models: bool) -> tuple[list[str], list[str]]:
        """The envelopes of everything that a board has not done, for whoever brings them there: (artifacts, runs). Its runs are leased for
        as long as an order lives. `with_models`: also the artifacts of these runs that the board is known to have."""
        with transaction(self._engine, write=True) as connection:
            fetch, _ = self._holdings.orders(connection, device_id, sign=True)
            runs = self._queue.lend(connection, device_id, ORDER_LIFE_S)
            envelopes = [write_envelope(envelope).decode() for envelope in fetch]
            if with_models:
                envelopes += self._holdings.held(connection, device_id, run_queue.needed(connection, device_id))
            return envelopes, runs

    def compare(self, device_id: str, holds: Collection[str]) -> None:
        """A board has begun anew and says which artifacts it has."""
        with transaction(self._engine) as connection:
            if not self._holdings.differs(connection, device_id, holds):
                return
        with transaction(self._engine, write=True) as connection:
            self._holdings.compare(connection, device_id, frozenset(holds))

    def report(self, device_id: str, report: Report) -> ReportAnswer:
        """Takes in what has changed on a board; renews the lease of the run that it is at."""
        with transaction(self._engine, write=True) as connection:
            device_row(connection, device_id)
            for holding in report.holdings:
                self._holdings.take(connection, device_id, holding)
            for state in report.runs:
                self._queue.take(connection, device_id, state)
            for refusal in report.refused:
                count_from(connection, device_id, refusal.accepted)
                if not self._holdings.take_refusal(connection, device_id, refusal):
                    self._queue.take_refusal(connection, device_id, refusal)
            self._rollouts.advance(connection)
            going_on = [state.run_id for state in report.runs if state.status not in ENDED]
            cancel = self._queue.to_cancel(connection, device_id, going_on)
            return ReportAnswer(cancel=cancel, host_time=self._clock())

    def settle(self, run_id: str, items: tuple[int, int] | None = None) -> None:
        """A record of this run has arrived: its board may have the next one. `items`: so many of so many, where no report said it."""
        with transaction(self._engine, write=True) as connection:
            if (shown := self._queue.settle(connection, run_id, items)) is not None:
                self._holdings.show(connection, *shown)
            self._rollouts.advance(connection)

    def expire(self) -> list[str]:
        """Returns the runs of boards that vanished to their queues, and gives up transfers that stand still; the runs' ids."""
        conditions = [self._queue.late(), self._queue.unheard(), self._holdings.still()]
        if (
            self._clock() - self._advanced_at >= ADVANCE_EVERY_S
        ):  # time passes for roll-outs also when no board says anything
            self._advanced_at = self._clock()
            conditions.append(rollout.going_on())
        any_of = sa.or_(*(sa.exists().where(condition) for condition in conditions))
        with transaction(self._engine) as connection:
            if connection.execute(sa.select(sa.literal(1)).where(any_of)).first() is None:
                return []
        with transaction(self._engine, write=True) as connection:
            self._holdings.give_up(connection, _VANISHED.model_dump())
            returned = self._queue.expire(connection, _VANISHED.model_dump())
            self._rollouts.advance(connection)
            return returned

    # --- what people look at ------------------------------------------------------------------------------------------
    def targets(self, device_id: str | None = None, artifact_id: str | None = None) -> list[Target]:
        """Artifacts on boards, by board and age. With `artifact_id` every board is there, also those that never heard of it."""
        with transaction(self._engine) as connection:
            return holdings.targets(connection, device_id, artifact_id)

    def titles(self) -> dict[str, str]:
        """What people call the artifacts of all targets and runs, by id."""
        with transaction(self._engine) as connection:
            return holdings.titles(connection)

    def rollouts(self, name: str | None = None) -> list[Rollout]:
        """All roll-outs, or the one of this name, as far as they are."""
        with transaction(self._engine, write=True) as connection:
            self._rollouts.advance(connection)
            return self._rollouts.listed(connection, name)

    def runs(
        self, sweep: str | None = None, run_ids: Collection[str] | None = None, open_only: bool = False
    ) -> list[QueuedRun]:
        """Runs in the order in which they were queued."""
        self.expire()
        with transaction(self._engine) as connection:
            return run_queue.listed(connection, sweep, run_ids, open_only)


def new_run_id(task: str) -> str:
    """A run id that nobody else makes."""
    return f"{task}-{uuid.uuid4().hex[:12]}"
