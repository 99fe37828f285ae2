"""What a dead process leaves is settled by the next one: with a process that really was, and really died."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

import pytest

from orchestrator.catalog import owner
from orchestrator.catalog.jobs import Stale, Ticket, add_job, find_job, load_job, owner_of, take_over
from orchestrator.catalog.owner import Owner
from orchestrator.catalog.schema import now
from orchestrator.controller import Controller
from orchestrator.dispatcher import Dispatcher, Limits
from orchestrator.jobs.backup_job import BackupJob
from orchestrator.jobs.states import JobState
from orchestrator.reconciler import reconcile, settle_dead
from tests.controller.scripted import Bench, add_backup, run_backup
from tests.controller.test_controller import state
from tests.jobs.world import failed
from workers.contract.machines import MachineRef
from workers.contract.messages import Command, Event, TakeSnapshot


def dead() -> Owner:
    process = subprocess.Popen(["sleep", "60"])
    found = owner.owner_of(process.pid)
    assert not owner.is_dead(found)
    process.kill()
    process.wait()
    return found


def settle(bench: Bench) -> list[str]:
    return reconcile(bench.catalog, lambda: bench.controller, bench.wait, deadline=5)


def die_at(bench: Bench, kind: str, perform: Callable[[Command], Event | None] | None = None) -> None:
    """A backup whose process dies just before a command of that kind."""
    add_backup(bench.catalog, "one", of=dead())
    bench.controller.start("one")
    bench.run(perform, until=kind)


STEPS = ["prepare", "take_snapshot", "transfer_disk", "commit_point", "release"]


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("performed", [False, True])
def test_death_at_every_step_leaves_nothing(bench: Bench, kind: str, performed: bool) -> None:
    run_backup(bench, "zero")

    def perform_and_die(command: Command) -> Event | None:
        event = bench.world.perform(command)
        return None if command.kind == kind else event

    die_at(bench, "" if performed else kind, perform_and_die if performed else None)
    lines = settle(bench)
    job = state(bench.catalog, "one")
    exists = kind == "release" or (kind == "commit_point" and performed)
    assert job.state is (JobState.SUCCEEDED if exists else JobState.FAILED)
    assert set(bench.world.checkpoints) == {"sf-one" if exists else "sf-zero"}
    assert not bench.world.snapshots
    assert not bench.world.sessions
    assert len(lines) == 1
    assert ("its point point-on exists" if exists else "nothing of it is left") in lines[0]
    assert settle(bench) == []


def test_death_in_the_middle_of_the_freeze_is_thawed(bench: Bench) -> None:
    def half(command: Command) -> Event | None:
        if isinstance(command, TakeSnapshot):
            bench.world.half_snapshot(command)
            return None
        return bench.world.perform(command)

    die_at(bench, "", half)
    assert bench.world.frozen
    settle(bench)
    assert bench.world.thaws
    assert bench.world.checkpoints == {}


def test_queued_job_of_a_dead_process_fails_without_a_command(bench: Bench) -> None:
    add_backup(bench.catalog, "one", of=dead())
    settle(bench)
    assert state(bench.catalog, "one").state is JobState.FAILED
    assert bench.sent == []


def test_what_a_dead_service_left_in_the_queue_for_its_schedule_begins_in_the_next(bench: Bench) -> None:
    """Its moment is decided and does not come again: it must neither fail nor be forgotten."""
    job = BackupJob(id="due", machine=MachineRef(hypervisor="lab", uuid="u", name="web"), vault="main", point="p")
    with bench.catalog.write() as session:
        ticket = Ticket(section="web", due=now())
        add_job(session, job, dead(), machine=("u", "web"), lock="machine:u", ticket=ticket)
    assert settle(bench) == []  # a command that only passes by
    assert state(bench.catalog, "due").state is JobState.QUEUED
    settle_dead(bench.catalog, lambda: bench.controller)
    with bench.catalog.read() as session:
        assert owner_of(find_job(session, "due")) == owner.this_process()
    dispatcher = Dispatcher(bench.catalog, bench.controller, lambda: Limits({}, {}), owner.this_process())
    assert dispatcher.dispatch() == ["due"]


def test_job_of_a_living_process_is_left_alone(bench: Bench) -> None:
    add_backup(bench.catalog, "one")
    bench.controller.start("one")
    assert settle(bench) == []
    assert state(bench.catalog, "one").state is JobState.PREPARING


def test_job_of_another_host_is_left_alone(bench: Bench) -> None:
    gone = dead()
    add_backup(bench.catalog, "one", of=Owner("elsewhere", gone.boot, gone.pid, gone.started))
    assert settle(bench) == []


def test_reused_pid_is_not_the_owner() -> None:
    mine = owner.this_process()
    assert not owner.is_dead(mine)
    assert owner.is_dead(Owner(mine.host, mine.boot, mine.pid, mine.started - 1))
    assert owner.is_dead(Owner(mine.host, "another boot", mine.pid, mine.started))


def test_zombie_is_dead() -> None:
    process = subprocess.Popen(["sleep", "60"])
    found = owner.owner_of(process.pid)
    process.kill()
    deadline = time.monotonic() + 10
    while not owner.is_dead(found) and time.monotonic() < deadline:
        pass  # it is killed, and nobody has reaped it
    assert owner.is_dead(found)
    process.wait()


def test_failed_release_is_tried_again_at_the_next_start(bench: Bench) -> None:
    die_at(bench, "transfer_disk")

    def fails(_seconds: float) -> None:
        bench.run(failed)

    [line] = reconcile(bench.catalog, lambda: bench.controller, fails, deadline=5)
    assert "could not be released (the release failed: it did not work)" in line
    assert bench.world.snapshots
    [line] = settle(bench)
    assert line == "backup one of web, whose release had failed: released, nothing of it is left"
    assert not bench.world.snapshots
    assert settle(bench) == []


def test_only_one_of_two_takes_a_job_over(bench: Bench) -> None:
    add_backup(bench.catalog, "one", of=dead())
    with bench.catalog.read() as session:
        row = find_job(session, "one")
    with bench.catalog.write() as session:
        take_over(session, row, owner.this_process())
    with pytest.raises(Stale), bench.catalog.write() as session:
        take_over(session, row, owner.this_process())
    with bench.catalog.read() as session:
        assert owner_of(load_job(session, "one")[0]) == owner.this_process()


def test_nothing_to_do_starts_no_worker(bench: Bench) -> None:
    def never() -> Controller:
        raise AssertionError("a worker was started")

    run_backup(bench, "zero")
    assert reconcile(bench.catalog, never, bench.wait) == []


def test_gives_up_after_its_deadline(bench: Bench) -> None:
    die_at(bench, "transfer_disk")
    [line] = reconcile(bench.catalog, lambda: bench.controller, lambda _seconds: None, deadline=0.05)
    assert line.endswith("still releasing; tried again at the next start")
