"""What is asked of all machines at once: by columns, not by rows with their documents, since there may be ten thousand
machines with three hundred thousand points, and somebody waits for the answer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import aliased
from sqlmodel import Session, col

from orchestrator.catalog.schema import MachineRow, PointRow
from workers.contract.guests import ExtensionState
from workers.contract.points import Consistency

MANY = 1000
"""From so many on, all are read instead of each being named."""


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest point of a machine that is not deleted."""

    id: str
    vault: str
    time: datetime
    consistency: Consistency


@dataclass(frozen=True, slots=True)
class Known:
    """What the catalog knows of a machine beside its points."""

    tags: tuple[str, ...]
    extension: ExtensionState | None
    """As the last job found it; None: no job has looked."""


NOTHING_KNOWN = Known((), None)


def newest_points(session: Session, machines: Collection[str] | None = None) -> dict[str, Newest]:
    """Machine UUID → its newest point that is not deleted; of these machines, or of all that were ever seen."""
    other = aliased(PointRow)
    # One seek per machine in an index of what is not deleted (migration 0004).
    newest = (
        select(col(other.id))
        .where(col(other.machine_uuid) == col(MachineRow.uuid), col(other.deleted_until).is_(None))
        .order_by(col(other.time).desc(), col(other.id).desc())
        .limit(1)
        .correlate(MachineRow)
        .scalar_subquery()
    )
    uuid = col(MachineRow.uuid)
    point = (col(PointRow.id), col(PointRow.vault), col(PointRow.time), col(PointRow.consistency))
    query = select(uuid, *point).join(PointRow, col(PointRow.id) == newest)
    if machines is not None and len(machines) < MANY:
        query = query.where(uuid.in_(machines))
    return {
        uuid: Newest(id, vault, time, Consistency(consistency))
        for uuid, id, vault, time, consistency in session.connection().execute(query)
    }


def known_machines(session: Session, machines: Collection[str] | None = None) -> dict[str, Known]:
    """Machine UUID → what is known; of these machines, or of all that were ever seen."""
    uuid = col(MachineRow.uuid)
    query = select(uuid, col(MachineRow.tags), col(MachineRow.extension))
    if machines is not None and len(machines) < MANY:
        query = query.where(uuid.in_(machines))
    return {
        uuid: Known(
            tags=tuple(tags.splitlines()),
            extension=ExtensionState.model_validate_json(extension) if extension else None,
        )
        for uuid, tags, extension in session.connection().execute(query)
    }
