"""Settles, at every start, what a crash has left behind (invariant 8).

The same function as everywhere, `controller.advance`, fed with `worker_lost`: there is no second way to clean up that
would have to be kept right beside the first. A job is taken only from a process that is provably dead, and by a guarded
update, so that of two processes that start at once only one does the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from orchestrator.catalog import owner
from orchestrator.catalog.jobs import Stale, load_job, owner_of, take_over, unsettled
from orchestrator.catalog.schema import JobRow, now
from orchestrator.catalog.store import Catalog
from orchestrator.controller import Controller
from orchestrator.jobs.backup_job import BackupJob
from orchestrator.jobs.states import TERMINAL, JobState
from workers.contract.errors import Busy
from workers.contract.messages import WorkerLost

SETTLE_SECONDS = 120.0
RETRY = timedelta(minutes=5)


def reconcile(
    catalog: Catalog,
    controller: Callable[[], Controller],
    wait: Callable[[float], object],
    *,
    deadline: float = SETTLE_SECONDS,
) -> list[str]:
    """Release what dead processes and failed releases have left; what was done, in words.

    `controller` is called only if there is something to do: it starts a worker. `wait` waits a moment (at most the
    given seconds) for news of jobs. Gives up after `deadline` seconds; what is not settled then is tried at the next
    start.
    """
    taken, lines = _take_all(catalog, controller)
    end = time.monotonic() + deadline
    open_ones = taken
    while open_ones and time.monotonic() < end:
        with catalog.read() as session:
            open_ones = [row for row in open_ones if load_job(session, row.id)[1].state not in TERMINAL]
        if open_ones:
            wait(0.2)
    return lines + [_outcome(catalog, row) for row in taken]


def settle_dead(catalog: Catalog, controller: Callable[[], Controller]) -> None:
    """The same for a service, which need not wait: it hears how they end. A release that failed waits a while."""
    adopt(catalog)
    _take_all(catalog, controller, patience=RETRY)


def adopt(catalog: Catalog) -> None:
    """Take over what dead processes have left in the queue for its schedule: its moment is decided and does not come
    again, so it begins here, in its turn."""
    with catalog.read() as session:
        rows = [row for row in unsettled(session) if _ours_to_settle(row) and _waits(row)]
    for row in rows:
        _take(catalog, row)


def _take_all(
    catalog: Catalog, controller: Callable[[], Controller], patience: timedelta = timedelta(0)
) -> tuple[list[JobRow], list[str]]:
    """Jobs that were taken over, and why some of them could not be begun."""
    with catalog.read() as session:
        rows = [row for row in unsettled(session) if _ours_to_settle(row) and not _waits(row)]
    rows = [row for row in rows if row.active or row.updated <= now() - patience]
    taken = [row for row in rows if _take(catalog, row)]
    return taken, [line for row in taken if (line := _begin(controller(), row))]


def _ours_to_settle(row: JobRow) -> bool:
    of = owner_of(row)
    return of != owner.NOBODY and (not row.active or owner.is_dead(of))


def _waits(row: JobRow) -> bool:
    """Scheduled, and nothing of it has begun."""
    return row.state == JobState.QUEUED and bool(row.section)


def _take(catalog: Catalog, row: JobRow) -> bool:
    try:
        with catalog.write() as session:
            take_over(session, row, owner.this_process())
    except Stale:
        return False
    return True


def _begin(controller: Controller, row: JobRow) -> str:
    """Why not, if it cannot be begun now."""
    try:
        if row.active:
            controller.advance(row.id, WorkerLost(detail=f"process {row.owner_pid} is gone"))
        else:
            controller.retry_release(row.id)
    except Busy as error:
        return f"{row.kind} {row.id} of {row.machine_name} has to wait with its release: {error}"
    return ""


def _outcome(catalog: Catalog, row: JobRow) -> str:
    with catalog.read() as session:
        _, job = load_job(session, row.id)
    why = "left behind by a process that is gone" if row.active else "whose release had failed"
    what = f"{row.kind} {row.id} of {row.machine_name}, {why}"
    if job.state not in TERMINAL:
        return f"{what}: still {job.state}; tried again at the next start"
    if job.leftover:
        return f"{what}: could not be released ({job.warnings[-1]}); tried again at the next start"
    if isinstance(job, BackupJob) and job.committed:
        return f"{what}: its point {job.point[:8]} exists; released"
    if job.state is JobState.SUCCEEDED:
        return f"{what}: finished"
    return f"{what}: released, nothing of it is left"
