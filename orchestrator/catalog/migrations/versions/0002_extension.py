"""What is known of the extension in each machine."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("machine", sa.Column("extension", sa.Text(), nullable=False, server_default=""))
