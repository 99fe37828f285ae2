"""Watches over jobs that are under way: gives up what takes too long, and what nobody performs any more.

Both forms use it: a process of the embedded form for the jobs it owns, the leading controller of the distributed form
for those that belong to nobody. It only ever feeds the state machines with `TimedOut` and `WorkerLost`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlmodel import col, select

from orchestrator.catalog.owner import Owner
from orchestrator.catalog.queue import begun
from orchestrator.catalog.schema import JobRow
from orchestrator.catalog.store import Catalog
from orchestrator.catalog.workers import served
from orchestrator.controller import Controller
from orchestrator.jobs.states import JobState
from orchestrator.limits import all_timed_out
from workers.contract.errors import Busy
from workers.contract.messages import SILENT_SECONDS, TimedOut, WorkerLost

RETRY_SECONDS = 300.0
"""Between two tries of a release that failed."""


@dataclass(frozen=True, slots=True)
class Quiet:
    """A job that is under way, and when it was last heard of."""

    job: str
    state: JobState
    hypervisor: str
    heard: datetime


def silent(jobs: Iterable[Quiet], now: datetime, living: Collection[str], seconds: float) -> list[str]:
    """Those that nobody performs any more. A release is only asked for again where somebody is there to hear it."""
    limit = now - timedelta(seconds=seconds)
    return [
        one.job
        for one in jobs
        if one.heard < limit and (one.state is not JobState.RELEASING or one.hypervisor in living)
    ]


class Overseer:
    """Of the jobs of one owner. Not for several threads at once."""

    def __init__(
        self, catalog: Catalog, controller: Callable[[], Controller], of: Owner, *, seconds: float = SILENT_SECONDS
    ) -> None:
        self._catalog = catalog
        self._controller = controller
        self._of = of
        self._seconds = seconds
        self._listening_since = float("-inf")

    def time_out(self, now: datetime) -> None:
        """Give up what takes too long."""
        with self._catalog.read() as session:
            rows = [(row.id, row.state, row.updated) for row in begun(session, self._of)]
        for job, why in all_timed_out(rows, now).items():
            self._controller().advance(job, TimedOut(detail=why))

    def deaf(self) -> None:
        """Signs of life could not have reached us until now: silence proves nothing yet."""
        self._listening_since = time.monotonic()

    def take_over(self, now: datetime) -> list[str]:
        """Give up what nobody performs any more; the ids."""
        if time.monotonic() < self._listening_since + self._seconds:
            return []
        with self._catalog.read() as session:
            jobs = [
                Quiet(row.id, JobState(row.state), row.hypervisor, row.heard or row.updated)
                for row in begun(session, self._of)
                if row.hypervisor
            ]
            lost = silent(jobs, now, served(session, self._seconds), self._seconds)
        for job in lost:
            detail = f"no worker was heard to work on it for {self._seconds:.0f} seconds"
            self._controller().advance(job, WorkerLost(detail=detail))
        return lost

    def retry_releases(self, now: datetime) -> None:
        """Release again what a failed release has left, where a worker is there to do it."""
        with self._catalog.read() as session:
            mine = (col(JobRow.owner_host) == self._of.host, col(JobRow.owner_pid) == self._of.pid)
            old = col(JobRow.updated) < now - timedelta(seconds=RETRY_SECONDS)
            query = select(JobRow.id, JobRow.hypervisor).where(col(JobRow.leftover), ~col(JobRow.active), *mine, old)
            living = served(session, self._seconds)
            jobs = [job for job, hypervisor in session.exec(query).all() if hypervisor in living]
        for job in jobs:
            try:
                self._controller().retry_release(job)
            except Busy:  # another job works there now; its turn comes
                continue
