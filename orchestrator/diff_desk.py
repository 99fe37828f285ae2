"""What changed between two points, per disk, from their block maps alone: no block of data is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from orchestrator import find
from orchestrator.catalog.points import document
from orchestrator.catalog.store import Catalog
from workers.context import Context
from workers.contract.errors import UsageError
from workers.contract.machines import Value
from workers.contract.points import DiskPoint, Point

if TYPE_CHECKING:
    from workers.vault import BlockReader

Kind = Literal["rewritten", "filled", "zeroed"]


class RangeView(Value):
    """Bytes of a disk that changed in one way: data to data, zero to data, data to zero."""

    start: int
    length: int
    change: Kind


class DiskDiff(Value):
    """One disk in two points. A size is None where the disk is not in the point; bytes are of whole blocks."""

    target: str
    capacity_before: int | None
    """In the first point."""
    capacity_after: int | None
    """… and in the second. What a disk has grown by counts as having been zero, and so does what was cut off."""
    changed_bytes: int = 0
    share: float = 0.0
    """Of the larger capacity."""
    bytes: dict[Kind, int] = {}
    """By what became of them."""
    range_count: int = 0
    ranges: list[RangeView] = []
    """Empty if they were not asked for: there may be millions."""
    incomparable: str = ""
    """Why nothing can be said of a disk that is in both; empty: it can."""

    @property
    def compared(self) -> bool:
        return not self.incomparable and None not in (self.capacity_before, self.capacity_after)


class PointDiff(Value):
    before: str
    after: str
    machines: list[str]
    """Name of the machine; two if the points are of different ones."""
    disks: list[DiskDiff]


class DiffDesk:
    def __init__(self, catalog: Catalog, context: Context) -> None:
        self._catalog = catalog
        self._context = context

    def diff(self, before: str, after: str, *, ranges: bool = True) -> PointDiff:
        """Raises NotFound, UsageError for points of different vaults; Corrupt, ObjectMissing."""
        with self._catalog.read() as session:
            rows = [find.point_named(session, ref) for ref in (before, after)]
            vaults = [row.vault for row in rows]
            first, second = (document(row) for row in rows)
        if vaults[0] != vaults[1]:
            raise UsageError(
                f"{before} is in vault {vaults[0]}, {after} in {vaults[1]}",
                hint="blocks have ids of their own in each vault: only points of one vault can be compared",
            )
        reader = self._context.vault(vaults[0]).reader()
        return PointDiff(
            before=first.id,
            after=second.id,
            machines=list(dict.fromkeys((first.machine.name, second.machine.name))),
            disks=[_compared(reader, target, first, second, ranges=ranges) for target in _targets(first, second)],
        )


def _targets(first: Point, second: Point) -> list[str]:
    return list(dict.fromkeys(disk.target for point in (first, second) for disk in point.disks))


def _compared(reader: BlockReader, target: str, first: Point, second: Point, *, ranges: bool) -> DiskDiff:
    from workers.vault import BlockMap
    from workers.vault.mapdiff import differences

    old, new = (_disk(point, target) for point in (first, second))
    sizes = {"capacity_before": old.capacity if old else None, "capacity_after": new.capacity if new else None}
    if old is None or new is None:
        return DiskDiff(target=target, **sizes)
    maps = [BlockMap(reader, bytes.fromhex(disk.root), disk.capacity, disk.block_size) for disk in (old, new)]
    if old.block_size != new.block_size:
        why = f"blocks of {old.block_size >> 10} KiB in the first and of {new.block_size >> 10} KiB in the second"
        return DiskDiff(target=target, **sizes, incomparable=why)
    listed, count = [], 0
    totals: dict[Kind, int] = {}
    for start, length, change in differences(maps[0], maps[1]):
        count += 1
        if ranges:
            listed.append(RangeView(start=start, length=length, change=change.value))
        totals[change.value] = totals.get(change.value, 0) + length
    changed = sum(totals.values())
    return DiskDiff(
        target=target,
        **sizes,
        changed_bytes=changed,
        share=round(changed / max(old.capacity, new.capacity, 1), 6),
        bytes=totals,
        range_count=count,
        ranges=listed,
    )


def _disk(point: Point, target: str) -> DiskPoint | None:
    return next((disk for disk in point.disks if disk.target == target), None)
