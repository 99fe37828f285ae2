"""What differs between two block maps: both trees walked together, subtrees that have the same id passed over.

The cost is that of what changed: pages that differ are read, data blocks never. What lies past the end of a disk counts
as zero, so a disk that grew, shrank, or has a tree of another height needs no rule of its own. The smallest unit is a
block: a short last block of a disk that was resized counts as changed where it is not zero, whatever it holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from workers.contract.errors import UsageError
from workers.vault.blockmap import FANOUT, ID, BlockMap
from workers.vault.packs import ZERO_ID


class Change(StrEnum):
    """What became of a range."""

    REWRITTEN = "rewritten"
    """Data before and after."""
    FILLED = "filled"
    """Zero before, data after."""
    ZEROED = "zeroed"
    """Data before, zero after."""


class Difference(NamedTuple):
    """A range of bytes in which every block changed in the same way."""

    start: int
    length: int
    change: Change


def differences(before: BlockMap, after: BlockMap) -> Iterator[Difference]:
    """What changed, ascending, adjacent ranges of one kind joined; ends at the larger disk's size. At most 2·height
    pages are in memory. Raises UsageError for different block sizes, of which the trees alone tell nothing; Corrupt,
    ObjectMissing."""
    block = before.block_size
    if after.block_size != block:
        raise UsageError(f"it has blocks of {block} bytes in one point and of {after.block_size} in the other")
    size = max(before.size, after.size)
    level = max(before.shape.height, after.shape.height) - 1
    first = end = 0
    kind: Change | None = None
    for index, change in _changed(before, after, level, 0, before.root, after.root):
        if kind is not None and (index, change) != (end, kind):
            yield Difference(first * block, (end - first) * block, kind)
            kind = None
        if kind is None:
            first, kind = index, change
        end = index + 1
    if kind is not None:
        yield Difference(first * block, min(end * block, size) - first * block, kind)


def _changed(
    before: BlockMap, after: BlockMap, level: int, index: int, old: bytes, new: bytes
) -> Iterator[tuple[int, Change]]:
    """Blocks that differ under page `index` of `level`, whose ids are `old` and `new`."""
    if old == new:
        return
    olds, news = _listed(before, level, index, old), _listed(after, level, index, new)
    for at in range(0, max(len(olds), len(news)), ID):
        one, other = olds[at : at + ID] or ZERO_ID, news[at : at + ID] or ZERO_ID
        if one == other:
            continue
        child = index * FANOUT + at // ID
        if level:
            yield from _changed(before, after, level - 1, child, one, other)
        else:
            yield child, _change(one, other)


def _listed(blocks: BlockMap, level: int, index: int, id: bytes) -> bytes:
    """The ids under a page; none for one that is zero or that the tree does not have. Above its top, a tree goes on
    with pages that list only the top."""
    if id == ZERO_ID:
        return b""
    return id if level >= blocks.shape.height else blocks.load(id, level, index)


def _change(old: bytes, new: bytes) -> Change:
    if old == ZERO_ID:
        return Change.FILLED
    return Change.ZEROED if new == ZERO_ID else Change.REWRITTEN
