"""Alerts in the catalog: one standing row per key, counted while it lasts, resolved when what it told of has passed."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from sqlalchemy import update
from sqlmodel import Session, col, select

from orchestrator.catalog.schema import AlertRow, now


class Severity(StrEnum):
    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


def raise_alert(session: Session, key: str, severity: Severity, subject: str, text: str, hint: str = "") -> None:
    """Tell of something. `key` says what makes two alerts the same (`backup-failed machine:<uuid>`): while one with
    that key stands it is counted and its text brought up to date, and it is told again only if it has become worse."""
    moment = now()
    row = standing(session, key)
    if row is None:
        session.add(
            AlertRow(
                key=key, severity=severity, subject=subject, text=text, hint=hint, first=moment, last=moment, count=1
            )
        )
    else:
        order = list(Severity)
        if order.index(severity) > order.index(Severity(row.severity)):
            row.told = None
        row.sqlmodel_update({"severity": severity, "text": text, "hint": hint, "last": moment, "count": row.count + 1})
    session.flush()


def resolve_alert(session: Session, key: str) -> bool:
    """What it told of has passed. False: no such alert stands."""
    statement = update(AlertRow).where(col(AlertRow.key) == key, col(AlertRow.resolved).is_(None))
    return session.connection().execute(statement.values(resolved=now(), told=None)).rowcount > 0


def standing(session: Session, key: str) -> AlertRow | None:
    return session.exec(select(AlertRow).where(AlertRow.key == key, col(AlertRow.resolved).is_(None))).first()


def standing_alerts(session: Session) -> Sequence[AlertRow]:
    """Oldest first."""
    return session.exec(select(AlertRow).where(col(AlertRow.resolved).is_(None)).order_by(col(AlertRow.first))).all()
