"""The running parts behind a service: Celery apps, controller, workers. Made when first needed.

Two forms, told apart by the broker's URL. Embedded (`memory://`): each process that starts jobs is their controller
and their worker, and owns them. Distributed (`redis://`): jobs of machines belong to nobody; they are added to the
queue in the catalog, any controller moves them on, and workers beside the hypervisors perform them. What needs no
hypervisor (a disk restored to a file) is done where it was asked for, in either form: the file is to lie there.

Most commands only read the catalog; they must not pay for Celery's import, nor for threads. What is asked of a job
that another process runs (progress, a cancellation) goes through the app's result backend, without a worker here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator.catalog import owner
from orchestrator.catalog.owner import NOBODY, Owner
from orchestrator.catalog.queue import anything_queued
from orchestrator.catalog.store import Catalog
from orchestrator.config import Config
from orchestrator.controller import Controller, Job, register
from orchestrator.dispatcher import Dispatcher, Limits
from orchestrator.jobs import docs
from orchestrator.jobs.states import TERMINAL
from workers import app as celery
from workers.context import Context
from workers.contract.messages import Command, Progress

if TYPE_CHECKING:
    from celery import Celery

    from workers.tasks import Tasks


def _sends_nothing(command: Command, queue: str) -> None:
    raise AssertionError(f"{command.kind} for {queue}: this process has no worker")


class Engine:
    """Thread-safe. `close` ends the worker, and with it whatever it still does."""

    def __init__(self, config: Config, catalog: Catalog, context: Context) -> None:
        self._config = config
        self._catalog = catalog
        self._context = context
        self._apps: dict[str, Celery] = {}
        self._controller: Controller | None = None
        self._dispatcher: Dispatcher | None = None
        self._tasks: Tasks | None = None
        self._worker: celery.ThreadWorkers | None = None
        self._more: list[celery.ThreadWorkers] = []
        self._serves: set[str] = set()
        self._starting = threading.RLock()
        self._news = threading.Condition()
        self._changes = 0
        self._broken: dict[str, Exception] = {}
        self._closing = threading.Event()
        self._listeners: list[Callable[[Job], None]] = []

    @property
    def embedded(self) -> bool:
        return celery.is_embedded(self._config.broker_url)

    def owner(self, hypervisor: str | None) -> Owner:
        """Whose a new job on `hypervisor` is."""
        return owner.this_process() if self.embedded or not hypervisor else NOBODY

    def reconfigure(self, config: Config) -> None:
        """From now on, limits are those of `config`; a hypervisor that is new to this process's worker is served."""
        with self._starting:
            self._config = config
            new = [name for name in config.worker.hypervisors if name not in self._serves]
            if self._controller is not None and new:
                plans = celery.plans_for(new, control=False)
                self._more.append(celery.ThreadWorkers(self.app(owner.this_process()), plans).__enter__())
                self._serves.update(new)

    def app(self, of: Owner) -> Celery:
        """The one that jobs of `of` go through: of a process, or of everybody."""
        with self._starting:
            local = self.embedded or of != NOBODY
            broker = "memory://" if local else self._config.broker_url
            if broker not in self._apps:
                backend = f"file://{self._config.worker.runtime_dir / 'results'}" if local else broker
                self._apps[broker] = celery.make_app(broker_url=broker, backend_url=backend)
            return self._apps[broker]

    # --- in this process -------------------------------------------------------------------------------------------

    @property
    def controller(self) -> Controller:
        """The controller of this process's own jobs, with a worker that performs what it asks for."""
        with self._starting:
            if self._controller is None:
                from workers.tasks import Tasks

                mine = owner.this_process()
                app = self.app(mine)
                controller = Controller(
                    self._catalog,
                    lambda command, queue: celery.send(app, command, queue),
                    stop=lambda job: celery.request_cancel(app, job),
                    changed=self._changed,
                )
                self._tasks = Tasks(app, self._context)
                register(app, controller, self._broke, patience=lambda: not self._closing.wait(0.5))
                self._dispatcher = Dispatcher(self._catalog, controller, lambda: Limits.of(self._config), mine)
                plans = celery.plans_for(self._config.worker.hypervisors, control=True)
                self._worker = celery.ThreadWorkers(app, plans).__enter__()
                self._serves.update(self._config.worker.hypervisors)
                self._controller = controller
            return self._controller

    def dispatch(self) -> list[str]:
        """Begin what this process has queued, as far as there are slots; the ids."""
        assert self.controller is not None
        assert self._dispatcher is not None
        return self._dispatcher.dispatch()

    def submit(self) -> None:
        """Jobs were queued: see to it that each begins when its turn comes."""
        with self._catalog.read() as session:
            here = anything_queued(session, owner.this_process())
        if here:
            self.dispatch()
        if not self.embedded:
            celery.wake(self.app(NOBODY))

    def tend(self) -> None:
        """What somebody who waits for a job of this process does now and then: room may have been made by another
        process, and nobody else watches the clock."""
        self.dispatch()

    # --- looking on ------------------------------------------------------------------------------------------------

    def onlooker(self, of: Owner) -> Controller:
        """A controller for events that send no command: good for the job of any process, and starts no worker."""
        if of != NOBODY and self._controller is not None:
            return self._controller
        app = self.app(of)
        return Controller(
            self._catalog,
            _sends_nothing,
            stop=lambda job: celery.request_cancel(app, job),
            changed=lambda job: self.ended(app, job),
        )

    def progress(self, job: Job, of: Owner) -> list[Progress]:
        """What the transfers of a running job last reported."""
        if job.state != "transferring":
            return []
        found = (celery.read_progress(self.app(of), job.id, target) for target in docs.targets_of(job))
        return [progress for progress in found if progress]

    def wait_for_change(self, seen: int, timeout: float) -> int:
        """Wait until a job has moved in this process since `seen`, at most `timeout` seconds; the new count."""
        with self._news:
            self._news.wait_for(lambda: self._changes != seen, timeout)
            return self._changes

    def listen(self, listener: Callable[[Job], None]) -> None:
        """Call `listener` after every transition in this process, in whatever thread it happens."""
        self._listeners.append(listener)

    def broken(self, job_id: str) -> Exception | None:
        """Why a job of this process does not go on, if an event of it could not be applied."""
        return self._broken.get(job_id)

    def _broke(self, job_id: str, error: Exception) -> None:
        with self._news:
            self._broken[job_id] = error
            self._changes += 1
            self._news.notify_all()

    def _changed(self, job: Job) -> None:
        """Of a job of this process."""
        self.ended(self.app(owner.this_process()), job)
        if job.state in TERMINAL and self._dispatcher is not None:
            self._dispatcher.dispatch()

    def ended(self, app: Celery, job: Job) -> None:
        """After a transition of a job: tell who waits, and clean up behind one that has ended."""
        if job.state in TERMINAL:
            celery.forget(app, job.id, docs.targets_of(job))
        with self._news:
            self._changes += 1
            self._news.notify_all()
        for listener in self._listeners:
            listener(job)

    def close(self) -> None:
        self._closing.set()
        with self._starting:
            for worker in self._more:
                worker.__exit__(None, None, None)
            self._more.clear()
            self._serves.clear()
            if self._worker is not None:
                self._worker.__exit__(None, None, None)
            self._worker = self._controller = self._dispatcher = None
