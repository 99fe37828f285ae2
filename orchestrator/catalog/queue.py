"""The queue of jobs, as far as deciding who begins next needs it: without their documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import update
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from orchestrator.catalog.owner import Owner
from orchestrator.catalog.schema import JobRow, LeaseRow, now
from orchestrator.jobs.states import JobState

DISPATCH = "dispatch"
"""Row in `lease`: who begins jobs touches it first, so that no two count the same free slot."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An active job, as the queue sees it."""

    id: str
    kind: str
    machine: str
    hypervisor: str
    """Empty: it needs none."""
    vault: str
    queued: bool
    priority: int
    moment: datetime
    """When it was due, or asked for."""
    owner: Owner
    section: str = ""
    """By whose schedule it was made; empty: somebody asked for it."""


def entries(session: Session) -> list[Entry]:
    """All active jobs."""
    row = JobRow
    columns = (row.id, row.kind, row.machine_name, row.hypervisor, row.vault, row.state, row.priority)
    moments = (row.due, row.created)
    owners = (row.section, row.owner_host, row.owner_boot, row.owner_pid, row.owner_started)
    query = select(*columns, *moments, *owners).where(col(row.active))  # type: ignore[call-overload]
    return [
        Entry(
            id=found[0],
            kind=found[1],
            machine=found[2],
            hypervisor=found[3],
            vault=found[4],
            queued=found[5] == JobState.QUEUED,
            priority=found[6],
            moment=found[7] or found[8],
            section=found[9],
            owner=Owner(*found[10:]),
        )
        for found in session.exec(query).all()
    ]


def anything_queued(session: Session, owner: Owner) -> bool:
    """Whether a job of `owner` waits."""
    mine = (col(JobRow.owner_host) == owner.host, col(JobRow.owner_pid) == owner.pid)
    query = select(JobRow.id).where(col(JobRow.active), col(JobRow.state) == JobState.QUEUED, *mine).limit(1)
    return session.exec(query).first() is not None


def lock_dispatch(session: Session) -> None:
    """Until the end of this transaction nobody else begins a job."""
    touch = update(LeaseRow).where(col(LeaseRow.name) == DISPATCH).values(holder="")
    if session.connection().execute(touch).rowcount == 0:
        try:
            with session.begin_nested():
                session.add(LeaseRow(name=DISPATCH, holder=""))
        except IntegrityError:  # somebody else was faster: wait for them
            session.connection().execute(touch)


def hear_of(session: Session, jobs: Iterable[str]) -> None:
    """Somebody performs a command of these."""
    wanted = list(jobs)
    if wanted:
        session.connection().execute(
            update(JobRow).where(col(JobRow.id).in_(wanted), col(JobRow.active)).values(heard=now())
        )


def hear_of_hypervisors(session: Session, hypervisors: Iterable[str]) -> None:
    """Their workers have so much to do that a command may wait."""
    names = list(hypervisors)
    if names:
        condition = (col(JobRow.hypervisor).in_(names), col(JobRow.active), col(JobRow.state) != JobState.QUEUED)
        session.connection().execute(update(JobRow).where(*condition).values(heard=now()))


def begun(session: Session, owner: Owner) -> Sequence[JobRow]:
    """Active jobs of `owner` that are under way."""
    mine = (
        col(JobRow.owner_host) == owner.host,
        col(JobRow.owner_boot) == owner.boot,
        col(JobRow.owner_pid) == owner.pid,
    )
    return session.exec(select(JobRow).where(col(JobRow.active), col(JobRow.state) != JobState.QUEUED, *mine)).all()
