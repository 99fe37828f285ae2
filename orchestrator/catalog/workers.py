"""Workers that were heard of, and what follows for the jobs that they perform."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlmodel import Session, col, select

from orchestrator.catalog.queue import hear_of, hear_of_hypervisors
from orchestrator.catalog.schema import WorkerRow, now
from workers.contract.messages import SILENT_SECONDS, Beat

FORGET_DAYS = 30


def note_beat(session: Session, beat: Beat) -> bool:
    """Store a sign of life, and pass it on to the jobs that it is one for. True: the worker is new, or was started
    again, or was silent."""
    moment = now()
    row = session.get(WorkerRow, beat.worker)
    known = row is not None and not _silent(row, moment) and Beat.model_validate_json(row.doc).started == beat.started
    row = row or WorkerRow(name=beat.worker, host=beat.host, pid=beat.pid, seen=moment)
    names = " ".join(beat.hypervisors)
    row.sqlmodel_update(
        {"host": beat.host, "pid": beat.pid, "hypervisors": names, "seen": moment, "doc": beat.model_dump_json()}
    )
    session.add(row)
    hear_of(session, {one.job for one in beat.running})
    if beat.free <= 0:
        hear_of_hypervisors(session, beat.hypervisors)
    return not known


def _silent(row: WorkerRow, moment: datetime, seconds: float = SILENT_SECONDS) -> bool:
    return row.seen < moment - timedelta(seconds=seconds)


def workers(session: Session) -> Sequence[WorkerRow]:
    """All that were ever heard of, by name."""
    return session.exec(select(WorkerRow).order_by(col(WorkerRow.name))).all()


def served(session: Session, seconds: float = SILENT_SECONDS) -> frozenset[str]:
    """Hypervisors with a worker that was heard of within so many seconds, and that takes commands."""
    recent = select(WorkerRow).where(col(WorkerRow.seen) >= now() - timedelta(seconds=seconds))
    alive = [row for row in session.exec(recent).all() if not (row.doc and Beat.model_validate_json(row.doc).ending)]
    return frozenset(name for row in alive for name in row.hypervisors.split())
