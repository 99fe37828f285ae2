"""What the outside sees: machines, points, jobs and vaults as frozen values, each fit for `--json`.

Apart from the tables and the documents, so that those can change without breaking whoever reads the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from orchestrator.jobs.backup_job import BackupJob
from orchestrator.jobs.docs import AnyJob
from orchestrator.jobs.restore import RestoreJob
from orchestrator.jobs.states import JobState
from orchestrator.jobs.upkeep import UpkeepJob
from workers.contract.errors import ErrorInfo
from workers.contract.guests import ExtensionState, GuestReport
from workers.contract.machines import MachineSummary, Power, Value
from workers.contract.messages import Progress
from workers.contract.points import Bottleneck, Consistency, DiskPoint, Mode, NotIncluded

if TYPE_CHECKING:
    from orchestrator.catalog.fleet import Newest
    from orchestrator.catalog.schema import EventRow, JobRow, PointRow


class DiskView(Value):
    """A disk of a machine."""

    target: str
    source: str
    format: str
    capacity: int
    excluded: str


class LastPoint(Value):
    id: str
    time: datetime
    consistency: Consistency


class MachineView(Value):
    name: str
    uuid: str
    hypervisor: str
    power: Power
    disks: list[DiskView]
    last_point: LastPoint | None
    protected: bool
    """A `[protect.*]` section covers it."""
    extension: ExtensionState | None = None
    """The extension as the last job found it; None: no job has looked."""
    tags: list[str] = []
    as_of: datetime | None = None
    """When its hypervisor last listed it; None: it was not asked for a list."""
    stale: bool = False
    """Its hypervisor does not answer: so it was at `as_of`."""


class MachinesView(Value):
    machines: list[MachineView]
    silent: dict[str, ErrorInfo] = {}
    """Hypervisor → why it did not answer."""


class PointDiskView(Value):
    """A disk of a point, with what its transfer measured (bytes, seconds)."""

    target: str
    capacity: int
    mode: Mode
    reason: str
    read_bytes: int
    new_bytes: int
    stored_bytes: int
    metadata_bytes: int
    seconds: float
    bottleneck: Bottleneck | None


class PointView(Value):
    id: str
    machine: str
    machine_uuid: str
    time: datetime
    consistency: Consistency
    consistency_goal: Consistency
    consistency_reason: str
    frozen_ms: int | None
    vault: str
    replicas: list[str] = []
    """Other vaults that have it too."""
    disks: list[PointDiskView]
    not_included: list[NotIncluded]
    alerts: list[str]
    damaged: str
    """What a verify found; empty: nothing."""
    verified: datetime | None = None
    """When a verify last read blocks of it and found nothing that affects it; None: never."""
    records: dict[str, str] = {}
    """What applications gave to be kept: `50-postgresql/backup_label` → text."""
    deleted_until: datetime | None = None
    """Deleted, and until when that can be taken back; None: it is not."""
    deleted_reason: str = ""
    pinned: str = ""
    """Why it is not to be deleted; empty: it is not pinned."""
    locked_until: datetime | None = None
    """Until then no deletion becomes final."""
    note: str = ""
    """What follows from what was done with it."""


class ExpiryView(Value):
    """What the policies of its machine say of a point."""

    point: str
    machine: str
    vault: str
    time: datetime
    policies: list[str]
    """Those that count for the machine in this vault."""
    keep: bool
    reasons: list[str]
    deleted_until: datetime | None = None
    """It was deleted just now, and until when that can be taken back."""


class EventView(Value):
    time: datetime
    kind: str
    text: str


class JobView(Value):
    id: str
    kind: str
    machine: str
    hypervisor: str = ""
    state: JobState
    created: datetime
    updated: datetime
    waits: str = ""
    """Why it is still queued."""
    error: ErrorInfo | None
    warnings: list[str]
    point: str | None
    """The point that a backup has made, or that a restore reads."""
    result: dict[str, Any]
    """Of a restore: files, uuid, name, started, replaced; of upkeep: what, and lines for people."""
    progress: list[Progress]
    disks: list[dict[str, str]]
    """target, mode, reason of each disk of a backup; targets of a restore."""
    goal: Consistency | None = None
    """Of a backup: what was asked for in so many words, by somebody or in the configuration."""
    extension: ExtensionState | None = None
    """Of a backup: the extension as it was found in the guest."""
    guest: GuestReport | None = None
    """Of a backup: the application scripts that ran in the guest, and what they printed."""
    events: list[EventView]


class VaultView(Value):
    name: str
    url: str
    replica_of: str | None = None
    """The vault that it follows."""
    points: int | None
    """None: it cannot be opened."""
    free_bytes: int | None
    problem: str
    """Why it cannot be used; empty: it can."""


class PackageView(Value):
    """A built extension package."""

    path: str
    os: str
    version: str
    """With its build; empty if it is refused."""
    serial: int = 0
    signed_by: str = ""
    """Public key, 64 hex digits."""
    files: int = 0
    refused: str = ""
    """Why it is not put into guests; empty: it is."""


class InstalledView(Value):
    """The extension of one machine, as the catalog knows it."""

    machine: str
    uuid: str
    hypervisor: str
    state: ExtensionState


def machine_view(
    summary: MachineSummary,
    last: Newest | None,
    *,
    protected: bool,
    extension: ExtensionState | None = None,
    as_of: datetime | None = None,
    stale: bool = False,
) -> MachineView:
    return MachineView(
        name=summary.machine.name,
        uuid=summary.machine.uuid,
        hypervisor=summary.machine.hypervisor,
        power=summary.power,
        disks=[
            DiskView(
                target=disk.target,
                source=disk.source,
                format=disk.format,
                capacity=disk.capacity,
                excluded=disk.excluded,
            )
            for disk in summary.disks
        ],
        last_point=last and LastPoint(id=last.id, time=last.time, consistency=last.consistency),
        protected=protected,
        extension=extension,
        tags=summary.tags,
        as_of=as_of,
        stale=stale,
    )


def point_view(row: PointRow, *, note: str = "") -> PointView:
    from orchestrator.catalog.points import document

    point = document(row)
    return PointView(
        id=point.id,
        machine=point.machine.name,
        machine_uuid=point.machine.uuid,
        time=point.time,
        consistency=point.consistency,
        consistency_goal=point.consistency_goal,
        consistency_reason=point.consistency_reason,
        frozen_ms=point.frozen_ms,
        vault=row.vault,
        replicas=[name for name in row.replicas.split() if name != row.vault],
        disks=[_point_disk(disk) for disk in point.disks],
        not_included=point.not_included,
        alerts=point.alerts,
        damaged=row.damaged,
        verified=row.verified,
        records=point.records,
        deleted_until=row.deleted_until,
        deleted_reason=row.deleted_reason,
        pinned=row.pinned,
        locked_until=row.locked_until,
        note=note,
    )


def _point_disk(disk: DiskPoint) -> PointDiskView:
    figures = disk.figures.model_dump()
    return PointDiskView(target=disk.target, capacity=disk.capacity, mode=disk.mode, reason=disk.reason, **figures)


def job_view(row: JobRow, job: AnyJob, events: Sequence[EventRow]) -> JobView:
    """Without progress, which lies elsewhere."""
    return JobView(
        id=job.id,
        kind=job.kind,
        machine=row.machine_name,
        hypervisor=row.hypervisor,
        state=job.state,
        created=row.created,
        updated=row.updated,
        error=job.error,
        warnings=job.warnings,
        point=_point_of(job),
        result=_result(job),
        progress=[],
        disks=_disks(job),
        goal=job.goal if isinstance(job, BackupJob) and job.goal_asked else None,
        extension=job.extension if isinstance(job, BackupJob) else None,
        guest=job.guest if isinstance(job, BackupJob) else None,
        events=[
            EventView(time=e.time, kind=e.kind, text=e.text if e.effective else f"{e.text} (ignored)") for e in events
        ],
    )


def _point_of(job: AnyJob) -> str | None:
    match job:
        case BackupJob():
            return job.committed.id if job.committed else None
        case RestoreJob():
            return job.point
        case UpkeepJob():
            return None


def _result(job: AnyJob) -> dict[str, Any]:
    match job:
        case BackupJob():
            return {}
        case RestoreJob():
            defined = job.defined.model_dump(mode="json", exclude={"kind"}) if job.defined else {}
            return {"files": job.files, **defined}
        case UpkeepJob():
            return {"what": job.what, "lines": job.lines}


def _disks(job: AnyJob) -> list[dict[str, str]]:
    match job:
        case BackupJob():
            return [{"target": p.target, "mode": p.mode.value, "reason": p.reason} for p in job.plans]
        case RestoreJob():
            return [{"target": target} for target in job.files]
        case UpkeepJob():
            return []
