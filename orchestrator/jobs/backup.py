"""A backup as a pure state machine (DESIGN section 4).

`advance` decides everything that a backup decides, from the job as stored and one event, and touches nothing: so any
order, loss or repetition of events can be tried in milliseconds. Three rules hold it together:

* An obligation (thaw, new checkpoint) is in the stored job *before* the command that creates it is sent. Whoever finds
  the job after a crash knows what may exist, and the one Release command ends all of it.
* An event that does not fit the state is late or repeated, and changes nothing.
* As long as disks are being transferred, a failure or a cancellation waits for their tasks to report (`stopping`): a
  release under running transfers would pull the snapshot and the vault's session from under live writers. Only a lost
  worker or a timeout, after which nobody will report, releases at once.
"""

from __future__ import annotations

from orchestrator.jobs.backup_job import BackupJob
from orchestrator.jobs.manifest import Parts, build_point
from orchestrator.jobs.states import TERMINAL, JobState, check
from orchestrator.plan import (
    base_checkpoint,
    block_size_for,
    demoted,
    plan_disks,
    trusted_bitmaps,
)
from workers.contract.errors import Busy, Cancelled, ErrorInfo, GuestError, HypervisorError, StillframeError
from workers.contract.messages import (
    BaseRefused,
    CancelRequested,
    Command,
    CommitPoint,
    DiskTransferred,
    Event,
    Failed,
    PointCommitted,
    Prepare,
    Prepared,
    Release,
    Released,
    SnapshotInfo,
    SnapshotTaken,
    TakeSnapshot,
    Thaw,
    TimedOut,
    TransferDisk,
    WorkerLost,
    sf_name,
)
from workers.contract.points import Mode, Point, healed_words

S = JobState


Step = tuple[BackupJob, list[Command]]


def start(job: BackupJob) -> Step:
    """Begin a queued backup. A job that is not queued is left alone."""
    if job.state is not S.QUEUED:
        return job, []
    prepare = Prepare(
        job=job.id,
        machine=job.machine,
        vault=job.vault,
        point=job.point,
        base_point=job.base.id if job.base else None,
        base_checkpoint=base_checkpoint(job.base),
        base_xml=job.base.checkpoint_xml if job.base else None,
        goal=job.goal,
    )
    return _to(job, S.PREPARING), [prepare]


def retry_release(job: BackupJob) -> Step:
    """Release once more what a failed release has left; without leftovers nothing happens."""
    if not job.leftover or job.state not in TERMINAL:
        return job, []
    return _release(job.model_copy(update={"leftover": False}))


def advance(job: BackupJob, event: Event) -> Step:
    """The job after `event`, and the commands to send once that is stored."""
    match event:
        case CancelRequested():
            return _cancel(job, event)
        case WorkerLost() | TimedOut():
            return _lost(job, event)
        case Failed():
            return _failed(job, event)
        case _:
            return _progress(job, event)


def _progress(job: BackupJob, event: Event) -> Step:
    match job.state, event:
        case S.PREPARING, Prepared():
            return _prepared(job, event)
        case S.SNAPSHOTTING, SnapshotTaken():
            return _snapshot_taken(job, event)
        case S.SNAPSHOTTING, BaseRefused():
            return _base_refused(job, event)
        case S.TRANSFERRING, DiskTransferred() if event.disk.target in job.outstanding:
            return _disk_transferred(job, event)
        case S.COMMITTING, PointCommitted() if event.point == job.point:
            return _release(job.model_copy(update={"committed": _locked(job.new_point, event)}))
        case S.RELEASING, Released():
            return _released(job, event)
        case _:
            return job, []


def _locked(point: Point | None, event: PointCommitted) -> Point | None:
    return point and point.model_copy(update={"locked_until": event.locked_until})


def _to(job: BackupJob, state: JobState, **changes: object) -> BackupJob:
    check(job.state, state)
    return job.model_copy(update={"state": state, **changes})


def _prepared(job: BackupJob, event: Prepared) -> Step:
    job = job.model_copy(update={"extension": event.extension})
    if job.error:
        return _release(job)
    inventory = event.inventory
    try:
        if inventory.foreign_job:
            raise Busy(
                f"another job runs on {job.machine.name}: {inventory.foreign_job}",
                hint=f"wait for it to end (`virsh domjobinfo {job.machine.name}`), then run the backup again",
            )
        plans, not_included = plan_disks(
            inventory,
            job.base,
            earlier=job.earlier,
            base_readable=event.base_readable,
            force_full=job.force_full,
            exclude=job.exclude,
            block_size_of=lambda target: block_size_for(
                job.block_size_rules, job.block_size, inventory.machine.name, target
            ),
        )
    except StillframeError as error:
        return _release(_with_error(job, error.info()))
    job = _to(
        job,
        S.SNAPSHOTTING,
        machine=inventory.machine,
        plans=plans,
        disks=[disk for disk in inventory.disks if disk.target in {p.target for p in plans}],
        not_included=not_included,
        trusted=trusted_bitmaps(inventory, job.base),
        online=event.online,
        must_thaw=event.online,
        new_checkpoint=sf_name(job.id) if event.online else None,
    )
    return job, [_take_snapshot(job)]


def _take_snapshot(job: BackupJob) -> TakeSnapshot:
    return TakeSnapshot(
        job=job.id,
        machine=job.machine,
        vault=job.vault,
        online=job.online,
        disks=job.plans,
        excluded=[item.target for item in job.not_included],
        goal=job.goal,
        options=job.options,
        extension=job.extension,
    )


def _base_refused(job: BackupJob, event: BaseRefused) -> Step:
    if job.error:
        return _release(job)
    named = event.target if event.target in {p.target for p in job.plans} else None
    refused = {p.target for p in job.plans if p.mode is Mode.INCREMENTAL and named in (None, p.target)}
    if not refused:
        return job, []
    reason = f"the hypervisor refused its base: {event.reason}"
    plans = [demoted(p, reason) if p.target in refused else p for p in job.plans]
    job = job.model_copy(update={"plans": plans, "trusted": [t for t in job.trusted if t not in refused]})
    return job, [_take_snapshot(job)]


def _snapshot_taken(job: BackupJob, event: SnapshotTaken) -> Step:
    # The snapshot's checkpoint may differ from the announced name only by not existing; the thaw is confirmed.
    report = event.snapshot.guest
    job = job.model_copy(
        update={
            "must_thaw": False,
            "snapshot": event.snapshot,
            "guest": report.model_copy(update={"records": {}}),
            "warnings": [*job.warnings, *report.warnings],
        }
    )
    if job.error:
        return _release(job)
    if job.require and event.snapshot.consistency.rank < job.goal.rank:
        return _release(_with_error(job, _not_worth_it(job, event.snapshot).info()))
    exports = {export.target: export for export in event.snapshot.exports}
    missing = [p.target for p in job.plans if p.target not in exports]
    if missing:
        error = HypervisorError(f"the snapshot of {job.machine.name} lacks {', '.join(missing)}")
        return _release(_with_error(job, error.info()))
    disks = {disk.target: disk for disk in job.disks}
    job = _to(job, S.TRANSFERRING)
    return job, [
        TransferDisk(
            job=job.id,
            machine=job.machine,
            vault=job.vault,
            plan=p,
            disk=disks[p.target],
            export=exports[p.target],
            online=job.online,
        )
        for p in job.plans
    ]


def _not_worth_it(job: BackupJob, snapshot: SnapshotInfo) -> GuestError:
    return GuestError(
        f"{job.goal} consistency is required, and this point would be {snapshot.consistency} only: "
        f"{snapshot.consistency_reason}",
        hint="mend that in the guest, or take what can be had: --no-require, or require = false in its policy",
    )


def _disk_transferred(job: BackupJob, event: DiskTransferred) -> Step:
    target = event.disk.target
    changes: dict[str, object] = {"transferred": {**job.transferred, target: event.disk}}
    if event.alert:
        changes["alerts"] = {**job.alerts, target: event.alert}
    if event.healed:
        changes["healed"] = {**job.healed, target: event.healed}
        changes["warnings"] = [*job.warnings, f"{target}: {healed_words(event.healed)}"]
    return _join(job.model_copy(update=changes))


def _join(job: BackupJob) -> Step:
    """Go on once every disk has reported (invariant 3)."""
    if job.outstanding:
        return job, []
    if job.error:
        return _release(job)
    assert job.snapshot is not None
    point = build_point(
        Parts(
            point=job.point,
            job=job.id,
            machine=job.machine,
            goal=job.goal,
            base=job.base,
            plans=job.plans,
            trusted=[target for target in job.trusted if target not in job.alerts],
            transferred=job.transferred,
            not_included=job.not_included,
            alerts=job.alerts,
            healed=job.healed,
        ),
        job.snapshot,
    )
    job = _to(job, S.COMMITTING, new_point=point, commit_sent=True)
    return job, [CommitPoint(job=job.id, vault=job.vault, point=point)]


def _old_checkpoint(job: BackupJob) -> str | None:
    """The base's checkpoint, if a committed new point makes it superfluous: no disk of it refers to it any more.
    None as long as no manifest can exist (invariant 1)."""
    if job.new_point is None:
        return None
    name = base_checkpoint(job.base)
    return None if name in {disk.checkpoint for disk in job.new_point.disks} else name


def _release(job: BackupJob) -> Step:
    job = _to(job, S.RELEASING)
    release = Release(
        job=job.id,
        machine=job.machine,
        vault=job.vault,
        point=job.point,
        commit_sent=job.commit_sent,
        thaw=job.must_thaw,
        new_checkpoint=job.new_checkpoint,
        old_checkpoint=_old_checkpoint(job),
    )
    # A guest that may be frozen must not wait behind transfers: Thaw travels on the queue `rescue`.
    thaw: list[Command] = [Thaw(job=job.id, machine=job.machine)] if job.must_thaw else []
    return job, [*thaw, release]


def _released(job: BackupJob, event: Released) -> Step:
    committed = event.committed or job.committed
    struck = {"must_thaw": False, "new_checkpoint": None, "committed": committed}
    return _end(job.model_copy(update={**struck, "warnings": [*job.warnings, *event.warnings]}))


def _end(job: BackupJob) -> Step:
    """The terminal state follows from whether the point exists, and only then from what went wrong."""
    bare = {"snapshot": None, "new_point": _bare(job.new_point), "committed": _bare(job.committed)}
    job = job.model_copy(update=bare)
    if job.committed:
        if job.error:
            job = job.model_copy(
                update={"warnings": [*job.warnings, f"{job.error.message} (the point exists all the same)"]}
            )
        return _to(job, S.SUCCEEDED, error=None), []
    error = job.error or ErrorInfo(code="VaultError", message="the point was not found in the vault after its commit")
    state = S.CANCELLED if error.code == Cancelled.__name__ else S.FAILED
    return _to(job, state, error=error), []


def _bare(point: Point | None) -> Point | None:
    """Without what may hold secrets: that is only in the vault, encrypted."""
    return point and point.model_copy(update={"definition": "", "nvram": None})


def _with_error(job: BackupJob, error: ErrorInfo) -> BackupJob:
    return job if job.error else job.model_copy(update={"error": error})


_COMMAND_OF = {
    S.PREPARING: "prepare",
    S.SNAPSHOTTING: "take_snapshot",
    S.TRANSFERRING: "transfer_disk",
    S.COMMITTING: "commit_point",
    S.RELEASING: "release",
}


def _failed(job: BackupJob, event: Failed) -> Step:
    if _COMMAND_OF.get(job.state) != event.command:
        return job, []
    if job.state is S.RELEASING:
        text = f"the release failed: {event.error.message}"
        return _end(job.model_copy(update={"leftover": True, "warnings": [*job.warnings, text]}))
    if job.state is S.TRANSFERRING:
        if event.target not in job.outstanding:
            return job, []
        return _join(_with_error(job, event.error).model_copy(update={"gone": [*job.gone, event.target]}))
    return _release(_with_error(job, event.error))


def _cancel(job: BackupJob, event: CancelRequested) -> Step:
    error = Cancelled(f"cancelled by {event.by}").info()
    if job.state is S.QUEUED:
        return _to(job, S.CANCELLED, error=error), []
    # Once a manifest may exist it is too late: the backup ends by itself within a moment.
    if job.state in (S.PREPARING, S.SNAPSHOTTING, S.TRANSFERRING):
        return _with_error(job, error), []
    return job, []


def _lost(job: BackupJob, event: WorkerLost | TimedOut) -> Step:
    if job.state in TERMINAL:
        return job, []
    lost = isinstance(event, WorkerLost)
    error = ErrorInfo(
        code=type(event).__name__,
        message=f"the backup's process ended: {event.detail}" if lost else f"it took too long: {event.detail}",
        hint=f"run it again: stillframe backup run {job.machine.name}",
        retryable=True,
    )
    job = _with_error(job, error)
    if job.state is S.QUEUED:
        return _to(job, S.FAILED), []
    if job.state is S.RELEASING and not lost:
        return _end(job.model_copy(update={"leftover": True, "warnings": [*job.warnings, error.message]}))
    return _release(job)
