"""What a controller needs: workers and leases, what is due, alerts, the audit log; more of machines and jobs."""

import sqlalchemy as sa
from alembic import op

from orchestrator.catalog.migrations.append_only import append_only

revision = "0004"
down_revision = "0003"

_UTC = sa.DateTime(timezone=True)


def _text(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=False, server_default="")


def _word(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.String(), nullable=False)


def upgrade() -> None:
    for name in ("tags", "power", "doubt"):
        op.add_column("machine", _text(name))
    for name in ("gone", "missed"):
        op.add_column("machine", sa.Column(name, _UTC, nullable=True))
    for column in (
        sa.Column("priority", sa.Integer(), nullable=False, server_default="10"),
        _text("section"),
        sa.Column("due", _UTC, nullable=True),
        sa.Column("deadline", _UTC, nullable=True),
        sa.Column("heard", _UTC, nullable=True),
        _text("asked_by"),
    ):
        op.add_column("job", column)
    op.create_table(
        "duty",
        sa.Column("subject", sa.String(), primary_key=True),
        sa.Column("section", sa.String(), primary_key=True),
        sa.Column("handled", _UTC, nullable=False),
        *(_text(name) for name in ("outcome", "policy", "vault", "schedule")),
        sa.Column("first", _UTC, nullable=True),
    )
    op.create_table(
        "hypervisor",
        sa.Column("name", sa.String(), primary_key=True),
        sa.Column("asked", _UTC, nullable=True),
        sa.Column("listed", _UTC, nullable=True),
        _text("problem"),
    )
    op.create_table(
        "sighting",
        sa.Column("hypervisor", sa.String(), primary_key=True),
        sa.Column("uuid", sa.String(), primary_key=True),
        sa.Column("doc", sa.Text(), nullable=False),
    )
    op.create_table(
        "lease", sa.Column("name", sa.String(), primary_key=True), _word("holder"), sa.Column("until", _UTC)
    )
    op.create_table(
        "worker",
        sa.Column("name", sa.String(), primary_key=True),
        _word("host"),
        sa.Column("pid", sa.Integer(), nullable=False),
        _text("hypervisors"),
        sa.Column("seen", _UTC, nullable=False),
        _text("doc"),
    )
    _alert()
    _points()
    op.create_table(
        "vault_look",
        sa.Column("id", sa.Integer(), primary_key=True),
        _word("vault"),
        sa.Column("time", _UTC, nullable=False),
        sa.Column("used_bytes", sa.BigInteger(), nullable=True),
        sa.Column("free_bytes", sa.BigInteger(), nullable=True),
        _text("problem"),
    )
    op.create_index("ix_vault_look_vault", "vault_look", ["vault"])
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("time", _UTC, nullable=False),
        _word("actor"),
        _word("action"),
        _word("subject"),
        _text("detail"),
    )
    op.create_index("ix_audit_time", "audit", ["time"])
    append_only("audit")


def _alert() -> None:
    op.create_table(
        "alert",
        sa.Column("id", sa.Integer(), primary_key=True),
        _word("key"),
        _word("severity"),
        _word("subject"),
        _text("text"),
        _text("hint"),
        sa.Column("first", _UTC, nullable=False),
        sa.Column("last", _UTC, nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("resolved", _UTC, nullable=True),
        sa.Column("told", _UTC, nullable=True),
        _text("ending"),
        _text("acknowledged"),
    )
    op.create_table(
        "delivery",
        sa.Column("target", sa.String(), primary_key=True),
        sa.Column("alert", sa.Integer(), sa.ForeignKey("alert.id"), primary_key=True),
        _word("said"),
        sa.Column("time", _UTC, nullable=False),
    )
    standing = sa.text("resolved IS NULL")
    op.create_index(
        "alert_one_standing_per_key",
        "alert",
        ["key"],
        unique=True,
        sqlite_where=standing,
        postgresql_where=standing,
    )


def _points() -> None:
    """What a list of machines shows of the newest point of each, without its document, and found by one seek."""
    op.add_column("point", _text("consistency"))
    postgresql = op.get_bind().dialect.name == "postgresql"
    found = "(doc::json)->>'consistency'" if postgresql else "json_extract(doc, '$.consistency')"
    op.execute(f"UPDATE point SET consistency = {found}")
    standing = sa.text("deleted_until IS NULL")
    op.create_index(
        "point_newest",
        "point",
        ["machine_uuid", "time", "id"],
        sqlite_where=standing,
        postgresql_where=standing,
    )
