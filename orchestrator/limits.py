"""How long a command may take before its job is given up: nothing that hangs may keep a guest frozen or a slot taken.

Out of band: whoever performs the command need not notice that it hangs. Transfers have no limit: they take what they
take, show their progress, and end themselves when cancelled. The limits are generous, for they are the last resort;
the commands' own deadlines (freeze, agent, connections) are far shorter and give better reasons.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from orchestrator.jobs.states import JobState

MINUTES = {
    JobState.PREPARING: 20,
    JobState.SNAPSHOTTING: 20,
    JobState.COMMITTING: 30,
    JobState.DEFINING: 20,
    JobState.RELEASING: 30,
}
"""Preparing may install an extension; a commit or a release may wait for an object store, and for its mirrors."""


def timed_out(state: JobState, since: datetime, now: datetime) -> str:
    """Why a job that is in `state` since then is given up, in words; empty: it is not."""
    minutes = MINUTES.get(state)
    if minutes is None or now - since < timedelta(minutes=minutes):
        return ""
    return f"{state} has taken longer than {minutes} minutes"


def all_timed_out(jobs: Iterable[tuple[str, str, datetime]], now: datetime) -> dict[str, str]:
    """(job, state, since) → why, of those that are given up."""
    verdicts = {job: timed_out(JobState(state), since, now) for job, state, since in jobs}
    return {job: why for job, why in verdicts.items() if why}
