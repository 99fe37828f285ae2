"""What do the points need? The marking half of a sweep.

Live blocks are remembered by the first eight bytes of their ids, in one sorted array: 8 bytes a block instead of the
hundred of a set, so ten TiB of different blocks take a third of a GiB. Two ids that begin alike would keep a block that
nobody needs; never the other way round.

A page of a map is read once, however many points share it: the cost is that of different pages, not of points times
disk size. Whatever cannot be read stops the marking, since nobody knows what it would have named.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from workers.contract.errors import Corrupt, NewerFormat, ObjectMissing, VaultError
from workers.contract.points import DiskPoint, Point
from workers.vault.blockmap import FANOUT, ID, BlockMap
from workers.vault.index import Index
from workers.vault.packs import ZERO_ID
from workers.vault.vault import Vault

READERS = 8
"""Pages read at a time: an object store answers after tens of milliseconds."""
_PENDING = 4 << 20
"""Ids after which they are merged into the array: 32 MiB."""
_BATCH = 512
"""Pages that are in memory at a time: 16 MiB."""
Prefixes = NDArray[np.uint64]


def prefixes(ids: bytes | bytearray) -> Prefixes:
    """The first eight bytes of each id in `ids`, as numbers."""
    return np.frombuffer(ids, dtype=">u8")[:: ID // 8].astype(np.uint64)


@dataclass
class Marks:
    """Live blocks, as far as points were walked."""

    points: set[str] = field(default_factory=set)
    """Ids of those that are done, and of aborted markers."""
    manifests: int = 0
    """Of `points`, those that are no markers."""
    pages: set[bytes] = field(default_factory=set)
    _live: Prefixes = field(default_factory=lambda: np.empty(0, np.uint64))
    _pending: list[Prefixes] = field(default_factory=list)
    _waiting: int = 0

    def add(self, ids: bytes | bytearray) -> None:
        """`ids`, joined, are live."""
        self._pending.append(prefixes(ids))
        self._waiting += len(ids) // ID
        if self._waiting > _PENDING:
            self._merge()

    def live(self) -> Prefixes:
        """Sorted, each once."""
        self._merge()
        return self._live

    def of(self, found: Prefixes) -> NDArray[np.bool_]:
        """Which of `found` are live."""
        live = self.live()
        if not len(live):
            return np.zeros(len(found), dtype=np.bool_)
        at = np.minimum(np.searchsorted(live, found), len(live) - 1)
        known: NDArray[np.bool_] = live[at] == found
        return known

    def _merge(self) -> None:
        if self._pending:
            new = np.unique(np.concatenate(self._pending))
            self._pending, self._waiting = [], 0
            self._live = np.union1d(self._live, new) if len(self._live) else new


class _Page(NamedTuple):
    blocks: BlockMap
    level: int
    position: int
    """Which page of its level it is."""
    id: bytes


OnPoint = Callable[[int, int], None]
"""Points walked, of how many."""


def mark(vault: Vault, marks: Marks, on_point: OnPoint, *, without: Collection[str] = ()) -> None:
    """Walk every point of the vault, but those of `without`, that `marks` does not know yet. Raises VaultError if one
    of them, or a page of its maps, cannot be read."""
    waiting = [one for one in vault.point_ids() if one not in marks.points and one not in without]
    with ThreadPoolExecutor(READERS, thread_name_prefix="mark") as pool:
        for done, point_id in enumerate(waiting):
            on_point(done, len(waiting))
            found = vault.manifest(point_id)
            if isinstance(found, str):
                raise VaultError(
                    f"point {point_id} cannot be read, so nobody knows what it needs: {found}",
                    hint=f"stillframe vault repair; or give the point up: stillframe point delete {point_id}",
                )
            if found is not None:
                marks.manifests += 1
                _walk_point(vault, found, marks, pool)
            marks.points.add(point_id)
    on_point(len(waiting), len(waiting))


def _walk_point(vault: Vault, point: Point, marks: Marks, pool: ThreadPoolExecutor) -> None:
    try:
        for disk in point.disks:
            _walk_disk(vault, disk, marks, pool)
    except (Corrupt, ObjectMissing, NewerFormat) as error:
        if next(vault.store.list(f"points/{point.id}"), None) is None:
            return  # deleted since it was listed, and swept by somebody else
        raise VaultError(
            f"point {point.id} of {point.machine.name} cannot be read whole, so nobody knows what it needs: {error}",
            hint="stillframe vault repair; or give the point up: stillframe point delete " + point.id[:8],
        ) from error


def _walk_disk(vault: Vault, disk: DiskPoint, marks: Marks, pool: ThreadPoolExecutor) -> None:
    blocks = BlockMap(vault.reader(refresh=False), bytes.fromhex(disk.root), disk.capacity, disk.block_size)
    level = blocks.shape.height - 1
    pages = _unseen([_Page(blocks, level, 0, blocks.root)], marks)
    while pages:
        batch, pages = pages[-_BATCH:], pages[:-_BATCH]  # deepest last: few pages wait, however wide the tree is
        for page, ids in zip(batch, pool.map(_load, batch), strict=True):
            marks.add(ids)
            if page.level:
                pages += _unseen(_children(page, ids), marks)


def _load(page: _Page) -> bytes:
    return page.blocks.load(page.id, page.level, page.position)


def _children(page: _Page, ids: bytes) -> Iterator[_Page]:
    for at in range(len(ids) // ID):
        id = ids[at * ID : at * ID + ID]
        yield _Page(page.blocks, page.level - 1, page.position * FANOUT + at, id)


def _unseen(pages: Iterator[_Page] | list[_Page], marks: Marks) -> list[_Page]:
    """Those that no point has had so far; they are live, too."""
    new = []
    for page in pages:
        if page.id != ZERO_ID and page.id not in marks.pages:
            marks.pages.add(page.id)
            marks.add(page.id)
            new.append(page)
    return new


# --- from live blocks to packs -----------------------------------------------------------------------------------


@dataclass
class Use:
    """What of a pack is needed."""

    blocks: int = 0
    """Of all kinds, needed or not."""
    stored: int = 0
    """Bytes of its sealed blocks."""
    needed: int = 0
    """Of these, the bytes of live blocks for which this copy counts."""
    only: int = 0
    """Live blocks of which no other copy is fit to be the one that counts."""


def uses(index: Index, marks: Marks, fit: set[int]) -> dict[int, Use]:
    """Number of a pack in the index → what of it is needed. Of each live block one copy counts: the first good one in
    a pack that is `fit`. Where there is none, all its copies are the `only` ones."""
    found: dict[int, Use] = {}
    for ids, packs, stored, good in _columns(index):
        live = marks.of(prefixes(ids))
        numbers, at = np.unique(packs, return_inverse=True)
        eligible = live & good & np.isin(packs, list(fit))
        group = _groups(ids)
        served = np.zeros(group[-1] + 1, dtype=np.bool_)
        served[group[eligible]] = True
        first = np.zeros(len(packs), dtype=np.bool_)
        first[np.flatnonzero(eligible)[np.unique(group[eligible], return_index=True)[1]]] = True
        orphan = live & ~served[group]
        for number, blocks, all_bytes, needed, only in zip(
            numbers.tolist(),
            np.bincount(at).tolist(),
            np.bincount(at, stored).tolist(),
            np.bincount(at, stored * first).tolist(),
            np.bincount(at, orphan).tolist(),
            strict=True,
        ):
            use = found.setdefault(number, Use())
            use.blocks += int(blocks)
            use.stored += int(all_bytes)
            use.needed += int(needed)
            use.only += int(only)
    return found


def _groups(ids: bytes) -> NDArray[np.int64]:
    """For each id the number of its group: equal ones, which stand together, have the same."""
    words = np.frombuffer(ids, dtype=np.uint64).reshape(-1, ID // 8)
    changes = np.any(words[1:] != words[:-1], axis=1)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(changes)])


def _columns(index: Index) -> Iterator[tuple[bytes, NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]]:
    """`Index.rows` as columns; all copies of one block come together."""
    held: list[tuple[bytes, int, int, bool]] = []
    for rows in index.rows():
        held += rows
        last = held[-1][0]
        cut = len(held)
        while cut and held[cut - 1][0] == last:
            cut -= 1
        if cut:
            yield _column(held[:cut])
        held = held[cut:]
    if held:
        yield _column(held)


def _column(
    rows: list[tuple[bytes, int, int, bool]],
) -> tuple[bytes, NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    ids, packs, stored, good = zip(*rows, strict=True)
    return b"".join(ids), np.array(packs, np.int64), np.array(stored, np.int64), np.array(good, np.bool_)
