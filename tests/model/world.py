"""A machine that is a plain dictionary of bytes, and the backups of it that are not plain at all.

Everything that decides or keeps is the real thing (the state machine of a backup, `plan`, `transfer`, the vault on a
store that goes wrong on demand, `restore`); only QEMU is replaced, by what QEMU is known to do with bitmaps: they
record whoever writes the image, lose their tail when the disk shrinks and get a clean one when it grows, and are
unusable after a crash.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from orchestrator.jobs import backup as machinery
from orchestrator.jobs.backup_job import BackupJob
from orchestrator.jobs.states import TERMINAL
from tests.vault.faulty import Died, FaultyStore, Plan
from workers import restore
from workers.contract import messages as m
from workers.contract.errors import Cancelled, StillframeError, describe
from workers.contract.extents import Extent, Kind
from workers.contract.machines import BitmapState, Disk, Inventory, MachineRef, Power
from workers.contract.points import Consistency, DiskPoint, Mode, Point
from workers.disks.memory import MemoryDisk
from workers.tasks import target_of
from workers.transfer import Settings, Tally, transfer_disk
from workers.vault import BlockMap, DirectoryStore, Vault
from workers.vault.rebuild import rebuild_index

PIECE = 512
"""Bytes per bit of the model's bitmaps."""
KEY = bytes(range(32))
MACHINE = MachineRef(hypervisor="lab", uuid="u", name="model")
SEARCHING = 400
"""Audit sample that misses no block of a small disk, as good as ever."""


@dataclass
class ModelDisk:
    """One disk: bytes, which pieces are allocated, and a bitmap per checkpoint."""

    number: int
    content: bytearray
    tracks: bool = True
    allocated: bytearray = field(default_factory=bytearray)
    bitmaps: dict[str, bytearray] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)

    @property
    def size(self) -> int:
        return len(self.content)

    def put(self, start: int, data: bytes, *, allocated: bool = True, told: bool = True) -> None:
        """Write whole pieces; `told=False`: no bitmap hears of it."""
        self.content[start : start + len(data)] = data
        first, end = start // PIECE, (start + len(data)) // PIECE
        self.allocated[first:end] = bytes([allocated]) * (end - first)
        for bitmap in self.bitmaps.values() if told else ():
            bitmap[first:end] = b"\1" * (end - first)

    def resize(self, size: int) -> None:
        for line, unit in ((self.content, 1), (self.allocated, PIECE), *((b, PIECE) for b in self.bitmaps.values())):
            del line[size // unit :]
            line.extend(bytes(size // unit - len(line)))

    def frozen(self, base: str | None) -> MemoryDisk:
        """As an export of it looks now: changes since `base`, or everything."""
        changed = self.bitmaps[base] if base else b"\1" * len(self.allocated)
        extents: list[Extent] = []
        for piece, (dirty, data) in enumerate(zip(changed, self.allocated, strict=True)):
            kind = Kind.UNCHANGED if not dirty else Kind.DATA if data else Kind.ZERO
            if extents and extents[-1].kind is kind:
                extents[-1] = Extent(extents[-1].start, extents[-1].length + PIECE, kind)
            else:
                extents.append(Extent(piece * PIECE, PIECE, kind))
        return MemoryDisk(bytes(self.content), extents)


@dataclass(frozen=True)
class Fault:
    """What goes wrong in one run: `what` of fail, full, die_before, die_after at the `at`-th call of the store, or
    `watch` (cancelled)."""

    what: str
    at: int = 0


class World:
    """The machine, its vault in `folder`, and what each point must hold."""

    def __init__(self, folder: Path, block_sizes: dict[str, int]) -> None:
        self.folder = folder
        self.block_sizes = block_sizes
        self.disks: dict[str, ModelDisk] = {}
        self.power = Power.PAUSED
        self.points: list[Point] = []
        self.truth: dict[str, dict[str, bytes]] = {}
        """Point → target → content at its moment."""
        self.audit_blocks = 0
        self.alerts: list[str] = []
        self._numbers = iter(range(1, 1 << 30))
        self._exports: dict[str, MemoryDisk] = {}
        self._watch: Callable[[Tally], None] = lambda _tally: None
        inner = DirectoryStore(folder / "vault", create=True)
        Vault.create(inner, key=KEY, cache_dir=folder / "cache")[0].close()
        self.reopen()

    def reopen(self, cache: str = "cache") -> None:
        self.store = FaultyStore(DirectoryStore(self.folder / "vault"), Plan())
        self.vault = Vault.open(self.store, key=KEY, cache_dir=self.folder / cache)

    def add(self, target: str, size: int, *, tracks: bool = True) -> ModelDisk:
        disk = ModelDisk(next(self._numbers), bytearray(size), tracks, bytearray(size // PIECE))
        self.disks[target] = disk
        return disk

    def copy_of(self, target: str) -> ModelDisk:
        """Another image with the same content and the same bitmaps."""
        return replace(deepcopy(self.disks[target]), number=next(self._numbers))

    # --- what the hypervisor would do ------------------------------------------------------------------------------

    def crash(self) -> None:
        """QEMU is killed: every bitmap stays marked as in use, and what it had recorded is lost."""
        for disk in self.disks.values():
            disk.broken.update(disk.bitmaps)
            for name in disk.bitmaps:
                disk.bitmaps[name] = bytearray(len(disk.allocated))
        self.power = Power.OFF

    def inventory(self, base: str | None) -> Inventory:
        disks = [self._seen(target, disk, base) for target, disk in sorted(self.disks.items())]
        return Inventory(machine=MACHINE, power=self.power, disks=disks, definition="<domain/>")

    def _seen(self, target: str, disk: ModelDisk, base: str | None) -> Disk:
        state = BitmapState.VALID if base in disk.bitmaps else BitmapState.MISSING
        return Disk(
            target=target,
            source=f"/images/{disk.number}",
            format="qcow2" if disk.tracks else "raw",
            capacity=disk.size,
            identity=str(disk.number),
            tracks_changes=disk.tracks,
            bitmap=None if base is None else BitmapState.INCONSISTENT if base in disk.broken else state,
        )

    def _forget(self, checkpoint: str) -> None:
        for disk in self.disks.values():
            disk.bitmaps.pop(checkpoint, None)
            disk.broken.discard(checkpoint)

    # --- a backup --------------------------------------------------------------------------------------------------

    def backup(self, *, full: bool = False, fault: Fault | None = None) -> BackupJob:
        """One run of the real state machine, to its end."""
        number = next(self._numbers)
        based = [point for point in self.points if any(disk.checkpoint for disk in point.disks)]
        job = BackupJob(
            id=f"j{number}",
            machine=MACHINE,
            vault="main",
            point=f"{number:032x}",
            force_full=full,
            block_size_rules={f"*/{target}": size for target, size in self.block_sizes.items()},
            base=based[-1] if based else None,
        )
        if fault is not None:
            self._arm(fault)
        job, commands = machinery.start(job)
        while commands:
            command, *commands = commands
            if command.kind == "release":
                self._disarm()
            event = self._performed(command)
            job, more = machinery.advance(job, event)
            commands = more if isinstance(event, m.WorkerLost) else commands + more
        assert job.state in TERMINAL, job.state
        assert not job.leftover, job.warnings
        if job.committed:
            self.points.append(self.vault.point(job.point))
        self.alerts += job.alerts.values()
        return job

    def _arm(self, fault: Fault) -> None:
        at = len(self.store.plan.calls) + fault.at
        match fault.what:
            case "fail":
                self.store.plan.fail_at = at
            case "full":
                self.store.plan.full_at = at
            case "die_before":
                self.store.plan.die_before = at
            case "die_after":
                self.store.plan.die_after = at
            case _:
                self._watch = _cancel

    def _disarm(self) -> None:
        self._watch = lambda _tally: None
        self.reopen()

    def _performed(self, command: m.Command) -> m.Event:
        try:
            return self._perform(command)
        except StillframeError as error:
            return m.Failed(command=command.kind, error=describe(error), target=target_of(command))
        except Died:
            return m.WorkerLost(detail="killed")

    def _perform(self, command: m.Command) -> m.Event:
        match command:
            case m.Prepare():
                found = self.inventory(command.base_checkpoint)
                self.vault.announce(command.job, command.point)
                return m.Prepared(inventory=found, online=found.power is not Power.OFF)
            case m.TakeSnapshot():
                return self._snapshot(command)
            case m.TransferDisk():
                return self._transfer(command)
            case m.CommitPoint():
                self.vault.commit(command.point)
                return m.PointCommitted(point=command.point.id)
            case m.Release():
                return self._release(command)
            case _:
                return m.Thawed(thawed=0)

    def _snapshot(self, command: m.TakeSnapshot) -> m.Event:
        name = m.sf_name(command.job)
        self._exports = {plan.target: self.disks[plan.target].frozen(plan.base_checkpoint) for plan in command.disks}
        self._taken = {plan.target: bytes(self.disks[plan.target].content) for plan in command.disks}
        for disk in self.disks.values() if command.online else ():
            if disk.tracks:
                disk.bitmaps[name] = bytearray(len(disk.allocated))
            disk.put(0, b"later".ljust(PIECE, b"!"))  # the guest goes on writing; the point must not see it
        exports = [
            m.ExportInfo(target=target, socket="", name=target, bitmap=None, capacity=disk.size)
            for target, disk in self._exports.items()
        ]
        return m.SnapshotTaken(
            snapshot=m.SnapshotInfo(
                name=name,
                online=command.online,
                exports=exports,
                checkpoint=name if command.online else None,
                checkpoint_xml="<xml/>" if command.online else None,
                time=(datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=next(self._numbers))).isoformat(),
                consistency=Consistency.CRASH,
                consistency_reason="a model",
                frozen_ms=None,
                definition="<domain/>",
            )
        )

    def _transfer(self, command: m.TransferDisk) -> m.Event:
        plan, source = command.plan, self._exports[command.plan.target]
        base = None
        if plan.mode is Mode.INCREMENTAL:
            assert plan.base_root is not None
            assert plan.base_capacity is not None
            base = BlockMap(self.vault.reader(), bytes.fromhex(plan.base_root), plan.base_capacity, plan.block_size)
        settings = Settings(plan.block_size, audit_blocks=self.audit_blocks)
        done = transfer_disk(source, self.vault, settings, base=base, watch=lambda tally: self._watch(tally))
        return m.DiskTransferred(
            disk=DiskPoint(
                target=plan.target,
                source=command.disk.source,
                format=command.disk.format,
                identity=command.disk.identity,
                capacity=command.disk.capacity,
                block_size=plan.block_size,
                root=done.root.hex(),
                mode=plan.mode,
                reason=plan.reason,
                checkpoint=None,
            ),
            alert=done.alert,
            healed=done.healed,
        )

    def _release(self, command: m.Release) -> m.Event:
        found = self.vault.settle(command.point) if command.commit_sent else None
        doomed = command.old_checkpoint if found else command.new_checkpoint
        if doomed is not None:
            self._forget(doomed)
        self.vault.withdraw(command.job)
        if found is not None:
            self.truth[command.point] = self._taken
        return m.Released(committed=found)

    # --- the truth -------------------------------------------------------------------------------------------------

    def lose_index(self) -> None:
        """The index segments and this host's cache are gone; packs are all that is left to find blocks by."""
        self.vault.close()
        shutil.rmtree(self.folder / "vault" / "index", ignore_errors=True)  # none if all was always zero
        shutil.rmtree(self.folder / "cache")
        self.reopen()
        rebuild_index(self.vault)

    def check(self) -> None:
        """Every point that was ever committed holds what the machine held, read block by block."""
        assert {point.id for point in self.vault.points()} == set(self.truth)
        assert not list(self.vault.sessions())
        for point in self.points:
            assert {disk.target for disk in point.disks} == set(self.truth[point.id])
            for disk in point.disks:
                wrong = _differences(self._read(disk), self.truth[point.id][disk.target])
                assert not wrong, f"point {point.id[-4:]}, {disk.target} ({disk.mode}, {disk.reason}): {wrong}"

    def check_restored(self) -> None:
        """The same, by the machinery of a restore."""
        folder = self.folder / "restored"
        for point in self.points:
            for disk in point.disks:
                path = folder / f"{point.id}-{disk.target}.raw"
                command = m.RestoreDisk(
                    job="r",
                    vault="main",
                    point=point.id,
                    target=disk.target,
                    path=str(path),
                    format="raw",
                    standalone=True,
                )
                restore.restore_disk(self.vault, command, 2, lambda _written: None)
                assert path.read_bytes() == self.truth[point.id][disk.target]
                path.unlink()

    def _read(self, disk: DiskPoint) -> bytes:
        reader = self.vault.reader()
        pieces = []
        for _, count, id in BlockMap(reader, bytes.fromhex(disk.root), disk.capacity, disk.block_size).runs():
            pieces.append(bytes(count * disk.block_size) if id is None else reader.get(id))
        return b"".join(pieces)[: disk.capacity]


def _cancel(_tally: Tally) -> None:
    raise Cancelled("cancelled")


def _differences(found: bytes, expected: bytes) -> str:
    if found == expected:
        return ""
    if len(found) != len(expected):
        return f"{len(found)} bytes instead of {len(expected)}"
    bad = [at for at in range(0, len(found), PIECE) if found[at : at + PIECE] != expected[at : at + PIECE]]
    return f"{len(bad)} of {len(found) // PIECE} pieces differ, the first at byte {bad[0]}"


def filling(seed: int, length: int) -> bytes:
    """Some content repeats on every disk and compresses, some does neither."""
    return bytes([seed]) * length if seed < 4 else random.Random(seed * length).randbytes(length)
