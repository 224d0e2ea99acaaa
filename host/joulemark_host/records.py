"""Run records on the host: every body that an agent sent, kept whole, and what listings and grids need beside it.

Storing is idempotent: the same bytes again are `unchanged`; other bytes under a run id that is taken are a Conflict and
are put into quarantine, so that neither of the two is lost or silently believed. A record is stored in one transaction.
The body is the truth; columns are `joulemark_host.facts.facts_of(body)` and are rebuilt when that function changes.
Not aware of HTTP. Sizes are in bytes, times in seconds of the host's wall clock, which is passed in.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import time
import zlib
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from pydantic import ValidationError
from pydantic_core import from_json
from sqlalchemy.engine import Connection, RowMapping
from sqlalchemy.exc import IntegrityError

from joulemark.errors import BadInput, Conflict, DigestMismatch, Forbidden, NotFound, TooLarge
from joulemark.wire import SCHEMA, Absent, Measure, Metric, Problem, RunRecord, content_id
from joulemark_host.database import RESTORE, open_database, transaction
from joulemark_host.facts import FACTS_VERSION, OUTCOMES, RunFacts, facts_of
from joulemark_host.tables import BODIES, METRICS_TABLE, QUARANTINE, RECORDS

LOG = logging.getLogger(__name__)
MAX_RECORD_BYTES = 64 * 2**20
QUARANTINE_PER_RUN = 8


@dataclass(frozen=True)
class Quarantined:
    """A body that was set aside because its run id was taken."""

    run_id: str
    sha256: str
    size_bytes: int
    received_at: float


@dataclass(frozen=True)
class Origin:
    """The board that sent a record, its signature, and whether an artifact was ever issued to it."""

    device_id: str
    signature: bytes | None = None
    issued: Callable[[str], bool] = lambda _: True


def parse_record(body: bytes, max_bytes: int = MAX_RECORD_BYTES) -> RunRecord:
    """The record in `body`. Raises TooLarge, or BadInput for malformed JSON, NaN, a newer schema or a wrong field."""
    if len(body) > max_bytes:
        raise TooLarge(
            f"the record has {len(body)} bytes, this host takes {max_bytes}",
            "lower the sample rate or split the task, or raise --max-record-bytes on the host",
        )
    _check_json(body)
    try:
        return RunRecord.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the record"
        raise BadInput(
            f"the record has {error.error_count()} wrong field(s); the first is {where}: {first['msg']}",
            "agent and host must be of the same version: compare `joulemark --version` on both",
        ) from error


def _check_json(body: bytes) -> None:
    """Strict JSON of a known schema; looked at before the fields, which a newer schema may have changed."""
    try:
        plain = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise BadInput(f"the record is not JSON: {error}", "send what GET /api/runs/{id}/record gives") from error
    number = plain.get("schema_number", SCHEMA) if isinstance(plain, dict) else None
    if isinstance(number, int) and number > SCHEMA:
        raise BadInput(
            f"the record has schema {number}; this host understands up to {SCHEMA}", "update joulemark on the host"
        )


class Records:
    """The collection behind one database URL. Safe to use from several threads and processes."""

    def __init__(
        self, url: str, clock: Callable[[], float] = time.time, max_record_bytes: int = MAX_RECORD_BYTES
    ) -> None:
        self._engine = open_database(url)
        self._clock = clock
        self.max_record_bytes = max_record_bytes
        self._derive_again()

    def close(self) -> None:
        """Gives the connections back."""
        self._engine.dispose()

    def put(
        self, body: bytes, run_id: str | None = None, origin: Origin | None = None
    ) -> Literal["created", "unchanged"]:
        """Stores a record. `run_id` and `origin`, where given, are the id under which it was sent and the board that sent it: they must be
        the record's own.

        Raises BadInput, Forbidden (another board's record, or one about an artifact that this board never got), TooLarge, Conflict
        (quarantined), NoSpace or Unavailable (nothing was stored; send it again).
        """
        record = parse_record(body, self.max_record_bytes)
        name = record.spec.run_id
        if run_id is not None and run_id != name:
            raise BadInput(f"the record of run {name!r} was sent under {run_id!r}", "send it under its own run id")
        if origin is not None:
            _check_origin(record, origin)
        sha256 = hashlib.sha256(body).hexdigest()
        facts = facts_of(record)
        try:
            with self._transaction() as connection:
                known = _known_sha256(connection, name)
                if known is None:
                    self._insert(connection, facts, body, sha256, origin.signature if origin is not None else None)
                    return "created"
        except IntegrityError:  # another writer was faster with the same run id
            with self._transaction() as connection:
                known = _known_sha256(connection, name)
        if known == sha256:
            self._keep_signature(name, origin)
            return "unchanged"
        kept = self._set_aside(name, body, sha256)
        raise Conflict(
            f"run {name!r} has another record here (sha256 {str(known)[:12]}, sent {sha256[:12]})",
            f"the second one {'is in quarantine' if kept else 'was not kept: too many are'}; run ids must be unique",
        )

    def raw(self, run_id: str) -> bytes:
        """The body exactly as it was sent. Raises NotFound, DigestMismatch when it is not what was stored: disks forget."""
        query = sa.select(BODIES.c.body, RECORDS.c.sha256).join(RECORDS, RECORDS.c.run_id == BODIES.c.run_id)
        with self._transaction() as connection:
            row = connection.execute(query.where(BODIES.c.run_id == run_id)).first()
        if row is None:
            raise NotFound(f"there is no record of run {run_id!r}", "`joulemark records` lists what is here")
        try:
            body = gzip.decompress(row.body)
        except (OSError, EOFError, zlib.error):  # damaged so that it cannot even be unpacked
            body = b""
        if hashlib.sha256(body).hexdigest() != row.sha256:
            raise DigestMismatch(f"the record of run {run_id!r} is damaged in the database", RESTORE)
        return body

    def signature(self, run_id: str) -> bytes | None:
        """The envelope in which the board vouches for its record; None for one that came unsigned. Raises NotFound."""
        with self._transaction() as connection:
            row = connection.execute(sa.select(BODIES.c.signature).where(BODIES.c.run_id == run_id)).first()
        if row is None:
            raise NotFound(f"there is no record of run {run_id!r}", "`joulemark records` lists what is here")
        return row.signature

    def facts(self, task: str | None = None, metrics: Collection[str] | None = None) -> list[RunFacts]:
        """All runs (of `task`) in order of receipt, with the named metrics (default: all)."""
        return self._facts(sa.true() if task is None else RECORDS.c.task == task, metrics)

    def cells(self, task: str, metric: str) -> list[RunFacts]:
        """Of each board × artifact the run that speaks for it on `task`, with one metric, in order of receipt.

        Which one that is says `compare.latest_runs`: the last received that came to an outcome, else the last.
        """
        outcome = sa.case((RECORDS.c.status.in_(OUTCOMES), 1), else_=0)
        order = (outcome.desc(), RECORDS.c.sequence.desc())
        place = sa.func.row_number().over(partition_by=(RECORDS.c.device_id, RECORDS.c.artifact_id), order_by=order)
        ranked = sa.select(RECORDS.c.sequence, place.label("place")).where(RECORDS.c.task == task).subquery()
        speaking = sa.select(ranked.c.sequence).where(ranked.c.place == 1)
        return self._facts(RECORDS.c.sequence.in_(speaking), [metric])

    def names(self) -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
        """({board id: its latest name}, {artifact id: (model, quantization)}) of everything that any record is about."""
        latest = sa.select(sa.func.max(RECORDS.c.sequence)).group_by(RECORDS.c.device_id)
        boards = sa.select(RECORDS.c.device_id, RECORDS.c.device_name).where(RECORDS.c.sequence.in_(latest))
        latest = sa.select(sa.func.max(RECORDS.c.sequence)).group_by(RECORDS.c.artifact_id)
        columns = (RECORDS.c.artifact_id, RECORDS.c.model, RECORDS.c.quantization)
        models = sa.select(*columns).where(RECORDS.c.sequence.in_(latest))
        with self._transaction() as connection:
            return (
                {row.device_id: row.device_name for row in connection.execute(boards)},
                {row.artifact_id: (row.model, row.quantization) for row in connection.execute(models)},
            )

    def _facts(self, condition: Any, metrics: Collection[str] | None) -> list[RunFacts]:
        query = sa.select(RECORDS).where(condition).order_by(RECORDS.c.sequence)
        figures = sa.select(METRICS_TABLE).join(RECORDS, RECORDS.c.run_id == METRICS_TABLE.c.run_id).where(condition)
        if metrics is not None:
            figures = figures.where(METRICS_TABLE.c.name.in_(metrics))
        with self._transaction() as connection:
            rows = connection.execute(query).mappings().all()
            by_run: dict[str, dict[str, Metric]] = {}
            for figure in connection.execute(figures).mappings():
                by_run.setdefault(figure["run_id"], {})[figure["name"]] = _metric(figure)
        return [_facts(row, by_run.get(row["run_id"], {})) for row in rows]

    def tasks(self) -> list[str]:
        """The tasks that any record is about, sorted."""
        with self._transaction() as connection:
            return list(connection.execute(sa.select(RECORDS.c.task).distinct().order_by(RECORDS.c.task)).scalars())

    def quarantined(self) -> list[Quarantined]:
        """What was set aside, in order of receipt."""
        columns = (QUARANTINE.c.run_id, QUARANTINE.c.sha256, QUARANTINE.c.size_bytes, QUARANTINE.c.received_at)
        with self._transaction() as connection:
            rows = connection.execute(sa.select(*columns).order_by(QUARANTINE.c.number))
            return [Quarantined(*row) for row in rows]

    def _insert(
        self, connection: Connection, facts: RunFacts, body: bytes, sha256: str, signature: bytes | None
    ) -> None:
        connection.execute(
            sa.insert(RECORDS).values(
                sha256=sha256,
                size_bytes=len(body),
                received_at=self._clock(),
                **_columns(facts),
            )
        )
        packed = gzip.compress(body, compresslevel=6, mtime=0)
        connection.execute(sa.insert(BODIES).values(run_id=facts.run_id, body=packed, signature=signature))
        if facts.metrics:
            connection.execute(sa.insert(METRICS_TABLE), _metric_rows(facts))

    def _keep_signature(self, run_id: str, origin: Origin | None) -> None:
        """A record that a person brought here came unsigned; when its board sends the same bytes, its word is kept."""
        if origin is None or origin.signature is None:
            return
        unsigned = sa.and_(BODIES.c.run_id == run_id, BODIES.c.signature.is_(None))
        with transaction(self._engine, write=True) as connection:
            connection.execute(sa.update(BODIES).where(unsigned).values(signature=origin.signature))

    def _set_aside(self, run_id: str, body: bytes, sha256: str) -> bool:
        """Keeps a conflicting body once; False when this run id has its full share of them already."""
        same_run = QUARANTINE.c.run_id == run_id
        try:
            with self._transaction() as connection:
                kept = set(connection.execute(sa.select(QUARANTINE.c.sha256).where(same_run)).scalars())
                if sha256 in kept or len(kept) >= QUARANTINE_PER_RUN:
                    return sha256 in kept
                packed = gzip.compress(body, compresslevel=6, mtime=0)
                row = {"run_id": run_id, "sha256": sha256, "size_bytes": len(body), "received_at": self._clock()}
                connection.execute(sa.insert(QUARANTINE).values(body=packed, **row))
        except IntegrityError:  # the same body came twice at the same time: it is kept
            return True
        return True

    def _derive_again(self) -> None:
        """Rebuilds the columns of records that an older `facts_of` derived, each in a transaction of its own."""
        with self._transaction() as connection:
            old = connection.execute(
                sa.select(RECORDS.c.run_id).where(RECORDS.c.facts_version != FACTS_VERSION)
            ).scalars()
            run_ids = list(old)
        for run_id in run_ids:
            try:
                facts = facts_of(parse_record(self.raw(run_id)))
            except BadInput as error:
                LOG.warning("the columns of run %s stay as an older version derived them: %s", run_id, error)
                continue
            with self._transaction() as connection:
                connection.execute(sa.update(RECORDS).where(RECORDS.c.run_id == run_id).values(**_columns(facts)))
                connection.execute(sa.delete(METRICS_TABLE).where(METRICS_TABLE.c.run_id == run_id))
                if facts.metrics:
                    connection.execute(sa.insert(METRICS_TABLE), _metric_rows(facts))

    def _transaction(self) -> AbstractContextManager[Connection]:
        return transaction(self._engine)


def _check_origin(record: RunRecord, origin: Origin) -> None:
    name = record.spec.run_id
    if origin.device_id != record.device.device_id:
        raise Forbidden(f"the record of run {name!r} is about another board", "a board sends its own records only")
    for artifact_id in {record.spec.artifact_id, content_id(record.manifest)}:
        if not origin.issued(artifact_id):
            raise Forbidden(
                f"the record of run {name!r} is about artifact {artifact_id[:12]}…, which this board was never given",
                "`joulemark push` it, then run it: a result counts only for what the host has issued",
            )


def _known_sha256(connection: Connection, run_id: str) -> str | None:
    return connection.execute(sa.select(RECORDS.c.sha256).where(RECORDS.c.run_id == run_id)).scalar()


def _columns(facts: RunFacts) -> dict[str, Any]:
    same = ("run_id", "status", "valid", "device_id", "device_name", "device_profile", "artifact_id", "model")
    more = ("quantization", "weight_bytes", "pack_id", "task", "task_hash", "variant", "finished_at")
    return {
        **{name: getattr(facts, name) for name in same + more},
        "facts_version": FACTS_VERSION,
        "problem": facts.problem.model_dump() if facts.problem else None,
        "reasons": list(facts.reasons),
        "conditions": dict(facts.conditions),
    }


def _metric_rows(facts: RunFacts) -> Sequence[dict[str, Any]]:
    empty = dict.fromkeys(column.name for column in METRICS_TABLE.c)
    return [
        {
            **empty,
            "run_id": facts.run_id,
            "name": name,
            **({"absent": metric.reason} if isinstance(metric, Absent) else metric.model_dump()),
        }
        for name, metric in facts.metrics.items()
    ]


def _metric(row: RowMapping) -> Metric:
    if row["value"] is None:
        return Absent(reason=row["absent"])
    return Measure(
        value=row["value"],
        unit=row["unit"],
        n=row["n"],
        low=row["low"],
        high=row["high"],
        source=row["source"],
    )


def _facts(row: RowMapping, metrics: dict[str, Metric]) -> RunFacts:
    names = (column.name for column in RECORDS.c)
    skipped = {"sha256", "size_bytes", "facts_version", "problem", "reasons"}
    return RunFacts(
        **{name: row[name] for name in names if name not in skipped},
        problem=Problem(**row["problem"]) if row["problem"] else None,
        reasons=tuple(row["reasons"]),
        metrics=metrics,
    )
