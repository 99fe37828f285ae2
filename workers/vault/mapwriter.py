"""Block maps, the writing side: from blocks, zero runs and inherited runs, in any order, to a root.

One accumulator per level. A run is split into a partial page, whole pages and a partial page; whole pages become a run
of the level above, without being looked at. So the cost is that of what changed, also on an 8 TiB disk, and only pages
that are partly settled are in memory. A page of the base is loaded only when a page is partly inherited.

Every block must be settled exactly once (invariant 3 again, at the last moment): twice, never, or past the end is an
error, so a reader that skipped a range cannot make a point.
"""

from __future__ import annotations

import threading
from enum import Enum
from typing import NoReturn

from workers.contract.errors import DiskError
from workers.vault.blockmap import FANOUT, ID, BlockMap, Shape, encode_page
from workers.vault.packs import ZERO_ID
from workers.vault.reader import BlockReader
from workers.vault.writer import BlockWriter


class _Run(Enum):
    ZERO = "zero"
    INHERIT = "inherit"


class _Page:
    """A page that is not settled yet. Unset ids are zero already."""

    __slots__ = ("ids", "inherited", "missing", "runs", "settled")

    def __init__(self, entries: int) -> None:
        self.ids = bytearray(entries * ID)
        self.settled = bytearray(entries)
        self.missing = entries
        self.inherited = 0
        self.runs: list[tuple[int, int]] = []
        """Inherited `(first, end)`, to be filled from the base when the page is complete."""

    def settle(self, first: int, end: int) -> bool:
        """Mark entries; False if one was settled before."""
        if self.settled.find(1, first, end) >= 0:
            return False
        self.settled[first:end] = b"\1" * (end - first)
        self.missing -= end - first
        return True


class MapWriter:
    """Builds the block map of a disk of `size` bytes. Thread-safe.

    `base` may be of another size, not of another block size; its pages are read through `reader`."""

    def __init__(
        self, writer: BlockWriter, reader: BlockReader, size: int, block_size: int, base: BlockMap | None
    ) -> None:
        if base is not None and base.block_size != block_size:
            raise DiskError(f"the base has blocks of {base.block_size} bytes, not {block_size}")
        self._writer = writer
        self._base = base and BlockMap(reader, base.root, base.size, base.block_size)
        self._shape = Shape.of(size, block_size)
        self._lock = threading.Lock()
        self._open: list[dict[int, _Page]] = [{} for _ in range(self._shape.height)]
        self._root: bytes | None = ZERO_ID if self._shape.count == 0 else None
        self.count = self._shape.count
        self.inheritable = 0
        """The first so many blocks exist in the base, in the same length, and may be inherited: on a disk that grew
        or shrank, a short last block may not."""
        if base is not None:
            self.inheritable = self.count if base.size == size else min(base.size, size) // block_size

    def set(self, index: int, id: bytes) -> None:
        """Block `index` has the id `id`. Raises DiskError if it is settled already or past the end."""
        with self._lock:
            self._check(index, 1, self.count)
            if id == ZERO_ID:
                self._run(0, _Run.ZERO, index, index + 1)
            else:
                self._set(0, index, id)

    def zero(self, first: int, count: int) -> None:
        """Blocks `[first, first + count)` are all zero. Raises DiskError."""
        with self._lock:
            self._check(first, count, self.count)
            self._run(0, _Run.ZERO, first, first + count)

    def inherit(self, first: int, count: int) -> None:
        """Blocks `[first, first + count)` are as in the base. Raises DiskError past `inheritable`, and what loading
        a page of the base raises."""
        with self._lock:
            self._check(first, count, self.inheritable)
            self._run(0, _Run.INHERIT, first, first + count)

    def finish(self) -> bytes:
        """The root. Raises DiskError if a block was not settled."""
        with self._lock:
            if self._root is None:
                raise DiskError(f"block {self._first_missing()} of {self.count} was neither read, zero nor inherited")
            return self._root

    # --- inside, under the lock ------------------------------------------------------------------------------------

    @staticmethod
    def _check(first: int, count: int, limit: int) -> None:
        if first < 0 or count < 1 or first + count > limit:
            raise DiskError(f"blocks {first} to {first + count} are not within the first {limit}")

    def _run(self, level: int, kind: _Run, first: int, end: int) -> None:
        if level == self._shape.height:
            self._top(ZERO_ID if kind is _Run.ZERO else self._base_ids(level, 0, 1))
            return
        while first < end:
            page = first // FANOUT
            stop = self._whole_pages(level, kind, first, end)
            if stop > page:
                if any(page <= index < stop for index in self._open[level]):
                    self._twice(level, first)
                self._run(level + 1, kind, page, stop)
                first = min(stop * FANOUT, end)
            else:
                stop = min(end, (page + 1) * FANOUT)
                self._partial(level, kind, first, stop)
                first = stop

    def _whole_pages(self, level: int, kind: _Run, first: int, end: int) -> int:
        """The end of the pages that a run covers whole, beginning with that of `first`; not beyond it if none."""
        page = first // FANOUT
        if first % FANOUT:
            return page
        stop = self._shape.widths[level + 1] if end == self._shape.widths[level] else end // FANOUT
        # Only the last page can differ: the run is within the base, so all full pages are full there too.
        if kind is _Run.INHERIT and stop > page and not self._same(level, stop - 1):
            stop -= 1
        return stop

    def _same(self, level: int, page: int) -> bool:
        """Whether a page lists as many entries here as in the base."""
        assert self._base is not None
        return self._base.shape.entries(level, page) == self._shape.entries(level, page)

    def _partial(self, level: int, kind: _Run, first: int, end: int) -> None:
        index, start = first // FANOUT, first // FANOUT * FANOUT
        page = self._settle(level, index, first - start, end - start)
        if kind is _Run.INHERIT:
            page.runs.append((first - start, end - start))
            page.inherited += end - first
        self._complete(level, index, page)

    def _set(self, level: int, index: int, id: bytes) -> None:
        if level == self._shape.height:
            self._top(id)
            return
        at = index % FANOUT
        page = self._settle(level, index // FANOUT, at, at + 1)
        page.ids[at * ID : at * ID + ID] = id
        self._complete(level, index // FANOUT, page)

    def _settle(self, level: int, index: int, first: int, end: int) -> _Page:
        page = self._open[level].get(index)
        if page is None:
            if self._settled(level + 1, index):
                self._twice(level, index * FANOUT + first)
            page = self._open[level][index] = _Page(self._shape.entries(level, index))
        if not page.settle(first, end):
            self._twice(level, index * FANOUT + first)
        return page

    def _settled(self, level: int, index: int) -> bool:
        """Whether an entry was settled before, be it as part of a page that is closed by now."""
        if level == self._shape.height:
            return self._root is not None
        page = self._open[level].get(index // FANOUT)
        return bool(page.settled[index % FANOUT]) if page else self._settled(level + 1, index // FANOUT)

    def _complete(self, level: int, index: int, page: _Page) -> None:
        """Hand a page that has all its entries to the level above."""
        if page.missing:
            return
        del self._open[level][index]
        if page.inherited == len(page.settled) and self._same(level, index):
            self._run(level + 1, _Run.INHERIT, index, index + 1)
            return
        for first, end in page.runs:
            page.ids[first * ID : end * ID] = self._base_ids(level, index * FANOUT + first, index * FANOUT + end)
        if page.ids.count(0) == len(page.ids):
            self._run(level + 1, _Run.ZERO, index, index + 1)
        else:
            self._set(level + 1, index, self._writer.put_page(encode_page(level, page.ids)))

    def _base_ids(self, level: int, first: int, end: int) -> bytes:
        """Entries `[first, end)` of one page of the base, joined; at the level above its top, its root."""
        assert self._base is not None
        if level >= self._base.shape.height or end - first == 1:
            return self._base.child_id(level, first)
        ids = self._base.page(level, first // FANOUT)
        at = first % FANOUT * ID
        return bytes((end - first) * ID) if ids is None else ids[at : at + (end - first) * ID]

    def _top(self, id: bytes) -> None:
        if self._root is not None:
            self._twice(self._shape.height, 0)
        self._root = id

    def _twice(self, level: int, entry: int) -> NoReturn:
        raise DiskError(f"block {entry * FANOUT**level} or one after it was settled twice: extents overlap")

    def _first_missing(self) -> int:
        index = 0
        for pages in reversed(self._open):
            page = pages.get(index)
            index = index * FANOUT + (page.settled.find(0) if page else 0)
        return index
