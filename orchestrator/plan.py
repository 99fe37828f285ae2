"""Full or incremental, disk by disk, and why.

The reasons are half of the purpose: "full" without a reason is what makes people distrust incremental backups. They are
written here, once, as the words that the job's log, the point and the CLI show. Any doubt about one disk makes that
disk full and leaves the others alone (invariant 6): reading too much is slow, reading too little is a lie.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from fnmatch import fnmatchcase

from workers.contract.errors import UsageError
from workers.contract.machines import BitmapState, Disk, Inventory
from workers.contract.messages import DiskPlan
from workers.contract.points import DiskPoint, Mode, NotIncluded, Point

_FIRST = "it is the first backup"
_NO_BASE = "no earlier point has a checkpoint to go on from (only a machine that runs gets one)"
_LOST_BASE = "the point to go on from has been deleted from the vault"
SHORT = 8
"""Digits of a point's id that people see."""


def base_checkpoint(base: Point | None) -> str | None:
    """The one checkpoint that the disks of `base` refer to, if any does."""
    if base is None:
        return None
    return next((disk.checkpoint for disk in base.disks if disk.checkpoint), None)


def block_size_for(rules: dict[str, int], default: int, machine: str, target: str) -> int:
    """Bytes; the first rule (`glob on machine/target` → size) that fits, else `default`."""
    name = f"{machine}/{target}"
    return next((size for glob, size in rules.items() if fnmatchcase(name, glob)), default)


def plan_disks(
    inventory: Inventory,
    base: Point | None,
    *,
    earlier: bool = False,
    base_readable: bool = True,
    force_full: bool = False,
    exclude: Collection[str] = (),
    block_size_of: Callable[[str], int],
) -> tuple[list[DiskPlan], list[NotIncluded]]:
    """What to do with each disk of the machine, and what is left out; `earlier`: there are points, if none to go on
    from; `base_readable`: the maps of `base` can be inherited from. Raises UsageError if nothing is left to back up, or
    if `exclude` names a disk that the machine does not have."""
    unknown = sorted(set(exclude) - {disk.target for disk in inventory.disks})
    if unknown:
        raise UsageError(
            f"{inventory.machine.name} has no disk {', '.join(unknown)}",
            hint=f"its disks are: {', '.join(disk.target for disk in inventory.disks)}",
        )
    plans: list[DiskPlan] = []
    left_out: list[NotIncluded] = []
    for disk in inventory.disks:
        if disk.refused and disk.target not in exclude:
            name = inventory.machine.name
            raise UsageError(
                f"{disk.target} of {name} cannot be backed up: {disk.excluded}",
                hint=f"to back up the rest: stillframe backup run {name} --exclude {disk.target}",
            )
        if disk.excluded:
            left_out.append(NotIncluded(target=disk.target, reason=disk.excluded))
        elif disk.target in exclude:
            left_out.append(NotIncluded(target=disk.target, reason="excluded by you"))
        else:
            plan = _plan_disk(disk, base, force_full=force_full, block_size=block_size_of(disk.target))
            if plan.mode is Mode.INCREMENTAL and not base_readable:
                plan = demoted(plan, _LOST_BASE)
            plans.append(demoted(plan, _NO_BASE) if plan.reason == _FIRST and earlier else plan)
    if not plans:
        why = "; ".join(f"{item.target}: {item.reason}" for item in left_out) or "it has no disks"
        raise UsageError(f"nothing to back up in {inventory.machine.name}: {why}")
    return plans, left_out


def trusted_bitmaps(inventory: Inventory, base: Point | None) -> list[str]:
    """Targets whose bitmap of the base holds every change since the base's map, whatever is read this time.

    A backup of a machine that is off makes no checkpoint; these disks keep the base's, older than needed and
    therefore safe (invariant 2)."""
    known = {disk.target: disk for disk in base.disks} if base else {}
    return [d.target for d in inventory.disks if d.target in known and not _distrust(d, known[d.target])]


def demoted(plan: DiskPlan, reason: str) -> DiskPlan:
    """The same disk, to be read in full after all."""
    return plan.model_copy(
        update={
            "mode": Mode.FULL,
            "reason": reason,
            "base_checkpoint": None,
            "base_root": None,
            "base_capacity": None,
        }
    )


def _plan_disk(disk: Disk, base: Point | None, *, force_full: bool, block_size: int) -> DiskPlan:
    old = next((d for d in base.disks if d.target == disk.target), None) if base else None
    why_full = _why_full(disk, base, old, force_full=force_full, block_size=block_size)
    if why_full or base is None or old is None:
        return DiskPlan(
            target=disk.target,
            mode=Mode.FULL,
            reason=why_full,
            block_size=block_size,
            tracks_changes=disk.tracks_changes,
        )
    grown = f"; it grew from {old.capacity} to {disk.capacity} bytes" if disk.capacity > old.capacity else ""
    return DiskPlan(
        target=disk.target,
        mode=Mode.INCREMENTAL,
        reason=f"changes since {base.id[:SHORT]} ({base.time:%Y-%m-%d %H:%M:%S} UTC) are known{grown}",
        block_size=block_size,
        base_checkpoint=old.checkpoint,
        base_root=old.root,
        base_capacity=old.capacity,
        tracks_changes=True,
    )


def _why_full(disk: Disk, base: Point | None, old: DiskPoint | None, *, force_full: bool, block_size: int) -> str:
    """Empty if it can be incremental."""
    if not disk.tracks_changes:
        return f"it is {disk.format}: no change tracking"
    if base is None:
        return _FIRST
    if force_full:
        return "you asked for it"
    if old is None:
        left_out = base is not None and any(item.target == disk.target for item in base.not_included)
        return "it was left out of the base point" if left_out else "it is a new disk"
    if old.block_size != block_size:
        return f"its block size changed from {old.block_size} to {block_size} bytes"
    return _distrust(disk, old)


def _distrust(disk: Disk, old: DiskPoint) -> str:
    """Why the base's bitmap of this disk does not hold all changes; empty if it does."""
    if not disk.tracks_changes:
        return f"it is {disk.format}: no change tracking"
    if old.checkpoint is None:
        return "the base point kept no checkpoint of it"
    if old.identity != disk.identity:
        return f"its image changed from {old.source} to {disk.source}" + (
            " (another file of that name)" if old.source == disk.source else ""
        )
    if disk.capacity < old.capacity:
        return f"it shrank from {old.capacity} to {disk.capacity} bytes"
    if disk.bitmap is BitmapState.VALID:
        return ""
    detail = f" ({disk.bitmap_detail})" if disk.bitmap_detail else ""
    if disk.bitmap is BitmapState.INCONSISTENT:
        return f"the bitmap was in use after a crash (inconsistent){detail}"
    return f"the bitmap is missing{detail}"
