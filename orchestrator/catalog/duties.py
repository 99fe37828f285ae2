"""What is in force for machines by sections, and up to when it is decided: read at once, changed one by one, and each
change only if nobody else was faster.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import bindparam, delete, select, text, update
from sqlmodel import Session, col

from orchestrator.catalog.schema import DutyRow, JobRow, MachineRow, PointRow, UtcDateTime
from orchestrator.scheduler import Active, Adopt, Drop, Duty, Key, Machine

_MACHINE = "machine:"
_JOIN = (
    "INSERT INTO duty (subject, section, handled, outcome, policy, vault, schedule, first) "
    "VALUES (:subject, :section, :handled, :outcome, :policy, :vault, :schedule, :first) ON CONFLICT DO NOTHING"
)


def duties(session: Session) -> dict[Key, Duty]:
    """Of all machines."""
    names = ("subject", "section", *_NAMES)
    columns: list[Any] = [col(getattr(DutyRow, name)) for name in names]
    query = select(*columns).where(col(DutyRow.subject).startswith(_MACHINE))
    return {(row[0].removeprefix(_MACHINE), row[1]): Duty(*row[2:]) for row in session.connection().execute(query)}


_NAMES = ("handled", "policy", "vault", "schedule", "first", "outcome")
"""Columns, in the order of `Duty`."""


def join(session: Session, adopted: Iterable[Adopt]) -> None:
    """Put duties in force that are new; of two controllers that do so, the first one counts."""
    rows = [{**_key(one.machine.uuid, one.section.name), **_values(one.after)} for one in adopted]
    if rows:
        moments = [bindparam(name, type_=UtcDateTime()) for name in ("handled", "first")]
        session.connection().execute(text(_JOIN).bindparams(*moments), rows)


def replace(session: Session, uuid: str, section: str, before: Duty, after: Duty) -> bool:
    """Put `after` in force. False: somebody else has changed it since it was read."""
    statement = update(DutyRow).where(*_unchanged(uuid, section, before)).values(**_values(after))
    return session.connection().execute(statement).rowcount > 0


def drop(session: Session, one: Drop) -> None:
    session.connection().execute(delete(DutyRow).where(*_unchanged(one.uuid, one.section, one.before)))


def _key(uuid: str, section: str) -> dict[str, Any]:
    return {"subject": f"{_MACHINE}{uuid}", "section": section}


def _values(duty: Duty) -> dict[str, Any]:
    return {name: getattr(duty, name) for name in _NAMES}


def _unchanged(uuid: str, section: str, duty: Duty) -> list[Any]:
    return [
        col(DutyRow.subject) == f"{_MACHINE}{uuid}",
        col(DutyRow.section) == section,
        col(DutyRow.handled) == duty.handled,
        col(DutyRow.schedule) == duty.schedule,
    ]


def machines(session: Session, hypervisors: Iterable[str]) -> list[Machine]:
    """All that were ever seen; `away` says why none of the hypervisors can begin a backup of it."""
    known = set(hypervisors)
    where = (col(MachineRow.uuid), col(MachineRow.hypervisor), col(MachineRow.name), col(MachineRow.tags))
    query = select(*where, col(MachineRow.power), col(MachineRow.gone), col(MachineRow.missed), col(MachineRow.doubt))
    found = []
    for uuid, hypervisor, name, tags, power, gone, missed, doubt in session.connection().execute(query):
        away: str = doubt
        if gone is not None:
            away = f"it is gone since {gone:%Y-%m-%d %H:%M} UTC"
        elif hypervisor not in known:
            away = f"its hypervisor {hypervisor} is not configured"
        elif missed is not None:
            away = f"{hypervisor} no longer lists it, since {missed:%Y-%m-%d %H:%M} UTC"
        elif not power:
            away = "no hypervisor has listed it yet"
        found.append(Machine(uuid, hypervisor, name, tuple(tags.splitlines()), away))
    return found


def active(session: Session) -> dict[str, Active]:
    """Machine UUID → the job that has it for itself."""
    columns = (col(JobRow.lock), col(JobRow.id), col(JobRow.kind), col(JobRow.section), col(JobRow.state))
    query = select(*columns).where(col(JobRow.active), col(JobRow.lock).startswith(_MACHINE))
    found = session.connection().execute(query)
    return {lock.removeprefix(_MACHINE): Active(id, kind, section, state) for lock, id, kind, section, state in found}


def pointed(session: Session) -> set[tuple[str, str]]:
    """(machine UUID, vault) of all that have a point."""
    query = select(col(PointRow.machine_uuid), col(PointRow.vault)).distinct()
    return {(uuid, vault) for uuid, vault in session.connection().execute(query)}
