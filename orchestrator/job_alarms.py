"""How a job ended, told: in the transaction in which it ends, so that neither is there without the other."""

from __future__ import annotations

from sqlmodel import Session, col, select

from orchestrator.alarms import Before, job_ended
from orchestrator.catalog.alerts import apply
from orchestrator.catalog.points import document
from orchestrator.catalog.schema import AlertRow, JobRow, PointRow
from orchestrator.jobs.backup_job import BackupJob
from orchestrator.jobs.docs import AnyJob
from orchestrator.jobs.states import TERMINAL, JobState
from orchestrator.jobs.upkeep import UpkeepJob
from workers.logs import about

POINTS = 10
"""So many of its last points say what a machine's points are usually worth."""
_ROWS = 10
"""So many of the jobs before are looked at: what failed oftener in a row is as bad."""


def tell(session: Session, row: JobRow, before: AnyJob, after: AnyJob) -> None:
    """Raise and resolve what follows, if the job has just ended; `row` as it was read."""
    if after.state in TERMINAL and before.state not in TERMINAL:
        with about(job=after.id):
            apply(session, job_ended(after, _known(session, row, after)))


def _known(session: Session, row: JobRow, job: AnyJob) -> Before:
    subject = f"vault:{job.vault}" if isinstance(job, UpkeepJob) else f"machine:{row.machine_uuid}"
    keys = session.exec(
        select(AlertRow.key).where(
            col(AlertRow.resolved).is_(None),
            col(AlertRow.key).contains(subject, autoescape=True) | col(AlertRow.key).endswith(f"job:{job.id}"),
        )
    ).all()
    found = Before(failures=_failures(session, row, job), standing=frozenset(keys))
    return _points(session, job, found) if isinstance(job, BackupJob) else found


def _failures(session: Session, row: JobRow, job: AnyJob) -> int:
    """Of the same kind and subject, in a row until now; a cancelled one breaks no row and makes none longer."""
    query = select(JobRow.state).where(JobRow.kind == row.kind, JobRow.id != row.id, ~col(JobRow.active))
    if isinstance(job, UpkeepJob):
        query = query.where(JobRow.lock == row.lock)
    else:
        query = query.where(JobRow.machine_uuid == row.machine_uuid)
    query = query.where(JobRow.state != JobState.CANCELLED.value).order_by(col(JobRow.created).desc()).limit(_ROWS)
    count = 0
    for state in session.exec(query):
        if state != JobState.FAILED.value:
            break
        count += 1
    return count


def _points(session: Session, job: BackupJob, found: Before) -> Before:
    rows = session.exec(
        select(PointRow)
        .where(
            PointRow.machine_uuid == job.machine.uuid,
            PointRow.vault == job.vault,
            PointRow.id != job.point,
            col(PointRow.deleted_until).is_(None),
        )
        .order_by(col(PointRow.time).desc())
        .limit(POINTS)
    ).all()
    points = [document(one) for one in rows]
    return Before(
        failures=found.failures,
        best=max((point.consistency for point in points), key=lambda one: one.rank, default=None),
        included=frozenset(disk.target for disk in points[0].disks) if points else frozenset(),
        standing=found.standing,
    )
