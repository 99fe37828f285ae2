"""Block maps, the reading side: the Merkle tree of ids that describes a whole disk at one point.

Fan-out 1024 and as many levels as needed: a change touches one page per level, and an all-zero page is ZERO at every
level, so an 8 TiB disk with nothing on it is one id and costs nothing to walk.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from workers.contract.errors import Corrupt
from workers.vault.packs import ZERO_ID
from workers.vault.reader import BlockReader

FANOUT = 1024
ID = 32
_HEAD = struct.Struct(">4sBBH")
_MAGIC, _VERSION = b"SFMP", 1


def encode_page(level: int, ids: bytes | bytearray) -> bytes:
    return _HEAD.pack(_MAGIC, _VERSION, level, len(ids) // ID) + ids


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a tree over `count` blocks."""

    count: int
    widths: tuple[int, ...]
    """Entries per level: `widths[0]` blocks, `widths[1]` leaf pages, …; the last is 1, the top page."""

    @staticmethod
    def of(size: int, block_size: int) -> Shape:
        widths = [-(-size // block_size)]
        while len(widths) < 2 or widths[-1] > 1:
            widths.append(max(1, -(-widths[-1] // FANOUT)))
        return Shape(widths[0], tuple(widths))

    @property
    def height(self) -> int:
        """Number of levels of pages, at least 1."""
        return len(self.widths) - 1

    def entries(self, level: int, page: int) -> int:
        """How many ids a page lists; 0 for a page that the tree does not have."""
        if level >= self.height:
            return 0
        return max(0, min(FANOUT, self.widths[level] - page * FANOUT))


class BlockMap:
    """The map of a disk of `size` bytes in blocks of `block_size`, under `root`. Thread-safe."""

    def __init__(self, reader: BlockReader, root: bytes, size: int, block_size: int) -> None:
        self.reader = reader
        self.root = root
        self.size = size
        self.block_size = block_size
        self.shape = Shape.of(size, block_size)
        self.count = self.shape.count

    def id_at(self, index: int) -> bytes:
        """The id of block `index`. Raises IndexError past the end; ObjectMissing, Corrupt."""
        return self.child_id(0, index)

    def child_id(self, level: int, index: int) -> bytes:
        """Entry `index` of `level`: a block's id at level 0, the id of a page of level - 1 above. The entry above the
        top level is the root."""
        if not 0 <= index < self.shape.widths[level]:
            raise IndexError(f"no entry {index} at level {level}")
        if level == self.shape.height:
            return self.root
        page = self.page(level, index // FANOUT)
        if page is None:
            return ZERO_ID
        at = index % FANOUT * ID
        return page[at : at + ID]

    def page(self, level: int, index: int) -> bytes | None:
        """The ids that page `index` of `level` lists, joined; None if all are ZERO."""
        id = self.child_id(level + 1, index)
        return None if id == ZERO_ID else self.load(id, level, index)

    def load(self, id: bytes, level: int, index: int) -> bytes:
        """The ids in the page `id`, which is page `index` of `level`. Raises Corrupt if it is another's."""
        data = self.reader.get_page(id)
        count = self.shape.entries(level, index)
        head = _HEAD.unpack_from(data) if len(data) >= _HEAD.size else None
        if head != (_MAGIC, _VERSION, level, count) or len(data) != _HEAD.size + count * ID:
            raise Corrupt(f"page {id.hex()[:16]}… is not page {index} of level {level} of this block map")
        return data[_HEAD.size :]

    def runs(self) -> Iterator[tuple[int, int, bytes | None]]:
        """Tile `[0, count)` in order: `(index, 1, id)` for a block, `(first, n, None)` for a run of zero blocks, as
        long as can be."""
        zero_from = 0
        for index, id in self._blocks(self.shape.height - 1, 0, self.root):
            if index > zero_from:
                yield zero_from, index - zero_from, None
            yield index, 1, id
            zero_from = index + 1
        if self.count > zero_from:
            yield zero_from, self.count - zero_from, None

    def _blocks(self, level: int, index: int, id: bytes) -> Iterator[tuple[int, bytes]]:
        """Blocks under a page that are not zero; a zero subtree is one step."""
        if id == ZERO_ID:
            return
        ids = self.load(id, level, index)
        for at in range(len(ids) // ID):
            child = ids[at * ID : at * ID + ID]
            if level:
                yield from self._blocks(level - 1, index * FANOUT + at, child)
            elif child != ZERO_ID:
                yield index * FANOUT + at, child

    def pages(self) -> Iterator[tuple[int, int, bytes, bytes]]:
        """Every page that is not ZERO, from the top down: `(level, index, id, the ids that it lists)`."""
        yield from self._pages(self.shape.height - 1, 0, self.root)

    def _pages(self, level: int, index: int, id: bytes) -> Iterator[tuple[int, int, bytes, bytes]]:
        if id == ZERO_ID:
            return
        ids = self.load(id, level, index)
        yield level, index, id, ids
        for at in range(len(ids) // ID if level else 0):
            yield from self._pages(level - 1, index * FANOUT + at, ids[at * ID : at * ID + ID])

    def last_data(self, first: int, end: int) -> int | None:
        """Index of the last block of `[first, end)` that is not zero, or None. Reads at most 2·height pages."""
        return self._last_data(self.shape.height - 1, 0, self.root, first, end)

    def _last_data(self, level: int, page: int, id: bytes, first: int, end: int) -> int | None:
        if id == ZERO_ID:
            return None
        ids, start = self.load(id, level, page), page * FANOUT
        span: int = FANOUT**level
        low, high = max(0, first // span - start), min(len(ids) // ID, -(-end // span) - start)
        while used := len(ids[low * ID : high * ID].rstrip(b"\0")):
            high = low + (used - 1) // ID
            if not level:
                return start + high
            child = ids[high * ID : high * ID + ID]
            if (found := self._last_data(level - 1, start + high, child, first, end)) is not None:
                return found
        return None

    def sample(self, rng: random.Random, k: int) -> list[int]:
        """Indexes, in order, of up to `k` different blocks that are not zero, by random descent (not quite uniform:
        a block in a sparse page is likelier). Reads at most 2·k·height pages."""
        found: set[int] = set()
        if self.root == ZERO_ID:
            return []
        for _ in range(2 * k):
            if len(found) == k:
                break
            index, id = 0, self.root
            for level in range(self.shape.height - 1, -1, -1):
                ids = self.load(id, level, index)
                slots = [at for at in range(len(ids) // ID) if ids[at * ID : at * ID + ID] != ZERO_ID]
                at = rng.choice(slots)
                index, id = index * FANOUT + at, ids[at * ID : at * ID + ID]
            found.add(index)
        return sorted(found)
