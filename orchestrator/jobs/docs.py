"""Any job, whatever its kind: how it is stored, and the three functions that move it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, TypeAdapter

from orchestrator.jobs import backup, restore
from orchestrator.jobs.backup_job import BackupJob
from orchestrator.jobs.restore import RestoreJob
from workers.contract.messages import Command, Event

Job = Annotated[BackupJob | RestoreJob, Field(discriminator="kind")]
JOB: TypeAdapter[BackupJob | RestoreJob] = TypeAdapter(Job)

Step = tuple[BackupJob | RestoreJob, list[Command]]


def start(job: BackupJob | RestoreJob) -> Step:
    return backup.start(job) if isinstance(job, BackupJob) else restore.start(job)


def advance(job: BackupJob | RestoreJob, event: Event) -> Step:
    return backup.advance(job, event) if isinstance(job, BackupJob) else restore.advance(job, event)


def retry_release(job: BackupJob | RestoreJob) -> Step:
    return backup.retry_release(job) if isinstance(job, BackupJob) else restore.retry_release(job)


def hypervisor_of(job: BackupJob | RestoreJob) -> str | None:
    """Where the job's commands must run; None: anywhere that sees the vault."""
    return job.machine.hypervisor if isinstance(job, BackupJob) else job.hypervisor
