"""One thin Celery task per command: resolve the names, make the move, report the event.

Whatever happens inside a task becomes an event: the controller never has to guess from a missing message what an
exception meant. Only a killed process reports nothing, and that the reconciler notices.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from workers import quiesce, restore, snapshot, transfer
from workers.app import cancel_requested, post_event, publish_progress
from workers.context import Context
from workers.contract import messages as m
from workers.contract.errors import (
    Cancelled,
    DiskError,
    GuestError,
    HypervisorError,
    NoSpace,
    NotFound,
    StillframeError,
    UsageError,
    VaultError,
    Yielded,
    describe,
)
from workers.contract.machines import Inventory, Power
from workers.contract.points import Consistency, DiskPoint, Mode, Point, healed_words
from workers.contract.seams import Hypervisor
from workers.disks.targets import HERE, Landing
from workers.listing import list_machines
from workers.logs import about
from workers.quiesce import Guest, Notes
from workers.work_desk import WorkDesk

if TYPE_CHECKING:
    from celery import Celery

    from workers.vault import Vault
    from workers.visit import Visit

log = logging.getLogger(__name__)

C = TypeVar(
    "C",
    m.Prepare,
    m.TakeSnapshot,
    m.TransferDisk,
    m.CommitPoint,
    m.Release,
    m.PrepareRestore,
    m.RestoreDisk,
    m.DefineMachine,
    m.Discard,
    m.Thaw,
    m.ListMachines,
)


def target_of(command: m.Command) -> str | None:
    """The disk that a command is for, if it is for one: a job that joins its disks must know which of them failed."""
    match command:
        case m.TransferDisk():
            return command.plan.target
        case m.RestoreDisk():
            return command.target
        case _:
            return None


def _performed(perform: Callable[[C], m.Event], command: C) -> m.Event:
    """What came of it: whatever happens becomes an event, and a line in the log."""
    began = time.monotonic()
    log.debug("%s begins", command.kind)
    try:
        event = perform(command)
    except Exception as error:
        info = describe(error)
        ours = isinstance(error, StillframeError)
        log.warning("%s failed: %s", command.kind, info.message, exc_info=None if ours else error)
        return m.Failed(command=command.kind, error=info, target=target_of(command))
    log.info("%s done", command.kind, extra={"seconds": round(time.monotonic() - began, 3)})
    return event


class Tasks:
    """The commands of the contract, performed on one worker."""

    def __init__(self, app: Celery, context: Context) -> None:
        self._app = app
        self._context = context
        self.desk = WorkDesk({name: one.max_transfers for name, one in context.config.hypervisors.items()})
        """What is being performed now."""
        self._register(m.Prepare, self.prepare)
        self._register(m.TakeSnapshot, self.take_snapshot)
        self._register(m.TransferDisk, self.transfer_disk)
        self._register(m.CommitPoint, self.commit_point)
        self._register(m.Release, self.release)
        self._register(m.PrepareRestore, self.prepare_restore)
        self._register(m.RestoreDisk, self.restore_disk)
        self._register(m.DefineMachine, self.define_machine)
        self._register(m.Discard, self.discard)
        self._register(m.Thaw, self.thaw)
        self._register(m.ListMachines, self.list_machines)

    def _register(self, message: type[C], perform: Callable[[C], m.Event]) -> None:
        def task(text: str) -> None:
            command = message.model_validate_json(text)
            with (
                about(job=command.job, command=command.kind, target=target_of(command) or ""),
                self.desk.performing(m.Running(job=command.job, kind=command.kind, target=target_of(command))),
            ):
                post_event(self._app, command.job, _performed(perform, command))

        kind: Any = message.model_fields["kind"].default
        # Not shared: Celery would hand the task, with this context in it, to every other app of the process.
        self._app.task(task, name=f"stillframe.{kind}", shared=False)

    # --- backup ------------------------------------------------------------------------------------------------

    def prepare(self, command: m.Prepare) -> m.Event:
        vault = self._context.vault(command.vault)
        hypervisor = self._context.hypervisor(command.machine.hypervisor)
        found = hypervisor.inventory(command.machine.uuid, base=command.base_checkpoint, base_xml=command.base_xml)
        vault.announce(command.job, command.point, reads=[command.base_point] if command.base_point else [])
        readable = command.base_point is None or vault.readable(command.base_point)
        extension = None
        if found.power is Power.RUNNING and command.goal is not Consistency.CRASH:
            with self._context.visit(found.machine, command.job) as visit:
                extension = visit.see_to_extension()
        online = found.power is not Power.OFF
        return m.Prepared(inventory=found, online=online, extension=extension, base_readable=readable)

    def take_snapshot(self, command: m.TakeSnapshot) -> m.Event:
        """A command that waited in its queue until its job had been given up and released must leave nothing behind:
        its job is looked for before, and again afterwards. Raises VaultError then."""
        self._require_session(command.vault, command.job)
        event = self._take_snapshot(command)
        try:
            self._require_session(command.vault, command.job)
        except VaultError:
            checkpoint = m.sf_name(command.job) if command.online else None
            self._release_late(command, checkpoint)
            raise
        return event

    def _release_late(self, command: m.TakeSnapshot, checkpoint: str | None) -> None:
        release = m.Release(
            job=command.job,
            machine=command.machine,
            vault=command.vault,
            point="",
            commit_sent=False,
            thaw=False,
            new_checkpoint=checkpoint,
            old_checkpoint=None,
        )
        self.release(release)

    def _take_snapshot(self, command: m.TakeSnapshot) -> m.Event:
        name, uuid = command.machine.hypervisor, command.machine.uuid
        hypervisor = self._context.hypervisor(name)
        places = self._context.places(name)
        found = hypervisor.inventory(uuid)
        if (found.power is not Power.OFF) != command.online:
            raise Yielded("the machine was started or stopped while its backup was prepared", hint="run it again")
        if not command.online:
            return snapshot.take_offline(hypervisor, found, command.job, command.disks, places)
        if found.power is not Power.RUNNING or command.goal is Consistency.CRASH:
            return self._take_online(command, hypervisor, found, Guest())
        with self._context.visit(found.machine, command.job) as visit:
            return self._take_online(command, hypervisor, found, visit.guest(command.extension))

    def _take_online(
        self, command: m.TakeSnapshot, hypervisor: Hypervisor, found: Inventory, guest: Guest
    ) -> m.SnapshotTaken | m.BaseRefused:
        return snapshot.take_online(
            hypervisor,
            guest,
            found,
            command.job,
            command.disks,
            command.excluded,
            command.goal,
            self._context.places(command.machine.hypervisor),
            command.options,
        )

    def transfer_disk(self, command: m.TransferDisk) -> m.Event:
        def look() -> None:  # the snapshot stands, and its scratch grows, while the transfer waits for its turn
            self._stop_if_unwanted(command.job)
            if command.online:
                snapshot.require_space(self._context.places(command.machine.hypervisor))

        with self.desk.turn(command.machine.hypervisor, look):
            return self._transfer_disk(command)

    def _transfer_disk(self, command: m.TransferDisk) -> m.Event:
        from workers.disks.nbd_source import NbdSource
        from workers.disks.pace import paced_source
        from workers.vault import BlockMap

        vault, plan, export = self._context.vault(command.vault), command.plan, command.export
        base = None
        if plan.mode is Mode.INCREMENTAL and plan.base_root and plan.base_capacity is not None:
            base = BlockMap(vault.reader(), bytes.fromhex(plan.base_root), plan.base_capacity, plan.block_size)
        settings = transfer.Settings(plan.block_size, threads=self._context.config.transfer_threads)
        try:
            with self._context.places(command.machine.hypervisor).host.socket(Path(export.socket)) as socket:
                nbd = NbdSource(socket, export.name, bitmap=export.bitmap)
                source = paced_source(nbd, self._context.bucket(command.machine.hypervisor))
                done = transfer.transfer_disk(source, vault, settings, base=base, watch=self._transfer_watch(command))
        finally:
            self._require_unwritten(command)
        if source.size != command.disk.capacity:
            raise DiskError(f"{plan.target} was resized between its inventory and its snapshot")
        return m.DiskTransferred(disk=_disk_point(command, done), alert=done.alert, healed=done.healed)

    def _require_unwritten(self, command: m.TransferDisk) -> None:
        if not command.online:
            places = self._context.places(command.machine.hypervisor)
            snapshot.require_unwritten(command.job, command.plan.target, command.disk.source, places)

    def _transfer_watch(self, command: m.TransferDisk) -> transfer.Watch:
        places = self._context.places(command.machine.hypervisor)

        def watch(tally: transfer.Tally) -> None:
            self._stop_if_unwanted(command.job)
            if command.online:
                snapshot.require_space(places)
            self._require_unwritten(command)
            progress = m.Progress(
                target=command.plan.target,
                done_bytes=tally.done_bytes,
                total_bytes=tally.total_bytes,
                read_bytes=tally.read_bytes,
                stored_bytes=tally.stored_bytes,
                rate=tally.read_bytes / max(tally.seconds, 0.001),
                bottleneck=tally.bottleneck,
            )
            publish_progress(self._app, command.job, progress)

        return watch

    def _stop_if_unwanted(self, job: str) -> None:
        if self.desk.ending:
            raise Yielded("the worker was stopped", hint="run it again")
        if cancel_requested(self._app, job):
            raise Cancelled("cancelled")

    def _require_session(self, name: str, job: str) -> Vault:
        """The vault. Raises VaultError if the job has ended: its session there is withdrawn."""
        from workers.vault.sessions import SESSIONS, read_session

        vault = self._context.vault(name)
        if read_session(vault.store, SESSIONS + job) is None:
            raise VaultError(f"job {job} has ended: its session is withdrawn, and nothing of it is wanted any more")
        return vault

    def commit_point(self, command: m.CommitPoint) -> m.Event:
        # Settled long ago: the point is there, or was deleted since, and its blocks may be gone.
        vault = self._require_session(command.vault, command.job)
        point = vault.commit(command.point)
        return m.PointCommitted(point=point.id, locked_until=point.locked_until)

    def release(self, command: m.Release) -> m.Event:
        """Every step is tried, whatever the others came to; the first error is raised at the end. The thaw comes
        first and needs no vault; what was never begun is not looked for, so that a dead hypervisor or a missing vault
        does not make a second failure of the first."""
        name = command.machine.hypervisor
        point: list[Point] = []
        warnings: list[str] = []

        def settle() -> None:
            found = self._context.vault(command.vault).settle(command.point) if command.commit_sent else None
            point.extend([found] if found else [])
            self._drop_checkpoint(command, committed=found is not None)

        def withdraw() -> None:
            warnings.extend(self._withdraw(command.vault, command.job))

        steps: list[Callable[[], object]] = []
        if command.thaw:
            steps.append(lambda: self.thaw(m.Thaw(job=command.job, machine=command.machine)))
        if command.new_checkpoint is not None:
            steps.append(lambda: self._end_backup(command))
        steps += [lambda: snapshot.remove_files(command.job, self._context.places(name)), settle, withdraw]
        errors: list[StillframeError] = []
        for step in steps:
            try:
                step()
            except StillframeError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return m.Released(committed=point[0] if point else None, warnings=warnings)

    def _end_backup(self, command: m.Release) -> None:
        hypervisor = self._context.hypervisor(command.machine.hypervisor)
        with suppress(NotFound):  # the machine is gone, and its jobs with it
            hypervisor.end_backup(command.machine.uuid, m.sf_name(command.job))

    def _drop_checkpoint(self, command: m.Release, *, committed: bool) -> None:
        """Invariants 1 and 2: the old one only after its successor is durable, the new one only without its point."""
        doomed = command.old_checkpoint if committed else command.new_checkpoint
        if doomed is not None:
            hypervisor = self._context.hypervisor(command.machine.hypervisor)
            with suppress(NotFound):  # the machine is gone: so is what knew of its checkpoints
                hypervisor.delete_checkpoint(command.machine.uuid, doomed)

    def thaw(self, command: m.Thaw) -> m.Event:
        """Thaw, then resume what was held. Raises GuestError while a freeze was sent, the machine runs, and nobody in
        the guest answers: the obligation stands until the thaw is confirmed, or the machine is off."""
        name = command.machine.hypervisor
        notes = self._context.places(name).notes_of(command.job)
        try:
            with self._context.visit(command.machine, command.job, rescue=True) as visit:
                thawed = self._thawed(command, visit, notes)
            if notes.held.exists():
                with self._context.visit(command.machine, command.job) as visit:
                    visit.let_go(command.job)
        except NotFound:
            thawed = 0  # the machine is gone
        notes.frozen.unlink(missing_ok=True)
        notes.held.unlink(missing_ok=True)
        return m.Thawed(thawed=thawed)

    def _thawed(self, command: m.Thaw, visit: Visit, notes: Notes) -> int:
        try:
            freezer = visit.ways.freezer
            if freezer is None:
                raise GuestError(visit.ways.why_not)
            return quiesce.thaw(freezer, notes.frozen)[0] if freezer.frozen() else 0
        except GuestError as error:
            hypervisor = self._context.hypervisor(command.machine.hypervisor)
            if notes.frozen.exists() and hypervisor.inventory(command.machine.uuid).power is not Power.OFF:
                raise GuestError(
                    f"the guest of {command.machine.name} may be frozen, and its agent does not answer: {error}",
                    hint=f"{hypervisor.features.thaw_hint.format(machine=command.machine.name)}; or restart the guest "
                    "agent, or reset the machine",
                ) from None
            return 0

    def list_machines(self, command: m.ListMachines) -> m.Event:
        return list_machines(self._context, command)

    # --- restore -----------------------------------------------------------------------------------------------

    def prepare_restore(self, command: m.PrepareRestore) -> m.Event:
        hypervisor = self._context.hypervisor(command.hypervisor) if command.hypervisor else None
        folder = Path(command.directory) if command.directory else None
        if command.pool is not None:
            if hypervisor is None:
                raise UsageError("a pool belongs to a hypervisor", hint="name one with --hypervisor")
            folder = hypervisor.volume_dir(command.pool)
        vault = self._context.vault(command.vault)
        with suppress(VaultError, NoSpace):  # a vault that is full, or may only be read, can be restored from
            vault.announce(command.job, reads=[command.point])
        if not vault.readable(command.point):
            raise NotFound(
                f"point {command.point[:8]} is not in vault {command.vault}, or is about to go: its deletion is final",
                hint="stillframe point list",
            )
        return restore.prepare(vault, hypervisor, command, folder)

    def restore_disk(self, command: m.RestoreDisk) -> m.Event:
        threads = self._context.config.transfer_threads

        def watch(written: restore.Written) -> None:
            self._stop_if_unwanted(command.job)
            progress = m.Progress(
                target=command.target,
                done_bytes=written.done_bytes,
                total_bytes=written.total_bytes,
                read_bytes=written.written_bytes,
                stored_bytes=0,
                rate=written.written_bytes / max(written.seconds, 0.001),
            )
            publish_progress(self._app, command.job, progress)

        vault = self._context.vault(command.vault)
        restored = restore.restore_disk(vault, command, threads, watch, self._landing(command.hypervisor, command.job))
        if command.standalone:
            self._withdraw(command.vault, command.job)
        return restored

    def _landing(self, hypervisor: str | None, job: str) -> Landing:
        if hypervisor is None:
            return HERE
        places = self._context.places(hypervisor)
        return Landing(places.host, places.runtime_of(job), self._context.bucket(hypervisor))

    def _withdraw(self, vault: str, job: str) -> list[str]:
        """End the session of a job; what went wrong: then a sweep ends it, in days."""
        try:
            self._context.vault(vault).withdraw(job)
        except StillframeError as error:
            return [f"the session could not be withdrawn from vault {vault}: {error}"]
        return []

    def define_machine(self, command: m.DefineMachine) -> m.Event:
        hypervisor = self._context.hypervisor(command.hypervisor)
        landing = self._landing(command.hypervisor, command.job)
        defined = restore.define_machine(self._context.vault(command.vault), hypervisor, command, landing)
        if command.pool is not None:
            with suppress(HypervisorError, NotFound):  # the machine is there; libvirt sees the files at its next look
                hypervisor.refresh_pool(command.pool)
        self._withdraw(command.vault, command.job)
        return defined

    def discard(self, command: m.Discard) -> m.Event:
        hypervisor = self._context.hypervisor(command.hypervisor) if command.hypervisor else None
        discarded = restore.discard(hypervisor, command, self._landing(command.hypervisor, command.job))
        self._withdraw(command.vault, command.job)  # a vault that cannot be opened was the first news already
        return discarded


def _disk_point(command: m.TransferDisk, done: transfer.Transferred) -> DiskPoint:
    plan, disk = command.plan, command.disk
    return DiskPoint(
        target=plan.target,
        source=disk.source,
        format=disk.format,
        identity=disk.identity,
        capacity=disk.capacity,
        block_size=plan.block_size,
        root=done.root.hex(),
        mode=Mode.FULL if done.alert else plan.mode,
        reason=done.alert or plan.reason + (f"; {healed_words(done.healed)}" if done.healed else ""),
        checkpoint=None,
        options=disk.source_options,
        figures=done.figures,
    )
