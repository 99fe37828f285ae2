"""Upkeep as a state machine: small, and never a command."""

from __future__ import annotations

import pytest

from orchestrator.jobs import upkeep
from orchestrator.jobs.states import JobState
from orchestrator.jobs.upkeep import UpkeepJob
from workers.contract.errors import Cancelled, VaultMissing
from workers.contract.messages import CancelRequested, Event, Failed, WorkerLost

QUEUED = UpkeepJob(id="one", what="sweep", vault="main")
WORKING, _ = upkeep.start(QUEUED)
FAILED = Failed(command="upkeep", error=VaultMissing("no vault there").info())
CANCEL = CancelRequested(by="anna")
LOST = WorkerLost(detail="process 7 is gone")


def test_it_runs_and_ends() -> None:
    assert WORKING.state is JobState.WORKING
    done, commands = upkeep.finish(WORKING, ["removed 3 packs"], ["one store was slow"])
    assert (done.state, done.lines, done.warnings, commands) == (
        JobState.SUCCEEDED,
        ["removed 3 packs"],
        ["one store was slow"],
        [],
    )


@pytest.mark.parametrize(
    ("job", "events", "state", "code"),
    [
        (QUEUED, [CANCEL], JobState.CANCELLED, "Cancelled"),
        (QUEUED, [LOST], JobState.FAILED, "WorkerLost"),
        (WORKING, [FAILED], JobState.FAILED, "VaultMissing"),
        (WORKING, [LOST], JobState.FAILED, "WorkerLost"),
        (WORKING, [CANCEL], JobState.WORKING, "Cancelled"),
        (WORKING, [CANCEL, Failed(command="upkeep", error=Cancelled("x").info())], JobState.CANCELLED, "Cancelled"),
        (WORKING, [CANCEL, FAILED], JobState.CANCELLED, "Cancelled"),
        (WORKING, [FAILED, CANCEL, LOST], JobState.FAILED, "VaultMissing"),
    ],
)
def test_every_way_to_end(job: UpkeepJob, events: list[Event], state: JobState, code: str) -> None:
    for event in events:
        job, commands = upkeep.advance(job, event)
        assert commands == []
    assert (job.state, job.error and job.error.code) == (state, code)
    assert job.stopping == (state is JobState.WORKING)


def test_what_came_too_late_changes_nothing() -> None:
    done, _ = upkeep.finish(upkeep.advance(WORKING, CANCEL)[0], ["done"], [])
    assert (done.state, done.error) == (JobState.SUCCEEDED, None)
    for event in (FAILED, CANCEL, LOST):
        assert upkeep.advance(done, event) == (done, [])
    assert upkeep.start(done) == (done, [])
    assert upkeep.finish(QUEUED, [], []) == (QUEUED, [])
