"""Runs jobs: applies events to them and sends the commands that follow.

One transaction per event: load, decide (pure), guard, append the event, store. Commands are sent only after the
commit, so that a crash in between loses a command and never an obligation; the reconciler finds the job and releases
it. What is sent twice is harmless by contract.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy.exc import DBAPIError, OperationalError

from orchestrator.catalog.jobs import Stale, append_event, load_job, store_job
from orchestrator.catalog.points import put_extension, put_point, see_machine
from orchestrator.catalog.store import Catalog
from orchestrator.job_alarms import tell
from orchestrator.jobs import docs, upkeep
from orchestrator.jobs.backup_job import BackupJob
from orchestrator.jobs.states import JobState
from orchestrator.jobs.words import describe
from workers.app import ADVANCE, CONTROL, host_queue, rescue_queue
from workers.contract.messages import EVENT, Command, Event, MachinesListed

if TYPE_CHECKING:
    from celery import Celery
    from sqlmodel import Session

Job = docs.AnyJob
Send = Callable[[Command, str], None]
"""Send a command to a queue."""

log = logging.getLogger(__name__)

T = TypeVar("T")
_Moved = tuple[Job, Job, list[Command]]
"""A job before, after, and what follows."""

TRIES = 20
GIVEN_UP = ("worker_lost", "timed_out")


def queue_of(job: Job, command: Command) -> str:
    """Thaws never stand behind transfers; what needs a hypervisor runs beside it."""
    hypervisor = docs.hypervisor_of(job)
    if not hypervisor:
        return CONTROL
    return rescue_queue(hypervisor) if command.kind == "thaw" else host_queue(hypervisor)


def _no_stop(_job: str) -> None:
    pass


def _no_change(_job: Job) -> None:
    pass


class Controller:
    """Thread-safe; any number of them on one catalog. `stop` tells the running commands of a job to end themselves,
    `changed` is called after every transition of a job."""

    def __init__(
        self,
        catalog: Catalog,
        send: Send,
        *,
        stop: Callable[[str], None] = _no_stop,
        changed: Callable[[Job], None] = _no_change,
    ) -> None:
        self._catalog = catalog
        self._send = send
        self._stop = stop
        self._changed = changed

    def start(self, job_id: str) -> None:
        """Begin a queued job, whatever else is under way: see `dispatcher` for who asks first."""
        self._step(job_id, docs.start, "started", "started")

    def start_chosen(self, choose: Callable[[Session], list[str]]) -> list[str]:
        """Begin the queued jobs that `choose` names, in the transaction in which it was asked; their ids."""

        def begin(session: Session) -> list[_Moved]:
            return [self._apply(session, job_id, docs.start, "started", "started") for job_id in choose(session)]

        moved = self._transact(begin)
        for before, after, commands in moved:
            _write_down(before, after, "started")
            try:
                self._follow("started", before, after, commands)
            except Exception:  # whatever happens to one, the others have begun as well, and must be told to
                log.exception("job %s: its first command could not be sent", after.id)
        return [after.id for _, after, _ in moved]

    def retry_release(self, job_id: str) -> None:
        """Release again what a failed release has left. Raises Busy if another job works there now."""
        self._step(job_id, docs.retry_release, "retried", "releasing again what was left behind")

    def advance(self, job_id: str, event: Event) -> None:
        """Apply one event. Late and repeated ones are recorded and change nothing. Raises NotFound."""
        self._step(job_id, lambda job: docs.advance(job, event), event.kind, describe(event))

    def finish_upkeep(self, job_id: str, lines: list[str], warnings: list[str]) -> None:
        """A piece of upkeep is done; a job that is no longer at work is left as it is."""

        def finish(job: Job) -> docs.Step:
            return upkeep.finish(job, lines, warnings) if isinstance(job, upkeep.UpkeepJob) else (job, [])

        self._step(job_id, finish, "finished", "; ".join(lines))

    def _step(self, job_id: str, decide: Callable[[Job], docs.Step], kind: str, text: str) -> None:
        moved = self._transact(lambda session: self._apply(session, job_id, decide, kind, text))
        _write_down(moved[0], moved[1], text)
        self._follow(kind, *moved)

    def _transact(self, act: Callable[[Session], T]) -> T:
        for tries_left in reversed(range(TRIES)):
            try:
                with self._catalog.write() as session:
                    return act(session)
            except (Stale, OperationalError):  # somebody else was first, or the database is busy or away for a moment
                if not tries_left:
                    raise
        raise AssertionError("the last try has raised")

    def _follow(self, kind: str, before: Job, after: Job, commands: list[Command]) -> None:
        for command in commands:
            self._send(command, queue_of(after, command))
        # Also the tasks of a job that was given up, in case that they live: nothing that they do is wanted any more.
        if (after.stopping and not before.stopping) or (kind in GIVEN_UP and before.state is JobState.TRANSFERRING):
            self._stop(after.id)
        self._changed(after)

    def _apply(self, session: Session, job_id: str, decide: Callable[[Job], docs.Step], kind: str, text: str) -> _Moved:
        row, before = load_job(session, job_id)
        after, commands = decide(before)
        append_event(session, job_id, kind, text, effective=after != before or bool(commands))
        if after != before:
            store_job(session, after, row.version)
            _register(session, before, after)
            tell(session, row, before, after)
        return before, after, commands


def _write_down(before: Job, after: Job, text: str) -> None:
    """A line in the log, after the commit."""
    match after:
        case BackupJob():
            subject = {"machine": after.machine.name, "hypervisor": after.machine.hypervisor}
        case _:
            subject = {}
    level = logging.DEBUG if after == before else logging.INFO
    if after.state is JobState.FAILED and before.state is not JobState.FAILED:
        level, text = logging.WARNING, f"failed: {after.error.message if after.error else text}"
    what = {"job": after.id, "kind": after.kind, "state": after.state.value, "vault": after.vault, **subject}
    log.log(level, "%s", text, extra=what)


def _register(session: Session, before: Job, after: Job) -> None:
    """A point is in the catalog from the moment that it is known to be committed."""
    if isinstance(before, BackupJob) and isinstance(after, BackupJob):
        if after.committed and not before.committed:
            put_point(session, after.vault, after.committed)
        if after.machine != before.machine:
            see_machine(session, after.machine)
        if after.extension and after.extension != before.extension:
            put_extension(session, after.machine.uuid, after.extension)


Heard = Callable[[Sequence[MachinesListed]], object]


def _deaf(_listings: Sequence[MachinesListed]) -> None:
    pass


def register(
    app: Celery,
    controller: Controller,
    broken: Callable[[str, Exception], None],
    *,
    patience: Callable[[], bool] = lambda: False,
    heard: Heard = _deaf,
) -> None:
    """Make `controller` the one that this process's worker hands events to. `broken` is told of an event that could
    not be applied: its job would otherwise wait for ever. `patience` waits a moment for a catalog that is away, and
    says whether to try again. `heard` is handed what hypervisors list, which belongs to no job."""

    def apply(job_id: str, event: Event) -> None:
        if isinstance(event, MachinesListed):
            heard([event])
        else:
            controller.advance(job_id, event)

    @app.task(name=ADVANCE, shared=False)  # type: ignore[untyped-decorator]
    def advance(job_id: str, event_json: str) -> None:
        while True:
            try:
                apply(job_id, EVENT.validate_json(event_json))
            except DBAPIError as error:
                if patience():
                    continue
                broken(job_id, error)
            except Exception as error:
                log.exception("job %s: an event could not be applied", job_id)
                broken(job_id, error)
            return
