"""A backup step by step: the ways that people meet, one test each."""

from __future__ import annotations

import pytest

from orchestrator.jobs.backup import advance, retry_release, start
from orchestrator.jobs.backup_job import BackupJob
from orchestrator.jobs.states import JobState, check
from tests.jobs.world import MACHINE, World, disk, failed
from workers.contract.errors import Cancelled, NoSpace
from workers.contract.guests import ExtensionState, ExtensionUse, GuestReport, ScriptOutcome, ScriptRun
from workers.contract.machines import Power
from workers.contract.messages import (
    BaseRefused,
    CancelRequested,
    Command,
    CommitPoint,
    DiskTransferred,
    Event,
    Failed,
    Release,
    TakeSnapshot,
    Thaw,
    TimedOut,
    TransferDisk,
    WorkerLost,
)
from workers.contract.points import Consistency, Mode

S = JobState
CANCELLED = Cancelled("cancelled by anna").info()


def new_job(world: World, point: str, **changes: object) -> BackupJob:
    base = world.newest_base()
    job = BackupJob(id=f"job-{point}", machine=MACHINE, vault="main", point=point, base=base)
    return job.model_copy(update=changes)


def run(world: World, job: BackupJob) -> tuple[BackupJob, list[Command]]:
    """To its end, every command performed; the commands that were sent."""
    sent: list[Command] = []
    job, todo = start(job)
    while todo:
        command = todo.pop(0)
        sent.append(command)
        job, more = advance(job, world.perform(command))
        todo += more
    return job, sent


def run_backup(world: World, point: str, **changes: object) -> BackupJob:
    return run(world, new_job(world, point, **changes))[0]


def until(world: World, job: BackupJob, state: JobState) -> tuple[BackupJob, list[Command]]:
    """The job just arrived in `state`, and the commands that wait there."""
    job, todo = start(job)
    while job.state is not state:
        job, more = advance(job, world.perform(todo.pop(0)))
        todo += more
    return job, todo


def test_first_backup_makes_a_point_and_a_checkpoint() -> None:
    world = World()
    job, sent = run(world, new_job(world, "p1"))
    assert job.state is S.SUCCEEDED
    kinds = ["prepare", "take_snapshot", "transfer_disk", "transfer_disk", "commit_point", "release"]
    assert [command.kind for command in sent] == kinds
    point = world.points["p1"]
    assert [(d.mode, d.reason, d.checkpoint) for d in point.disks] == [
        (Mode.FULL, "it is the first backup", "sf-job-p1")
    ] * 2
    assert point.nvram == b"\x00\xff"
    assert set(world.checkpoints) == {"sf-job-p1"}


def test_a_base_that_has_left_the_vault_is_not_inherited_from() -> None:
    """Its checkpoint, which no point refers to any more, goes once the new point is there."""
    world = World()
    run_backup(world, "p1")
    job = new_job(world, "p2")
    assert job.base is not None
    del world.points["p1"]
    job, sent = run(world, job)
    assert job.state is S.SUCCEEDED
    reasons = {(disk.mode, disk.reason) for disk in world.points["p2"].disks}
    assert reasons == {(Mode.FULL, "the point to go on from has been deleted from the vault")}
    assert not [one for one in sent if isinstance(one, TransferDisk) and one.plan.base_root]
    assert set(world.checkpoints) == {"sf-job-p2"}


def test_incremental_moves_the_checkpoint_on_only_after_the_commit() -> None:
    world = World()
    run_backup(world, "p1")
    job, sent = run(world, new_job(world, "p2"))
    assert job.state is S.SUCCEEDED
    assert [p.mode for p in job.plans] == [Mode.INCREMENTAL] * 2
    release = sent[-1]
    assert isinstance(release, Release)
    assert release.old_checkpoint == "sf-job-p1"
    assert set(world.checkpoints) == {"sf-job-p2"}


def test_machine_off_keeps_the_base_and_its_checkpoint() -> None:
    world = World()
    run_backup(world, "p1")
    world.power = Power.OFF
    job, sent = run(world, new_job(world, "p2"))
    assert job.state is S.SUCCEEDED
    release = sent[-1]
    assert isinstance(release, Release)
    assert (release.new_checkpoint, release.old_checkpoint, release.thaw) == (None, None, False)
    assert {d.checkpoint for d in world.points["p2"].disks} == {"sf-job-p1"}
    assert world.points["p2"].checkpoint_xml == "<checkpoint name='sf-job-p1'/>"
    world.power = Power.RUNNING
    third = run_backup(world, "p3")
    assert [p.mode for p in third.plans] == [Mode.INCREMENTAL] * 2
    assert set(world.checkpoints) == {"sf-job-p3"}


def test_machine_off_with_a_broken_bitmap_gives_it_no_checkpoint() -> None:
    world = World(power=Power.RUNNING)
    run_backup(world, "p1")
    world.power = Power.OFF
    world.inconsistent.add(("sf-job-p1", "vdb"))
    run_backup(world, "p2")
    assert {d.target: d.checkpoint for d in world.points["p2"].disks} == {"vda": "sf-job-p1", "vdb": None}


def test_forced_full_of_a_machine_that_is_off_keeps_the_base() -> None:
    world = World()
    run_backup(world, "p1")
    world.power = Power.OFF
    job = run_backup(world, "p2", force_full=True)
    assert [p.mode for p in job.plans] == [Mode.FULL] * 2
    assert {d.checkpoint for d in world.points["p2"].disks} == {"sf-job-p1"}


def test_alert_takes_the_trust_from_a_bitmap_that_would_be_kept() -> None:
    world = World()
    run_backup(world, "p1")
    world.power = Power.OFF
    job, [first, second] = until(world, new_job(world, "p2"), S.TRANSFERRING)
    lied = world.perform(first)
    assert isinstance(lied, DiskTransferred)
    job, _ = advance(job, lied.model_copy(update={"alert": "an unchanged block differs"}))
    job, [commit] = advance(job, world.perform(second))
    assert isinstance(commit, CommitPoint)
    assert [d.checkpoint for d in commit.point.disks] == [None, "sf-job-p1"]
    assert commit.point.alerts == ["vda: an unchanged block differs"]


def test_blocks_that_were_healed_are_told_and_take_no_trust_away() -> None:
    world = World()
    run_backup(world, "p1")
    world.power = Power.OFF
    job, [first, second] = until(world, new_job(world, "p2"), S.TRANSFERRING)
    healed = world.perform(first)
    assert isinstance(healed, DiskTransferred)
    job, _ = advance(job, healed.model_copy(update={"healed": 3}))
    job, [commit] = advance(job, world.perform(second))
    assert isinstance(commit, CommitPoint)
    assert [d.checkpoint for d in commit.point.disks] == ["sf-job-p1"] * 2
    assert commit.point.alerts == job.warnings == ["vda: 3 damaged blocks of the vault read again"]


def test_refused_base_demotes_that_disk_in_the_same_run() -> None:
    world = World()
    run_backup(world, "p1")
    job, [snapshot] = until(world, new_job(world, "p2"), S.SNAPSHOTTING)
    world.inconsistent.add(("sf-job-p1", "vdb"))
    job, [again] = advance(job, world.perform(snapshot))
    assert isinstance(again, TakeSnapshot)
    assert [(p.target, p.mode) for p in again.disks] == [("vda", Mode.INCREMENTAL), ("vdb", Mode.FULL)]
    assert again.disks[1].reason == "the hypervisor refused its base: bitmap cannot be used"
    assert job.must_thaw


def test_refused_base_of_no_named_disk_demotes_all() -> None:
    world = World()
    run_backup(world, "p1")
    job, [_] = until(world, new_job(world, "p2"), S.SNAPSHOTTING)
    job, [again] = advance(job, BaseRefused(target=None, reason="checkpoint broken"))
    assert isinstance(again, TakeSnapshot)
    assert [p.mode for p in again.disks] == [Mode.FULL] * 2
    assert advance(job, BaseRefused(target=None, reason="checkpoint broken")) == (job, [])


def test_lost_during_the_snapshot_thaws_at_once_and_deletes_the_new_checkpoint() -> None:
    world = World()
    run_backup(world, "p1")
    job, [snapshot] = until(world, new_job(world, "p2"), S.SNAPSHOTTING)
    assert isinstance(snapshot, TakeSnapshot)
    world.half_snapshot(snapshot)
    assert world.frozen
    job, commands = advance(job, WorkerLost(detail="process 7 is gone"))
    assert [type(c) for c in commands] == [Thaw, Release]
    for command in commands:
        job, _ = advance(job, world.perform(command))
    assert job.state is S.FAILED
    assert world.thaws == 2  # on the queue `rescue`, and by the release
    assert set(world.checkpoints) == {"sf-job-p1"}


@pytest.mark.parametrize("committed", [True, False])
def test_lost_during_the_commit_is_settled_by_the_vault(committed: bool) -> None:
    world = World()
    run_backup(world, "p1")
    job, [commit] = until(world, new_job(world, "p2"), S.COMMITTING)
    if committed:
        world.perform(commit)
    job, [release] = advance(job, WorkerLost(detail="process 7 is gone"))
    job, _ = advance(job, world.perform(release))
    assert job.state is (S.SUCCEEDED if committed else S.FAILED)
    assert set(world.checkpoints) == {"sf-job-p2" if committed else "sf-job-p1"}
    if not committed:  # the zombie's commit comes too late
        assert world.perform(commit).kind == "failed"


def test_one_failed_disk_waits_for_the_others_and_fails_with_the_first_error() -> None:
    world = World()
    job, [first, second] = until(world, new_job(world, "p1"), S.TRANSFERRING)
    job, commands = advance(job, failed(first, NoSpace("scratch is full").info()))
    assert (job.state.value, commands, job.stopping) == ("transferring", [], True)
    job, [release] = advance(job, failed(second, Cancelled("cancelled").info()))
    assert job.state.value == "releasing"
    job, _ = advance(job, world.perform(release))
    assert job.state.value == "failed"
    assert job.error is not None
    assert job.error.code == "NoSpace"


def test_cancel_waits_for_running_transfers() -> None:
    world = World()
    job, [first, second] = until(world, new_job(world, "p1"), S.TRANSFERRING)
    assert advance(job, CancelRequested(by="anna")) == (job.model_copy(update={"error": CANCELLED}), [])
    job, _ = advance(job, CancelRequested(by="anna"))
    job, commands = advance(job, world.perform(first))
    assert commands == []
    job, [release] = advance(job, failed(second, Cancelled("cancelled").info()))
    job, _ = advance(job, world.perform(release))
    assert job.state is S.CANCELLED
    assert world.points == {}
    assert world.checkpoints == {}


def test_cancel_of_a_queued_job_sends_nothing() -> None:
    job, commands = advance(new_job(World(), "p1"), CancelRequested(by="anna"))
    assert (job.state, commands) == (S.CANCELLED, [])
    assert start(job) == (job, [])


def test_cancel_during_the_commit_comes_too_late() -> None:
    world = World()
    job, [commit] = until(world, new_job(world, "p1"), S.COMMITTING)
    assert advance(job, CancelRequested(by="anna")) == (job, [])
    job, [release] = advance(job, world.perform(commit))
    job, _ = advance(job, world.perform(release))
    assert job.state is S.SUCCEEDED


def test_failed_release_keeps_its_obligations_for_the_next_start() -> None:
    world = World()
    job, [first, _] = until(world, new_job(world, "p1"), S.TRANSFERRING)
    job, [release] = advance(job, WorkerLost(detail="process 7 is gone"))
    job, commands = advance(job, failed(release))
    assert (job.state, job.leftover, commands) == (S.FAILED, True, [])
    assert job.new_checkpoint == "sf-job-p1"
    job, [again] = retry_release(job)
    assert again == release
    job, _ = advance(job, world.perform(again))
    assert (job.state, job.leftover, world.checkpoints) == (S.FAILED, False, {})
    assert retry_release(job) == (job, [])
    assert first.kind == "transfer_disk"


def test_failed_release_of_a_committed_point_is_a_success_with_a_leftover() -> None:
    world = World()
    job, [commit] = until(world, new_job(world, "p1"), S.COMMITTING)
    job, [release] = advance(job, world.perform(commit))
    job, _ = advance(job, failed(release))
    assert (job.state, job.leftover) == (S.SUCCEEDED, True)
    assert job.warnings == ["the release failed: it did not work"]


def test_job_of_somebody_else_makes_it_busy() -> None:
    world = World()
    job, [prepare] = start(new_job(world, "p1"))
    event: Event = world.perform(prepare)
    assert event.kind == "prepared"
    foreign = event.inventory.model_copy(update={"foreign_job": "migration"})
    job, [release] = advance(job, event.model_copy(update={"inventory": foreign}))
    job, _ = advance(job, world.perform(release))
    assert job.error is not None
    assert (job.state, job.error.exit_code) == (S.FAILED, 11)
    assert not world.sessions


def test_excluding_everything_is_a_usage_error() -> None:
    world = World(disks=[disk("vda")])
    job = run_backup(world, "p1", exclude=["vda"])
    assert job.error is not None
    assert (job.state, job.error.exit_code) == (S.FAILED, 2)
    assert job.error.message == "nothing to back up in web: vda: excluded by you"


def test_raw_disk_has_no_checkpoint() -> None:
    world = World(disks=[disk("vda"), disk("vdb", format="raw", tracks_changes=False)])
    run_backup(world, "p1")
    assert [d.checkpoint for d in world.points["p1"].disks] == ["sf-job-p1", None]
    second = run_backup(world, "p2")
    assert [(p.mode, p.reason) for p in second.plans][1] == (Mode.FULL, "it is raw: no change tracking")


def test_transfers_carry_the_disk_of_the_inventory() -> None:
    world = World()
    _, commands = until(world, new_job(world, "p1"), S.TRANSFERRING)
    assert [c.disk.source for c in commands if isinstance(c, TransferDisk)] == [d.source for d in world.disks]


def test_no_transition_that_the_table_does_not_know() -> None:
    with pytest.raises(ValueError, match="transferring cannot become cancelled"):
        check(S.TRANSFERRING, S.CANCELLED)


def test_refusal_of_a_disk_takes_the_trust_from_its_bitmap() -> None:
    world = World()
    run_backup(world, "p1")
    world.power = Power.OFF
    job, _ = until(world, new_job(world, "p2"), S.SNAPSHOTTING)
    assert job.trusted == ["vda", "vdb"]
    job, _ = advance(job, BaseRefused(target="vdb", reason="bitmap cannot be used"))
    assert job.trusted == ["vda"]


def test_first_report_of_a_disk_counts() -> None:
    world = World()
    job, [first, second] = until(world, new_job(world, "p1"), S.TRANSFERRING)
    report = world.perform(first)
    assert isinstance(report, DiskTransferred)
    job, _ = advance(job, report)
    other = report.model_copy(update={"disk": report.disk.model_copy(update={"root": "ff" * 32})})
    assert advance(job, other) == (job, [])
    _, [commit] = advance(job, world.perform(second))
    assert isinstance(commit, CommitPoint)
    assert commit.point.disks[0].root == report.disk.root


@pytest.mark.parametrize("kind", ["prepare", "take_snapshot", "transfer_disk", "commit_point", "thaw"])
def test_late_failure_of_another_command_changes_nothing(kind: str) -> None:
    """While the release runs it would be taken for the release's, and the guest's state for unknown."""
    world = World()
    job, [_] = until(world, new_job(world, "p1"), S.RELEASING)
    late = Failed(command=kind, error=NoSpace("full").info(), target="vda")
    assert advance(job, late) == (job, [])


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
def test_an_ended_job_stays_as_it_is(end: str) -> None:
    world = World()
    job, [prepare] = start(new_job(world, "p1"))
    if end == "succeeded":
        job = run_backup(world, "p2")
    else:
        if end == "cancelled":
            job, _ = advance(job, CancelRequested(by="anna"))
        job, [release] = advance(job, failed(prepare))
        job, _ = advance(job, world.perform(release))
    assert job.state == end
    for late in (WorkerLost(detail="x"), TimedOut(detail="x"), CancelRequested(by="x"), failed(prepare)):
        assert advance(job, late) == (job, [])


def test_what_is_required_and_not_had_fails_the_backup_and_leaves_nothing() -> None:
    world = World()
    run_backup(world, "p1")
    before = dict(world.checkpoints)
    job = run_backup(world, "p2", goal=Consistency.APPLICATION, require=True)
    assert job.state is S.FAILED
    assert job.error is not None
    assert "application consistency is required" in job.error.message
    assert "frozen and thawed" in job.error.message
    assert (list(world.points), world.checkpoints, world.snapshots) == (["p1"], before, {})


def test_what_is_required_and_had_makes_a_point() -> None:
    assert run_backup(World(), "p1", goal=Consistency.FILESYSTEM, require=True).state is S.SUCCEEDED


def test_what_the_guest_said_goes_to_the_snapshot_the_job_and_the_point() -> None:
    script = ScriptRun(name="50-postgresql", phase="pre", outcome=ScriptOutcome.OK)
    report = GuestReport(scripts=[script], records={"50-postgresql/label": "x"}, log="done", warnings=["look"])
    world = World(extension=ExtensionState(use=ExtensionUse.ENABLED, version="1"), report=report)
    job, sent = run(world, new_job(world, "p1", options={"postgresql": "backup"}))
    [take] = [command for command in sent if isinstance(command, TakeSnapshot)]
    assert (take.extension, take.options) == (world.extension, {"postgresql": "backup"})
    assert (job.extension, job.warnings) == (world.extension, ["look"])
    assert job.guest == report.model_copy(update={"records": {}})
    assert world.points["p1"].records == report.records
