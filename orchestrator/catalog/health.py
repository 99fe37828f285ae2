"""What the catalog knows of how things stand: machines and their last points, vaults as found, who is alive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import delete, func
from sqlmodel import Session, col, select

from orchestrator.alarms import Late
from orchestrator.catalog.schema import JobRow, LeaseRow, MachineRow, VaultLookRow, WorkerRow

KEPT = timedelta(days=60)
"""For how long looks at vaults are kept."""
GROWTH = timedelta(days=7)
"""Over how long growth is measured, if that is known."""


@dataclass(frozen=True, slots=True)
class Place:
    """A machine that is there."""

    uuid: str
    name: str
    hypervisor: str
    tags: tuple[str, ...]


def places(session: Session) -> list[Place]:
    """Machines that are there, as far as the catalog knows."""
    columns = (col(MachineRow.uuid), col(MachineRow.name), col(MachineRow.hypervisor), col(MachineRow.tags))
    rows = session.connection().execute(select(*columns).where(col(MachineRow.gone).is_(None)))
    return [Place(uuid, name, hypervisor, tuple(tags.splitlines())) for uuid, name, hypervisor, tags in rows]


def late_jobs(session: Session, now: datetime) -> list[Late]:
    """Active ones whose deadline has passed."""
    rows = session.exec(select(JobRow).where(col(JobRow.active), col(JobRow.deadline) < now)).all()
    return [
        Late(row.id, row.machine_uuid, row.machine_name, row.state, row.deadline, row.section)
        for row in rows
        if row.deadline is not None and row.kind == "backup"
    ]


def active_jobs(session: Session) -> Sequence[JobRow]:
    """Oldest first."""
    return session.exec(select(JobRow).where(col(JobRow.active)).order_by(col(JobRow.created))).all()


# --- vaults ----------------------------------------------------------------------------------------------------------


def note_look(session: Session, row: VaultLookRow) -> None:
    session.add(row)
    session.connection().execute(delete(VaultLookRow).where(col(VaultLookRow.time) < row.time - KEPT))
    session.flush()


def last_look(session: Session, vault: str) -> VaultLookRow | None:
    newest_first = select(VaultLookRow).where(VaultLookRow.vault == vault).order_by(col(VaultLookRow.time).desc())
    return session.exec(newest_first.limit(1)).first()


def growth(session: Session, vault: str, now: datetime) -> float | None:
    """Bytes a day, by the oldest look of the last week; None before there is a whole day between two."""
    query = select(VaultLookRow).where(
        VaultLookRow.vault == vault, col(VaultLookRow.used_bytes).is_not(None), col(VaultLookRow.time) > now - GROWTH
    )
    first = session.exec(query.order_by(col(VaultLookRow.time)).limit(1)).first()
    last = session.exec(query.order_by(col(VaultLookRow.time).desc()).limit(1)).first()
    if first is None or last is None or last.used_bytes is None or first.used_bytes is None:
        return None
    days = (last.time - first.time) / timedelta(days=1)
    return (last.used_bytes - first.used_bytes) / days if days >= 1 else None


def last_upkeep(session: Session, vault: str) -> dict[str, datetime]:
    """Kind of upkeep → when a job of it last succeeded."""
    query = (
        select(JobRow.lock, func.max(JobRow.updated))
        .where(JobRow.kind == "upkeep", JobRow.vault == vault, JobRow.state == "succeeded")
        .group_by(col(JobRow.lock))
    )
    return {lock.split(":")[1]: time for lock, time in session.exec(query).all()}


def upkeep_lock(what: str, vault: str) -> str:
    """One at a time of each kind and vault."""
    return f"upkeep:{what}:{vault}"


# --- who is alive ----------------------------------------------------------------------------------------------------


def leases(session: Session) -> Sequence[LeaseRow]:
    return session.exec(select(LeaseRow)).all()


def workers(session: Session) -> Sequence[WorkerRow]:
    return session.exec(select(WorkerRow).order_by(col(WorkerRow.name))).all()
