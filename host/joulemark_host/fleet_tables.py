"""The layout of what the host knows of its fleet: boards, credentials, one-time keys, who asked when, and what happened.

In the same database as the records. Secrets are there only as digests. Times are seconds of the host's wall clock.
"""

from __future__ import annotations

import sqlalchemy as sa

from joulemark_host.tables import METADATA

DEVICES = sa.Table(
    "devices",
    METADATA,
    sa.Column("device_id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("admission", sa.Text, nullable=False),
    sa.Column("problem", sa.Text),
    sa.Column("public_key", sa.Text, nullable=False, unique=True),
    sa.Column("tls_public_key", sa.Text, nullable=False),
    sa.Column("hardware", sa.Text),
    sa.Column("enrolled_at", sa.Float, nullable=False),
    sa.Column("approved_at", sa.Float),
    sa.Column("seen_at", sa.Float),
    sa.Column("address", sa.Text),
    sa.Column("facts", sa.JSON),
    sa.Column("revision", sa.Integer, nullable=False, default=0),
    sa.Column("last_order", sa.BigInteger, nullable=False, default=0),
    sa.Column("clock_ahead_s", sa.Float),
)

GROUPS = sa.Table(
    "device_groups",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("device_id", sa.Text, sa.ForeignKey("devices.device_id", ondelete="CASCADE"), primary_key=True),
)

RELEASES = sa.Table(
    "releases",
    METADATA,
    sa.Column("family", sa.Text, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("artifact_id", sa.Text, nullable=False, unique=True),
)

HOLDINGS = sa.Table(
    "holdings",
    METADATA,
    sa.Column("device_id", sa.Text, sa.ForeignKey("devices.device_id", ondelete="CASCADE"), primary_key=True),
    sa.Column("artifact_id", sa.Text, primary_key=True, index=True),
    sa.Column("sequence", sa.BigInteger, nullable=False),
    sa.Column("envelope", sa.Text, nullable=False),
    sa.Column("expires_at", sa.Float, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("received_bytes", sa.BigInteger, nullable=False),
    sa.Column("problem", sa.JSON),
    sa.Column("changed_at", sa.Float, nullable=False),
)

RUNS = sa.Table(
    "runs",
    METADATA,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("run_id", sa.Text, nullable=False, unique=True),
    sa.Column("sweep", sa.Text, index=True),
    sa.Column("device_id", sa.Text, sa.ForeignKey("devices.device_id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("task", sa.Text, nullable=False),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("status", sa.Text, nullable=False, index=True),
    sa.Column("envelope", sa.Text),
    sa.Column("lease_until", sa.Float),
    sa.Column("leases", sa.Integer, nullable=False),
    sa.Column("phase", sa.Text),
    sa.Column("items_done", sa.Integer, nullable=False),
    sa.Column("items_total", sa.Integer),
    sa.Column("problem", sa.JSON),
    sa.Column("queued_at", sa.Float, nullable=False),
    sa.Column("changed_at", sa.Float, nullable=False),
    sqlite_autoincrement=True,
)

ROLLOUTS = sa.Table(
    "rollouts",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("plan", sa.JSON, nullable=False),
    sa.Column("status", sa.Text, nullable=False, index=True),
    sa.Column("problem", sa.Text, nullable=False),
    sa.Column("stage", sa.Integer, nullable=False),
    sa.Column("begun_at", sa.Float, nullable=False),
    sa.Column("stage_begun_at", sa.Float, nullable=False),
    sa.Column("ended_at", sa.Float),
)

CREDENTIALS = sa.Table(
    "credentials",
    METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False, index=True),
    sa.Column("issued_at", sa.Float, nullable=False),
    sa.Column("revoked_at", sa.Float),
)

ENROLMENT_KEYS = sa.Table(
    "enrolment_keys",
    METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("approved", sa.Boolean, nullable=False),
    sa.Column("issued_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float, nullable=False),
    sa.Column("used_at", sa.Float),
    sa.Column("used_by", sa.Text),
)

SESSIONS = sa.Table(
    "sessions",
    METADATA,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("device_id", sa.Text, sa.ForeignKey("devices.device_id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("instance_id", sa.Text, nullable=False),
    sa.Column("boot_id", sa.Text, nullable=False),
    sa.Column("begun_at", sa.Float, nullable=False),
    sa.UniqueConstraint("device_id", "instance_id"),
    sqlite_autoincrement=True,
)

EVENTS = sa.Table(
    "events",
    METADATA,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("what", sa.Text, nullable=False),
    sa.Column("about", sa.Text, nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sqlite_autoincrement=True,
)
