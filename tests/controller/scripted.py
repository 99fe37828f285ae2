"""A controller whose `send` reaches a small world (`tests.jobs.world`) instead of Celery: the seam is the parameter."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.catalog import owner
from orchestrator.catalog.jobs import add_job
from orchestrator.catalog.owner import Owner
from orchestrator.catalog.points import newest_base
from orchestrator.catalog.store import Catalog
from orchestrator.controller import Controller, Job
from orchestrator.jobs.backup_job import BackupJob
from tests.jobs.world import MACHINE, World
from workers.contract.messages import Command, Event

Perform = Callable[[Command], Event | None]


class Bench:
    """Commands queue up; `run` performs them until none is left. `dies` is asked before each: True ends the worker."""

    def __init__(self, catalog: Catalog, world: World) -> None:
        self.catalog = catalog
        self.world = world
        self.queue: list[Command] = []
        self.sent: list[tuple[str, str]] = []
        self.stopped: list[str] = []
        self.changes: list[tuple[str, str]] = []
        self.controller = Controller(catalog, self._send, stop=self.stopped.append, changed=self._changed)

    def _send(self, command: Command, queue: str) -> None:
        self.queue.append(command)
        self.sent.append((command.kind, queue))

    def _changed(self, job: Job) -> None:
        self.changes.append((job.id, job.state))

    def run(self, perform: Perform | None = None, *, until: str = "") -> None:
        """Perform what is queued; stop before the first command of kind `until`, which is lost."""
        while self.queue:
            command = self.queue.pop(0)
            if command.kind == until:
                self.queue.clear()
                return
            event = (perform or self.world.perform)(command)
            if event is not None:
                self.controller.advance(command.job, event)

    def wait(self, _seconds: float) -> None:
        """In place of waiting for other threads: do their work."""
        self.run()


def add_backup(catalog: Catalog, job_id: str, *, of: Owner | None = None) -> BackupJob:
    """A queued backup of the world's machine, with its base from the catalog."""
    with catalog.write() as session:
        base = newest_base(session, MACHINE.uuid, "main")
        job = BackupJob(id=job_id, machine=MACHINE, vault="main", point=f"point-{job_id}", base=base)
        add_job(
            session,
            job,
            of or owner.this_process(),
            machine=(MACHINE.uuid, MACHINE.name),
            lock=f"machine:{MACHINE.uuid}",
            uses_point=base.id if base else "",
        )
    return job


def run_backup(bench: Bench, job_id: str) -> None:
    add_backup(bench.catalog, job_id)
    bench.controller.start(job_id)
    bench.run()
