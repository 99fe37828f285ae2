"""A small world that performs commands as the contract says: one machine, a hypervisor's checkpoints, a vault.

It stands on the other side of the seam `Command → Event`, and checks the invariants at every command that it is given:
what the state machines command is judged by what it would do to a machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from workers.contract.errors import DiskError, ErrorInfo, HypervisorError, VaultError
from workers.contract.guests import ExtensionState, GuestReport
from workers.contract.machines import BitmapState, Disk, Inventory, MachineRef, Power
from workers.contract.messages import (
    BaseRefused,
    Command,
    CommitPoint,
    DefineMachine,
    Discard,
    Discarded,
    DiskRestored,
    DiskTransferred,
    Event,
    ExportInfo,
    Failed,
    MachineDefined,
    PointCommitted,
    Prepare,
    Prepared,
    PrepareRestore,
    Release,
    Released,
    RestoreDisk,
    RestorePrepared,
    SnapshotInfo,
    SnapshotTaken,
    TakeSnapshot,
    Thaw,
    Thawed,
    TransferDisk,
    sf_name,
)
from workers.contract.points import Consistency, DiskPoint, Mode, Point

MACHINE = MachineRef(hypervisor="lab", uuid="11111111-2222-3333-4444-555555555555", name="web")
EPOCH = datetime(2026, 11, 22, tzinfo=UTC)
GIB = 1 << 30


def failed(command: Command, error: ErrorInfo | None = None) -> Failed:
    info = error or HypervisorError("it did not work").info()
    target = command.target if isinstance(command, RestoreDisk) else None
    if isinstance(command, TransferDisk):
        target = command.plan.target
    return Failed(command=command.kind, error=info, target=target)


def disk(target: str, **changes: object) -> Disk:
    source = f"/images/web-{target}.qcow2"
    return Disk(
        target=target, source=source, format="qcow2", capacity=GIB, identity=f"{source}:1", tracks_changes=True
    ).model_copy(update=changes)


@dataclass
class World:
    power: Power = Power.RUNNING
    disks: list[Disk] = field(default_factory=lambda: [disk("vda"), disk("vdb")])
    tick: int = 0
    """Time: every snapshot and every write is a tick later."""
    checkpoints: dict[str, int] = field(default_factory=dict)
    """Name → tick from which it tracks."""
    inconsistent: set[tuple[str, str]] = field(default_factory=set)
    """(checkpoint, target) whose bitmap is of no use."""
    frozen: bool = False
    snapshots: dict[str, int] = field(default_factory=dict)
    """Job → tick of its snapshot."""
    sessions: set[str] = field(default_factory=set)
    points: dict[str, Point] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)
    """Point → tick of what it holds."""
    fenced: set[str] = field(default_factory=set)
    whole: set[tuple[str, str]] = field(default_factory=set)
    """(job, target) whose transfer ended well."""
    files: dict[str, str] = field(default_factory=dict)
    """Restored path → job that wrote it, or `somebody else`."""
    machines: dict[str, str] = field(default_factory=lambda: {MACHINE.uuid: "original"})
    """UUID → who defined it."""
    thaws: int = 0
    extension: ExtensionState | None = None
    report: GuestReport = field(default_factory=GuestReport)

    # --- performing ------------------------------------------------------------------------------------------------

    def perform(self, command: Command) -> Event:
        match command:
            case Prepare():
                return self._prepare(command)
            case TakeSnapshot():
                return self._take_snapshot(command)
            case TransferDisk():
                return self._transfer(command)
            case CommitPoint():
                return self._commit(command)
            case Release():
                return self._release(command)
            case Thaw():
                self.thaws += 1
                self.frozen = False
                return Thawed(thawed=1)
            case PrepareRestore():
                return self._prepare_restore(command)
            case RestoreDisk():
                return self._restore(command)
            case DefineMachine():
                return self._define(command)
            case Discard():
                return self._discard(command)

    def inventory(self, base: str | None) -> Inventory:
        disks = []
        for one in self.disks:
            bitmap = None
            if base is not None:
                bitmap = BitmapState.VALID if base in self.checkpoints else BitmapState.MISSING
                if (base, one.target) in self.inconsistent:
                    bitmap = BitmapState.INCONSISTENT
            disks.append(one.model_copy(update={"bitmap": bitmap}))
        return Inventory(machine=MACHINE, power=self.power, disks=disks, definition="<domain secret='1'/>")

    def _prepare(self, command: Prepare) -> Event:
        self.sessions.add(command.job)
        inventory = self.inventory(command.base_checkpoint)
        return Prepared(
            inventory=inventory,
            online=self.power is not Power.OFF,
            extension=self.extension,
            base_readable=command.base_point is None or command.base_point in self.points,
        )

    def _take_snapshot(self, command: TakeSnapshot) -> Event:
        """Also where it fails half-way, everything that it can have left is there (see `half_snapshot`)."""
        for plan in command.disks:
            base = plan.base_checkpoint
            if base is not None and (base not in self.checkpoints or (base, plan.target) in self.inconsistent):
                return BaseRefused(target=plan.target, reason="bitmap cannot be used")
        self.half_snapshot(command)
        self.frozen = False
        name = sf_name(command.job)
        return SnapshotTaken(
            snapshot=SnapshotInfo(
                name=name,
                online=command.online,
                exports=[
                    ExportInfo(target=p.target, socket="/run/x", name=p.target, bitmap=p.base_checkpoint, capacity=GIB)
                    for p in command.disks
                ],
                checkpoint=name if command.online else None,
                checkpoint_xml=f"<checkpoint name='{name}'/>" if command.online else None,
                time=(EPOCH + timedelta(seconds=self.tick)).isoformat(),
                consistency=Consistency.FILESYSTEM,
                consistency_reason="2 file systems frozen and thawed",
                frozen_ms=12 if command.online else None,
                guest=self.report,
                definition="<domain secret='1'/>",
                nvram=b"\x00\xff",
            )
        )

    def half_snapshot(self, command: TakeSnapshot) -> None:
        self.tick += 1
        self.snapshots[command.job] = self.tick
        if command.online:
            self.frozen = True
            self.checkpoints[sf_name(command.job)] = self.tick

    def _transfer(self, command: TransferDisk) -> Event:
        if command.job not in self.snapshots:
            return failed(command, DiskError("the export is gone").info())
        plan = command.plan
        if plan.mode is Mode.INCREMENTAL:
            assert plan.base_checkpoint in self.checkpoints
            assert plan.base_root is not None
            # Invariant 2: every change since the base's map is in the bitmap.
            assert self.checkpoints[plan.base_checkpoint] <= int(plan.base_root, 16)
        self.whole.add((command.job, plan.target))
        return DiskTransferred(
            disk=DiskPoint(
                target=plan.target,
                source=command.disk.source,
                format=command.disk.format,
                identity=command.disk.identity,
                capacity=command.disk.capacity,
                block_size=plan.block_size,
                root=f"{self.snapshots[command.job]:064x}",
                mode=plan.mode,
                reason=plan.reason,
                checkpoint=None,
            )
        )

    def _commit(self, command: CommitPoint) -> Event:
        point = command.point
        if point.id in self.fenced:
            return failed(command, VaultError("somebody settled that this point does not exist").info())
        for one in point.disks:  # invariant 3
            assert (command.job, one.target) in self.whole
        self.points[point.id] = point
        self.taken[point.id] = int(point.disks[0].root, 16)
        return PointCommitted(point=point.id)

    def _release(self, command: Release) -> Event:
        if command.thaw:
            self.thaws += 1
            self.frozen = False
        assert not self.frozen, "released a frozen guest without a thaw"
        exists = command.point in self.points
        assert command.commit_sent or not exists, "a manifest may exist, and the release does not look"
        if command.commit_sent and not exists:
            self.fenced.add(command.point)
        self.snapshots.pop(command.job, None)
        doomed = command.old_checkpoint if exists else command.new_checkpoint
        if doomed is not None:
            self._delete_checkpoint(doomed)
        self.sessions.discard(command.job)
        return Released(committed=self.points[command.point] if exists else None)

    def _delete_checkpoint(self, name: str) -> None:
        """Invariant 1: only once the newest point does without it."""
        newest = self.newest()
        if newest is not None:
            assert name not in {one.checkpoint for one in newest.disks}, "deleted the base"
        self.checkpoints.pop(name, None)

    def newest(self) -> Point | None:
        return max(self.points.values(), key=lambda p: p.time, default=None)

    def newest_base(self) -> Point | None:
        found = [p for p in self.points.values() if any(d.checkpoint for d in p.disks)]
        return max(found, key=lambda p: p.time) if found else None

    # --- restore ---------------------------------------------------------------------------------------------------

    def _prepare_restore(self, command: PrepareRestore) -> Event:
        point = self.points[command.point]
        targets = command.targets or [d.target for d in point.disks]
        return RestorePrepared(
            files={t: command.to or f"{command.directory}/{t}.qcow2" for t in targets},
            formats=dict.fromkeys(targets, "qcow2"),
            point=point,
        )

    def _restore(self, command: RestoreDisk) -> Event:
        if command.path in self.files:
            return failed(command, ErrorInfo(code="TargetExists", message="exists"))
        self.files[command.path] = command.job
        return DiskRestored(target=command.target, written_bytes=1)

    def _define(self, command: DefineMachine) -> Event:
        for path in command.disks.values():
            assert self.files[path] == command.job
        assert command.replace or self.machines.get(command.uuid) in (None, command.job)
        self.machines[command.uuid] = command.job
        return MachineDefined(uuid=command.uuid, name=command.name, started=command.start)

    def _discard(self, command: Discard) -> Event:
        if command.uuid is not None:
            assert self.machines.get(command.uuid) in (None, command.job), "undefined somebody else's machine"
            self.machines.pop(command.uuid, None)
        for path in command.paths:
            if self.files.get(path) == command.job:
                del self.files[path]
        return Discarded()
