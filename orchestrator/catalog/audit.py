"""Who did what: a log that only grows."""

from __future__ import annotations

from collections.abc import Sequence

from sqlmodel import Session, col, select

from orchestrator.catalog.schema import AuditRow, now

LONGEST = 1000
"""Characters of a subject or detail: they hold what people and machines call things."""


def record(session: Session, actor: str, action: str, subject: str, detail: str = "") -> None:
    """Note that `actor` (`user@host`, or `schedule`) did `action` (`backup.run`, `point.delete`) to `subject`; in the
    same transaction as the act, so that neither is there without the other."""
    row = AuditRow(time=now(), actor=actor, action=action, subject=subject[:LONGEST], detail=detail[:LONGEST])
    session.add(row)
    session.flush()


def recent(session: Session, limit: int, *, action: str = "", actor: str = "") -> Sequence[AuditRow]:
    """Newest first; of actions that begin with `action`, of actors whose name contains `actor`."""
    query = select(AuditRow).order_by(col(AuditRow.id).desc()).limit(limit)
    if action:
        query = query.where(col(AuditRow.action).startswith(action, autoescape=True))
    if actor:
        query = query.where(col(AuditRow.actor).contains(actor, autoescape=True))
    return session.exec(query).all()
