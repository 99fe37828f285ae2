"""A host whose machines libvirt runs.

One connection is shared by all threads: libvirt's calls block, release the GIL, and are safe to mix. A libvirtd that
was restarted is connected to again at the next call: QEMU, its backup job and its sockets live on meanwhile.
Nothing is aborted here without the proof in `backup_xml.running_name` (invariant 4): `abortJob` would as readily
kill a migration.
"""

from __future__ import annotations

import math
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import libvirt
import libvirt_qemu

from workers.contract.errors import Busy, HypervisorError, HypervisorUnreachable, NotFound, UsageError
from workers.contract.hosts import Host
from workers.contract.machines import Disk, Inventory, Leftovers, MachineRef, MachineSummary, Power
from workers.contract.seams import BackupRequest, Begun, Features, NewMachine
from workers.hosts.local import LOCAL
from workers.hypervisors import backup_xml, checkpoints, domain_xml, errors, host_files, iothreads, pools, tags
from workers.hypervisors.disk_facts import DiskFacts
from workers.hypervisors.wires import Wire

END_SECONDS = 120.0
"""libvirt handles the events of all machines on one thread, and a machine whose QEMU was killed can hold that for 30 s
(measured): a job that was aborted ends only then."""
LOST_SECONDS = 2.0
_BACKUP_SINCE = 7_002_000
"""libvirt 7.2: incremental backup on by default."""
_FULL_XML: int = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
_UNDEFINE: int = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
    | libvirt.VIR_DOMAIN_UNDEFINE_KEEP_TPM
)
"""TPM state is kept: a machine that is replaced comes back under its UUID, and points do not hold that state."""


def _silent(_context: object, _error: object) -> None:
    """In place of libvirt's own handler, which prints every error to stderr."""


class LibvirtHypervisor:
    """See `seams.Hypervisor`."""

    def __init__(self, wire: Wire, *, name: str, host: Host = LOCAL, runtime_dir: Path | None = None) -> None:
        libvirt.registerErrorHandler(_silent, None)
        self._wire, self._name, self._runtime_dir = wire, name, runtime_dir
        self.host = host
        self._lock = threading.Lock()
        self._open: libvirt.virConnect | None = None
        connection = self._connection()
        with errors.translated(f"asking {name} for its version"):
            library, qemu = connection.getLibVersion(), connection.getVersion()
        self.features = Features(
            version=f"libvirt {_dotted(library)}, QEMU {_dotted(qemu)}", backup=library >= _BACKUP_SINCE
        )

    def _connection(self) -> libvirt.virConnect:
        """A connection that answers now. `isAlive` alone would not notice a libvirtd that is gone until the next call
        fails."""
        with self._lock:
            if self._open is None or not _answers(self._open):
                address = self._wire.dial()
                try:
                    self._open = libvirt.open(address)
                except libvirt.libvirtError as error:
                    raise HypervisorUnreachable(
                        f"cannot connect to {self._name} ({self._wire.there}): {errors.text(error)}",
                        hint=self._wire.start,
                    ) from None
            return self._open

    def _domain(self, uuid: str) -> libvirt.virDomain:
        try:
            return self._connection().lookupByUUIDString(uuid)
        except libvirt.libvirtError as error:
            if errors.code(error) in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_INVALID_ARG):
                raise NotFound(f"{self._name} has no machine with UUID {uuid}", hint="stillframe vm list") from None
            raise errors.translate(error, f"looking for machine {uuid}") from None

    # --- looking -----------------------------------------------------------------------------------------------

    def machines(self, *, disks: bool = True) -> list[MachineSummary]:
        found = []
        with errors.translated(f"listing the machines of {self._name}"):
            domains = self._connection().listAllDomains()
            listed = self._disks_of(domains) if disks else {}
            for domain in domains:
                with _unless_gone():
                    ref = self._ref(domain)
                    mine, words = listed.get(ref.uuid, []), tags.of_definition(domain.XMLDesc(0))
                    found.append(MachineSummary(machine=ref, power=_power(domain), disks=mine, tags=words))
        return sorted(found, key=lambda summary: summary.machine.name)

    def inventory(self, uuid: str, *, base: str | None = None, base_xml: str | None = None) -> Inventory:
        domain = self._domain(uuid)
        with errors.translated(f"looking at {domain.name()}"):
            power, disks, live = _power(domain), self._disks(domain), domain.XMLDesc(0)
            if base is not None:
                known = base_xml if base_xml and base_xml.startswith("<") else None  # else it was no libvirt's then
                verdicts = checkpoints.judge(self.host, domain, power is not Power.OFF, disks, base, known)
                disks = [
                    disk.model_copy(update={"bitmap": verdict.state, "bitmap_detail": verdict.detail})
                    if (verdict := verdicts.get(disk.target))
                    else disk
                    for disk in disks
                ]
            if power is not Power.OFF:
                disks = iothreads.marked(self.host, disks, *iothreads.of_definition(live))
            definition = domain.XMLDesc(_FULL_XML)
            return Inventory(
                machine=self._ref(domain),
                power=power,
                disks=disks,
                definition=definition,
                nvram_path=domain_xml.nvram_path(live) or domain_xml.nvram_path(definition),
                orderly_off=power is Power.OFF and domain.state()[1] == libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN,
                agent=domain_xml.agent_connected(live),
                foreign_job=_foreign_job(domain, disks),
            )

    def nvram(self, inventory: Inventory) -> bytes | None:
        return host_files.read_nvram(self.host, Path(inventory.nvram_path)) if inventory.nvram_path else None

    def _ref(self, domain: libvirt.virDomain) -> MachineRef:
        return MachineRef(hypervisor=self._name, uuid=domain.UUIDString(), name=domain.name())

    def _disks(self, domain: libvirt.virDomain, *, lenient: bool = False) -> list[Disk]:
        elements = domain_xml.disks(domain.XMLDesc(0))
        facts = DiskFacts(self._connection(), domain, self.host, DiskFacts.look(self.host, elements))
        return [facts.disk(element, lenient=lenient) for element in elements]

    def _disks_of(self, domains: list[libvirt.virDomain]) -> dict[str, list[Disk]]:
        """Of many machines, by UUID, after one look at all their images; of those that are still there."""
        elements: dict[str, list[domain_xml.DiskElement]] = {}
        found: dict[str, list[Disk]] = {}
        for domain in domains:
            with _unless_gone():
                elements[domain.UUIDString()] = domain_xml.disks(domain.XMLDesc(0))
        seen = DiskFacts.look(self.host, (each for listed in elements.values() for each in listed))
        for domain in domains:
            facts = DiskFacts(self._connection(), domain, self.host, seen)
            with _unless_gone():
                uuid = domain.UUIDString()
                found[uuid] = [facts.disk(element, lenient=True) for element in elements.get(uuid, [])]
        return found

    # --- the guest ---------------------------------------------------------------------------------------------

    def agent_command(self, uuid: str) -> Callable[[str, float], str]:
        """A function that sends one JSON command to the guest agent and returns its JSON reply, waiting at most the
        given seconds. It raises GuestError, NotFound, HypervisorUnreachable."""

        def command(request: str, timeout: float) -> str:
            domain = self._domain(uuid)
            try:
                return str(libvirt_qemu.qemuAgentCommand(domain, request, max(1, math.ceil(timeout)), 0))
            except libvirt.libvirtError as error:
                raise errors.guest_error(error) from None

        return command

    def thaw_command(self, uuid: str) -> list[str]:
        thaw = '{"execute": "guest-fsfreeze-thaw"}'
        virsh = ["virsh", "-q", "-c", self._wire.there, "qemu-agent-command", "--timeout", "10", uuid, thaw]
        return self.host.command(virsh)

    # --- backup jobs -------------------------------------------------------------------------------------------

    def begin_backup(self, uuid: str, request: BackupRequest) -> Begun:
        """Busy if any other job runs: libvirt would wait for it for 30 s, with the guest frozen."""
        backup_xml.require_ours(request.name)
        domain = self._domain(uuid)
        doing = f"starting the backup of {domain.name()}"
        with errors.translated(doing):
            _refuse_beside_another_job(domain)
            socket = self._socket(domain, request.name)
            document = backup_xml.checkpoint(request)
            try:
                domain.backupBegin(
                    backup_xml.backup(request, socket), document, libvirt.VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL
                )
                made = domain.checkpointLookupByName(request.name).getXMLDesc(0) if document else None
            except libvirt.libvirtError as error:
                self._undo_begin(uuid, request.name, LOST_SECONDS if errors.lost_connection(error) else 0.0)
                raise errors.translate(error, doing) from None
        return Begun(exports=backup_xml.exports(request, socket), checkpoint_xml=made)

    def _undo_begin(self, uuid: str, name: str, patience: float) -> None:
        """After any failure: libvirt keeps the checkpoint when only the export failed. When the reply was lost, the
        job may start within `patience` seconds; if it does so later, the job's release ends it.

        Only what libvirt knows is looked at: a backup that never began left no bitmap to search for."""
        domain = self._domain(uuid)
        with errors.translated(f"undoing the backup {name} that failed to start"):
            deadline = time.monotonic() + patience
            while domain.isActive() and not self.end_backup(uuid, name) and time.monotonic() < deadline:
                time.sleep(0.05)
            if checkpoints.lookup(domain, name) is not None:
                self.delete_checkpoint(uuid, name)

    def end_backup(self, uuid: str, name: str) -> bool:
        backup_xml.require_ours(name)
        domain = self._domain(uuid)
        with errors.translated(f"ending the backup of {domain.name()}"):
            description = _backup_description(domain)
            if description is None or backup_xml.running_name(description) != name:
                return False
            socket = backup_xml.socket_path(description)
            try:
                domain.abortJob()
            except libvirt.libvirtError:
                if _running_backup(domain) == name:
                    raise
            deadline = time.monotonic() + END_SECONDS
            while _running_backup(domain) == name:
                if time.monotonic() > deadline:
                    raise HypervisorError(f"the backup job of {domain.name()} did not end within {END_SECONDS:.0f} s")
                time.sleep(0.02)
        self.host.remove([socket])
        return True

    def _socket(self, domain: libvirt.virDomain, name: str) -> Path:
        folder = host_files.socket_folder(self.host, self._wire.there, domain.ID()) or self._runtime_dir
        if folder is None:
            raise HypervisorError(f"libvirt keeps no folder for {domain.name()}, and no runtime_dir is configured")
        path = folder / f"{name}{backup_xml.SOCKET_SUFFIX}"
        if len(str(path).encode()) > 107:
            raise HypervisorError(f"the path of the socket is too long for the system: {path}")
        return path

    # --- checkpoints -------------------------------------------------------------------------------------------

    def delete_checkpoint(self, uuid: str, name: str) -> None:
        backup_xml.require_ours(name)
        domain = self._domain(uuid)
        with errors.translated(f"deleting checkpoint {name} of {domain.name()}"):
            checkpoints.delete(self.host, domain, bool(domain.isActive()), self._disks(domain, lenient=True), name)

    def leftovers(self, uuid: str) -> Leftovers:
        domain = self._domain(uuid)
        with errors.translated(f"looking for leftovers of {domain.name()}"):
            known = checkpoints.names(domain)
            held = checkpoints.names_in_images(self.host, self._disks(domain, lenient=True))
            running = _running_backup(domain)
        return Leftovers(
            machine=self._ref(domain),
            backup_job=running.removeprefix(backup_xml.PREFIX) if running else None,
            checkpoints=[*(name for name in held if name not in known), *known],
        )

    # --- machines ----------------------------------------------------------------------------------------------

    def redefined(self, definition: str, new: NewMachine) -> str:
        name, uuid, path, macs = new.name, new.uuid, new.nvram_path, new.fresh_macs
        return domain_xml.restored(definition, name=name, uuid=uuid, disks=new.disks, nvram_path=path, fresh_macs=macs)

    def define(self, definition: str, nvram: bytes | None, *, start: bool) -> str:
        """Define a machine, or define it anew if its UUID is known. TargetExists if its name is another's."""
        with errors.translated("defining the machine"):
            domain = self._connection().defineXML(definition)
        path = domain_xml.nvram_path(domain.XMLDesc(_FULL_XML))
        if nvram is not None:
            if path is None:
                raise UsageError(f"the point has NVRAM, but {domain.name()} is defined without")
            host_files.write_nvram(self.host, Path(path), nvram)
        if start:
            with errors.translated(f"starting {domain.name()}"):
                domain.create()
        return shlex.join(["virsh", "start", domain.name()])

    def undefine(self, uuid: str) -> None:
        try:
            domain = self._domain(uuid)
        except NotFound:
            return
        with errors.translated(f"removing {domain.name()}"):
            if domain.isActive():
                domain.destroy()
            if domain.isPersistent():
                domain.undefineFlags(_UNDEFINE)

    def volume_dir(self, pool: str) -> Path:
        return pools.folder_of(self._connection(), pool)

    def refresh_pool(self, pool: str) -> None:
        pools.refresh(self._connection(), pool)

    def close(self) -> None:
        with self._lock:
            if self._open is not None:
                with suppress(libvirt.libvirtError):  # it may be lost
                    self._open.close()
                self._open = None
            self._wire.close()


@contextmanager
def _unless_gone() -> Iterator[None]:
    """What is done with a machine that may have been removed since it was listed."""
    try:
        yield
    except libvirt.libvirtError as error:
        if errors.code(error) != libvirt.VIR_ERR_NO_DOMAIN:
            raise


def _answers(connection: libvirt.virConnect) -> bool:
    try:
        return bool(connection.getLibVersion())
    except libvirt.libvirtError:
        return False


def _dotted(version: int) -> str:
    return f"{version // 1_000_000}.{version // 1000 % 1000}.{version % 1000}"


def _power(domain: libvirt.virDomain) -> Power:
    state, _reason = domain.state()
    if state in (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PMSUSPENDED):
        return Power.PAUSED
    return Power.RUNNING if domain.isActive() else Power.OFF


def _backup_description(domain: libvirt.virDomain) -> str | None:
    """libvirt's document of the running backup job; None if none runs."""
    try:
        return str(domain.backupGetXMLDesc())
    except libvirt.libvirtError as error:
        if errors.code(error) in (libvirt.VIR_ERR_NO_DOMAIN_BACKUP, libvirt.VIR_ERR_OPERATION_INVALID):
            return None
        raise


def _running_backup(domain: libvirt.virDomain) -> str | None:
    """`sf-<job>` of our running backup; None if none of ours runs."""
    description = _backup_description(domain)
    return backup_xml.running_name(description) if description is not None else None


def _refuse_beside_another_job(domain: libvirt.virDomain) -> None:
    if not domain.isActive():
        raise HypervisorError(f"{domain.name()} is not running: its images are read directly")
    job = _foreign_job(domain, []) or _running_backup(domain)
    if job:
        raise Busy(f"a job runs on {domain.name()}: {job}")


_OPERATIONS = {
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT: "migration",
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN: "migration",
    libvirt.VIR_DOMAIN_JOB_OPERATION_SAVE: "save",
    libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT: "snapshot",
    libvirt.VIR_DOMAIN_JOB_OPERATION_DUMP: "dump",
}


def _foreign_job(domain: libvirt.virDomain, disks: list[Disk]) -> str:
    """What job that is not ours runs on the machine or on one of `disks`; empty: none."""
    if not domain.isActive():
        return ""
    description = _backup_description(domain)
    if description is not None:
        return "" if backup_xml.running_name(description) else "a backup of another program"
    stats = domain.jobStats()
    if stats.get("type", libvirt.VIR_DOMAIN_JOB_NONE) != libvirt.VIR_DOMAIN_JOB_NONE:
        return _OPERATIONS.get(stats.get("operation"), "a job of another program")
    for disk in disks:
        if not disk.excluded and domain.blockJobInfo(disk.target, 0):
            return f"a block job on {disk.target}"
    return ""
