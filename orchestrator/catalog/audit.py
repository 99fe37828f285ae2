"""Who did what: a log that only grows."""

from __future__ import annotations

from collections.abc import Sequence

from sqlmodel import Session, col, select

from orchestrator.catalog.schema import AuditRow, now


def record(session: Session, actor: str, action: str, subject: str, detail: str = "") -> None:
    """Note that `actor` (`user@host`, or `schedule`) did `action` (`backup.run`, `point.delete`) to `subject`; in the
    same transaction as the act, so that neither is there without the other."""
    session.add(AuditRow(time=now(), actor=actor, action=action, subject=subject, detail=detail))
    session.flush()


def recent(session: Session, limit: int) -> Sequence[AuditRow]:
    """Newest first."""
    return session.exec(select(AuditRow).order_by(col(AuditRow.id).desc()).limit(limit)).all()
