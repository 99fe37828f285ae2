"""A job that looks after a vault, as a pure state machine: sweep, verify, replicate, or extend locks.

It touches no machine, so it holds nothing that would have to be released, and has no command for a worker: the
controller performs it (`orchestrator/upkeep_runner.py`), and every piece of work can be run again from the beginning.
What was not done is due again at the next turn.
"""

from __future__ import annotations

from typing import Literal, get_args

from orchestrator.jobs.states import TERMINAL, JobState, check
from workers.contract.errors import Cancelled, ErrorInfo
from workers.contract.machines import Value
from workers.contract.messages import CancelRequested, Command, Event, Failed, TimedOut, WorkerLost

S = JobState

UpkeepKind = Literal["sweep", "verify", "replicate", "lock"]
UPKEEP_KINDS: tuple[UpkeepKind, ...] = get_args(UpkeepKind)
"""In the words of `[upkeep]`."""


class UpkeepJob(Value):
    """All that is known of one piece of upkeep; stored whole with every transition."""

    kind: Literal["upkeep"] = "upkeep"
    id: str
    what: UpkeepKind
    vault: str
    state: JobState = S.QUEUED
    lines: list[str] = []
    """What came of it, for people."""
    leftover: bool = False
    """Always False: nothing is held."""
    error: ErrorInfo | None = None
    warnings: list[str] = []

    @property
    def stopping(self) -> bool:
        """What runs should end itself."""
        return self.error is not None and self.state not in TERMINAL


Step = tuple[UpkeepJob, list[Command]]


def start(job: UpkeepJob) -> Step:
    """Begin a queued one. A job that is not queued is left alone."""
    return (_to(job, S.WORKING), []) if job.state is S.QUEUED else (job, [])


def retry_release(job: UpkeepJob) -> Step:
    """There is nothing to release."""
    return job, []


def advance(job: UpkeepJob, event: Event) -> Step:
    """The job after `event`; never a command."""
    match job.state, event:
        case state, _ if state in TERMINAL:
            return job, []
        case S.QUEUED, CancelRequested():
            return _to(job, S.CANCELLED, error=_cancelled(event.by)), []
        case _, CancelRequested():
            return job if job.error else job.model_copy(update={"error": _cancelled(event.by)}), []
        case _, WorkerLost() | TimedOut():
            return _ended(job, _lost(job, event.detail)), []
        case S.WORKING, Failed():
            return _ended(job, event.error), []
        case _:
            return job, []


def finish(job: UpkeepJob, lines: list[str], warnings: list[str]) -> Step:
    """The work is done; a cancellation that came meanwhile came too late. Anything but a job at work is left alone."""
    if job.state is not S.WORKING:
        return job, []
    return _to(job, S.SUCCEEDED, lines=lines, warnings=[*job.warnings, *warnings], error=None), []


def _to(job: UpkeepJob, state: JobState, **changes: object) -> UpkeepJob:
    check(job.state, state)
    return job.model_copy(update={"state": state, **changes})


def _ended(job: UpkeepJob, error: ErrorInfo) -> UpkeepJob:
    """The first error counts: what follows a cancellation is its consequence."""
    error = job.error or error
    return _to(job, S.CANCELLED if error.code == Cancelled.__name__ else S.FAILED, error=error)


def _cancelled(by: str) -> ErrorInfo:
    return Cancelled(f"cancelled by {by}").info()


def _lost(job: UpkeepJob, detail: str) -> ErrorInfo:
    return ErrorInfo(
        code=WorkerLost.__name__,
        message=f"the process that did it ended: {detail}",
        hint=f"it comes again at its next turn; or now: stillframe upkeep run {job.what} {job.vault}",
        retryable=True,
    )
