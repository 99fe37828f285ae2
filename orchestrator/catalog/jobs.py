"""Jobs in the catalog: guarded transitions, one active job per lock, append-only events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, or_, update
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from orchestrator.actor import SCHEDULE, whoami
from orchestrator.catalog.audit import record
from orchestrator.catalog.owner import Owner
from orchestrator.catalog.schema import EventRow, JobRow, now
from orchestrator.jobs.docs import JOB, AnyJob, hypervisor_of
from orchestrator.jobs.states import TERMINAL
from workers.contract.errors import Busy, NotFound, UsageError

RESTORE, ASKED, BACKUP, UPKEEP = 0, 5, 10, 20
"""Usual priorities: of the jobs that wait, the lowest begins first. ASKED: a backup that somebody asked for, and may
wait for at a terminal. A policy moves its backups by four at most."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """With what a job joins the queue."""

    priority: int = BACKUP
    section: str = ""
    """The `[protect.*]` section or kind of upkeep whose schedule it follows; empty: somebody asked for it."""
    due: datetime | None = None
    """The moment of the schedule that it stands for."""
    deadline: datetime | None = None
    asked_by: str = ""
    """Empty: the schedule, or whoever runs this process."""


BY_HAND = Ticket()


class Stale(Exception):
    """Somebody else has moved the job since it was read: read it again."""


def add_job(
    session: Session,
    job: AnyJob,
    owner: Owner,
    *,
    machine: tuple[str, str],
    lock: str,
    uses_point: str = "",
    ticket: Ticket = BY_HAND,
) -> None:
    """Store a new, queued job of `machine` (UUID, name). Raises Busy if an active job has the same lock."""
    moment = now()
    actor = ticket.asked_by or (SCHEDULE if ticket.section else whoami())
    row = JobRow(
        id=job.id,
        kind=job.kind,
        machine_uuid=machine[0],
        machine_name=machine[1],
        hypervisor=hypervisor_of(job) or "",
        vault=job.vault,
        uses_point=uses_point,
        lock=lock,
        state=job.state,
        owner_host=owner.host,
        owner_boot=owner.boot,
        owner_pid=owner.pid,
        owner_started=owner.started,
        created=moment,
        updated=moment,
        priority=ticket.priority,
        section=ticket.section,
        due=ticket.due,
        deadline=ticket.deadline,
        asked_by=actor,
        doc=JOB.dump_json(job).decode(),
    )
    # Looked up first for a message that names the other job; the unique index decides.
    refuse_locked(session, lock)
    session.add(row)
    try:
        session.flush()
    except IntegrityError:
        raise Busy(f"another job works on {machine[1]}", hint="stillframe job list") from None
    record(session, actor, f"{job.kind}.run", machine[1], f"job {job.id}")


def refuse_locked(session: Session, lock: str) -> None:
    """Raises Busy if an active job has `lock`."""
    other = session.exec(select(JobRow).where(JobRow.lock == lock, col(JobRow.active))).first()
    if other is not None:
        raise Busy(
            f"{other.kind} {other.id} works on {other.machine_name} ({other.state})",
            hint=f"watch it: stillframe job watch {other.id}; end it: stillframe job cancel {other.id}",
        )


def load_job(session: Session, job_id: str) -> tuple[JobRow, AnyJob]:
    """Raises NotFound."""
    row = session.get(JobRow, job_id)
    if row is None:
        raise NotFound(f"no job {job_id}", hint="stillframe job list")
    return row, JOB.validate_json(row.doc)


def store_job(session: Session, job: AnyJob, version: int) -> None:
    """Store a transition of the job that was read at `version`. Raises Stale if it has moved since, Busy if a job
    that became active again (a release tried again) meets another on the same lock."""
    moment = now()
    statement = (
        update(JobRow)
        .where(col(JobRow.id) == job.id, col(JobRow.version) == version)
        .values(
            version=version + 1,
            state=job.state,
            active=job.state not in TERMINAL,
            leftover=job.leftover,
            updated=moment,
            heard=moment,
            doc=JOB.dump_json(job).decode(),
        )
    )
    try:
        done = session.connection().execute(statement)
    except IntegrityError:
        raise Busy(f"another job works there: {job.id} has to wait", hint="stillframe job list --active") from None
    if done.rowcount == 0:
        raise Stale(job.id)


def take_over(session: Session, row: JobRow, owner: Owner) -> None:
    """Make `owner` the owner of the job as read. Raises Stale if somebody else was faster."""
    done = session.connection().execute(
        update(JobRow)
        .where(col(JobRow.id) == row.id, col(JobRow.version) == row.version)
        .values(
            version=row.version + 1,
            owner_host=owner.host,
            owner_boot=owner.boot,
            owner_pid=owner.pid,
            owner_started=owner.started,
        )
    )
    if done.rowcount == 0:
        raise Stale(row.id)


def owner_of(row: JobRow) -> Owner:
    return Owner(row.owner_host, row.owner_boot, row.owner_pid, row.owner_started)


def append_event(session: Session, job_id: str, kind: str, text: str, *, effective: bool = True) -> None:
    session.add(EventRow(job=job_id, time=now(), kind=kind, text=text, effective=effective))


def events_of(session: Session, job_id: str) -> Sequence[EventRow]:
    """Oldest first."""
    return session.exec(select(EventRow).where(EventRow.job == job_id).order_by(col(EventRow.id))).all()


def unsettled(session: Session) -> Sequence[JobRow]:
    """Jobs that are active, or have ended with obligations that stand."""
    return session.exec(select(JobRow).where(or_(col(JobRow.active), col(JobRow.leftover)))).all()


def recent_jobs(session: Session, *, active_only: bool, limit: int) -> Sequence[JobRow]:
    """Newest first."""
    query = select(JobRow).order_by(col(JobRow.created).desc()).limit(limit)
    return session.exec(query.where(col(JobRow.active)) if active_only else query).all()


def find_job(session: Session, prefix: str) -> JobRow:
    """By id or unique beginning of one. Raises NotFound, UsageError if several begin so."""
    found = session.exec(select(JobRow).where(col(JobRow.id).startswith(prefix, autoescape=True)).limit(3)).all()
    if not prefix or not found:
        raise NotFound(f"no job {prefix!r}", hint="stillframe job list")
    if len(found) > 1:
        raise UsageError(f"several jobs begin with {prefix}: {', '.join(row.id for row in found)} …")
    return found[0]


def jobs_using(session: Session, point_id: str) -> Sequence[JobRow]:
    """Active jobs that read the point."""
    condition: ColumnElement[bool] = col(JobRow.uses_point) == point_id
    return session.exec(select(JobRow).where(condition, col(JobRow.active))).all()
