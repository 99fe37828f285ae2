"""What of a disk must be read again because the vault has lost it.

A bitmap tells what changed on the disk, not what rotted in the vault. An incremental inherits whole subtrees of its
base's map, and with them blocks of which no good copy is left. So where damage is known, the base's map is walked
before the transfer, and what is lost is treated as changed: the disk still has it, the writer stores it under the same
id, and every older point that needs it is whole again.

Nothing of this happens while no damage is known. Else it costs a look at every page of the base's map and a look-up
for each block: 128 MiB of pages and some ten seconds for each TiB of data in blocks of 256 KiB.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from workers.contract.extents import Kind
from workers.disks.blocks import BlockRun, joined
from workers.vault import ZERO_ID, BlockMap, BlockWriter
from workers.vault.blockmap import FANOUT, ID, encode_page


class Healing:
    """The blocks of one base that are lost, and which of them a transfer has to read for that reason alone."""

    def __init__(self, lost: dict[int, bytes]) -> None:
        self._lost = lost
        """Index → id that the base's map has for it."""
        self._indexes = sorted(lost)
        self._expected: dict[int, bytes] = {}
        self.wrong: int | None = None
        """A block that was called unchanged, and has another content than the base says."""

    @staticmethod
    def of(base: BlockMap | None, writer: BlockWriter) -> Healing:
        """Look for what is lost. Pages that can still be read, though not from a copy to rely on, are stored again at
        once. Raises Corrupt, ObjectMissing if a page cannot be read at all."""
        if base is None or not writer.doubtful:
            return Healing({})
        lost: dict[int, bytes] = {}
        for level, page, id, ids in base.pages():
            if writer.lost([id]):
                writer.put_page(encode_page(level, ids))
            if level:
                continue
            children = [ids[at : at + ID] for at in range(0, len(ids), ID)]
            gone = writer.lost(children) - {ZERO_ID}
            if gone:
                lost |= {page * FANOUT + at: child for at, child in enumerate(children) if child in gone}
        return Healing(lost)

    @property
    def blocks(self) -> int:
        """Blocks that were read again."""
        return len(self._expected)

    def runs(self, runs: Iterable[BlockRun]) -> Iterator[BlockRun]:
        """The same runs, but what is unchanged and lost is to be read."""
        return joined(piece for run in runs for piece in self._pieces(run))

    def _pieces(self, run: BlockRun) -> Iterator[BlockRun]:
        first, end = run.first, run.first + run.count
        if run.kind is Kind.UNCHANGED:
            for index in self._indexes[bisect_left(self._indexes, first) : bisect_left(self._indexes, end)]:
                if index > first:
                    yield BlockRun(first, index - first, Kind.UNCHANGED)
                self._expected[index] = self._lost[index]
                yield BlockRun(index, 1, Kind.DATA)
                first = index + 1
        if end > first:
            yield BlockRun(first, end - first, run.kind)

    def seen(self, index: int, id: bytes) -> None:
        """A block was read and has this id. Thread-safe."""
        if self._expected.get(index, id) != id:
            self.wrong = index
