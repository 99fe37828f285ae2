"""A restore as a pure state machine: of one disk to a file, or of a whole machine.

The paths and the UUID that a restore may create are in the stored job before the command that creates them, so that
an ended restore of any kind is undone exactly (Discard), and nothing else is touched (invariant 9). The one exception
is a replacement that may have happened already: its files may be the machine's disks by now, and are never deleted.
"""

from __future__ import annotations

from typing import Literal

from orchestrator.jobs.states import TERMINAL, JobState, check
from workers.contract.errors import Cancelled, ErrorInfo
from workers.contract.machines import Value
from workers.contract.messages import (
    CancelRequested,
    Command,
    DefineMachine,
    Discard,
    Discarded,
    DiskRestored,
    Event,
    Failed,
    ImageFormat,
    MachineDefined,
    PrepareRestore,
    RestoreDisk,
    RestorePrepared,
    TimedOut,
    WorkerLost,
)

S = JobState


class RestoreJob(Value):
    """All that is known of one restore; stored whole with every transition."""

    kind: Literal["restore"] = "restore"
    id: str
    vault: str
    point: str
    targets: list[str] = []
    """Empty: all disks of the point."""
    hypervisor: str | None = None
    """None: a single disk to a file."""
    name: str | None = None
    uuid: str | None = None
    """That the machine will have: chosen before anything is defined."""
    directory: str | None = None
    pool: str | None = None
    to: str | None = None
    format: ImageFormat | None = None
    replace: bool = False
    start: bool = False

    state: JobState = S.QUEUED
    files: dict[str, str] = {}
    """Obligation: target → path that this job may have written."""
    formats: dict[str, ImageFormat] = {}
    restored: dict[str, DiskRestored] = {}
    gone: list[str] = []
    may_define: bool = False
    """Obligation: the machine may be defined."""
    defined: MachineDefined | None = None
    leftover: bool = False
    error: ErrorInfo | None = None
    warnings: list[str] = []

    @property
    def outstanding(self) -> list[str]:
        if self.state is not S.TRANSFERRING:
            return []
        return [t for t in self.files if t not in self.restored and t not in self.gone]

    @property
    def stopping(self) -> bool:
        """Running commands should end themselves: nothing that they do is wanted any more."""
        return self.error is not None and self.state not in TERMINAL and self.state is not S.RELEASING


Step = tuple[RestoreJob, list[Command]]


def start(job: RestoreJob) -> Step:
    """Begin a queued restore. A job that is not queued is left alone."""
    if job.state is not S.QUEUED:
        return job, []
    prepare = PrepareRestore(
        job=job.id,
        vault=job.vault,
        point=job.point,
        targets=job.targets,
        hypervisor=job.hypervisor,
        name=job.name,
        uuid=job.uuid,
        directory=job.directory,
        pool=job.pool,
        to=job.to,
        format=job.format,
        replace=job.replace,
    )
    return _to(job, S.PREPARING), [prepare]


def retry_release(job: RestoreJob) -> Step:
    """Discard once more what a failed discard has left; without leftovers nothing happens."""
    if not job.leftover or job.state not in TERMINAL:
        return job, []
    return _discard(job.model_copy(update={"leftover": False}))


def advance(job: RestoreJob, event: Event) -> Step:
    """The job after `event`, and the commands to send once that is stored."""
    match job.state, event:
        case _, CancelRequested():
            return _cancel(job, event)
        case _, WorkerLost() | TimedOut():
            return _lost(job, event)
        case _, Failed():
            return _failed(job, event)
        case S.PREPARING, RestorePrepared():
            return _prepared(job, event)
        case S.TRANSFERRING, DiskRestored() if event.target in job.outstanding:
            return _join(job.model_copy(update={"restored": {**job.restored, event.target: event}}))
        case S.DEFINING, MachineDefined():
            # A cancellation that came while the machine was being defined came too late.
            return _to(job, S.SUCCEEDED, defined=event, error=None), []
        case S.RELEASING, Discarded():
            struck = job.model_copy(update={"warnings": [*job.warnings, *event.warnings], "may_define": False})
            return _end(struck)
        case _:
            return job, []


def _to(job: RestoreJob, state: JobState, **changes: object) -> RestoreJob:
    check(job.state, state)
    return job.model_copy(update={"state": state, **changes})


def _prepared(job: RestoreJob, event: RestorePrepared) -> Step:
    if job.error:
        return _discard(job)
    job = _to(job, S.TRANSFERRING, files=event.files, formats=event.formats)
    return job, [
        RestoreDisk(
            job=job.id,
            vault=job.vault,
            point=job.point,
            target=target,
            hypervisor=job.hypervisor,
            path=path,
            format=event.formats[target],
            standalone=job.hypervisor is None,
        )
        for target, path in event.files.items()
    ]


def _join(job: RestoreJob) -> Step:
    if job.outstanding:
        return job, []
    if job.error:
        return _discard(job)
    if job.hypervisor is None:
        return _to(job, S.SUCCEEDED), []
    job = _to(job, S.DEFINING, may_define=True)
    return job, [_define(job)]


def _define(job: RestoreJob) -> DefineMachine:
    assert job.hypervisor is not None
    assert job.uuid is not None
    assert job.name is not None
    return DefineMachine(
        job=job.id,
        vault=job.vault,
        point=job.point,
        hypervisor=job.hypervisor,
        uuid=job.uuid,
        name=job.name,
        disks=job.files,
        formats=job.formats,
        pool=job.pool,
        replace=job.replace,
        start=job.start,
    )


def _discard(job: RestoreJob) -> Step:
    job = _to(job, S.RELEASING)
    replaced = job.replace and job.may_define
    paths = [] if replaced else list(job.files.values())
    if replaced and job.files:
        kept = f"kept, because the machine may use them already: {', '.join(job.files.values())}"
        if kept not in job.warnings:
            job = job.model_copy(update={"warnings": [*job.warnings, kept]})
    return job, [
        Discard(
            job=job.id,
            vault=job.vault,
            paths=paths,
            hypervisor=job.hypervisor,
            uuid=job.uuid if job.may_define and not job.replace else None,
        )
    ]


def _end(job: RestoreJob) -> Step:
    cancelled = job.error is not None and job.error.code == Cancelled.__name__
    return _to(job, S.CANCELLED if cancelled else S.FAILED), []


def _with_error(job: RestoreJob, error: ErrorInfo) -> RestoreJob:
    return job if job.error else job.model_copy(update={"error": error})


_COMMAND_OF = {
    S.PREPARING: "prepare_restore",
    S.TRANSFERRING: "restore_disk",
    S.DEFINING: "define_machine",
    S.RELEASING: "discard",
}


def _failed(job: RestoreJob, event: Failed) -> Step:
    if _COMMAND_OF.get(job.state) != event.command:
        return job, []
    if job.state is S.RELEASING:
        text = f"undoing the restore failed: {event.error.message}"
        return _end(job.model_copy(update={"leftover": True, "warnings": [*job.warnings, text]}))
    if job.state is S.TRANSFERRING:
        if event.target not in job.outstanding:
            return job, []
        return _join(_with_error(job, event.error).model_copy(update={"gone": [*job.gone, event.target]}))
    return _discard(_with_error(job, event.error))


def _cancel(job: RestoreJob, event: CancelRequested) -> Step:
    error = Cancelled(f"cancelled by {event.by}").info()
    if job.state is S.QUEUED:
        return _to(job, S.CANCELLED, error=error), []
    if job.state in (S.PREPARING, S.TRANSFERRING):
        return _with_error(job, error), []
    return job, []


def _lost(job: RestoreJob, event: WorkerLost | TimedOut) -> Step:
    if job.state in TERMINAL:
        return job, []
    lost = isinstance(event, WorkerLost)
    error = ErrorInfo(
        code=type(event).__name__,
        message=f"the restore's process ended: {event.detail}" if lost else f"it took too long: {event.detail}",
        hint="run the restore again",
        retryable=True,
    )
    if job.state is S.QUEUED:
        return _to(_with_error(job, error), S.FAILED), []
    if job.state is S.RELEASING and not lost:
        return _end(job.model_copy(update={"leftover": True, "warnings": [*job.warnings, error.message]}))
    if job.state is S.DEFINING and job.replace and lost:
        # Half replaced is no state to leave a machine in, and defining it again is harmless: go on, not back.
        return job, [_define(job)]
    return _discard(_with_error(job, error))
