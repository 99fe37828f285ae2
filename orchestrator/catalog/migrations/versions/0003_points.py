"""Deletions that can be taken back, pins, locks, replicas and verifications of points."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    moment = sa.DateTime(timezone=True)
    for name in ("deleted_until", "locked_until", "verified"):
        op.add_column("point", sa.Column(name, moment, nullable=True))
    for name in ("deleted_reason", "pinned", "replicas"):
        op.add_column("point", sa.Column(name, sa.Text(), nullable=False, server_default=""))
    op.create_table(
        "vault_check",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("vault", sa.String(), nullable=False, index=True),
        sa.Column("time", moment, nullable=False),
        sa.Column("level", sa.String(), nullable=False),
        sa.Column("share", sa.String(), nullable=False),
        sa.Column("packs", sa.Integer(), nullable=False),
        sa.Column("blocks", sa.Integer(), nullable=False),
        sa.Column("read_bytes", sa.BigInteger(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("findings", sa.Integer(), nullable=False),
    )
