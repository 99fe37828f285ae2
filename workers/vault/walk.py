"""From points to what they need: which damage touches which disk.

A map page shared by many points is looked at once: the cost is that of different pages, not of points times disk size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from workers.contract.errors import Corrupt, NewerFormat, ObjectMissing
from workers.contract.points import DiskPoint, Point
from workers.vault.blockmap import FANOUT, ID, BlockMap
from workers.vault.damage import WHOLE
from workers.vault.index import Index, Location
from workers.vault.packs import DATA, PAGE, ZERO_ID
from workers.vault.reader import BlockReader

SAMPLE_BLOCKS = 64
"""Blocks of each disk that are read in a sample."""
_NONE: frozenset[str] = frozenset()


class Walk:
    """Through the maps of points. `bad` are copies (block, pack) known to be damaged: all of them, before the first
    `damage` is asked for."""

    def __init__(
        self,
        index: Index,
        reader: BlockReader,
        sizes: dict[str, int],
        bad: set[tuple[bytes, str]],
        problem: Callable[[str, str], None],
    ) -> None:
        self._index = index
        self._reader = reader
        self._sizes = sizes
        self._problem = problem
        self.bad = bad
        self._memo: dict[bytes, frozenset[str]] = {}

    def trust(self, pack: str) -> None:
        """The pack was found whole after all."""
        self.bad = {copy for copy in self.bad if copy[1] != pack}

    def needed(self, points: list[Point]) -> set[str]:
        """Packs that hold the pages and blocks of `points`, as far as they can be read."""
        packs: set[str] = set()
        seen: set[bytes] = set()

        def visit(blocks: BlockMap, level: int, index: int, id: bytes) -> None:
            if id == ZERO_ID or id in seen:
                return
            packs.update(location.pack for location in self._index.find(id))
            if level < 0:
                return
            seen.add(id)
            try:
                ids = blocks.load(id, level, index)
            except (Corrupt, ObjectMissing, NewerFormat):
                return  # reported by `damage`
            for at in range(len(ids) // ID):
                visit(blocks, level - 1, index * FANOUT + at, ids[at * ID : at * ID + ID])

        for point in points:
            for disk in point.disks:
                blocks = self._map(disk)
                visit(blocks, blocks.shape.height - 1, 0, blocks.root)
        return packs

    def sample(self, disk: DiskPoint) -> Iterator[Location]:
        """Every copy of some blocks of a disk."""
        blocks = self._map(disk)
        try:
            ids = [blocks.id_at(index) for index in blocks.sample(random.Random(), SAMPLE_BLOCKS)]
        except (Corrupt, ObjectMissing, NewerFormat):
            return  # a page is damaged: reported by `damage`
        for id in ids:
            yield from self._index.find(id)

    def damage(self, disk: DiskPoint) -> list[str]:
        """Objects whose damage keeps the disk from being restored whole."""
        blocks = self._map(disk)
        return sorted(self._page(blocks, blocks.shape.height - 1, 0, blocks.root))

    def _map(self, disk: DiskPoint) -> BlockMap:
        return BlockMap(self._reader, bytes.fromhex(disk.root), disk.capacity, disk.block_size)

    def _page(self, blocks: BlockMap, level: int, index: int, id: bytes) -> frozenset[str]:
        """The same of what is under a page."""
        if id == ZERO_ID:
            return _NONE
        if (known := self._memo.get(id)) is not None:
            return known
        found = set(self._block(id, PAGE))
        try:
            ids = b"" if found else blocks.load(id, level, index)
        except (Corrupt, ObjectMissing, NewerFormat) as error:
            copies = self._index.find(id)
            name = copies[0].pack if copies else block_name(id)
            self._problem(name, str(error))
            found.add(name)
            ids = b""
        for at in range(len(ids) // ID):
            child = ids[at * ID : at * ID + ID]
            if child == ZERO_ID:
                continue
            if level:
                found |= self._page(blocks, level - 1, index * FANOUT + at, child)
            else:
                found |= self._block(child, DATA)
        self._memo[id] = frozenset(found) if found else _NONE
        return self._memo[id]

    def _block(self, id: bytes, kind: int) -> frozenset[str]:
        """Nothing if one copy of the block is good as far as is known."""
        copies = self._index.find(id)
        bad: list[str] = []
        for name, entry in copies:
            size = self._sizes.get(name)
            if size is None:
                self._problem(name, "it is missing")
            elif entry.offset + entry.stored > size:
                self._problem(name, f"it is cut short: {size} bytes")
                self._index.distrust(id, name)
            elif entry.kind != kind:
                self._problem(name, f"{block_name(id)} in it is of another kind than a map says")
                self._index.distrust(id, name)
            elif (id, name) in self.bad:
                self._problem(name, f"{block_name(id)} in it is known to be damaged")
            elif (WHOLE, name) not in self.bad or self._opens(Location(name, entry), kind):
                return _NONE
            bad.append(name)
        if not bad:
            self._problem(block_name(id), "it is in no index segment")
            bad.append(block_name(id))
        return frozenset(bad)

    def _opens(self, location: Location, kind: int) -> bool:
        """Of a pack that is not what its name says, this block may be."""
        try:
            self._reader.open(location, kind)
        except (Corrupt, ObjectMissing, NewerFormat) as error:
            self._problem(location.pack, str(error))
            return False
        return True


def block_name(id: bytes) -> str:
    return f"block {id.hex()}"
