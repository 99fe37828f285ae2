"""Runs inside the transaction of `store.Catalog.open`, so that two processes cannot migrate at once."""

from alembic import context
from sqlmodel import SQLModel

import orchestrator.catalog.schema

assert orchestrator.catalog.schema.HEAD

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=SQLModel.metadata,
    render_as_batch=True,
    transactional_ddl=True,
)
context.run_migrations()
