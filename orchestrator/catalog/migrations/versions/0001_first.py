"""Machines, jobs, their events, points."""

import sqlalchemy as sa
from alembic import op

from orchestrator.catalog.migrations.append_only import append_only

revision = "0001"
down_revision = None

_UTC = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "machine",
        sa.Column("uuid", sa.String(), primary_key=True),
        sa.Column("hypervisor", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("seen", _UTC, nullable=False),
    )
    op.create_index("ix_machine_name", "machine", ["name"])
    _job()
    op.create_table(
        "job_event",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("job", sa.String(), sa.ForeignKey("job.id"), nullable=False),
        sa.Column("time", _UTC, nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("effective", sa.Boolean(), nullable=False),
    )
    op.create_index("ix_job_event_job", "job_event", ["job"])
    append_only("job_event")
    op.create_table(
        "point",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("vault", sa.String(), nullable=False),
        sa.Column("machine_uuid", sa.String(), nullable=False),
        sa.Column("machine_name", sa.String(), nullable=False),
        sa.Column("time", _UTC, nullable=False),
        sa.Column("has_checkpoint", sa.Boolean(), nullable=False),
        sa.Column("damaged", sa.Text(), nullable=False),
        sa.Column("doc", sa.Text(), nullable=False),
    )
    op.create_index("point_by_machine", "point", ["machine_uuid", "vault", "time"])
    op.create_index("ix_point_machine_name", "point", ["machine_name"])
    op.create_index("ix_point_time", "point", ["time"])


def _job() -> None:
    op.create_table(
        "job",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("machine_uuid", sa.String(), nullable=False),
        sa.Column("machine_name", sa.String(), nullable=False),
        sa.Column("hypervisor", sa.String(), nullable=False),
        sa.Column("vault", sa.String(), nullable=False),
        sa.Column("uses_point", sa.String(), nullable=False),
        sa.Column("lock", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("active", sa.Boolean(), nullable=False),
        sa.Column("leftover", sa.Boolean(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("owner_host", sa.String(), nullable=False),
        sa.Column("owner_boot", sa.String(), nullable=False),
        sa.Column("owner_pid", sa.Integer(), nullable=False),
        sa.Column("owner_started", sa.BigInteger(), nullable=False),
        sa.Column("created", _UTC, nullable=False),
        sa.Column("updated", _UTC, nullable=False),
        sa.Column("doc", sa.Text(), nullable=False),
    )
    active, unsettled = sa.text("active"), sa.text("active OR leftover")
    op.create_index(
        "job_one_active_per_lock", "job", ["lock"], unique=True, sqlite_where=active, postgresql_where=active
    )
    op.create_index("job_unsettled", "job", ["id"], sqlite_where=unsettled, postgresql_where=unsettled)
    op.create_index("ix_job_machine_uuid", "job", ["machine_uuid"])
    op.create_index("ix_job_uses_point", "job", ["uses_point"])
    op.create_index("ix_job_created", "job", ["created"])
