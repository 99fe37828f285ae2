"""From extents (bytes, as the hypervisor sees them) to runs of blocks (as the vault keeps them).

A block is inherited only if every byte of it is unchanged, and is the zero block only if every byte is known to be
zero; any other block is read whole, so that a partly dirty block is never patched together from two points. Streaming
and run-length, so that an 8 TiB disk with 100 changed blocks costs 200 steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from workers.contract.extents import Extent, Kind, tiled


@dataclass(frozen=True, slots=True)
class BlockRun:
    """`count` blocks from block `first`, all treated alike."""

    first: int
    count: int
    kind: Kind


def block_count(size: int, block_size: int) -> int:
    return -(-size // block_size)


def block_runs(
    extents: Iterable[Extent], size: int, block_size: int, *, inheritable: int | None = None
) -> Iterator[BlockRun]:
    """Runs that cover all blocks of a disk of `size` bytes, in order, neighbours of one kind joined.

    `inheritable` is the capacity of the base in bytes: a block that the base does not have at the same length (the
    tail of a disk that has grown) is read even if it is called unchanged; None: there is no base. Raises DiskError
    if the extents do not tile the disk.
    """
    return joined(_pieces(tiled(extents, size), size, block_size, _whole_blocks(size, block_size, inheritable)))


def _whole_blocks(size: int, block_size: int, inheritable: int | None) -> int:
    """How many leading blocks the base has at the same length."""
    if inheritable is None:
        return 0
    return block_count(size, block_size) if inheritable == size else min(inheritable, size) // block_size


def _pieces(extents: Iterable[Extent], size: int, block_size: int, base_blocks: int) -> Iterator[BlockRun]:
    open_kind: Kind | None = None  # of the block that has begun but not ended
    for extent in extents:
        first = extent.start // block_size
        if extent.start % block_size:
            assert open_kind is not None
            open_kind = open_kind if open_kind is extent.kind else Kind.DATA
            if extent.end < min((first + 1) * block_size, size):
                continue
            yield from _settled(first, 1, open_kind, base_blocks)
            open_kind = None
            first += 1
        end = block_count(size, block_size) if extent.end == size else extent.end // block_size
        if end > first:
            yield from _settled(first, end - first, extent.kind, base_blocks)
        if extent.end % block_size and extent.end != size and end >= first:
            open_kind = extent.kind


def _settled(first: int, count: int, kind: Kind, base_blocks: int) -> Iterator[BlockRun]:
    if kind is not Kind.UNCHANGED:
        yield BlockRun(first, count, kind)
        return
    inherited = max(0, min(first + count, base_blocks) - first)
    if inherited:
        yield BlockRun(first, inherited, Kind.UNCHANGED)
    if inherited < count:
        yield BlockRun(first + inherited, count - inherited, Kind.DATA)


def joined(runs: Iterable[BlockRun]) -> Iterator[BlockRun]:
    """The same blocks, neighbours of one kind in one run."""
    last: BlockRun | None = None
    for run in runs:
        if last is not None and last.kind is run.kind:
            last = BlockRun(last.first, last.count + run.count, last.kind)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last
