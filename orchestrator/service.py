"""The one seam between Stillframe and whoever uses it: the command line, later the web, programs, tests.

Opening is cheap (one look into the catalog): Celery, libvirt and vault are imported and connected when a call needs
them. Everything returned is a frozen value.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Self

from sqlalchemy.exc import OperationalError

from orchestrator import audit, find
from orchestrator.audit import Act, Journal, audited
from orchestrator.catalog import owner
from orchestrator.catalog.fleet import NOTHING_KNOWN, known_machines, newest_points
from orchestrator.catalog.jobs import events_of, find_job, load_job, owner_of, recent_jobs, unsettled
from orchestrator.catalog.store import Catalog, unreachable
from orchestrator.chores import Chore
from orchestrator.config import Config
from orchestrator.config_watch import ConfigWatch
from orchestrator.desk import Desk
from orchestrator.diff_desk import DiffDesk
from orchestrator.dispatcher import why_queued
from orchestrator.guest_desk import GuestDesk
from orchestrator.integrity_desk import Advance, IntegrityDesk
from orchestrator.job_desk import JobDesk
from orchestrator.jobs.states import TERMINAL, JobState
from orchestrator.key_desk import KeyDesk
from orchestrator.lock_desk import LockDesk
from orchestrator.machine_desk import MachineDesk
from orchestrator.machine_news import MachineNews
from orchestrator.notify_desk import NotifyDesk
from orchestrator.point_desk import PointDesk
from orchestrator.replica_desk import ReplicaDesk
from orchestrator.schedule_desk import ScheduleDesk
from orchestrator.status_desk import StatusDesk
from orchestrator.upkeep_desk import UpkeepDesk
from orchestrator.upkeep_jobs import UpkeepJobs
from orchestrator.upkeep_work import UpkeepWork
from orchestrator.vault_desk import VaultDesk
from orchestrator.views import JobView, MachinesView, MachineView, PointView, VaultView, job_view, machine_view
from orchestrator.watch_desk import WatchDesk
from workers.app import is_embedded
from workers.context import Context
from workers.contract.errors import StillframeError, UsageError
from workers.contract.machines import MachineSummary
from workers.contract.messages import CancelRequested, ListMachines

if TYPE_CHECKING:
    from orchestrator.engine import Engine
    from workers.vault import VaultStats
    from workers.vault.findings import Level, Share, VerifyReport
    from workers.vault.rebuild import Rebuilt

__all__ = ["JobView", "MachineView", "PointView", "Service", "VaultView"]

POLL = 0.2
"""Seconds between looks at a job that may move in another process."""
AWAY_SECONDS = 300.0
"""For how long a catalog that does not answer is waited for: a database that is started again."""


class Service:
    """Use as a context manager, or call `close`."""

    def __init__(self, config: Config, catalog: Catalog) -> None:
        self._config = config
        self._catalog = catalog
        self._context = Context(config.worker)
        self._desk = VaultDesk(config, catalog, self._context)
        news = MachineNews(lambda: self._config, catalog)
        afar = None if is_embedded(config.broker_url) else self._send_listing
        self.machine_desk = MachineDesk(lambda: self._config, catalog, self._context, news, afar)
        """What is known of machines, and asking for it."""
        self.guests = GuestDesk(config, catalog, self._context, lambda wanted: self._summary(wanted, disks=False))
        """What concerns guests and not jobs."""
        self.point_desk = PointDesk(config, catalog, self._context, lambda wanted: self._summary(wanted))
        """What concerns points: deletions, pins, expiry."""
        self.diff = DiffDesk(catalog, self._context)
        self.replicas = ReplicaDesk(config, catalog, self._context)
        self.upkeep = UpkeepDesk(config, self._context)
        self.integrity = IntegrityDesk(config, catalog, self._context)
        self.keys = KeyDesk(config, self._context)
        self.locks = LockDesk(config, self._context, self.keys, _user)
        self._jobs = JobDesk(
            config,
            catalog,
            self.guests,
            self.replicas,
            machine_named=lambda wanted: self._summary(wanted, disks=False).machine,
            owner=lambda hypervisor: self.engine.owner(hypervisor),
            begin=self._begin,
        )
        self.start_backup = self._jobs.start_backup
        self.start_restore_disk = self._jobs.start_restore_disk
        self.start_restore_machine = self._jobs.start_restore_machine
        self.schedules = ScheduleDesk(lambda: self._config, catalog, self._jobs, self._begin, since=datetime.now(UTC))
        """What is due, and what will be: a chore."""
        work = UpkeepWork(self.point_desk, self.upkeep, self.integrity, self.replicas, self.locks)
        self.upkeep_jobs = UpkeepJobs(
            lambda: self._config,
            catalog,
            self.locks,
            lambda: self.engine.onlooker(owner.this_process()),
            work.perform,
        )
        """What is done to vaults by the clock."""
        self.watch = WatchDesk(lambda: self._config, catalog, self._context, self.integrity)
        """What did not happen, or has no job: chores."""
        self.status = StatusDesk(lambda: self._config, catalog, self.watch, self.schedules.next_runs)
        """How everything stands; alerts."""
        self.notify = NotifyDesk(lambda: self._config, catalog)
        """Who is told of alerts."""
        self.audit = Journal(catalog, self._named)
        """Who did what."""
        for desk, acts in self._changing():
            audited(desk, self.audit, acts)
        self._desks: list[Desk] = [
            self._desk,
            self.guests,
            self.point_desk,
            self.replicas,
            self.upkeep,
            self.integrity,
            self.keys,
            self.locks,
            self._jobs,
        ]
        self.config_watch = ConfigWatch(config, catalog, self.use)
        """For processes that stay: reads the file again when it changes."""
        self._running: Engine | None = None
        self.settled: list[str] = []
        """What was settled at the start."""

    def _begin(self, _jobs: Sequence[str]) -> None:
        """Jobs were queued: have them begun when their turn comes."""
        self.engine.submit()

    def _changing(self) -> list[tuple[object, dict[str, Act]]]:
        """What of the desks changes something."""
        return [
            (self, audit.SERVICE),
            (self._desk, audit.VAULTS),
            (self.guests, audit.GUESTS),
            (self.point_desk, audit.POINTS),
            (self.replicas, audit.REPLICAS),
            (self.upkeep, audit.UPKEEP),
            (self.integrity, audit.INTEGRITY),
            (self.keys, audit.KEYS),
            (self.locks, audit.LOCKS),
            (self.status, audit.STATUS),
        ]

    def _named(self, argument: str, value: object) -> object:
        """What an argument means, for the audit log."""
        match argument, value:
            case "name" | "vault_name", str() | None:
                return self._config.vault_name(value)
            case "ref", str():
                point = self.point(value)
                return f"{point.machine} {point.id}"
            case "job_id", str():
                with self._catalog.read() as session:
                    return find_job(session, value).id
        return value

    @staticmethod
    def open(config: Config, *, reconcile: bool = True) -> Service:
        """The catalog made or migrated; what a crash has left is settled. Raises ConfigError."""
        service = Service(config, Catalog.open(config.catalog_url))
        if reconcile:
            service.settled = service.reconcile()
        return service

    def close(self) -> None:
        self.upkeep_jobs.close()
        if self._running is not None:
            self._running.close()
        self.machine_desk.close()
        self._context.close()
        self._catalog.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def engine(self) -> Engine:
        if self._running is None:
            from orchestrator.engine import Engine

            self._running = Engine(self._config, self._catalog, self._context)
        return self._running

    @property
    def config(self) -> Config:
        """As last loaded."""
        return self._config

    @property
    def catalog(self) -> Catalog:
        return self._catalog

    def use(self, config: Config) -> None:
        """From now on this configuration is in force: all but its catalog, its broker and its folders. What is due by
        the one before is begun by that."""
        now = datetime.now(UTC)
        self.schedules.changes(now)
        self._config = config
        self._context.use(config.worker)
        for desk in self._desks:
            desk.use(config)
        if self._running is not None:
            self._running.reconfigure(config)

    def reload(self) -> None:
        """Have the configuration read again, whether its file seems changed or not."""
        self.config_watch.again()

    def chores(self) -> list[Chore]:
        """What whoever serves does again and again."""
        return [
            *self.machine_desk.chores(),
            *self.schedules.chores(),
            *self.watch.chores(),
            *self.upkeep_jobs.chores(),
            *self.notify.chores(),
        ]

    def reconcile(self) -> list[str]:
        """Settle jobs whose process is dead and releases that failed; what was done, in words."""
        with self._catalog.read() as session:
            if not unsettled(session):
                return []
        from orchestrator.reconciler import reconcile

        seen = 0

        def wait(seconds: float) -> None:
            nonlocal seen
            seen = self.engine.wait_for_change(seen, seconds)

        return reconcile(self._catalog, lambda: self.engine.controller, wait)

    # --- machines --------------------------------------------------------------------------------------------------

    def machines(self, hypervisor: str | None = None) -> list[MachineView]:
        """All machines of one or all hypervisors, those of one that does not answer as it last had them."""
        return self.look_at_machines(hypervisor).machines

    def look_at_machines(self, hypervisor: str | None = None, *, ask: bool | None = None) -> MachinesView:
        """All machines of one or all hypervisors, and who did not answer. `ask`: the hypervisors; None: where that is
        quick."""
        found, look = self.machine_desk.listed(hypervisor, ask=ask)
        stale = [bool(one.problem or look.silent.get(one.summary.machine.hypervisor)) for one in found]
        told = [(one.summary, one.as_of, old) for one, old in zip(found, stale, strict=True)]
        return MachinesView(machines=self._machine_views(told), silent=look.silent)

    def machine(self, wanted: str) -> MachineView:
        """By UUID, name, or `hypervisor/name`. Raises NotFound, UsageError, HypervisorUnreachable."""
        return self._machine_views([(self._summary(wanted), None, False)])[0]

    def _machine_views(self, found: Sequence[tuple[MachineSummary, datetime | None, bool]]) -> list[MachineView]:
        """Of machines, each with when it was listed, and whether its hypervisor did not answer since."""
        uuids = [summary.machine.uuid for summary, _, _ in found]
        with self._catalog.read() as session:
            last, known = newest_points(session, uuids), known_machines(session, uuids)
        views = []
        for summary, as_of, stale in found:
            machine = summary.machine
            seen = known.get(machine.uuid, NOTHING_KNOWN)
            covered = self._config.protected_by(machine.hypervisor, machine.name, seen.tags) is not None
            newest, extension = last.get(machine.uuid), seen.extension
            views.append(
                machine_view(summary, newest, protected=covered, extension=extension, as_of=as_of, stale=stale)
            )
        return views

    def _summary(self, wanted: str, *, disks: bool = True) -> MachineSummary:
        return self.machine_desk.find(wanted, disks=disks)

    def _send_listing(self, command: ListMachines) -> None:
        from workers import app as celery

        celery.send(self.engine.app(owner.NOBODY), command, celery.host_queue(command.hypervisor))

    # --- jobs ------------------------------------------------------------------------------------------------------

    def job(self, job_id: str) -> JobView:
        """By id or unique beginning of one. Raises NotFound, UsageError."""
        with self._catalog.read() as session:
            row, job = load_job(session, find_job(session, job_id).id)
            view = job_view(row, job, events_of(session, row.id))
            waits = why_queued(session, self._config, row) if job.state is JobState.QUEUED else ""
        progress = self.engine.progress(job, owner_of(row)) if job.state == "transferring" else []
        return view.model_copy(update={"progress": progress, "waits": waits})

    def jobs(self, *, active_only: bool = False, limit: int = 50) -> list[JobView]:
        """Newest first."""
        with self._catalog.read() as session:
            ids = [row.id for row in recent_jobs(session, active_only=active_only, limit=limit)]
        return [self.job(job_id) for job_id in ids]

    def wait(self, job_id: str, *, on_progress: Callable[[JobView], None] | None = None) -> JobView:
        """Wait until the job has ended, whichever process runs it; if that process dies, the job is settled here. A
        catalog that goes away meanwhile is waited for. Raises CatalogUnreachable after `AWAY_SECONDS`."""
        seen, away_since = 0, 0.0
        while True:
            try:
                view, of = self.job(job_id), self._owner_of(job_id)
                away_since = 0.0
            except OperationalError as away:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > AWAY_SECONDS:
                    raise unreachable(away) from None
                seen = self.engine.wait_for_change(seen, POLL)
                continue
            if on_progress is not None:
                on_progress(view)
            if view.state in TERMINAL:
                return view
            if owner.is_dead(of):
                self.reconcile()
            elif of == owner.this_process():
                self.engine.tend()
            if error := self.engine.broken(view.id):
                raise StillframeError(
                    f"job {view.id} cannot go on: {error}",
                    hint="the next stillframe command settles it: stillframe job list",
                ) from error
            seen = self.engine.wait_for_change(seen, POLL)

    def _owner_of(self, job_id: str) -> owner.Owner:
        with self._catalog.read() as session:
            return owner_of(find_job(session, job_id))

    def cancel(self, job_id: str) -> None:
        """Ask a job to end; it releases what it holds, which may take a moment. Raises UsageError if it has ended."""
        view = self.job(job_id)
        if view.state in TERMINAL:
            raise UsageError(f"job {view.id} has {view.state} already")
        # Decided by the controller here, whoever owns the job: a cancellation sends no command.
        self.engine.onlooker(self._owner_of(view.id)).advance(view.id, CancelRequested(by=_user()))

    # --- points ----------------------------------------------------------------------------------------------------

    def points(self, machine: str | None = None) -> list[PointView]:
        """Those that are not deleted, newest last."""
        return self.point_desk.points(machine)

    def point(self, ref: str) -> PointView:
        """By id or unique beginning of one, `VM@latest`, or `VM@2026-11-22T02:00` (the newest until then)."""
        return self.point_desk.point(ref)

    # --- vaults ----------------------------------------------------------------------------------------------------

    def verify_vault(
        self, name: str | None, level: Level, on_progress: Advance | None = None, *, share: Share | None = None
    ) -> VerifyReport:
        return self.integrity.verify(name, level, on_progress, share=share)

    def verify_point(self, ref: str, level: Level, on_progress: Advance | None = None) -> VerifyReport:
        with self._catalog.read() as session:
            row = find.point_named(session, ref)
        return self.integrity.verify(row.vault, level, on_progress, points=[row.id])

    def vaults(self) -> list[VaultView]:
        return self._desk.views()

    def vault_stats(self, name: str | None = None) -> VaultStats:
        return self._desk.stats(name)

    def rebuild_catalog(self, name: str | None = None) -> int:
        """Read the points back from the vaults; how many there are."""
        return self._desk.rebuild_catalog(name)

    def rebuild_index(self, name: str | None = None, on_progress: Advance | None = None) -> Rebuilt:
        return self._desk.rebuild_index(name, on_progress)

    def init_vault(self, name: str) -> str | None:
        """Make a vault and its key; the recovery phrase, to be shown once. None: it exists already."""
        return self._desk.init(name)


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "somebody"
