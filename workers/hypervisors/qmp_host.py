"""A host whose machines are QEMU processes without libvirt, each with a QMP socket.

QEMU is the only one that knows of such a machine, and only while it runs: one that is off does not exist here, and no
point can be made of it. What libvirt keeps beside QEMU (a list of checkpoints, of jobs) is read from the process and
its images every time, so there is nothing that could disagree with them (invariant 6).

The monitor takes one client at a time: each act here opens a connection of its own and closes it (`qmp_wire.py`), under
a lock per monitor for the threads of this process.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from workers.contract.errors import (
    Busy,
    HypervisorError,
    HypervisorUnreachable,
    NotFound,
    StillframeError,
    TargetExists,
    UsageError,
)
from workers.contract.hosts import Host
from workers.contract.machines import Disk, Inventory, Leftovers, MachineRef, MachineSummary, Power
from workers.contract.seams import BackupRequest, Begun, Export, Features, NewMachine
from workers.hosts.local import LOCAL
from workers.hypervisors import host_files, iothreads, qemu_process, qmp_backup, qmp_define, qmp_definition
from workers.hypervisors.backup_xml import PREFIX, require_ours
from workers.hypervisors.qemu_process import Process
from workers.hypervisors.qmp_agent import Agents, is_connected
from workers.hypervisors.qmp_definition import Definition, Image
from workers.hypervisors.qmp_disks import Drive, drives, judged
from workers.hypervisors.qmp_machines import Found, Sockets, held, identity
from workers.hypervisors.qmp_wire import GREETING_SECONDS, HELD_HINT, Monitor

QUIT_SECONDS = 60.0
GLANCE_SECONDS = 0.5
_OLDEST = (5, 2)
"""QEMU with block-export-add, and with bitmaps that are merged in a transaction."""
_ONLY_RUNNING = "without libvirt a machine is known only while its QEMU runs: start it, and try again"
_NO_POOLS = "a QEMU without libvirt has no storage pools"
_UNMARKED = (
    "QEMU was started without -uuid: its UUID here is made of this host and its socket's path, and changes with them"
)


class QmpHypervisor:
    """See `seams.Hypervisor`."""

    def __init__(self, path: Path, *, name: str, runtime_dir: Path, patience: float = GREETING_SECONDS) -> None:
        """`path`: a QMP socket, or a folder of such; `patience`: seconds for which another client's turn at a monitor
        is waited for. Raises HypervisorUnreachable if it cannot be either."""
        self._patience = patience
        self.host: Host = LOCAL
        self._name, self._runtime = name, runtime_dir
        self._sockets = Sockets(path)
        self._lock = threading.Lock()
        self._locks: dict[Path, threading.Lock] = {}
        self._paths: dict[str, Path] = {}
        self._images: dict[str, list[Path]] = {}
        self._agents = Agents(self._monitor)
        version = self._version()
        words = f"QEMU {'.'.join(str(part) for part in version)} over QMP" if version else "QEMU over QMP, none runs"
        self.features = Features(
            version=words,
            backup=not version or version >= _OLDEST,
            knows_off=False,
            drop_checkpoint="qemu-img bitmap --remove IMAGE {checkpoint}, while {machine} is off",
            thaw_hint="send guest-fsfreeze-thaw to the agent's socket of {machine}",
        )

    def _version(self) -> tuple[int, ...]:
        """Of the oldest QEMU that answers at once; empty if none does."""
        found = []
        for path in self._sockets.paths():
            with suppress(HypervisorError, Busy), Monitor(path, greeting_seconds=GLANCE_SECONDS) as monitor:
                found.append(monitor.version)
        return min(found, default=())

    # --- finding a machine -------------------------------------------------------------------------------------

    @contextmanager
    def _connected(self, path: Path) -> Iterator[Monitor]:
        with self._lock:
            lock = self._locks.setdefault(path, threading.Lock())
        with lock, Monitor(path, greeting_seconds=self._patience) as monitor:
            yield monitor

    @contextmanager
    def _monitor(self, uuid: str) -> Iterator[Monitor]:
        """A connection to the monitor of the machine `uuid`. Raises NotFound if it does not run, Busy."""
        with ExitStack() as stack:
            known = self._paths.get(uuid)
            monitor = self._at(stack, known, uuid) if known else None
            if monitor is None:
                monitor = self._at(stack, self._searched(uuid), uuid)
            if monitor is None:
                raise Busy("the machine is just being stopped or started", hint="run it again")
            yield monitor

    def _at(self, stack: ExitStack, path: Path, uuid: str) -> Monitor | None:
        """The monitor at `path`, if the machine is there. Raises Busy."""
        with ExitStack() as trial:
            try:
                monitor = trial.enter_context(self._connected(path))
                if identity(monitor).uuid != uuid:
                    return None
            except HypervisorError:
                return None
            stack.push(trial.pop_all())
            return monitor

    def _searched(self, uuid: str) -> Path:
        """Raises HypervisorError where two have that UUID: which of them a point is of, nobody could say."""
        fitting = [found for found in self._found() if found.uuid == uuid]
        if not fitting:
            raise NotFound(f"{self._name} has no machine with UUID {uuid} that runs", hint=_ONLY_RUNNING)
        if len(fitting) > 1:
            both = " and ".join(f"{found.name} ({found.socket})" for found in fitting)
            raise HypervisorError(f"{both} have the same UUID {uuid}", hint="give each QEMU a -uuid of its own")
        if fitting[0].held:
            raise Busy(f"{fitting[0].name}: {fitting[0].held}", hint=HELD_HINT)
        self._paths[uuid] = fitting[0].socket
        return fitting[0].socket

    def _found(self) -> list[Found]:
        """All machines, whichever monitors they have."""
        machines: dict[tuple[str, int], Found] = {}
        for found in self._answering():
            machines.setdefault((found.uuid, found.pid), found)
        return list(machines.values())

    def _answering(self) -> Iterator[Found]:
        for path in self._sockets.paths():
            try:
                with self._connected(path) as monitor:
                    found = identity(monitor)
            except Busy as busy:
                try:
                    found = held(path, busy)
                except Busy:
                    if self._sockets.alone:
                        raise
                    continue
            except HypervisorError as error:
                if self._sockets.alone and not isinstance(error, HypervisorUnreachable):
                    raise
                continue  # nobody serves it any more, or it is something else
            yield found

    # --- looking -----------------------------------------------------------------------------------------------

    def machines(self, *, disks: bool = True) -> list[MachineSummary]:
        """Those that run. One whose monitor somebody holds is listed without its disks."""
        listed = [self._summary(found, disks=disks) for found in self._found()]
        return sorted(listed, key=lambda summary: summary.machine.name)

    def _summary(self, found: Found, *, disks: bool) -> MachineSummary:
        machine = MachineRef(hypervisor=self._name, uuid=found.uuid, name=found.name)
        bare = MachineSummary(machine=machine, power=Power.RUNNING, disks=[])
        if found.held:
            return bare
        try:
            with self._connected(found.socket) as monitor:
                return MachineSummary(
                    machine=machine,
                    power=_power(monitor),
                    disks=[drive.disk for drive in self._drives(monitor)] if disks else [],
                )
        except (Busy, HypervisorError):  # held or gone since
            return bare

    def _drives(self, monitor: Monitor, *, lenient: bool = True) -> list[Drive]:
        found = drives(monitor, qemu_process.look(monitor.peer.pid), lenient=lenient)
        return [drive for drive in found if not drive.firmware]

    def inventory(self, uuid: str, *, base: str | None = None, base_xml: str | None = None) -> Inventory:  # noqa: ARG002
        """Nothing is ever redefined: QEMU and its images hold all that there is of a checkpoint."""
        with self._monitor(uuid) as monitor:
            found = identity(monitor)
            process = qemu_process.look(monitor.peer.pid)
            everything = drives(monitor, process, lenient=False)
            listed = [drive for drive in everything if not drive.firmware]
            definition = _described(found, process, everything)
            self._remember(uuid, listed)
            disks = [_judged(drive, base) for drive in listed]
            threaded = [drive.disk.target for drive in listed if drive.iothread]
            return Inventory(
                machine=MachineRef(hypervisor=self._name, uuid=uuid, name=found.name),
                power=_power(monitor),
                disks=iothreads.marked(LOCAL, disks, process.program if process else "", threaded),
                definition=definition.model_dump_json(),
                nvram_path=definition.nvram.names[-1] if definition.nvram else None,
                agent=is_connected(monitor),
                foreign_job=qmp_backup.foreign_job(monitor),
                remarks=[] if found.own_uuid else [_UNMARKED],
            )

    def _remember(self, uuid: str, listed: list[Drive]) -> None:
        """For checkpoints that have to go when the machine has just ended."""
        self._images[uuid] = [Path(drive.disk.source) for drive in listed if drive.disk.tracks_changes]

    def nvram(self, inventory: Inventory) -> bytes | None:
        return host_files.read_nvram(LOCAL, Path(inventory.nvram_path)) if inventory.nvram_path else None

    # --- the guest ---------------------------------------------------------------------------------------------

    def agent_command(self, uuid: str) -> Callable[[str, float], str]:
        return self._agents.command(uuid)

    def thaw_command(self, uuid: str) -> list[str]:
        return self._agents.thaw_command(uuid)

    # --- backup jobs -------------------------------------------------------------------------------------------

    def begin_backup(self, uuid: str, request: BackupRequest) -> Begun:
        """Busy if any other job runs, or if somebody uses the NBD server of that QEMU."""
        require_ours(request.name)
        folder = self._runtime / request.name
        try:
            with self._monitor(uuid) as monitor:
                listed = self._drives(monitor)
                self._remember(uuid, listed)
                exports = self._begun(monitor, listed, request, folder)
        except HypervisorUnreachable:
            with suppress(NotFound), self._monitor(uuid) as monitor:  # a reply was lost: what it was, nobody knows
                qmp_backup.undo(monitor, self._drives(monitor), request.name, folder)
            raise
        return Begun(exports=exports, checkpoint_xml=_checkpoint(request))

    def _begun(self, monitor: Monitor, listed: list[Drive], request: BackupRequest, folder: Path) -> list[Export]:
        found = {drive.disk.target: drive for drive in listed}
        qmp_backup.check(monitor, found, request)
        try:
            return qmp_backup.begin(monitor, found, request, folder)
        except HypervisorUnreachable:
            raise  # undone over a new connection
        except StillframeError:
            qmp_backup.undo(monitor, self._drives(monitor), request.name, folder)
            raise

    def end_backup(self, uuid: str, name: str) -> bool:
        require_ours(name)
        with self._monitor(uuid) as monitor:
            return qmp_backup.end(monitor, name, self._runtime / name)

    def delete_checkpoint(self, uuid: str, name: str) -> None:
        """Of a machine that has ended since, in the images that it had here. Busy if somebody writes one of them."""
        require_ours(name)
        try:
            with self._monitor(uuid) as monitor:
                qmp_backup.delete_checkpoint(monitor, self._drives(monitor), name)
        except NotFound:
            if uuid not in self._images:
                raise
            for path in self._images[uuid]:
                if path.exists() and any(one.name == name and not one.depth for one in _bitmaps(path)):
                    host_files.remove_bitmap(LOCAL, path, name)

    def leftovers(self, uuid: str) -> Leftovers:
        with self._monitor(uuid) as monitor:
            running = qmp_backup.running(monitor)
            return Leftovers(
                machine=MachineRef(hypervisor=self._name, uuid=uuid, name=identity(monitor).name),
                backup_job=running.removeprefix(PREFIX) if running else None,
                checkpoints=qmp_backup.checkpoints(self._drives(monitor)),
            )

    # --- machines ----------------------------------------------------------------------------------------------

    def redefined(self, definition: str, new: NewMachine) -> str:
        return qmp_definition.restored(definition, new, self._sockets.folder)

    def define(self, definition: str, nvram: bytes | None, *, start: bool) -> str:
        """Write a start script beside the disks, and run it if asked."""
        wanted = qmp_definition.read(definition)
        for found in self._found():
            if found.name == wanted.name and found.uuid != wanted.uuid:
                raise TargetExists(f"a machine named {wanted.name} runs already", hint="choose another --name")
        script = qmp_define.write(wanted, nvram, self._runtime)
        if start:
            qmp_define.start(script, wanted.name)
        return shlex.quote(str(script))

    def undefine(self, uuid: str) -> None:
        """What its start script wrote goes too, if it was defined here."""
        with suppress(NotFound), ExitStack() as stack:
            monitor = stack.enter_context(self._monitor(uuid))
            process = os.pidfd_open(monitor.peer.pid)
            stack.callback(os.close, process)
            with suppress(HypervisorUnreachable):  # it is gone before it has answered
                monitor.ask("quit")
            if not select.select([process], [], [], QUIT_SECONDS)[0]:
                raise HypervisorError(f"QEMU (process {monitor.peer.pid}) did not end within {QUIT_SECONDS:.0f} s")
        qmp_define.remove(uuid, self._runtime)

    def volume_dir(self, pool: str) -> Path:
        raise UsageError(f"{pool}: {_NO_POOLS}", hint="use --dir")

    def refresh_pool(self, pool: str) -> None:
        raise UsageError(f"{pool}: {_NO_POOLS}", hint="use --dir")

    def close(self) -> None:
        """Nothing is open between two acts."""


def _power(monitor: Monitor) -> Power:
    return Power.RUNNING if monitor.ask("query-status")["running"] else Power.PAUSED


def _judged(drive: Drive, base: str | None) -> Disk:
    return drive.disk if base is None or drive.disk.excluded else judged(drive, base)


def _bitmaps(path: Path) -> list[host_files.ImageBitmap]:
    return host_files.bitmaps(LOCAL, path, shared=False)


def _checkpoint(request: BackupRequest) -> str | None:
    """A note for people: the bitmaps themselves are in the images."""
    tracked = [disk.target for disk in request.disks if disk.tracks_changes]
    return json.dumps({"kind": "qmp-checkpoint", "version": 1, "disks": tracked}) if tracked else None


def _described(found: Found, process: Process | None, everything: list[Drive]) -> Definition:
    """Where the process is hidden from us, the command line is empty: its disks can be restored, and no machine."""
    images = {
        drive.disk.target: Image(
            names=list(dict.fromkeys((drive.named, drive.disk.source))),
            format=drive.disk.format,
            read_only=drive.read_only,
        )
        for drive in everything
        if drive.named
    }
    firmware = {drive.disk.target for drive in everything if drive.firmware}
    stores = [images[target] for target in images if target in firmware and not images[target].read_only]
    return Definition(
        name=found.name,
        uuid=found.uuid,
        program=process.program if process else "",
        arguments=process.arguments if process else [],
        folder=str(process.folder) if process else "/",
        monitor=str(found.socket.absolute()),
        images={target: image for target, image in images.items() if target not in firmware},
        nvram=stores[0] if stores else None,
    )
