"""Who was told what of which alert."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from sqlalchemy import delete, insert, update
from sqlmodel import Session, col, select

from orchestrator.catalog.schema import AlertRow, DeliveryRow, now

_AT_ONCE = 500


def said_of(session: Session, alerts: Collection[int]) -> dict[tuple[str, int], str]:
    """(target, alert) → what it was last told."""
    found: dict[tuple[str, int], str] = {}
    for ids in _chunks(alerts):
        query = select(DeliveryRow.target, DeliveryRow.alert, DeliveryRow.said).where(col(DeliveryRow.alert).in_(ids))
        found |= {(target, alert): said for target, alert, said in session.exec(query)}
    return found


def note_said(session: Session, target: str, said: Collection[tuple[int, str]]) -> None:
    """`target` was told of each alert that it is in that state."""
    connection, moment = session.connection(), now()
    for ids in _chunks([alert for alert, _ in said]):
        before = (col(DeliveryRow.target) == target, col(DeliveryRow.alert).in_(ids))
        connection.execute(delete(DeliveryRow).where(*before))
    rows = [{"target": target, "alert": alert, "said": state, "time": moment} for alert, state in said]
    if rows:
        connection.execute(insert(DeliveryRow), rows)


def settle(session: Session, rows: Iterable[AlertRow]) -> None:
    """Everybody has been told of these, as they were read; one that has changed since is left to be told."""
    alike: dict[tuple[str, bool], list[int]] = {}
    for row in rows:
        if row.id is not None:
            alike.setdefault((row.severity, row.resolved is None), []).append(row.id)
    moment = now()
    for (severity, stands), alerts in alike.items():
        resolved = col(AlertRow.resolved)
        unchanged = (col(AlertRow.severity) == severity, resolved.is_(None) if stands else resolved.is_not(None))
        for ids in _chunks(alerts):
            statement = update(AlertRow).where(col(AlertRow.id).in_(ids), *unchanged).values(told=moment)
            session.connection().execute(statement)


def _chunks(alerts: Iterable[int]) -> Iterator[Sequence[int]]:
    ids = sorted(set(alerts))
    for start in range(0, len(ids), _AT_ONCE):
        yield ids[start : start + _AT_ONCE]
