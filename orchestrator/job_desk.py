"""How jobs are made: backups and restores that somebody asks for, and backups that a schedule asks for.

The half of `Service` that begins jobs. A backup is made in one place whoever wants it, in the transaction of the
caller: the scheduler's, which notes in the same breath that the moment is handled, or that of `start_backup`.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from sqlmodel import Session

from orchestrator import find
from orchestrator.catalog.jobs import ASKED, RESTORE, Ticket, add_job
from orchestrator.catalog.owner import Owner
from orchestrator.catalog.points import document, has_points, newest_base, see_machine, tags_of
from orchestrator.catalog.store import Catalog
from orchestrator.config import Config
from orchestrator.config_file import Policy
from orchestrator.desk import Desk
from orchestrator.guest_desk import GuestDesk
from orchestrator.jobs.backup_job import BackupJob
from orchestrator.jobs.restore import RestoreJob
from orchestrator.primary import require_primary
from orchestrator.replica_desk import ReplicaDesk
from workers.contract.errors import NotFound, UsageError
from workers.contract.machines import MachineRef
from workers.contract.messages import IMAGE_FORMATS, ImageFormat
from workers.contract.points import Consistency


class JobDesk(Desk):
    """`machine_named`: the machine that people mean by a name. `owner`: whose a job on a hypervisor is. `begin`:
    have these queued jobs begun, now or in their turn."""

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        guests: GuestDesk,
        replicas: ReplicaDesk,
        *,
        machine_named: Callable[[str], MachineRef],
        owner: Callable[[str | None], Owner],
        begin: Callable[[Sequence[str]], None],
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._guests = guests
        self._replicas = replicas
        self._machine_named = machine_named
        self._owner = owner
        self._begin = begin

    # --- backups ---------------------------------------------------------------------------------------------------

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
        """Begin a backup; its job's id. What is None, the machine's policy and section say, or `[backup]`. Raises Busy
        if another job works on the machine."""
        if vault is not None:
            require_primary(self._config, vault)
        found = self._machine_named(machine)
        with self._catalog.read() as session:
            tags = tags_of(session, found.uuid)
        section = self._config.protected_by(found.hypervisor, found.name, tags, vault=vault)
        protect = self._config.protect[section] if section is not None else None
        into = require_primary(self._config, vault or (protect.vault if protect else None))
        policy = self._config.policies[protect.policy] if protect else Policy()
        required = policy.require if require is None else require
        policy = policy.model_copy(update={"consistency": goal or policy.consistency, "require": required})
        warnings = self.refresh_packages([policy])
        with self._catalog.write() as session:
            ticket = Ticket(ASKED)
            job_id = self.queue_backup(
                session, found, into, policy, ticket, full=full, exclude=exclude, warnings=warnings
            )
            see_machine(session, found)
        self._begin([job_id])
        return job_id

    def refresh_packages(self, policies: Sequence[Policy]) -> list[str]:
        """Build what backups by these policies put into guests and is missing; warnings."""
        goals = {policy.consistency or self._config.consistency for policy in policies}
        return self._guests.refresh_packages() if goals - {Consistency.CRASH} else []

    def queue_backup(
        self,
        session: Session,
        machine: MachineRef,
        vault: str,
        policy: Policy,
        ticket: Ticket,
        *,
        full: bool = False,
        exclude: Sequence[str] = (),
        warnings: Sequence[str] = (),
    ) -> str:
        """Make a queued job, in the caller's transaction; its id. Raises Busy if another job works on the machine."""
        base = newest_base(session, machine.uuid, vault)
        job = BackupJob(
            id=_new_job_id(),
            machine=machine,
            vault=vault,
            point=secrets.token_hex(16),
            goal=policy.consistency or self._config.consistency,
            goal_asked=policy.consistency is not None or self._config.consistency_explicit,
            require=policy.require,
            options={**self._config.extension.options, **policy.options},
            force_full=full,
            exclude=list(exclude),
            block_size=self._config.worker.block_size,
            block_size_rules=self._config.block_sizes,
            base=base,
            earlier=base is not None or has_points(session, machine.uuid, vault),
            warnings=list(warnings),
        )
        name, lock = (machine.uuid, machine.name), f"machine:{machine.uuid}"
        uses = base.id if base else ""
        add_job(session, job, self._owner(machine.hypervisor), machine=name, lock=lock, uses_point=uses, ticket=ticket)
        return job.id

    # --- restores --------------------------------------------------------------------------------------------------

    def start_restore_disk(
        self, point_ref: str, target: str, *, to: Path, format: str | None = None, vault: str | None = None
    ) -> str:
        """Begin to write one disk of a point into the new file `to`; from `vault`, else from one that has it. Raises
        NotFound, Busy."""
        wanted = _format(format)
        held_by, remarks = self._replicas.holder(point_ref, vault)
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
            lock = f"file:{to.absolute()}"
            add_job(
                session, job, self._owner(None), machine=machine, lock=lock, uses_point=row.id, ticket=Ticket(RESTORE)
            )
        self._begin([job.id])
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
        held_by, remarks = self._replicas.holder(point_ref, vault)
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
            add_job(
                session,
                job,
                self._owner(job.hypervisor),
                machine=machine,
                lock=lock,
                uses_point=row.id,
                ticket=Ticket(RESTORE),
            )
        self._begin([job.id])
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


def _new_job_id() -> str:
    return secrets.token_hex(6)


def _format(word: str | None) -> ImageFormat | None:
    found = next((format for format in IMAGE_FORMATS if format == word), None)
    if word is not None and found is None:
        raise UsageError(f"the format of a disk cannot be {word!r}", hint=f"there are: {', '.join(IMAGE_FORMATS)}")
    return found
