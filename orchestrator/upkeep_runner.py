"""Runs upkeep: one job after the other, on a thread of its own in the process that made them.

Sweeps and verifications take hours and must keep nobody waiting, so they are no chores. Whoever cancels one, or gives
it up because this process seemed dead, does so in the catalog; the work looks there each time it says how far it is,
and ends itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

from sqlalchemy import update
from sqlalchemy.exc import DBAPIError
from sqlmodel import col

from orchestrator.actor import SCHEDULE, acting_as
from orchestrator.catalog.jobs import load_job
from orchestrator.catalog.schema import JobRow, now
from orchestrator.catalog.store import Catalog
from orchestrator.controller import Controller
from orchestrator.jobs.states import JobState
from orchestrator.jobs.upkeep import UpkeepJob
from workers.contract.errors import Cancelled, StillframeError, describe
from workers.contract.machines import Value
from workers.contract.messages import BEAT_SECONDS, Failed
from workers.logs import about

LOOK_SECONDS = 1.0
END_SECONDS = 10.0


class Done(Value):
    """What came of a piece of upkeep, for people."""

    lines: list[str] = []
    warnings: list[str] = []


Check = Callable[[object], None]
"""Called with progress, now and then: raises Cancelled if the work is not wanted any more."""
Perform = Callable[[UpkeepJob, Check], Done]


class UpkeepRunner:
    """Thread-safe. `close` ends what runs; what waits stays queued, and is settled as any job of a process that is
    gone."""

    def __init__(
        self,
        catalog: Catalog,
        controller: Callable[[], Controller],
        perform: Perform,
        *,
        beat_seconds: float = BEAT_SECONDS,
    ) -> None:
        self._beat_seconds = beat_seconds
        self._catalog = catalog
        self._controller = controller
        self._perform = perform
        self._queue: SimpleQueue[str] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closing = False

    def submit(self, job_id: str) -> None:
        """Run a queued job when its turn comes."""
        with self._lock:
            self._queue.put(job_id)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)
                self._thread.start()

    def close(self) -> None:
        self._closing = True
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(END_SECONDS)

    def _run(self) -> None:
        while True:
            with self._lock:
                try:
                    job_id = self._queue.get_nowait()
                except Empty:
                    self._thread = None
                    return
            if not self._closing:
                self._one(job_id)

    def _one(self, job_id: str) -> None:
        """Whatever happens becomes an event of the job; if even that fails, its silence tells."""
        with suppress(StillframeError):  # the job is gone, or another one has its lock
            controller = self._controller()
            controller.start(job_id)
            job, row = self._load(job_id)
            if job.state is not JobState.WORKING:
                return  # cancelled while it waited
            actor = SCHEDULE if row.section else row.asked_by
            stop = threading.Event()
            beat = threading.Thread(target=self._beat, args=(job_id, stop), name="upkeep-beat", daemon=True)
            beat.start()
            try:
                with acting_as(actor), about(job=job_id, command=job.what):
                    done = self._perform(job, self._check(job_id))
            except Exception as error:  # noqa: BLE001 - the border: whatever happens becomes an event
                controller.advance(job_id, Failed(command="upkeep", error=describe(error)))
            else:
                controller.finish_upkeep(job_id, done.lines, done.warnings)
            finally:
                stop.set()
                beat.join()

    def _load(self, job_id: str) -> tuple[UpkeepJob, JobRow]:
        with self._catalog.read() as session:
            row, job = load_job(session, job_id)
        assert isinstance(job, UpkeepJob)
        return job, row

    def _beat(self, job_id: str, stop: threading.Event) -> None:
        """Signs of life, for controllers on other hosts."""
        while not stop.wait(self._beat_seconds):
            with suppress(DBAPIError):  # a catalog that is away for a moment; for longer, the job is given up
                self._hear(job_id)

    def _hear(self, job_id: str) -> None:
        statement = update(JobRow).where(col(JobRow.id) == job_id, col(JobRow.active))
        with self._catalog.write() as session:
            session.connection().execute(statement.values(heard=now()))

    def _check(self, job_id: str) -> Check:
        looked = time.monotonic()

        def check(_progress: object) -> None:
            nonlocal looked
            if self._closing:
                raise Cancelled("the process that did it ends")
            if time.monotonic() - looked < LOOK_SECONDS:
                return
            looked = time.monotonic()
            job, _ = self._load(job_id)
            if job.state is not JobState.WORKING or job.stopping:
                raise Cancelled("it is not wanted any more")

        return check
