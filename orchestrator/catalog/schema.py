"""The tables. What a rule needs to query is a column; everything else of a job or point is its document, as JSON.

Points lie here without definition and NVRAM: those may hold secrets, and stay in the vault, encrypted.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import BigInteger, DateTime, Dialect, Index, Text, TypeDecorator
from sqlmodel import Field, SQLModel

HEAD = "0004"
"""Newest migration; a test holds it against the migrations themselves."""


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC in Python on every database (SQLite forgets the zone)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None:
            return None
        moment: datetime = value
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def now() -> datetime:
    return datetime.now(UTC)


class MachineRow(SQLModel, table=True):
    """A machine that was seen, so that its points can be named after it is gone."""

    __tablename__: ClassVar[str] = "machine"

    uuid: str = Field(primary_key=True)
    hypervisor: str
    name: str = Field(index=True)
    seen: datetime = Field(sa_type=UtcDateTime)
    extension: str = Field(default="", sa_type=Text)
    """An `ExtensionState` as the last job found it; empty: no job has looked yet."""
    tags: str = Field(default="", sa_type=Text)
    """Tags from its libvirt metadata and description, one per line, as the last discovery found them."""
    power: str = Field(default="", sa_type=Text)
    """A `Power`, as the last discovery found it; empty: nobody looked."""
    gone: datetime | None = Field(default=None, sa_type=UtcDateTime)
    """Since when no hypervisor has it; None: it is there."""
    missed: datetime | None = Field(default=None, sa_type=UtcDateTime)
    """When its hypervisor first listed its machines without it: on its way to another, or gone."""
    doubt: str = Field(default="", sa_type=Text)
    """Why nobody can say which of two machines it is (it runs on two hypervisors at once): no backup of it then begins
    by itself. Empty: one can."""


class JobRow(SQLModel, table=True):
    __tablename__: ClassVar[str] = "job"
    # Its two partial indexes (one active job per lock; what is unsettled) are made by the migration alone: naming them
    # here would load PostgreSQL's whole dialect at each start of a command (50 ms).

    id: str = Field(primary_key=True)
    kind: str
    machine_uuid: str = Field(index=True)
    machine_name: str
    hypervisor: str
    vault: str
    uses_point: str = Field(default="", index=True)
    """The point that the job reads: the one it restores, or its base."""
    lock: str
    """What the job has for itself while it is active: `machine:<uuid>` or `file:<path>`."""
    state: str
    active: bool = True
    leftover: bool = False
    version: int = 0
    """Counts transitions: a writer that read an older one has lost."""
    owner_host: str
    owner_boot: str
    owner_pid: int
    owner_started: int = Field(sa_type=BigInteger)
    created: datetime = Field(sa_type=UtcDateTime, index=True)
    updated: datetime = Field(sa_type=UtcDateTime)
    priority: int = 10
    """Of those that are queued the lowest is begun first: `catalog.queue.RESTORE`, `BACKUP`, `UPKEEP`, give or take a
    policy's own."""
    section: str = Field(default="", sa_type=Text)
    """The `[protect.*]` section, or kind of upkeep, by whose schedule it was made; empty: somebody asked for it."""
    due: datetime | None = Field(default=None, sa_type=UtcDateTime)
    """The moment of the schedule that it stands for."""
    deadline: datetime | None = Field(default=None, sa_type=UtcDateTime)
    """Not ended by then, it is reported as overdue."""
    heard: datetime | None = Field(default=None, sa_type=UtcDateTime)
    """Last sign of life of whoever performs its commands."""
    asked_by: str = Field(default="", sa_type=Text)
    """Who started it, for the audit."""
    doc: str = Field(sa_type=Text)


class EventRow(SQLModel, table=True):
    """Append-only: triggers refuse update and delete."""

    __tablename__: ClassVar[str] = "job_event"

    id: int | None = Field(default=None, primary_key=True)
    job: str = Field(foreign_key="job.id", index=True)
    time: datetime = Field(sa_type=UtcDateTime)
    kind: str
    text: str = Field(sa_type=Text)
    effective: bool
    """False: it came late or twice, and changed nothing."""


class PointRow(SQLModel, table=True):
    __tablename__: ClassVar[str] = "point"
    __table_args__: ClassVar[tuple[Index, ...]] = (Index("point_by_machine", "machine_uuid", "vault", "time"),)

    id: str = Field(primary_key=True)
    vault: str
    machine_uuid: str
    machine_name: str = Field(index=True)
    time: datetime = Field(sa_type=UtcDateTime, index=True)
    consistency: str = Field(default="", sa_type=Text)
    """A `Consistency`, as in the manifest."""
    has_checkpoint: bool
    """Some disk refers to a checkpoint: it can be the base of an incremental."""
    damaged: str = Field(default="", sa_type=Text)
    """What a verify found; empty: nothing."""
    deleted_until: datetime | None = Field(default=None, sa_type=UtcDateTime)
    """Deleted, and until when that can be taken back; None: not deleted."""
    deleted_reason: str = Field(default="", sa_type=Text)
    pinned: str = Field(default="", sa_type=Text)
    """Why it is not to be deleted; empty: it is not pinned."""
    locked_until: datetime | None = Field(default=None, sa_type=UtcDateTime)
    """As in the manifest."""
    replicas: str = Field(default="", sa_type=Text)
    """Names of the vaults that hold it too, joined by blanks."""
    verified: datetime | None = Field(default=None, sa_type=UtcDateTime)
    """When a verify last read blocks of it; None: never."""
    doc: str = Field(sa_type=Text)


class CheckRow(SQLModel, table=True):
    """One verification of a vault."""

    __tablename__: ClassVar[str] = "vault_check"

    id: int | None = Field(default=None, primary_key=True)
    vault: str = Field(index=True)
    time: datetime = Field(sa_type=UtcDateTime)
    level: str
    share: str = ""
    """`3/30`: which part of the packs; empty: all."""
    packs: int
    blocks: int
    read_bytes: int = Field(sa_type=BigInteger)
    seconds: float
    findings: int


class DutyRow(SQLModel, table=True):
    """Up to which moment of a schedule everything is decided: a moment is handled once, whoever was down meanwhile."""

    __tablename__: ClassVar[str] = "duty"

    subject: str = Field(primary_key=True)
    """`machine:<uuid>` or `vault:<name>`."""
    section: str = Field(primary_key=True)
    """As `JobRow.section`."""
    handled: datetime = Field(sa_type=UtcDateTime)
    outcome: str = Field(default="", sa_type=Text)
    """What was decided then, in words: `job 1a2b…`, `left out: …`."""
    policy: str = Field(default="", sa_type=Text)
    """Of a machine: the policy, vault and schedule that are in force for it; when one of them changes, what was missed
    by the old one is not made up for by the new."""
    vault: str = Field(default="", sa_type=Text)
    schedule: str = Field(default="", sa_type=Text)
    first: datetime | None = Field(default=None, sa_type=UtcDateTime)
    """When a first backup is owed beside the schedule, whose next moment is too far away; None: none is."""


class HypervisorRow(SQLModel, table=True):
    """When a hypervisor was last asked for its machines, and what came of it."""

    __tablename__: ClassVar[str] = "hypervisor"

    name: str = Field(primary_key=True)
    asked: datetime | None = Field(default=None, sa_type=UtcDateTime)
    """Since when its answer is awaited; None: it is not."""
    listed: datetime | None = Field(default=None, sa_type=UtcDateTime)
    """When the question was asked to which it last listed its machines; None: never."""
    problem: str = Field(default="", sa_type=Text)
    """Why it did not, since; empty: it did."""


class SightingRow(SQLModel, table=True):
    """A machine as one hypervisor last listed it: usually one for each machine."""

    __tablename__: ClassVar[str] = "sighting"

    hypervisor: str = Field(primary_key=True)
    uuid: str = Field(primary_key=True)
    doc: str = Field(sa_type=Text)
    """A `MachineSummary`; its disks as they were when somebody last asked for them."""


class LeaseRow(SQLModel, table=True):
    """What only one controller at a time does."""

    __tablename__: ClassVar[str] = "lease"

    name: str = Field(primary_key=True)
    holder: str
    until: datetime | None = Field(default=None, sa_type=UtcDateTime)
    """Free after that."""


class WorkerRow(SQLModel, table=True):
    """A worker that was heard of."""

    __tablename__: ClassVar[str] = "worker"

    name: str = Field(primary_key=True)
    host: str
    pid: int
    hypervisors: str = Field(default="", sa_type=Text)
    """Names, joined by blanks."""
    seen: datetime = Field(sa_type=UtcDateTime)
    doc: str = Field(default="", sa_type=Text)
    """Its last `Beat`."""


class AlertRow(SQLModel, table=True):
    """Something that somebody should know: one standing row per key, counted while it lasts."""

    __tablename__: ClassVar[str] = "alert"
    # Its partial unique index (one standing alert per key) is made by the migration alone, as those of jobs.

    id: int | None = Field(default=None, primary_key=True)
    key: str
    """What makes two of them the same: `backup-failed machine:<uuid>`."""
    severity: str
    """`info`, `warning`, `critical`."""
    subject: str
    """The machine, vault, hypervisor or worker, for people."""
    text: str = Field(default="", sa_type=Text)
    hint: str = Field(default="", sa_type=Text)
    first: datetime = Field(sa_type=UtcDateTime)
    last: datetime = Field(sa_type=UtcDateTime)
    count: int = 1
    resolved: datetime | None = Field(default=None, sa_type=UtcDateTime)
    told: datetime | None = Field(default=None, sa_type=UtcDateTime)
    """When everybody who is to know had been told of it as it is now; None: not yet."""
    ending: str = Field(default="", sa_type=Text)
    """Resolved by what, in words."""
    acknowledged: str = Field(default="", sa_type=Text)
    """Who has seen it and will see to it; empty: nobody. Forgotten when it becomes worse."""


class DeliveryRow(SQLModel, table=True):
    """What a target of notifications was last told of an alert."""

    __tablename__: ClassVar[str] = "delivery"

    target: str = Field(primary_key=True)
    """`email`, or `webhook:<name>`."""
    alert: int = Field(primary_key=True, foreign_key="alert.id")
    said: str
    """A severity, or `resolved`."""
    time: datetime = Field(sa_type=UtcDateTime)


class VaultLookRow(SQLModel, table=True):
    """How a vault was found, now and then: how fast it fills is the difference of two looks."""

    __tablename__: ClassVar[str] = "vault_look"

    id: int | None = Field(default=None, primary_key=True)
    vault: str = Field(index=True)
    time: datetime = Field(sa_type=UtcDateTime)
    used_bytes: int | None = Field(default=None, sa_type=BigInteger)
    """Of its packs; None: it could not be looked into."""
    free_bytes: int | None = Field(default=None, sa_type=BigInteger)
    """None: its place does not say."""
    problem: str = Field(default="", sa_type=Text)
    """Why it cannot be used; empty: it can."""


class AuditRow(SQLModel, table=True):
    """Who did what. Append-only: triggers refuse update and delete."""

    __tablename__: ClassVar[str] = "audit"

    id: int | None = Field(default=None, primary_key=True)
    time: datetime = Field(sa_type=UtcDateTime, index=True)
    actor: str
    """`user@host`, or `schedule`."""
    action: str
    """`backup.run`, `point.delete` …"""
    subject: str
    detail: str = Field(default="", sa_type=Text)
