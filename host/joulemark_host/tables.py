"""The layout of the record database, for any engine that SQLAlchemy speaks to.

`records` has what listings and grids filter by; `bodies` keeps each record whole, in a table of its own, so that a grid over thousands of
runs reads no megabytes; `metrics` is one row for each run × figure; `quarantine` keeps bodies that claimed a run id which another body had
already. Derived columns may be rebuilt from the bodies at any time. Times are seconds of the host's wall clock.
"""

from __future__ import annotations

import sqlalchemy as sa

METADATA = sa.MetaData()

ABOUT = sa.Table("about", METADATA, sa.Column("key", sa.Text, primary_key=True), sa.Column("value", sa.Text))

RECORDS = sa.Table(
    "records",
    METADATA,
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("run_id", sa.Text, nullable=False, unique=True),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.Integer, nullable=False),
    sa.Column("received_at", sa.Float, nullable=False),
    sa.Column("facts_version", sa.Integer, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("valid", sa.Boolean, nullable=False),
    sa.Column("device_id", sa.Text, nullable=False, index=True),
    sa.Column("device_name", sa.Text, nullable=False),
    sa.Column("device_profile", sa.Text, nullable=False),
    sa.Column("artifact_id", sa.Text, nullable=False, index=True),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("quantization", sa.Text, nullable=False),
    sa.Column("weight_bytes", sa.BigInteger, nullable=False),
    sa.Column("pack_id", sa.Text, nullable=False),
    sa.Column("task", sa.Text, nullable=False),
    sa.Column("task_hash", sa.Text, nullable=False),
    sa.Column("variant", sa.Text, nullable=False),
    sa.Column("finished_at", sa.Float),
    sa.Column("problem", sa.JSON),
    sa.Column("reasons", sa.JSON, nullable=False),
    sa.Column("conditions", sa.JSON, nullable=False),
    # A grid asks for the runs of one task, the latest of each board × artifact.
    sa.Index("records_cells", "task", "device_id", "artifact_id", "sequence"),
    sqlite_autoincrement=True,
)

BODIES = sa.Table(
    "bodies",
    METADATA,
    sa.Column("run_id", sa.Text, sa.ForeignKey("records.run_id", ondelete="CASCADE"), primary_key=True),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("signature", sa.LargeBinary),
)

METRICS_TABLE = sa.Table(
    "metrics",
    METADATA,
    sa.Column("run_id", sa.Text, sa.ForeignKey("records.run_id", ondelete="CASCADE"), primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Float),
    sa.Column("unit", sa.Text),
    sa.Column("n", sa.Integer),
    sa.Column("low", sa.Float),
    sa.Column("high", sa.Float),
    sa.Column("source", sa.Text),
    sa.Column("absent", sa.Text),
)

QUARANTINE = sa.Table(
    "quarantine",
    METADATA,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("run_id", sa.Text, nullable=False, index=True),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.Integer, nullable=False),
    sa.Column("received_at", sa.Float, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.UniqueConstraint("run_id", "sha256"),
)
