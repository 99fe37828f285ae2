"""The states of a job, and which may follow which.

One table, so that a transition nobody thought of is an error at the moment it is tried and not a stuck guest later.
Every way to `failed` or `cancelled` of a job on a machine that has begun leads through `releasing` (DESIGN section 4):
that is what makes "thawed and released" a property of the table and not of the care of whoever adds a state.
"""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    QUEUED = "queued"
    PREPARING = "preparing"
    SNAPSHOTTING = "snapshotting"
    TRANSFERRING = "transferring"
    COMMITTING = "committing"
    DEFINING = "defining"
    """Only a restore: the machine is being defined on its restored disks."""
    WORKING = "working"
    """Only upkeep of a vault: it holds nothing that would have to be released."""
    RELEASING = "releasing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})

_RELEASING = frozenset({JobState.RELEASING})

ALLOWED: dict[JobState, frozenset[JobState]] = {
    # Nothing has begun in `queued`, so there is nothing to release.
    JobState.QUEUED: frozenset({JobState.PREPARING, JobState.WORKING, JobState.FAILED, JobState.CANCELLED}),
    JobState.PREPARING: _RELEASING | {JobState.SNAPSHOTTING, JobState.TRANSFERRING},
    JobState.SNAPSHOTTING: _RELEASING | {JobState.TRANSFERRING},
    # A single restored disk ends here: it leaves no obligation behind.
    JobState.TRANSFERRING: _RELEASING | {JobState.COMMITTING, JobState.DEFINING, JobState.SUCCEEDED},
    JobState.COMMITTING: _RELEASING,
    JobState.DEFINING: _RELEASING | {JobState.SUCCEEDED},
    JobState.WORKING: TERMINAL,
    JobState.RELEASING: TERMINAL,
    # Only where a release failed and its obligations stand (`leftover`): the reconciler tries again.
    JobState.SUCCEEDED: _RELEASING,
    JobState.FAILED: _RELEASING,
    JobState.CANCELLED: _RELEASING,
}


def check(before: JobState, after: JobState) -> None:
    """Raise ValueError (a defect of ours, never of the user's) if `after` may not follow `before`."""
    if before != after and after not in ALLOWED[before]:
        raise ValueError(f"a job that is {before} cannot become {after}")
