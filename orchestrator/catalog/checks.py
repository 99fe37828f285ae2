"""Verifications of vaults in the catalog."""

from __future__ import annotations

from collections.abc import Sequence

from sqlmodel import Session, col, select

from orchestrator.catalog.schema import CheckRow


def add_check(session: Session, row: CheckRow) -> None:
    session.add(row)
    session.flush()


def checks_of(session: Session, vault: str) -> Sequence[CheckRow]:
    """Oldest first."""
    return session.exec(select(CheckRow).where(CheckRow.vault == vault).order_by(col(CheckRow.time))).all()
