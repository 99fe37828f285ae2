"""The processes that stay: `serve` (everything in one), `controller`, and how they end.

A polite request to end (SIGTERM, SIGINT) is honoured in order: no chore begins any more; of `serve`, the jobs of this
process are cancelled, and waited for until they have released what they hold; a controller just goes, for its jobs
belong to nobody and another controller, or the next start, moves them on. A second request does not wait. SIGHUP reads
the configuration again.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from types import FrameType

from sqlalchemy.exc import DBAPIError

from orchestrator.catalog import owner
from orchestrator.catalog.alerts import Severity, raise_alert, resolve_alert
from orchestrator.catalog.owner import Owner
from orchestrator.catalog.queue import entries
from orchestrator.catalog.store import Catalog
from orchestrator.chores import Chore
from orchestrator.config import Config
from orchestrator.control import Control
from orchestrator.controller import Job
from orchestrator.engine import Engine
from orchestrator.jobs.states import TERMINAL
from orchestrator.leases import LEASE_SECONDS, Lease
from orchestrator.overseer import Overseer
from orchestrator.reconciler import settle_dead
from orchestrator.serving import Serving
from workers.contract.errors import describe
from workers.contract.messages import SILENT_SECONDS, CancelRequested

log = logging.getLogger(__name__)

END_SECONDS = 60.0
"""For how long cancelled jobs have time to release what they hold."""


class Signals:
    """Requests from outside. `ending` is set by the first request to end; the second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.ending = threading.Event()
        self._reload: Callable[[], None] = lambda: None

    @contextmanager
    def heard(self, reload: Callable[[], None] = lambda: None) -> Iterator[None]:
        """While open, signals come here. For the main thread."""
        self._reload = reload
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {number: signal.signal(number, self._hear) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._reload()
        elif self.ending.is_set():
            raise KeyboardInterrupt
        else:
            self.ending.set()


def trouble(catalog: Catalog) -> Callable[[str, Exception | None], None]:
    """Tells of chores that fail, as alerts."""

    def tell(chore: str, error: Exception | None) -> None:
        key = f"chore-failed {chore}"
        with catalog.write() as session:
            if error is None:
                resolve_alert(session, key)
            else:
                info = describe(error)
                raise_alert(session, key, Severity.CRITICAL, chore, info.message, info.hint)

    return tell


class EmbeddedRole:
    """`stillframe serve`: this process is controller and worker of what it begins."""

    def __init__(self, catalog: Catalog, engine: Engine) -> None:
        self._catalog = catalog
        self._engine = engine
        self._me: Owner = owner.this_process()
        self._overseer = Overseer(catalog, lambda: engine.controller, self._me)

    def chores(self) -> list[Chore]:
        return [
            Chore("begin jobs", 2, lambda _now: _ignore(self._engine.dispatch())),
            Chore("settle", 30, self._settle),
            Chore("time limits", 15, self._overseer.time_out),
        ]

    def _settle(self, _now: datetime) -> None:
        settle_dead(self._catalog, lambda: self._engine.controller)

    def end_jobs(self, seconds: float = END_SECONDS) -> list[str]:
        """Cancel the jobs of this process and wait until they have released; those that have not. What only waits, for
        its schedule, is left in the queue: the next service begins it."""
        for job in self._mine():
            self._engine.controller.advance(job, CancelRequested(by="the end of the service"))
        seen, end = 0, datetime.now(UTC).timestamp() + seconds
        while (left := self._mine()) and datetime.now(UTC).timestamp() < end:
            seen = self._engine.wait_for_change(seen, 0.5)
        return left

    def _mine(self) -> list[str]:
        with self._catalog.read() as session:
            return [
                entry.id
                for entry in entries(session)
                if entry.owner == self._me and not (entry.queued and entry.section)
            ]


def _ignore(_value: object) -> None:
    pass


def run_serve(
    catalog: Catalog, engine: Engine, chores: Sequence[Chore], signals: Signals, reload: Callable[[], None]
) -> list[str]:
    """Everything in one process, until it is asked to end; the jobs that it could not end in order."""
    role = EmbeddedRole(catalog, engine)
    assert engine.controller is not None  # it starts the worker
    with _served([*role.chores(), *chores], catalog, engine, signals, reload):
        signals.ending.wait()
    return role.end_jobs()


def run_controller(
    config: Callable[[], Config],
    catalog: Catalog,
    engine: Engine,
    chores: Sequence[Chore],
    signals: Signals,
    reload: Callable[[], None],
    *,
    silent: float = SILENT_SECONDS,
    lease: float = LEASE_SECONDS,
) -> None:
    """A controller of the distributed form, until it is asked to end. `silent`: seconds without a sign of life after
    which a worker is gone; `lease`: for how long it leads without renewing."""
    with (
        Control(config, catalog, engine, silent=silent) as control,
        _served([*control.chores(), *chores], catalog, engine, signals, reload, seconds=lease) as serving,
    ):
        control.listen(serving.news)
        signals.ending.wait()


@contextmanager
def _served(
    chores: Sequence[Chore],
    catalog: Catalog,
    engine: Engine,
    signals: Signals,
    reload: Callable[[], None],
    *,
    seconds: float = LEASE_SECONDS,
) -> Iterator[Serving]:
    """While open, chores are done whenever this process leads."""
    lease = Lease(catalog, seconds=seconds)
    serving = Serving(lambda: chores, lease, trouble(catalog), renew=seconds / 3)

    def ended(job: Job) -> None:
        if job.state in TERMINAL:
            serving.news()

    engine.listen(ended)

    def again() -> None:
        reload()
        serving.news()

    thread = threading.Thread(target=serving.run, name="chores")
    with signals.heard(again):
        thread.start()
        try:
            yield serving
        finally:
            serving.stop()
            thread.join(END_SECONDS)
            with suppress(DBAPIError):  # a catalog that is away: the lease runs out by itself
                lease.give_up()
