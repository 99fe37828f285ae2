"""Points and machines in the catalog: what the vaults hold, as far as one must know without opening them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import delete, update
from sqlmodel import Session, col, select

from orchestrator.catalog.schema import MachineRow, PointRow, now
from workers.contract.guests import ExtensionState
from workers.contract.machines import MachineRef
from workers.contract.points import Point

UNSAID = "pinned"
"""Stands for the reason of a pin that has none."""


def put_point(session: Session, vault: str, point: Point) -> None:
    """Register a committed point; again is harmless. What is known of it beyond its manifest stays."""
    bare = point.model_copy(update={"definition": "", "nvram": None})
    fields: dict[str, Any] = {
        "vault": vault,
        "machine_uuid": point.machine.uuid,
        "machine_name": point.machine.name,
        "time": point.time,
        "consistency": point.consistency.value,
        "has_checkpoint": any(disk.checkpoint for disk in point.disks),
        "locked_until": point.locked_until,
        "doc": bare.model_dump_json(),
    }
    row = session.get(PointRow, point.id)
    if row is None:
        session.add(PointRow(id=point.id, **fields))
    else:
        row.sqlmodel_update(fields)
    session.flush()


def document(row: PointRow) -> Point:
    """The manifest without definition and NVRAM."""
    return Point.model_validate_json(row.doc)


def newest_base(session: Session, machine_uuid: str, vault: str) -> Point | None:
    """The newest point some of whose disks have a checkpoint; a damaged one too, since what the vault has lost of it is
    read again (`workers/healing.py`). One that is deleted is whole until that is final, and the backup that goes on
    from it finds out."""
    row = session.exec(
        select(PointRow)
        .where(
            PointRow.machine_uuid == machine_uuid,
            PointRow.vault == vault,
            col(PointRow.has_checkpoint),
        )
        .order_by(col(PointRow.time).desc())
        .limit(1)
    ).first()
    return document(row) if row else None


def points_of(
    session: Session, machines: Collection[str] | None = None, *, vault: str | None = None
) -> Sequence[PointRow]:
    """Oldest first; of the machines with those UUIDs, or of all."""
    query = select(PointRow).order_by(col(PointRow.time), col(PointRow.id))
    if machines is not None:
        query = query.where(col(PointRow.machine_uuid).in_(machines))
    if vault is not None:
        query = query.where(PointRow.vault == vault)
    return session.exec(query).all()


def listed_points(
    session: Session, machines: Collection[str] | None = None, *, live: bool, deleted: bool, limit: int | None
) -> Sequence[PointRow]:
    """Oldest first: those that are not deleted, those that are, or both; the newest `limit` of them, if that is
    given."""
    query = select(PointRow).order_by(col(PointRow.time).desc(), col(PointRow.id).desc())
    if machines is not None:
        query = query.where(col(PointRow.machine_uuid).in_(machines))
    if not (live and deleted):
        query = query.where(col(PointRow.deleted_until).is_(None) if live else col(PointRow.deleted_until).is_not(None))
    return session.exec(query.limit(limit)).all()[::-1]


def has_points(session: Session, machine_uuid: str, vault: str) -> bool:
    found = select(PointRow.id).where(PointRow.machine_uuid == machine_uuid, PointRow.vault == vault)
    return session.exec(found.limit(1)).first() is not None


def machines_named(session: Session, name: str) -> dict[str, str]:
    """UUID → hypervisor of the machines meant by `name`: a UUID, `hypervisor/name`, or a name. A name means the
    machines that have it now; if none has, those that once had it."""
    hypervisor, _, bare = name.rpartition("/")
    now_so = [row for row in seen_machines(session) if row.uuid == name or row.name == bare]
    found = {row.uuid: row.hypervisor for row in now_so if hypervisor in ("", row.hypervisor)}
    if not found:
        once = session.exec(select(PointRow).where(PointRow.machine_name == name)).all()
        found = {row.machine_uuid: document(row).machine.hypervisor for row in once}
    return found


def points_with_prefix(session: Session, prefix: str, limit: int = 3) -> Sequence[PointRow]:
    return session.exec(select(PointRow).where(col(PointRow.id).startswith(prefix, autoescape=True)).limit(limit)).all()


def remove_point(session: Session, point_id: str) -> None:
    session.connection().execute(delete(PointRow).where(col(PointRow.id) == point_id))


def damaged_points(session: Session, vault: str) -> list[str]:
    """Ids of the points of a vault that a verify found damaged; oldest first."""
    query = select(PointRow.id).where(PointRow.vault == vault, PointRow.damaged != "")
    return list(session.exec(query.order_by(col(PointRow.time), col(PointRow.id))).all())


def mark_damaged(session: Session, point_id: str, damage: str) -> None:
    """Empty `damage`: a later verify found it whole again."""
    session.connection().execute(update(PointRow).where(col(PointRow.id) == point_id).values(damaged=damage))


def mark_deleted(session: Session, point_id: str, until: datetime | None, reason: str = "") -> None:
    """Until when its deletion can be taken back; None: it is not deleted."""
    values = {"deleted_until": until, "deleted_reason": reason}
    session.connection().execute(update(PointRow).where(col(PointRow.id) == point_id).values(values))


def mark_pinned(session: Session, point_id: str, reason: str | None) -> None:
    """Why it is not to be deleted; None: it is not pinned."""
    why = UNSAID if reason == "" else reason or ""
    session.connection().execute(update(PointRow).where(col(PointRow.id) == point_id).values(pinned=why))


def note_replica(session: Session, vault: str, replica: str, held: Collection[str]) -> None:
    """Of the points of `vault`, a replica has those with the ids `held`."""
    for row in points_of(session, vault=vault):
        names = set(row.replicas.split()) - {replica} | ({replica} if row.id in held else set())
        row.replicas = " ".join(sorted(names))
    session.flush()


def mark_verified(session: Session, point_id: str, when: datetime) -> None:
    """Blocks of it were read then."""
    session.connection().execute(update(PointRow).where(col(PointRow.id) == point_id).values(verified=when))


def see_machine(session: Session, machine: MachineRef, seen: datetime | None = None) -> None:
    """A job has found the machine there, under that name; with `seen`, a point says so of that moment, which counts
    for less than what was seen later. What is known of it beyond that stays."""
    row = session.get(MachineRow, machine.uuid)
    moment = seen or now()
    if row is None:
        session.add(MachineRow(uuid=machine.uuid, hypervisor=machine.hypervisor, name=machine.name, seen=moment))
    elif seen is None or row.seen <= seen:
        row.sqlmodel_update({"hypervisor": machine.hypervisor, "name": machine.name, "seen": moment})
        if seen is None:
            row.gone = row.missed = None
    session.flush()


def tags_of(session: Session, machine_uuid: str) -> list[str]:
    """As the last discovery found them; none of a machine that was never seen."""
    tags = session.exec(select(MachineRow.tags).where(MachineRow.uuid == machine_uuid)).first()
    return (tags or "").splitlines()


def put_extension(session: Session, machine_uuid: str, state: ExtensionState) -> None:
    """What a job has found; of a machine that was never seen nothing is kept."""
    row = session.get(MachineRow, machine_uuid)
    if row is not None:
        row.extension = state.model_dump_json()
        session.flush()


def extensions(session: Session) -> dict[str, ExtensionState]:
    """Machine UUID → its extension, where a job has looked."""
    return {
        row.uuid: ExtensionState.model_validate_json(row.extension) for row in seen_machines(session) if row.extension
    }


def seen_machines(session: Session) -> Sequence[MachineRow]:
    return session.exec(select(MachineRow)).all()
