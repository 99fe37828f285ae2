"""A restore step by step: what it may undo, and what it must keep."""

from __future__ import annotations

from orchestrator.jobs.restore import RestoreJob, advance, retry_release, start
from orchestrator.jobs.states import JobState
from tests.jobs.test_backup import run_backup
from tests.jobs.world import MACHINE, World, failed
from workers.contract.errors import Cancelled
from workers.contract.messages import CancelRequested, Command, DefineMachine, Discard, RestoreDisk, WorkerLost

S = JobState
LOST = WorkerLost(detail="process 7 is gone")


def disk_job() -> RestoreJob:
    return RestoreJob(id="r1", vault="main", point="p1", targets=["vdb"], to="/out/vdb.qcow2")


def machine_job(*, replace: bool = False) -> RestoreJob:
    return RestoreJob(
        id="r1",
        vault="main",
        point="p1",
        hypervisor="lab",
        name="web2",
        uuid=MACHINE.uuid if replace else "new",
        directory="/new",
        replace=replace,
    )


def world_with_point() -> World:
    world = World()
    run_backup(world, "p1")
    return world


def until(world: World, job: RestoreJob, state: JobState) -> tuple[RestoreJob, list[Command]]:
    job, todo = start(job)
    while job.state is not state:
        job, more = advance(job, world.perform(todo.pop(0)))
        todo += more
    return job, todo


def test_disk_to_a_file() -> None:
    world = world_with_point()
    job, todo = until(world, disk_job(), S.SUCCEEDED)
    assert todo == []
    assert job.files == {"vdb": "/out/vdb.qcow2"}
    assert world.files == {"/out/vdb.qcow2": "r1"}


def test_single_disk_is_standalone_and_disks_of_a_machine_are_not() -> None:
    world = world_with_point()
    for job, expected in ((disk_job(), [True]), (machine_job(), [False, False])):
        _, commands = until(world, job, S.TRANSFERRING)
        assert [c.standalone for c in commands if isinstance(c, RestoreDisk)] == expected


def test_machine_is_defined_once_all_disks_are_there() -> None:
    world = world_with_point()
    job, [define] = until(world, machine_job(), S.DEFINING)
    assert isinstance(define, DefineMachine)
    assert job.may_define
    job, _ = advance(job, world.perform(define))
    assert job.state is S.SUCCEEDED
    assert world.machines["new"] == "r1"


def test_lost_while_defining_undefines_and_removes() -> None:
    world = world_with_point()
    job, [define] = until(world, machine_job(), S.DEFINING)
    world.perform(define)
    job, [discard] = advance(job, LOST)
    assert isinstance(discard, Discard)
    assert discard.uuid == "new"
    job, _ = advance(job, world.perform(discard))
    assert (job.state, world.files, "new" in world.machines) == (S.FAILED, {}, False)


def test_lost_before_the_definition_undefines_nothing() -> None:
    world = world_with_point()
    job, _ = until(world, machine_job(), S.TRANSFERRING)
    _, [discard] = advance(job, LOST)
    assert isinstance(discard, Discard)
    assert (discard.uuid, discard.paths) == (None, ["/new/vda.qcow2", "/new/vdb.qcow2"])


def test_lost_while_replacing_goes_on_and_not_back() -> None:
    world = world_with_point()
    job, [define] = until(world, machine_job(replace=True), S.DEFINING)
    job, [again] = advance(job, LOST)
    assert again == define
    job, _ = advance(job, world.perform(again))
    assert job.state is S.SUCCEEDED


def test_failed_replacement_keeps_files_and_machine() -> None:
    """They may be the machine's disks by now."""
    world = world_with_point()
    job, [define] = until(world, machine_job(replace=True), S.DEFINING)
    world.perform(define)
    job, [discard] = advance(job, failed(define))
    assert isinstance(discard, Discard)
    assert (discard.paths, discard.uuid) == ([], None)
    assert job.warnings == ["kept, because the machine may use them already: /new/vda.qcow2, /new/vdb.qcow2"]


def test_cancel_waits_for_the_writers_and_removes_what_they_wrote() -> None:
    world = world_with_point()
    job, [first, second] = until(world, machine_job(), S.TRANSFERRING)
    job, _ = advance(job, CancelRequested(by="anna"))
    job, commands = advance(job, world.perform(first))
    assert (commands, job.stopping) == ([], True)
    job, [discard] = advance(job, failed(second, Cancelled("cancelled").info()))
    job, _ = advance(job, world.perform(discard))
    assert (job.state, world.files) == (S.CANCELLED, {})


def test_failed_discard_is_tried_again() -> None:
    world = world_with_point()
    job, [first, _] = until(world, machine_job(), S.TRANSFERRING)
    world.perform(first)
    job, [discard] = advance(job, LOST)
    job, _ = advance(job, failed(discard))
    assert (job.state, job.leftover) == (S.FAILED, True)
    job, [again] = retry_release(job)
    assert again == discard
    job, _ = advance(job, world.perform(again))
    assert (job.leftover, world.files) == (False, {})
