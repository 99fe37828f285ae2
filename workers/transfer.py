"""Carry one disk of a snapshot into the vault: extents → block runs → blocks → block map.

A few threads share one iterator of work; each carries its blocks the whole way (read, zero?, hash, known?, compress,
seal, append) over a connection of its own. There is no queue between stages, so memory is bounded by construction:
threads × reads in flight × block size.

Change tracking is not believed blindly. A small random sample of the blocks that it calls unchanged is read again and
compared with the base; one mismatch and the whole disk is read (research, gap 1: nobody else detects bitmaps that are
stale but look valid, after a storage roll-back for instance). The last unchanged data block is always in the sample:
a disk that shrank and grew again since the base has lost its tail, and QEMU's bitmap the memory of it; then that block
is the one that certainly differs.

Nor is the vault: what it has lost is read again although nothing changed (`healing.py`).
"""

from __future__ import annotations

import random
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from workers.contract.errors import Corrupt, ObjectMissing
from workers.contract.extents import Kind
from workers.contract.points import Bottleneck, Figures
from workers.contract.seams import BlockSource
from workers.disks.blocks import block_runs
from workers.healing import Healing
from workers.parallel import share_out
from workers.vault import BlockMap, BlockWriter, MapWriter, Vault

READ_UNIT = 1 << 20
"""Bytes per read at the least: smaller blocks are read together where they are neighbours."""
WATCH_SECONDS = 0.5


@dataclass(slots=True)
class Tally:
    """What a running transfer has done so far; bytes and seconds."""

    total_bytes: int
    done_bytes: int = 0
    read_bytes: int = 0
    stored_bytes: int = 0
    seconds: float = 0.0
    read_wait: float = 0.0
    cpu: float = 0.0
    write: float = 0.0

    @property
    def bottleneck(self) -> Bottleneck:
        waits = {Bottleneck.READ: self.read_wait, Bottleneck.CPU: self.cpu, Bottleneck.WRITE: self.write}
        return max(waits, key=lambda kind: waits[kind])


Watch = Callable[[Tally], None]
"""Called every half second; raises to stop the transfer (cancelled, scratch full, machine started)."""


@dataclass(frozen=True, slots=True)
class Settings:
    block_size: int
    threads: int = 2
    audit_blocks: int = 8
    """Unchanged blocks that are read again in an incremental, besides the last one."""


@dataclass(frozen=True, slots=True)
class Transferred:
    root: bytes
    figures: Figures
    alert: str
    """Not empty: change tracking was wrong, and the disk was read in full."""
    healed: int = 0
    """Unchanged blocks that were read again because the vault had lost them."""


def transfer_disk(
    source: BlockSource, vault: Vault, settings: Settings, *, base: BlockMap | None, watch: Watch
) -> Transferred:
    """Everything durable in the vault when this returns: packs first, then their index.

    `base` is the map that unchanged blocks are inherited from, or None to read everything. Raises DiskError when the
    source fails or its extents do not tile the disk, and whatever `watch` raises.
    """
    started = time.monotonic()
    with _telling(vault), vault.writer() as writer:
        tally = Tally(source.size)
        run, alert = _incremental(source, vault, writer, settings, base, watch, tally) if base else (None, "")
        if run is None or alert:
            tally = Tally(source.size, read_bytes=tally.read_bytes)
            run = _Run(source, vault, writer, settings, None, watch, tally)
            run.carry()
        root = run.blocks.finish()
        writer.finish()
        figures = Figures(
            read_bytes=run.tally.read_bytes,
            new_bytes=writer.new_bytes,
            stored_bytes=writer.stored_bytes,
            metadata_bytes=writer.metadata_bytes,
            seconds=round(time.monotonic() - started, 3),
            bottleneck=run.measured().bottleneck,
        )
    return Transferred(root, figures, alert, run.healing.blocks)


@contextmanager
def _telling(vault: Vault) -> Iterator[None]:
    """Damage that is met on the way is told to every host, however it ends."""
    try:
        yield
    finally:
        vault.tell_damage()


def _incremental(
    source: BlockSource,
    vault: Vault,
    writer: BlockWriter,
    settings: Settings,
    base: BlockMap,
    watch: Watch,
    tally: Tally,
) -> tuple[_Run | None, str]:
    """A pass that inherits from `base`, and why it cannot be believed; `tally` counts what it read."""
    try:
        run = _Run(source, vault, writer, settings, base, watch, tally)
        run.carry()
        return run, run.audit()
    except (Corrupt, ObjectMissing) as error:  # of pages of the base: nothing else is read from the vault
        return None, f"the block map of the base cannot be read: {error}"


class _Run:
    """One pass over one disk."""

    def __init__(
        self,
        source: BlockSource,
        vault: Vault,
        writer: BlockWriter,
        settings: Settings,
        base: BlockMap | None,
        watch: Watch,
        tally: Tally,
    ) -> None:
        self._source = source
        self._vault = vault
        self._writer = writer
        self._settings = settings
        self._base = base
        self._watch = watch
        self._reader = vault.reader()
        self.healing = Healing.of(base, writer)
        self.blocks = MapWriter(writer, self._reader, source.size, settings.block_size, base)
        self.tally = tally
        self._started = self._watched = time.monotonic()
        chosen = base.sample(random.Random(), settings.audit_blocks) if base is not None else []
        self._candidates = sorted(chosen)
        self._audited: list[int] = []
        self._last_inherited: int | None = None  # of those that are not zero
        self._waits: list[list[float]] = []  # seconds waited for reads, one cell a thread

    def carry(self) -> None:
        share_out(self._units(), self._carry_some, self._settings.threads)
        self._watch(self.measured())

    def measured(self) -> Tally:
        self.tally.stored_bytes = self._writer.stored_bytes
        self.tally.read_wait = sum(cell[0] for cell in self._waits)
        self.tally.cpu = self._writer.cpu_seconds
        self.tally.write = self._writer.write_seconds
        self.tally.seconds = time.monotonic() - self._started
        return self.tally

    def _units(self) -> Iterator[tuple[int, int]]:
        """`(offset, length)` of what must be read. Pulled under the lock of `share_out`, so it may count and watch."""
        size, block = self._source.size, self._settings.block_size
        extents = self._source.extents(trust_changes=self._base is not None)
        inheritable = None if self._base is None else self._base.size
        unit = max(READ_UNIT, block)
        for run in self.healing.runs(block_runs(extents, size, block, inheritable=inheritable)):
            start, end = run.first * block, min((run.first + run.count) * block, size)
            if run.kind is Kind.DATA:
                for offset in range(start, end, unit):
                    length = min(unit, end - offset)
                    self._tick(length)
                    self.tally.read_bytes += length
                    yield offset, length
                continue
            if run.kind is Kind.ZERO:
                self.blocks.zero(run.first, run.count)
            else:
                self._inherit(run.first, run.first + run.count)
            self._tick(end - start)

    def _inherit(self, first: int, end: int) -> None:
        assert self._base is not None
        self.blocks.inherit(first, end - first)
        self._audited += self._candidates[bisect_left(self._candidates, first) : bisect_left(self._candidates, end)]
        last = self._base.last_data(first, end)
        self._last_inherited = self._last_inherited if last is None else last

    def _tick(self, length: int) -> None:
        self.tally.done_bytes += length
        now = time.monotonic()
        if now - self._watched >= WATCH_SECONDS:
            self._watched = now
            self._watch(self.measured())

    def _carry_some(self, units: Iterator[tuple[int, int]]) -> None:
        block, put = self._settings.block_size, self._writer.put
        waited = [0.0]
        self._waits.append(waited)
        since = time.monotonic()
        for offset, data in self._source.read(units):
            waited[0] += time.monotonic() - since
            for start in range(0, len(data), block):
                index, id = (offset + start) // block, put(data[start : start + block])
                self.healing.seen(index, id)
                self.blocks.set(index, id)
            since = time.monotonic()

    def audit(self) -> str:
        """Read the sample again; what was wrong, or nothing."""
        block, size = self._settings.block_size, self._source.size
        base = self._base
        if self.healing.wrong is not None:
            start = self.healing.wrong * block
            return f"change tracking called bytes {start} to {min(start + block, size)} unchanged, but they differ"
        if base is None or self._last_inherited is None:
            return ""
        chosen = sorted({*self._audited, self._last_inherited})
        ranges = [(index * block, min(block, size - index * block)) for index in chosen]
        for offset, data in self._source.read(iter(ranges)):
            self.tally.read_bytes += len(data)
            if self._reader.block_id(data) != base.id_at(offset // block):
                return f"change tracking called bytes {offset} to {offset + len(data)} unchanged, but they differ"
        return ""
