"""The one seam between Stillframe and whoever uses it: the command line, later the web, programs, tests.

Opening is cheap (one look into the catalog): Celery, libvirt and vault are imported and connected when a call needs
them. Everything returned is a frozen value.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypedDict

from orchestrator import find
from orchestrator.catalog import owner
from orchestrator.catalog.jobs import (
    add_job,
    events_of,
    find_job,
    load_job,
    owner_of,
    recent_jobs,
    unsettled,
)
from orchestrator.catalog.points import (
    document,
    extensions,
    newest_base,
    newest_points,
    points_of,
    see_machine,
)
from orchestrator.catalog.schema import PointRow
from orchestrator.catalog.store import Catalog
from orchestrator.config import Config
from orchestrator.config_file import Policy
from orchestrator.diff_desk import DiffDesk
from orchestrator.guest_desk import GuestDesk
from orchestrator.integrity_desk import Advance, IntegrityDesk
from orchestrator.jobs.backup_job import BackupJob
from orchestrator.jobs.restore import RestoreJob
from orchestrator.jobs.states import TERMINAL
from orchestrator.key_desk import KeyDesk
from orchestrator.lock_desk import LockDesk
from orchestrator.point_desk import PointDesk
from orchestrator.replica_desk import ReplicaDesk
from orchestrator.upkeep_desk import UpkeepDesk
from orchestrator.vault_desk import VaultDesk, require_primary
from orchestrator.views import JobView, MachineView, PointView, VaultView, job_view, machine_view
from workers.context import Context
from workers.contract.errors import HypervisorError, NotFound, StillframeError, UsageError
from workers.contract.guests import ExtensionState
from workers.contract.machines import MachineRef, MachineSummary
from workers.contract.messages import IMAGE_FORMATS, CancelRequested, ImageFormat
from workers.contract.points import Consistency

if TYPE_CHECKING:
    from orchestrator.engine import Engine
    from workers.vault import VaultStats
    from workers.vault.findings import Level, Share, VerifyReport
    from workers.vault.rebuild import Rebuilt

__all__ = ["JobView", "MachineView", "PointView", "Service", "VaultView"]

POLL = 0.2
"""Seconds between looks at a job that may move in another process."""


class _Asked(TypedDict):
    """What a backup asks of its guest."""

    goal: Consistency
    goal_asked: bool
    require: bool
    options: dict[str, str]


class Service:
    """Use as a context manager, or call `close`."""

    def __init__(self, config: Config, catalog: Catalog) -> None:
        self._config = config
        self._catalog = catalog
        self._context = Context(config.worker)
        self._desk = VaultDesk(config, catalog, self._context)
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
        self._running: Engine | None = None
        self.settled: list[str] = []
        """What was settled at the start."""

    @staticmethod
    def open(config: Config, *, reconcile: bool = True) -> Service:
        """The catalog made or migrated; what a crash has left is settled. Raises ConfigError."""
        service = Service(config, Catalog.open(config.catalog_url))
        if reconcile:
            service.settled = service.reconcile()
        return service

    def close(self) -> None:
        if self._running is not None:
            self._running.close()
        self._context.close()
        self._catalog.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _engine(self) -> Engine:
        if self._running is None:
            from orchestrator.engine import Engine

            self._running = Engine(self._config, self._catalog, self._context)
        return self._running

    def reconcile(self) -> list[str]:
        """Settle jobs whose process is dead and releases that failed; what was done, in words."""
        with self._catalog.read() as session:
            if not unsettled(session):
                return []
        from orchestrator.reconciler import reconcile

        seen = 0

        def wait(seconds: float) -> None:
            nonlocal seen
            seen = self._engine.wait_for_change(seen, seconds)

        return reconcile(self._catalog, lambda: self._engine.controller, wait)

    # --- machines --------------------------------------------------------------------------------------------------

    def machines(self, hypervisor: str | None = None) -> list[MachineView]:
        """All machines of one or all hypervisors. Raises HypervisorUnreachable only if none can be asked."""
        summaries = self._summaries(hypervisor)
        with self._catalog.read() as session:
            last, known = newest_points(session), extensions(session)
        return [self._machine_view(summary, last, known) for summary in summaries]

    def machine(self, wanted: str) -> MachineView:
        """By UUID, name, or `hypervisor/name`. Raises NotFound, UsageError, HypervisorUnreachable."""
        summary = self._summary(wanted)
        with self._catalog.read() as session:
            last, known = newest_points(session), extensions(session)
        return self._machine_view(summary, last, known)

    def _machine_view(
        self, summary: MachineSummary, last: dict[str, PointRow], known: dict[str, ExtensionState]
    ) -> MachineView:
        machine = summary.machine
        protected = self._config.protected_by(machine.hypervisor, machine.name) is not None
        extension = known.get(machine.uuid)
        return machine_view(summary, last.get(machine.uuid), protected=protected, extension=extension)

    def _summaries(self, hypervisor: str | None = None, *, disks: bool = True) -> list[MachineSummary]:
        names = [hypervisor] if hypervisor else list(self._config.worker.hypervisors)
        if not names:
            raise UsageError(f"{self._config.path} names no hypervisor", hint="add a [hypervisors.local] section")
        found: list[MachineSummary] = []
        errors: list[HypervisorError] = []
        for name in names:
            try:
                found += self._context.hypervisor(name).machines(disks=disks)
            except HypervisorError as error:
                errors.append(error)
        if len(errors) == len(names):
            raise errors[0]
        return found

    def _summary(self, wanted: str, *, disks: bool = True) -> MachineSummary:
        hypervisor = wanted.partition("/")[0]
        known = "/" in wanted and hypervisor in self._config.worker.hypervisors
        return find.machine_among(self._summaries(hypervisor if known else None, disks=disks), wanted)

    # --- jobs ------------------------------------------------------------------------------------------------------

    def start_backup(
        self,
        machine: str,
        *,
        full: bool = False,
        goal: Consistency | None = None,
        require: bool | None = None,
        exclude: Sequence[str] = (),
        vault: str | None = None,
    ) -> str:
        """Begin a backup in this process; its job's id. What is None, the machine's policy says, or `[backup]`.
        Raises Busy if another job works on the machine."""
        vault_name = require_primary(self._config, vault)
        found = self._summary(machine, disks=False).machine
        asked = self._asked(found, goal, require)
        warnings = self.guests.refresh_packages() if asked["goal"] is not Consistency.CRASH else []
        with self._catalog.write() as session:
            base = newest_base(session, found.uuid, vault_name)
            job = BackupJob(
                id=_new_job_id(),
                machine=found,
                vault=vault_name,
                point=secrets.token_hex(16),
                force_full=full,
                exclude=list(exclude),
                block_size=self._config.worker.block_size,
                block_size_rules=self._config.block_sizes,
                base=base,
                earlier=bool(points_of(session, {found.uuid}, vault=vault_name)),
                warnings=warnings,
                **asked,
            )
            uses = base.id if base else ""
            name, lock = (found.uuid, found.name), f"machine:{found.uuid}"
            add_job(session, job, owner.this_process(), machine=name, lock=lock, uses_point=uses)
            see_machine(session, found)
        self._engine.controller.start(job.id)
        return job.id

    def _asked(self, machine: MachineRef, goal: Consistency | None, require: bool | None) -> _Asked:
        policy = self._config.policy_for(machine.hypervisor, machine.name) or Policy()
        return {
            "goal": goal or policy.consistency or self._config.consistency,
            "goal_asked": bool(goal or policy.consistency or self._config.consistency_explicit),
            "require": policy.require if require is None else require,
            "options": {**self._config.extension.options, **policy.options},
        }

    def start_restore_disk(
        self, point_ref: str, target: str, *, to: Path, format: str | None = None, vault: str | None = None
    ) -> str:
        """Begin to write one disk of a point into the new file `to`; from `vault`, else from one that has it. Raises
        NotFound, Busy."""
        wanted = _format(format)
        held_by, remarks = self.replicas.holder(point_ref, vault)
        with self._catalog.write() as session:
            row = find.point_named(session, point_ref)
            point = document(row)
            if target not in [disk.target for disk in point.disks]:
                there = ", ".join(disk.target for disk in point.disks)
                raise NotFound(f"point {row.id[:8]} has no disk {target!r}", hint=f"it has: {there}")
            job = RestoreJob(
                id=_new_job_id(),
                vault=held_by,
                warnings=remarks,
                point=row.id,
                targets=[target],
                to=str(to.absolute()),
                format=wanted,
            )
            machine = (row.machine_uuid, row.machine_name)
            add_job(
                session, job, owner.this_process(), machine=machine, lock=f"file:{to.absolute()}", uses_point=row.id
            )
        self._engine.controller.start(job.id)
        return job.id

    def start_restore_machine(
        self,
        point_ref: str,
        *,
        name: str | None = None,
        directory: Path | None = None,
        pool: str | None = None,
        start: bool = False,
        replace: bool = False,
        hypervisor: str | None = None,
        vault: str | None = None,
    ) -> str:
        """Begin to restore a machine as a new one, or (`replace`) in place of the original; from `vault`, else from
        one that has the point. Raises NotFound, Busy."""
        held_by, remarks = self.replicas.holder(point_ref, vault)
        with self._catalog.write() as session:
            row = find.point_named(session, point_ref)
            point = document(row)
            if replace and directory is None and pool is None:
                directory = Path(point.disks[0].source).parent
            new_name = point.machine.name if replace else name or f"{point.machine.name}-restored"
            if "/" in new_name or new_name in (".", ".."):
                raise UsageError(f"a machine cannot be named {new_name!r}: its disks are files of that name")
            new_uuid = point.machine.uuid if replace else str(uuid.uuid4())
            job = RestoreJob(
                id=_new_job_id(),
                vault=held_by,
                warnings=remarks,
                point=row.id,
                hypervisor=self._restore_host(hypervisor, point.machine.hypervisor),
                name=new_name,
                uuid=new_uuid,
                directory=str(directory) if directory else None,
                pool=pool,
                replace=replace,
                start=start,
            )
            machine, lock = (new_uuid, new_name), f"machine:{new_uuid}"
            add_job(session, job, owner.this_process(), machine=machine, lock=lock, uses_point=row.id)
        self._engine.controller.start(job.id)
        return job.id

    def _restore_host(self, asked: str | None, original: str) -> str:
        known = self._config.worker.hypervisors
        if asked is not None and asked not in known:
            raise NotFound(f"no hypervisor {asked!r} is configured", hint=f"there are: {', '.join(known) or 'none'}")
        chosen = asked or (original if original in known else None)
        if chosen is None and len(known) == 1:
            chosen = next(iter(known))
        if chosen is None:
            hint = f"--hypervisor {next(iter(known))}" if known else "add a [hypervisors.local] section"
            raise UsageError(f"the point's hypervisor {original} is not configured", hint=hint)
        return chosen

    def job(self, job_id: str) -> JobView:
        """By id or unique beginning of one. Raises NotFound, UsageError."""
        with self._catalog.read() as session:
            row, job = load_job(session, find_job(session, job_id).id)
            view = job_view(row, job, events_of(session, row.id))
        progress = self._engine.progress(job) if job.state == "transferring" else []
        return view.model_copy(update={"progress": progress})

    def jobs(self, *, active_only: bool = False, limit: int = 50) -> list[JobView]:
        """Newest first."""
        with self._catalog.read() as session:
            ids = [row.id for row in recent_jobs(session, active_only=active_only, limit=limit)]
        return [self.job(job_id) for job_id in ids]

    def wait(self, job_id: str, *, on_progress: Callable[[JobView], None] | None = None) -> JobView:
        """Wait until the job has ended, whichever process runs it; if that process dies, the job is settled here."""
        seen = 0
        while True:
            view = self.job(job_id)
            if on_progress is not None:
                on_progress(view)
            if view.state in TERMINAL:
                return view
            with self._catalog.read() as session:
                dead = owner.is_dead(owner_of(find_job(session, view.id)))
            if dead:
                self.reconcile()
            if error := self._engine.broken(view.id):
                raise StillframeError(
                    f"job {view.id} cannot go on: {error}",
                    hint="the next stillframe command settles it: stillframe job list",
                ) from error
            seen = self._engine.wait_for_change(seen, POLL)

    def cancel(self, job_id: str) -> None:
        """Ask a job to end; it releases what it holds, which may take a moment. Raises UsageError if it has ended."""
        view = self.job(job_id)
        if view.state in TERMINAL:
            raise UsageError(f"job {view.id} has {view.state} already")
        # Decided by the controller here, whoever owns the job: a cancellation sends no command.
        self._engine.onlooker.advance(view.id, CancelRequested(by=_user()))

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


def _new_job_id() -> str:
    return secrets.token_hex(6)


def _format(word: str | None) -> ImageFormat | None:
    found = next((format for format in IMAGE_FORMATS if format == word), None)
    if word is not None and found is None:
        raise UsageError(f"the format of a disk cannot be {word!r}", hint=f"there are: {', '.join(IMAGE_FORMATS)}")
    return found


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "somebody"
