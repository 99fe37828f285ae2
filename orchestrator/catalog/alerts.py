"""Alerts in the catalog: one standing row per key, counted while it lasts, resolved when what it told of has passed."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from sqlalchemy import update
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from orchestrator.alarms import Raise, Resolve, Severity, Verdict
from orchestrator.catalog.schema import AlertRow, now

log = logging.getLogger(__name__)

__all__ = ["Raise", "Resolve", "Severity", "Verdict"]


def apply(session: Session, verdicts: Iterable[Verdict]) -> None:
    """Raise and resolve as it was decided."""
    for verdict in verdicts:
        if isinstance(verdict, Resolve):
            resolve_alert(session, verdict.key, verdict.ending)
        else:
            raise_alert(
                session,
                verdict.key,
                verdict.severity,
                verdict.subject,
                verdict.text,
                verdict.hint,
                event=verdict.event,
            )


def raise_alert(
    session: Session, key: str, severity: Severity, subject: str, text: str, hint: str = "", *, event: bool = False
) -> None:
    """Tell of something. `key` says what makes two alerts the same (`backup-failed machine:<uuid>`): while one with
    that key stands its text is brought up to date, and it is told again only if it has become worse. `event`: it
    happened once more, and is counted; False: a state that lasts, which is not."""
    row = standing(session, key) or _begun(session, key, severity, subject, text, hint)
    if row is None:
        return
    if severity.rank > Severity(row.severity).rank:
        row.told, row.acknowledged = None, ""
        _write_down(key, severity, subject, text)
    count = row.count + (1 if event else 0)
    row.sqlmodel_update(
        {"severity": severity, "subject": subject, "text": text, "hint": hint, "last": now(), "count": count}
    )
    session.flush()


def _begun(session: Session, key: str, severity: Severity, subject: str, text: str, hint: str) -> AlertRow | None:
    """A new alert stands, and there is nothing more to do: None. Or somebody else was first, with that one."""
    moment = now()
    row = AlertRow(
        key=key, severity=severity, subject=subject, text=text, hint=hint, first=moment, last=moment, count=1
    )
    try:
        with session.begin_nested():
            session.add(row)
    except IntegrityError:
        return standing(session, key)
    _write_down(key, severity, subject, text)
    return None


def _write_down(key: str, severity: Severity, subject: str, text: str) -> None:
    """In the log as well: it may be all that anybody looks at."""
    log.warning("%s: %s", subject, text, extra={"alert": key, "severity": severity.value})


def resolve_alert(session: Session, key: str, ending: str = "") -> bool:
    """What it told of has passed, by `ending`. False: no such alert stands."""
    statement = update(AlertRow).where(col(AlertRow.key) == key, col(AlertRow.resolved).is_(None))
    values = {"resolved": now(), "told": None, "ending": ending}
    if not session.connection().execute(statement.values(**values)).rowcount:
        return False
    log.info("passed: %s", ending, extra={"alert": key})
    return True


def standing(session: Session, key: str) -> AlertRow | None:
    return session.exec(select(AlertRow).where(AlertRow.key == key, col(AlertRow.resolved).is_(None))).first()


def standing_alerts(session: Session) -> Sequence[AlertRow]:
    """Oldest first."""
    return session.exec(select(AlertRow).where(col(AlertRow.resolved).is_(None)).order_by(col(AlertRow.first))).all()


def recent_alerts(session: Session, limit: int) -> Sequence[AlertRow]:
    """Those that stand and those that stood, newest first."""
    newest_first = select(AlertRow).order_by(col(AlertRow.last).desc(), col(AlertRow.id).desc())
    return session.exec(newest_first.limit(limit)).all()


def untold(session: Session) -> Sequence[AlertRow]:
    """Alerts of which somebody may have to be told; oldest first."""
    return session.exec(select(AlertRow).where(col(AlertRow.told).is_(None)).order_by(col(AlertRow.id))).all()
