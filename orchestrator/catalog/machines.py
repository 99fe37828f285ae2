"""Machines in the catalog as hypervisors listed them: a cache of what is there, and what was last known of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar

from sqlalchemy import delete, or_, update
from sqlalchemy.orm import Mapped
from sqlmodel import Session, col, select
from sqlmodel.sql.expression import SelectOfScalar

from orchestrator.catalog.schema import HypervisorRow, LeaseRow, MachineRow, SightingRow
from orchestrator.discovery import Answer, Awaited, Change, Known, Listed, Seen, Silent
from workers.contract.machines import MachineSummary, Power
from workers.contract.messages import MachinesListed

T = TypeVar("T")

AWAIT = timedelta(seconds=60)
"""So long an answer is waited for."""
_LEASE = "discovery"


@dataclass(frozen=True, slots=True)
class Sighting:
    """A machine as a hypervisor last listed it."""

    summary: MachineSummary
    as_of: datetime | None
    """When it was listed; None: never, by this catalog."""
    problem: str
    """Why its hypervisor did not answer since; empty: it did."""


def alone(session: Session) -> None:
    """Until the end of the transaction nobody else decides what has become of machines."""
    found = session.connection().execute(update(LeaseRow).where(col(LeaseRow.name) == _LEASE).values(holder=""))
    if not found.rowcount:
        session.add(LeaseRow(name=_LEASE, holder=""))
        session.flush()


# --- hypervisors ---------------------------------------------------------------------------------------------------


def hypervisors(session: Session) -> dict[str, HypervisorRow]:
    return {row.name: row for row in session.exec(select(HypervisorRow)).all()}


def _hypervisor(session: Session, name: str) -> HypervisorRow:
    row = session.get(HypervisorRow, name)
    if row is None:
        row = HypervisorRow(name=name)
        session.add(row)
    return row


def ask(session: Session, names: Iterable[str], moment: datetime) -> None:
    """Note that they are asked."""
    for name in names:
        _hypervisor(session, name).asked = moment
    session.flush()


def unanswered(session: Session, names: Collection[str], now: datetime) -> list[str]:
    """Those whose answer is overdue."""
    found = hypervisors(session)
    return [name for name in names if name in found and _overdue(found[name], now)]


def _overdue(row: HypervisorRow, now: datetime) -> bool:
    return row.asked is not None and now - row.asked > AWAIT


def note_silence(session: Session, name: str, why: str) -> None:
    row = _hypervisor(session, name)
    row.asked, row.problem = None, why
    session.flush()


def note_listing(session: Session, listing: MachinesListed) -> None:
    """Keep what a hypervisor has listed; only what differs is written."""
    row = _hypervisor(session, listing.hypervisor)
    row.asked, row.problem, row.listed = None, "", listing.asked
    query = select(SightingRow).where(SightingRow.hypervisor == listing.hypervisor)
    before = {sighting.uuid: sighting for sighting in session.exec(query).all()}
    for summary in listing.machines:
        old = before.pop(summary.machine.uuid, None)
        kept = summary
        if old is not None and not listing.disks:
            kept = summary.model_copy(update={"disks": MachineSummary.model_validate_json(old.doc).disks})
        doc = kept.model_dump_json()
        if old is None:
            session.add(SightingRow(hypervisor=listing.hypervisor, uuid=summary.machine.uuid, doc=doc))
        elif old.doc != doc:
            old.doc = doc
    for sighting in before.values():
        if listing.complete:
            session.delete(sighting)
        else:  # it is off, as far as anybody can tell
            off = MachineSummary.model_validate_json(sighting.doc).model_copy(update={"power": Power.OFF})
            sighting.doc = off.model_dump_json()
    session.flush()


def forget_others(session: Session, configured: Collection[str]) -> None:
    """What was listed by hypervisors that are not configured any more."""
    for table, name in ((SightingRow, col(SightingRow.hypervisor)), (HypervisorRow, col(HypervisorRow.name))):
        session.connection().execute(delete(table).where(name.not_in(list(configured))))


# --- what `discovery.decide` is given, and what becomes of its decisions -------------------------------------------


def answers(
    session: Session, configured: Collection[str], now: datetime, only: Collection[str] | None = None
) -> dict[str, Answer]:
    """Of each configured hypervisor; of the machines `only`, or of all."""
    rows = hypervisors(session)
    seen: dict[str, dict[str, Seen]] = {}
    for sighting in session.exec(_chosen(select(SightingRow), col(SightingRow.uuid), only)).all():
        seen.setdefault(sighting.hypervisor, {})[sighting.uuid] = _seen(sighting)
    return {name: _answer(rows.get(name), seen.get(name, {}), now) for name in configured}


def _answer(row: HypervisorRow | None, seen: dict[str, Seen], now: datetime) -> Answer:
    if row is not None and row.problem:
        return Silent(row.problem)
    if row is not None and _overdue(row, now):
        return Silent(f"no answer since {row.asked:%H:%M:%S} UTC")
    if row is None or row.asked is not None or row.listed is None:
        return Awaited()
    return Listed(seen, row.listed)


def _seen(row: SightingRow) -> Seen:
    summary = MachineSummary.model_validate_json(row.doc)
    return Seen(summary.machine.name, summary.power, tuple(summary.tags))


MANY = 500
"""More than that are not named in a query, but found by reading all."""


def _chosen(query: SelectOfScalar[T], uuid: Mapped[str], only: Collection[str] | None) -> SelectOfScalar[T]:
    return query if only is None or len(only) > MANY else query.where(uuid.in_(list(only)))


def known(session: Session, only: Collection[str] | None = None) -> dict[str, Known]:
    """UUID → machine; of the machines `only`, or of all."""
    rows: Sequence[MachineRow] = session.exec(_chosen(select(MachineRow), col(MachineRow.uuid), only)).all()
    return {row.uuid: as_known(row) for row in rows}


def as_known(row: MachineRow) -> Known:
    return Known(
        uuid=row.uuid,
        hypervisor=row.hypervisor,
        name=row.name,
        power=Power(row.power) if row.power else None,
        tags=tuple(row.tags.split()),
        gone=row.gone is not None,
        missed=row.missed,
        doubt=row.doubt,
    )


def concerned(session: Session, names: Collection[str]) -> set[str]:
    """UUIDs of the machines that an answer of those hypervisors may say something new of."""
    there = session.exec(select(SightingRow.uuid).where(col(SightingRow.hypervisor).in_(list(names)))).all()
    home = select(MachineRow.uuid).where(
        or_(
            col(MachineRow.hypervisor).in_(list(names)),
            col(MachineRow.missed).is_not(None),
            col(MachineRow.doubt) != "",
        )
    )
    return {*there, *session.exec(home.where(col(MachineRow.gone).is_(None))).all()}


def homeless(session: Session, configured: Collection[str]) -> set[str]:
    """UUIDs of machines whose hypervisor is not configured any more."""
    query = select(MachineRow.uuid).where(
        col(MachineRow.hypervisor).not_in(list(configured)), col(MachineRow.gone).is_(None)
    )
    return set(session.exec(query).all())


def apply(session: Session, change: Change, now: datetime) -> None:
    """Store a decision."""
    machine = change.machine
    row = session.get(MachineRow, machine.uuid)
    if row is None:
        row = MachineRow(uuid=machine.uuid, hypervisor=machine.hypervisor, name=machine.name, seen=now)
        session.add(row)
    if not machine.gone and machine.missed is None:
        row.seen = now
    row.sqlmodel_update(
        {
            "hypervisor": machine.hypervisor,
            "name": machine.name,
            "power": machine.power or "",
            "tags": "\n".join(machine.tags),
            "gone": (row.gone or now) if machine.gone else None,
            "missed": machine.missed,
            "doubt": machine.doubt,
        }
    )


def doubtful(session: Session) -> Sequence[MachineRow]:
    return session.exec(select(MachineRow).where(col(MachineRow.doubt) != "")).all()


# --- looking -------------------------------------------------------------------------------------------------------


def sightings(session: Session, hypervisor: str | None = None) -> list[Sighting]:
    """Machines that are there, by name, as they were last listed: each where it is, one in doubt everywhere."""
    hosts = hypervisors(session)
    there = select(MachineRow.uuid, MachineRow.hypervisor, MachineRow.doubt).where(col(MachineRow.gone).is_(None))
    rows = {uuid: (where, doubt) for uuid, where, doubt in session.exec(there)}
    found = []
    query = select(SightingRow.hypervisor, SightingRow.uuid, SightingRow.doc)
    if hypervisor is not None:
        query = query.where(SightingRow.hypervisor == hypervisor)
    for name, uuid, doc in session.exec(query):
        where, doubt = rows.get(uuid, ("", ""))
        if not (doubt or where == name):
            continue
        host = hosts.get(name)
        summary = MachineSummary.model_validate_json(doc)
        found.append(Sighting(summary, host.listed if host else None, host.problem if host else ""))
    return sorted(found, key=lambda one: (one.summary.machine.name, one.summary.machine.hypervisor))


def also_on(session: Session, uuid: str) -> list[str]:
    """Hypervisors that list the machine."""
    return sorted(session.exec(select(SightingRow.hypervisor).where(SightingRow.uuid == uuid)).all())


def gone(session: Session) -> Sequence[MachineRow]:
    """By name."""
    query = select(MachineRow).where(col(MachineRow.gone).is_not(None)).order_by(col(MachineRow.name))
    return session.exec(query).all()
