"""The processes of a distributed Stillframe, with shorter patience: `python -m tests.distributed.process ROLE …`.

The worker's commands are performed by a small world for each machine (`tests.jobs.world`): all that is real is Celery,
Redis, PostgreSQL, and the processes, which can be killed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.config import load_config
from orchestrator.roles import Signals, run_controller
from orchestrator.service import Service
from tests.jobs.world import World
from workers import app as celery
from workers.context import Context
from workers.contract import messages as m
from workers.host import HostWorker
from workers.tasks import Tasks

if TYPE_CHECKING:
    from celery import Celery

SILENT = 8.0
LEASE = 4.0
BEAT = 1.0
TRANSFER_SECONDS = 0.1


class ScriptedTasks(Tasks):
    """What a hypervisor and a vault would do."""

    def __init__(self, app: Celery, context: Context) -> None:
        self._worlds: dict[str, World] = {}
        self._points: dict[str, World] = {}
        self._lock = threading.Lock()
        self._pause = threading.Event()
        super().__init__(app, context)

    def _register(self, message: type, perform: Callable[..., m.Event]) -> None:  # noqa: ARG002 - Tasks' own
        super()._register(message, self._perform)

    def _perform(self, command: m.Command) -> m.Event:
        if isinstance(command, m.TransferDisk | m.RestoreDisk):
            self._pause.wait(TRANSFER_SECONDS)
        with self._lock:
            event = self._world(command).perform(command)
        if isinstance(event, m.Prepared):
            machine = command.machine  # type: ignore[union-attr]
            return event.model_copy(update={"inventory": event.inventory.model_copy(update={"machine": machine})})
        return event

    def _world(self, command: m.Command) -> World:
        if isinstance(command, m.PrepareRestore | m.RestoreDisk | m.DefineMachine):
            return self._points[command.point]
        if isinstance(command, m.CommitPoint):
            world = self._worlds.setdefault(command.point.machine.uuid, World())
            self._points[command.point.id] = world
            return world
        if isinstance(command, m.Discard):
            return World()
        return self._worlds.setdefault(command.machine.uuid, World())


def controller(file: Path, silent: float = SILENT) -> None:
    with Service.open(load_config(file), reconcile=False) as service:
        print("up", flush=True)
        run_controller(
            lambda: service.config,
            service.catalog,
            service.engine,
            service.chores(),
            Signals(),
            service.reload,
            silent=silent,
            lease=LEASE,
        )


def worker(file: Path, hypervisor: str) -> None:
    config = load_config(file)
    app = celery.make_app(broker_url=config.broker_url, backend_url=config.broker_url)
    signals = Signals()
    with (
        HostWorker(app, Context(config.worker), [hypervisor], beat_seconds=BEAT, tasks=ScriptedTasks) as host,
        signals.heard(),
    ):
        print("up", flush=True)
        signals.ending.wait()
        host.finish(10)


if __name__ == "__main__":
    role, config_file, *names = sys.argv[1:]
    if role == "controller":
        controller(Path(config_file), *map(float, names))
    else:
        worker(Path(config_file), *names)
