"""Machines, jobs, their events, points."""

import sqlalchemy as sa
from alembic import op

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
    _append_only("job_event")
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


def _append_only(table: str) -> None:
    if op.get_bind().dialect.name == "sqlite":
        for act in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{act.lower()} BEFORE {act} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )
        return
    op.execute(
        f"CREATE FUNCTION {table}_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{table} is append-only'; END $$"
    )
    op.execute(
        f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE ON {table} "
        f"FOR EACH ROW EXECUTE FUNCTION {table}_append_only()"
    )
