"""Any job, whatever its kind: how it is stored, and the three functions that move it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, TypeAdapter

from orchestrator.jobs import backup, restore, upkeep
from orchestrator.jobs.backup_job import BackupJob
from orchestrator.jobs.restore import RestoreJob
from orchestrator.jobs.upkeep import UpkeepJob
from workers.contract.messages import Command, Event

AnyJob = BackupJob | RestoreJob | UpkeepJob
JOB: TypeAdapter[AnyJob] = TypeAdapter(Annotated[AnyJob, Field(discriminator="kind")])

Step = tuple[AnyJob, list[Command]]


def start(job: AnyJob) -> Step:
    match job:
        case BackupJob():
            return backup.start(job)
        case RestoreJob():
            return restore.start(job)
        case UpkeepJob():
            return upkeep.start(job)


def advance(job: AnyJob, event: Event) -> Step:
    match job:
        case BackupJob():
            return backup.advance(job, event)
        case RestoreJob():
            return restore.advance(job, event)
        case UpkeepJob():
            return upkeep.advance(job, event)


def retry_release(job: AnyJob) -> Step:
    match job:
        case BackupJob():
            return backup.retry_release(job)
        case RestoreJob():
            return restore.retry_release(job)
        case UpkeepJob():
            return upkeep.retry_release(job)


def hypervisor_of(job: AnyJob) -> str | None:
    """Where the job's commands must run; None: anywhere that sees the vault."""
    match job:
        case BackupJob():
            return job.machine.hypervisor
        case RestoreJob():
            return job.hypervisor
        case UpkeepJob():
            return None


def targets_of(job: AnyJob) -> list[str]:
    """The disks that report progress."""
    match job:
        case BackupJob():
            return [plan.target for plan in job.plans]
        case RestoreJob():
            return list(job.files)
        case UpkeepJob():
            return []
