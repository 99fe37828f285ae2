"""The running parts behind a service: Celery app, controller, embedded worker. Made when first needed.

Most commands only read the catalog; they must not pay for Celery's import, nor for threads. What is asked of a job
that another process runs (progress, a cancellation) goes through the app's result backend, without a worker here.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from orchestrator.catalog.store import Catalog
from orchestrator.config import Config
from orchestrator.controller import Controller, Job, register
from orchestrator.jobs import docs
from orchestrator.jobs.states import TERMINAL
from workers import app as celery
from workers.context import Context
from workers.contract.messages import Command, Progress

if TYPE_CHECKING:
    from celery import Celery


def _sends_nothing(command: Command, queue: str) -> None:
    raise AssertionError(f"{command.kind} for {queue}: this process has no worker")


class Engine:
    """Thread-safe. `close` ends the worker, and with it whatever it still does."""

    def __init__(self, config: Config, catalog: Catalog, context: Context) -> None:
        self._config = config
        self._catalog = catalog
        self._context = context
        self._app: Celery | None = None
        self._controller: Controller | None = None
        self._worker: celery.EmbeddedWorker | None = None
        self._starting = threading.RLock()
        self._news = threading.Condition()
        self._changes = 0
        self._broken: dict[str, Exception] = {}

    @property
    def app(self) -> Celery:
        with self._starting:
            if self._app is None:
                broker = self._config.broker_url
                embedded = broker.startswith("memory")
                backend = f"file://{self._config.worker.runtime_dir / 'results'}" if embedded else broker
                self._app = celery.make_app(broker_url=broker, backend_url=backend)
            return self._app

    @property
    def controller(self) -> Controller:
        """The controller, with a worker that performs what it asks for."""
        with self._starting:
            if self._controller is None:
                from workers.tasks import Tasks

                app = self.app
                controller = Controller(
                    self._catalog,
                    lambda command, queue: celery.send(app, command, queue),
                    stop=self.stop,
                    changed=self._changed,
                )
                Tasks(app, self._context)
                register(app, controller, self._broke)
                self._worker = celery.EmbeddedWorker(app, self._config.worker.hypervisors).__enter__()
                self._controller = controller
            return self._controller

    @property
    def onlooker(self) -> Controller:
        """A controller for events that send no command: good for the job of any process, and starts no worker."""
        if self._controller is not None:
            return self._controller
        return Controller(self._catalog, _sends_nothing, stop=self.stop, changed=self._changed)

    def stop(self, job_id: str) -> None:
        """Tell the running commands of a job, in whatever process, to end themselves."""
        celery.request_cancel(self.app, job_id)

    def progress(self, job: Job) -> list[Progress]:
        """What the transfers of a running job last reported."""
        if job.state != "transferring":
            return []
        found = (celery.read_progress(self.app, job.id, target) for target in docs.targets_of(job))
        return [progress for progress in found if progress]

    def wait_for_change(self, seen: int, timeout: float) -> int:
        """Wait until a job has moved in this process since `seen`, at most `timeout` seconds; the new count."""
        with self._news:
            self._news.wait_for(lambda: self._changes != seen, timeout)
            return self._changes

    def broken(self, job_id: str) -> Exception | None:
        """Why a job of this process does not go on, if an event of it could not be applied."""
        return self._broken.get(job_id)

    def _broke(self, job_id: str, error: Exception) -> None:
        with self._news:
            self._broken[job_id] = error
            self._changes += 1
            self._news.notify_all()

    def _changed(self, job: Job) -> None:
        if job.state in TERMINAL:
            celery.forget(self.app, job.id, docs.targets_of(job))
        with self._news:
            self._changes += 1
            self._news.notify_all()

    def close(self) -> None:
        with self._starting:
            if self._worker is not None:
                self._worker.__exit__(None, None, None)
            self._worker = self._controller = None
