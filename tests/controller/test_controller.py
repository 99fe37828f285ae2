from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from orchestrator.catalog.jobs import events_of, load_job
from orchestrator.catalog.points import newest_base, points_of
from orchestrator.catalog.store import Catalog
from orchestrator.jobs.backup_job import BackupJob
from orchestrator.jobs.states import JobState
from tests.controller.scripted import Bench, add_backup, run_backup
from tests.jobs.world import MACHINE, disk, failed
from workers.contract.errors import Busy, NoSpace, NotFound
from workers.contract.messages import CancelRequested, Command, Event, TransferDisk, WorkerLost


def state(catalog: Catalog, job_id: str) -> BackupJob:
    with catalog.read() as session:
        _, job = load_job(session, job_id)
    assert isinstance(job, BackupJob)
    return job


def test_two_generations_with_their_points_and_queues(bench: Bench) -> None:
    run_backup(bench, "one")
    run_backup(bench, "two")
    with bench.catalog.read() as session:
        rows = points_of(session, [MACHINE.uuid])
        base = newest_base(session, MACHINE.uuid, "main")
    assert [row.id for row in rows] == ["point-one", "point-two"]
    assert base is not None
    assert base.id == "point-two"
    assert [p.reason[:13] for p in state(bench.catalog, "two").plans] == ["changes since"] * 2
    assert {queue for _, queue in bench.sent} == {"host.lab"}


def test_no_secret_of_the_definition_stays_in_the_catalog(bench: Bench) -> None:
    run_backup(bench, "one")
    with bench.catalog.read() as session:
        row, _ = load_job(session, "one")
        assert "secret" not in row.doc + "".join(p.doc for p in points_of(session))
        assert "secret" not in "".join(e.text for e in events_of(session, "one"))


def test_obligations_are_in_the_catalog_before_the_command_is_sent(bench: Bench) -> None:
    seen: list[tuple[bool, str | None, bool]] = []

    def look(command: Command) -> Event:
        job = state(bench.catalog, command.job)
        if command.kind in ("take_snapshot", "commit_point"):
            seen.append((job.must_thaw, job.new_checkpoint, job.commit_sent))
        return bench.world.perform(command)

    add_backup(bench.catalog, "one")
    bench.controller.start("one")
    bench.run(look)
    assert seen == [(True, "sf-one", False), (False, "sf-one", True)]


def test_an_event_that_comes_twice_is_recorded_and_changes_nothing(bench: Bench) -> None:
    run_backup(bench, "one")
    before = state(bench.catalog, "one")
    bench.controller.advance("one", WorkerLost(detail="process 7 is gone"))
    assert state(bench.catalog, "one") == before
    with bench.catalog.read() as session:
        assert [e.effective for e in events_of(session, "one")] == [True] * 7 + [False]


def test_thaw_travels_on_its_own_queue(bench: Bench) -> None:
    add_backup(bench.catalog, "one")
    bench.controller.start("one")
    bench.run(until="take_snapshot")
    bench.controller.advance("one", WorkerLost(detail="process 7 is gone"))
    assert bench.sent[-2:] == [("thaw", "rescue.lab"), ("release", "host.lab")]


def test_first_failure_stops_the_other_transfers_once(bench: Bench) -> None:
    def fails(command: Command) -> Event:
        if isinstance(command, TransferDisk):
            return failed(command, NoSpace("scratch is full").info())
        return bench.world.perform(command)

    bench.world.disks.append(disk("vdc"))
    add_backup(bench.catalog, "one")
    bench.controller.start("one")
    bench.run(fails)
    assert bench.stopped == ["one"]
    assert state(bench.catalog, "one").state is JobState.FAILED
    assert bench.changes[-1] == ("one", "failed")


def test_cancel_asks_the_workers_to_stop(bench: Bench) -> None:
    add_backup(bench.catalog, "one")
    bench.controller.start("one")
    bench.controller.advance("one", CancelRequested(by="anna"))
    assert bench.stopped == ["one"]
    bench.run()
    assert state(bench.catalog, "one").state is JobState.CANCELLED


def test_second_job_on_a_machine_is_busy_and_names_the_first(bench: Bench) -> None:
    add_backup(bench.catalog, "one")
    with pytest.raises(Busy) as caught:
        add_backup(bench.catalog, "two")
    assert str(caught.value) == "backup one works on web (queued)"
    assert "stillframe job cancel one" in caught.value.hint
    assert caught.value.exit_code == 11


def test_release_again_waits_for_a_job_that_works_there_now(bench: Bench) -> None:
    add_backup(bench.catalog, "one")
    bench.controller.start("one")
    bench.run(until="transfer_disk")
    bench.controller.advance("one", WorkerLost(detail="process 7 is gone"))
    bench.run(failed)
    assert state(bench.catalog, "one").leftover
    add_backup(bench.catalog, "two")
    with pytest.raises(Busy):
        bench.controller.retry_release("one")
    assert state(bench.catalog, "one").state is JobState.FAILED


def test_events_of_many_threads_join_exactly_once(bench: Bench) -> None:
    add_backup(bench.catalog, "one")
    bench.controller.start("one")
    prepare = bench.queue.pop()
    bench.controller.advance("one", bench.world.perform(prepare))
    bench.controller.advance("one", bench.world.perform(bench.queue.pop()))
    events = [bench.world.perform(command) for command in bench.queue] * 4
    bench.queue.clear()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda event: bench.controller.advance("one", event), events))
    assert [command.kind for command in bench.queue] == ["commit_point"]


def test_unknown_job(bench: Bench) -> None:
    with pytest.raises(NotFound):
        bench.controller.advance("none", WorkerLost(detail=""))
