"""Take a snapshot of a machine, and let go of it again.

Everything slow happens before the freeze: space is checked and scratch is made while the guest still writes. Between
freeze and thaw stands one call to the hypervisor (`quiesce.py` does the rest).

Everything that a snapshot leaves on a host lies in two folders named after the job (scratch and runtime), so that
`release` can remove it without knowing how far things got.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from workers.contract.errors import CheckpointUnusable, DiskError, HypervisorError, NoSpace, Yielded
from workers.contract.hosts import Host
from workers.contract.machines import Disk, Inventory, Power
from workers.contract.messages import BaseRefused, DiskPlan, ExportInfo, SnapshotInfo, SnapshotTaken, sf_name
from workers.contract.points import Consistency, Mode
from workers.contract.seams import BackupRequest, Begun, DiskRequest, Export, Hypervisor, QuiesceRequest
from workers.disks.images import Fingerprint, create, export_readonly, fingerprint, stop_exports
from workers.quiesce import SCRIPTS_SECONDS, WATCHDOG_SECONDS, Guest, Notes, make_point

_FROZEN, _HELD = ".frozen", ".held"

DANGER_HINT = "give that disk no I/O thread, or the machine a newer QEMU; or leave the disk out: --exclude DISK"


@dataclass(frozen=True, slots=True)
class Places:
    """Where the snapshots of one hypervisor keep their files, all on its host: whichever worker goes on with a job
    finds them."""

    host: Host
    scratch: Path
    runtime: Path
    floor: int
    """Bytes that must stay free where scratch lives."""

    def scratch_of(self, job: str) -> Path:
        return self.scratch / sf_name(job)

    def runtime_of(self, job: str) -> Path:
        return self.runtime / sf_name(job)

    def notes_of(self, job: str) -> Notes:
        """Whoever releases the job after a crash knows by them whether a guest that does not answer may be frozen, or
        was never touched."""
        frozen, held = (self.runtime / f"{sf_name(job)}{suffix}" for suffix in (_FROZEN, _HELD))
        if not self.host.local:
            return Notes(FarNote(self.host, frozen), FarNote(self.host, held))
        self.runtime.mkdir(parents=True, exist_ok=True)
        return Notes(frozen, held)


@dataclass(frozen=True, slots=True)
class FarNote:
    """See `quiesce.Note`."""

    host: Host
    path: Path

    def touch(self) -> None:
        self.host.write(self.path, b"")

    def exists(self) -> bool:
        return self.host.taken(self.path)

    def unlink(self, missing_ok: bool = False) -> None:  # noqa: ARG002 - as pathlib has it
        self.host.remove([self.path])


def require_space(places: Places) -> None:
    """Raises NoSpace if too little is free where scratch lives: a full scratch pauses the guest."""
    free, floor = places.host.free(places.scratch), places.floor
    if free < floor:
        raise NoSpace(
            f"only {free >> 20} MiB free in {places.scratch}, {floor >> 20} MiB must stay free while a backup runs",
            hint="free some space there, or set `scratch` under [paths] to a larger file system",
        )


# --- a running machine -----------------------------------------------------------------------------------------


def _require_harmless(found: Inventory, plans: list[DiskPlan]) -> None:
    """Before anything is frozen."""
    planned = {plan.target for plan in plans}
    for disk in found.disks:
        if disk.target in planned and disk.danger:
            raise HypervisorError(f"{found.machine.name}: {disk.target}: {disk.danger}", hint=DANGER_HINT)


def take_online(
    hypervisor: Hypervisor,
    guest: Guest,
    found: Inventory,
    job: str,
    plans: list[DiskPlan],
    excluded: list[str],
    goal: Consistency,
    places: Places,
    options: dict[str, str] | None = None,
) -> SnapshotTaken | BaseRefused:
    """One point in time across all planned disks of a machine that runs. Raises HypervisorError where that would harm
    the machine."""
    _require_harmless(found, plans)
    disks = {disk.target: disk for disk in found.disks}
    scratch = _make_scratch(job, plans, disks, places)
    request = BackupRequest(
        name=sf_name(job),
        excluded=excluded,
        disks=[_requested(plan, scratch[plan.target]) for plan in plans],
    )
    quiesce = QuiesceRequest(
        job=job,
        uuid=found.machine.uuid,
        goal=goal,
        freeze_s=WATCHDOG_SECONDS,
        limit_s=SCRIPTS_SECONDS,
        skip_disks=[disks[target].address for target in excluded if target in disks and disks[target].address],
        options=options or {},
    )
    point = _Point(hypervisor, found.machine.uuid, request)
    if found.power is not Power.RUNNING:
        guest = Guest(why_no_freezer="the machine is paused: its guest cannot be frozen")
    try:
        held = make_point(guest, quiesce, point.make, places.notes_of(job))
    except CheckpointUnusable as refusal:
        incremental = {plan.target for plan in plans if plan.mode is Mode.INCREMENTAL}
        if not incremental or refusal.target not in {None, *incremental}:
            raise  # nothing is left to read in full instead
        places.host.remove([places.scratch_of(job)])
        return BaseRefused(target=refusal.target, reason=str(refusal))
    begun = point.begun
    return SnapshotTaken(
        snapshot=SnapshotInfo(
            name=request.name,
            online=True,
            exports=[_described(export, disks[export.target].capacity) for export in begun.exports],
            checkpoint=request.name if begun.checkpoint_xml else None,
            checkpoint_xml=begun.checkpoint_xml,
            time=point.time.isoformat(),
            consistency=held.verdict.consistency,
            consistency_reason=held.verdict.reason,
            frozen_ms=held.frozen_ms,
            guest=held.report,
            definition=found.definition,
            nvram=hypervisor.nvram(found),
        )
    )


def _requested(plan: DiskPlan, scratch: Path) -> DiskRequest:
    base = plan.base_checkpoint if plan.mode is Mode.INCREMENTAL else None
    return DiskRequest(plan.target, plan.mode, base, scratch, plan.tracks_changes)


def _described(export: Export, capacity: int) -> ExportInfo:
    return ExportInfo(
        target=export.target, socket=export.socket, name=export.name, bitmap=export.bitmap, capacity=capacity
    )


class _Point:
    """The one call that makes the point in time, and when it was made."""

    def __init__(self, hypervisor: Hypervisor, uuid: str, request: BackupRequest) -> None:
        self._hypervisor = hypervisor
        self._uuid = uuid
        self._request = request
        self.time = datetime.now(UTC)
        self.begun = Begun([], None)

    def make(self) -> None:
        self.time = datetime.now(UTC)
        self.begun = self._hypervisor.begin_backup(self._uuid, self._request)


def _make_folder(host: Host, folder: Path, key: str, mode: int) -> None:
    try:
        host.make_folder(folder, mode)
    except DiskError as error:
        raise DiskError(str(error), hint=f"set `{key}` under [paths] to a folder of {host.name}") from None


def _make_scratch(job: str, plans: list[DiskPlan], disks: dict[str, Disk], places: Places) -> dict[str, Path]:
    host, folder = places.host, places.scratch_of(job)
    _make_folder(host, places.scratch, "scratch", 0o711)
    require_space(places)
    host.make_folder(folder, 0o711)
    made = {}
    for plan in plans:
        if plan.target not in disks:
            raise DiskError(f"disk {plan.target} was removed from the machine while its backup was prepared")
        made[plan.target] = folder / f"{plan.target}.qcow2"
    host.remove([*made.values()])
    for target, path in made.items():
        create(host, path, "qcow2", disks[target].capacity)
    return made


# --- a machine that is off -------------------------------------------------------------------------------------


def take_offline(
    hypervisor: Hypervisor, found: Inventory, job: str, plans: list[DiskPlan], places: Places
) -> SnapshotTaken:
    """Serve the images of a machine that is off. No new checkpoint: the base stays, and the next run reads a superset
    of the changes, which is safe (invariant 2)."""
    disks = {disk.target: disk for disk in found.disks}
    folder = places.runtime_of(job)
    host = places.host
    _make_folder(host, folder, "runtime", 0o700)
    time_of_point = datetime.now(UTC)
    exports = []
    for plan in plans:
        disk = disks[plan.target]
        bitmap = plan.base_checkpoint if plan.mode is Mode.INCREMENTAL else None
        image = Path(disk.source)
        host.write(_fingerprint_file(folder, plan.target), fingerprint(host, image).model_dump_json().encode())
        socket = folder / f"{plan.target}.sock"
        export_readonly(host, image, disk.format, socket, bitmap=bitmap)
        exports.append(
            ExportInfo(
                target=plan.target,
                socket=str(socket),
                name="",
                bitmap=f"qemu:dirty-bitmap:{bitmap}" if bitmap else None,
                capacity=disk.capacity,
            )
        )
    # Once more, now that every later write shows in the fingerprints: a machine that was started before they were
    # taken and is idle since would leave no trace in them.
    if hypervisor.inventory(found.machine.uuid).power is not Power.OFF:
        raise Yielded("the machine was started while its backup began", hint="run it again")
    return SnapshotTaken(
        snapshot=SnapshotInfo(
            name=sf_name(job),
            online=False,
            exports=exports,
            checkpoint=None,
            checkpoint_xml=None,
            time=time_of_point.isoformat(),
            consistency=Consistency.APPLICATION if found.orderly_off else Consistency.CRASH,
            consistency_reason="the machine is off, after an orderly shutdown"
            if found.orderly_off
            else "the machine is off, and not known to have shut down in order",
            frozen_ms=None,
            definition=found.definition,
            nvram=hypervisor.nvram(found),
        )
    )


def _fingerprint_file(folder: Path, target: str) -> Path:
    return folder / f"{target}.image.json"


def require_unwritten(job: str, target: str, source: str, places: Places) -> None:
    """Raises Yielded if the image of a machine that was off has been written since the snapshot."""
    kept = places.host.read(_fingerprint_file(places.runtime_of(job), target))
    if kept is None:
        raise DiskError(f"what the image of {target} looked like at the snapshot is no longer known")
    if fingerprint(places.host, Path(source)) != Fingerprint.model_validate_json(kept):
        raise Yielded(
            f"the image of {target} was written during the backup of a machine that was off (was it started?)",
            hint="run the backup again: a running machine is backed up too",
        )


# --- afterwards ------------------------------------------------------------------------------------------------


def remove_files(job: str, places: Places) -> None:
    """End the job's helpers and remove its scratch and runtime folders. Idempotent."""
    host, runtime, scratch = places.host, places.runtime_of(job), places.scratch_of(job)
    found = host.look([runtime, scratch])
    if found[runtime].exists:
        stop_exports(host, runtime)
    host.remove([path for path in (runtime, scratch) if found[path].exists])


def strays(places: Places) -> list[str]:
    """Jobs that have files here, whoever they belong to."""
    files = [name for folder in (places.scratch, places.runtime) for name in places.host.names(folder, "sf-*")]
    return sorted({name.removeprefix("sf-").removesuffix(_FROZEN).removesuffix(_HELD) for name in files})
