"""A controller of the distributed form: hears events and signs of life from the broker, and moves jobs on.

Any number of them at once: every transition is guarded in the catalog, and what is to be done by one alone is done by
the one that holds the lease (`leases`). A catalog or a broker that is away is waited for; nothing is begun meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime
from types import TracebackType
from typing import Self, TypeVar

from sqlalchemy.exc import DBAPIError

from orchestrator.catalog.alerts import Severity, raise_alert, resolve_alert
from orchestrator.catalog.owner import NOBODY
from orchestrator.catalog.store import Catalog
from orchestrator.catalog.workers import note_beat, served
from orchestrator.chores import Chore
from orchestrator.config import Config
from orchestrator.controller import Controller, Job, register
from orchestrator.dispatcher import Dispatcher, Limits
from orchestrator.engine import Engine
from orchestrator.jobs.states import TERMINAL
from orchestrator.machine_news import MachineNews
from orchestrator.overseer import Overseer
from workers import app as celery
from workers.contract.errors import StillframeError
from workers.contract.messages import SILENT_SECONDS, Beat, Command

T = TypeVar("T")

THREADS = 4
SEND_SECONDS = 20.0
"""For how long a command waits for a broker that is away; then silence tells that it was lost."""


class Control:
    """Use as a context manager: as long as it is open, this process hears what workers say. `config` is asked anew
    each time: it may be reloaded."""

    def __init__(
        self, config: Callable[[], Config], catalog: Catalog, engine: Engine, *, silent: float = SILENT_SECONDS
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._engine = engine
        self._silent = silent
        self._app = engine.app(NOBODY)
        self._closing = threading.Event()
        self._news: Callable[[], None] = lambda: None
        self.controller = Controller(
            catalog, self._send, stop=lambda job: celery.request_cancel(self._app, job), changed=self._changed
        )
        self._dispatcher = Dispatcher(
            catalog,
            self.controller,
            lambda: Limits.of(config()),
            NOBODY,
            served=lambda session: served(session, silent),
        )
        self._overseer = Overseer(catalog, lambda: self.controller, NOBODY, seconds=silent)
        self._overseer.deaf()
        register(
            self._app,
            self.controller,
            lambda _job, _error: None,
            patience=self._patience,
            heard=MachineNews(config, catalog).heard,
        )
        self._register()
        self._workers = celery.ThreadWorkers(self._app, [celery.Plan("control", [celery.CONTROL], THREADS)])

    def __enter__(self) -> Self:
        self._workers.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._workers.__exit__(kind, error, trace)

    def listen(self, news: Callable[[], None]) -> None:
        """Call `news` when something has happened that chores may want to act on."""
        self._news = news

    # --- what is heard ---------------------------------------------------------------------------------------------

    def _patience(self) -> bool:
        """Wait a moment for the catalog; False: this process ends."""
        return not self._closing.wait(0.5)

    def _register(self) -> None:
        self._app.task(self._dispatch_now, name=celery.DISPATCH, shared=False)
        self._app.task(self._hear, name=celery.BEAT, shared=False)

    def _dispatch_now(self) -> None:
        self._persist(self._dispatcher.dispatch)

    def _hear(self, text: str) -> None:
        beat = Beat.model_validate_json(text)

        def note() -> bool:
            with self._catalog.write() as session:
                return note_beat(session, beat)

        if self._persist(note):
            self._persist(self._dispatcher.dispatch)
            self._news()

    def _persist(self, act: Callable[[], T]) -> T | None:
        while True:
            try:
                return act()
            except DBAPIError:
                if not self._patience():
                    return None

    def _send(self, command: Command, queue: str) -> None:
        celery.send(self._app, command, queue, patience=SEND_SECONDS)

    def _changed(self, job: Job) -> None:
        self._engine.ended(self._app, job)
        if job.state in TERMINAL:
            self._dispatcher.dispatch()
            self._news()

    # --- chores ----------------------------------------------------------------------------------------------------

    def chores(self) -> list[Chore]:
        return [
            Chore("begin jobs", 5, self._begin),
            Chore("take over silent jobs", 5, self._take_over),
            Chore("time limits", 15, self._overseer.time_out),
            Chore("release again", 60, self._overseer.retry_releases),
            Chore("workers", 15, self._look_for_workers),
        ]

    def _begin(self, _now: datetime) -> None:
        self._require_broker()
        self._dispatcher.dispatch()

    def _take_over(self, now: datetime) -> None:
        try:
            self._require_broker()
            self._overseer.take_over(now)
        except (StillframeError, DBAPIError):
            self._overseer.deaf()
            raise

    def _require_broker(self) -> None:
        if not celery.broker_answers(self._app):
            self._overseer.deaf()
            raise StillframeError(
                f"the broker {celery.without_password(self._config().broker_url)} does not answer: "
                "no job begins, and workers cannot report",
                hint="start Redis, or correct `url` under [broker]",
            )

    def _look_for_workers(self, _now: datetime) -> None:
        with self._catalog.write() as session:
            living = served(session, self._silent)
            for name in self._config().worker.hypervisors:
                key = f"no-worker hypervisor:{name}"
                if name in living:
                    resolve_alert(session, key)
                    continue
                raise_alert(
                    session,
                    key,
                    Severity.CRITICAL,
                    name,
                    f"no worker of hypervisor {name} is heard of: its machines are not backed up",
                    f"beside it: stillframe worker --hypervisor {name}",
                )
