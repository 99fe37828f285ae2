"""What hangs and what is silent is given up; nothing else is."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from orchestrator.catalog import owner
from orchestrator.catalog.owner import NOBODY
from orchestrator.catalog.queue import hear_of
from orchestrator.catalog.workers import note_beat, served
from orchestrator.jobs.states import JobState
from orchestrator.limits import MINUTES, timed_out
from orchestrator.overseer import Overseer, Quiet, silent
from tests.controller.scripted import Bench, add_backup
from tests.controller.test_controller import state
from workers.contract.messages import Beat, Running

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


def beat(hypervisor: str = "lab", running: tuple[str, ...] = (), free: int = 5, started: str = "then") -> Beat:
    return Beat(
        worker=f"{hypervisor}@host",
        host="host",
        pid=7,
        started=started,
        hypervisors=[hypervisor],
        running=[Running(job=job, kind="prepare") for job in running],
        free=free,
    )


@pytest.mark.parametrize("state_", list(JobState))
def test_every_state_but_queueing_and_transferring_has_a_limit(state_: JobState) -> None:
    late = NOON + timedelta(days=1)
    limited = {"preparing", "snapshotting", "committing", "defining", "releasing"}
    assert bool(timed_out(state_, NOON, late)) is (state_ in limited)
    assert timed_out(state_, NOON, NOON + timedelta(minutes=MINUTES.get(state_, 1)) - timedelta(seconds=1)) == ""


def test_a_preparation_that_hangs_is_given_up_and_released(bench: Bench) -> None:
    add_backup(bench.catalog, "one")
    bench.controller.start("one")
    overseer = Overseer(bench.catalog, lambda: bench.controller, owner.this_process())
    overseer.time_out(datetime.now(UTC) + timedelta(minutes=19))
    assert state(bench.catalog, "one").state is JobState.PREPARING
    overseer.time_out(datetime.now(UTC) + timedelta(minutes=21))
    job = state(bench.catalog, "one")
    assert job.state is JobState.RELEASING
    assert job.error is not None
    assert job.error.message == "it took too long: preparing has taken longer than 20 minutes"
    overseer.time_out(datetime.now(UTC) + timedelta(minutes=31))
    job = state(bench.catalog, "one")
    assert (job.state, job.leftover) == (JobState.FAILED, True), "its release hangs, too: tried again later"


def test_silence() -> None:
    def quiet(job: str, seconds: int, state_: JobState = JobState.TRANSFERRING) -> Quiet:
        return Quiet(job, state_, "lab", NOON - timedelta(seconds=seconds))

    jobs = [quiet("old", 61), quiet("new", 59), quiet("release", 61, JobState.RELEASING)]
    assert silent(jobs, NOON, (), 60) == ["old"], "nobody is there to hear the release"
    assert silent(jobs, NOON, ("lab",), 60) == ["old", "release"]


def test_only_what_was_not_heard_of_is_taken_over(bench: Bench) -> None:
    add_backup(bench.catalog, "one", of=NOBODY)
    bench.controller.start("one")
    overseer = Overseer(bench.catalog, lambda: bench.controller, NOBODY)
    soon, late = datetime.now(UTC) + timedelta(seconds=50), datetime.now(UTC) + timedelta(seconds=70)
    assert overseer.take_over(soon) == []
    overseer.deaf()
    assert overseer.take_over(late) == [], "who could not hear proves nothing by silence"
    listening = Overseer(bench.catalog, lambda: bench.controller, NOBODY)
    assert listening.take_over(late) == ["one"]
    assert state(bench.catalog, "one").state is JobState.RELEASING


def test_jobs_of_processes_are_not_the_leaders_to_take_over(bench: Bench) -> None:
    add_backup(bench.catalog, "one")
    bench.controller.start("one")
    overseer = Overseer(bench.catalog, lambda: bench.controller, NOBODY)
    assert overseer.take_over(datetime.now(UTC) + timedelta(hours=1)) == []


def heard(bench: Bench) -> datetime:
    from orchestrator.catalog.jobs import find_job

    with bench.catalog.read() as session:
        found = find_job(session, "one").heard
    assert found is not None
    return found


def test_beats_are_signs_of_life_of_what_they_mention(bench: Bench) -> None:
    add_backup(bench.catalog, "one", of=NOBODY)
    bench.controller.start("one")
    before = heard(bench)
    with bench.catalog.write() as session:
        assert note_beat(session, beat(running=("other",))), "it is new"
        assert served(session) == {"lab"}
    assert heard(bench) == before
    with bench.catalog.write() as session:
        assert not note_beat(session, beat(running=("one",)))
    after = heard(bench)
    assert after > before
    with bench.catalog.write() as session:
        note_beat(session, beat("elsewhere", free=0))
    assert heard(bench) == after
    with bench.catalog.write() as session:
        assert note_beat(session, beat(free=0, started="later")), "it was started again"
    assert heard(bench) > after, "its command may wait for a thread"


def test_a_job_that_has_ended_is_not_heard_of(bench: Bench) -> None:
    add_backup(bench.catalog, "one", of=NOBODY)
    bench.controller.start("one")
    bench.run()
    before = heard(bench)
    with bench.catalog.write() as session:
        hear_of(session, ["one"])
    assert heard(bench) == before
