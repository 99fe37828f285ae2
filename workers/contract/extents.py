"""Extents: byte ranges of a disk, each of one kind.

The three kinds are all that a backup has to know of a range. A range that changed to zeroes is ZERO, not UNCHANGED:
skipping it would bring stale data back at restore (research: virtnbdbackup since 2.21).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from workers.contract.errors import DiskError


class Kind(StrEnum):
    DATA = "data"
    ZERO = "zero"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class Extent:
    """`length` > 0 bytes from byte `start` of a disk."""

    start: int
    length: int
    kind: Kind

    @property
    def end(self) -> int:
        return self.start + self.length


def tiled(extents: Iterable[Extent], size: int) -> Iterator[Extent]:
    """Pass `extents` on, and raise DiskError unless they tile `[0, size)` exactly (invariant 3)."""
    position = 0
    for extent in extents:
        if extent.start != position or extent.length <= 0 or extent.end > size:
            raise DiskError(f"extents do not tile the disk: expected one at byte {position}, got {extent}")
        position = extent.end
        yield extent
    if position != size:
        raise DiskError(f"extents end at byte {position}, the disk at {size}")
