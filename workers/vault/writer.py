"""The writing side: blocks in, ids out. The hot path of every backup.

Each calling thread carries its block the whole way (zero? → hash → known? → compress → seal → append), so memory is
bounded by the number of threads and no queue stands between stages. A thread takes an open pack for itself, appends,
and puts it back: nothing is done under the lock but that. (Measured with two threads: as fast as the same steps with
nothing shared; sealing, hashing and writing one common pack under a lock reaches 70 %.) The price is a pack that is not
filled per thread, so a second one is opened only by a writer that has stored 16 MiB.

An id counts as known only when its block is in a durable, indexed pack that no sweep may remove while the writer works
(`reliable`), or in a pack of this very writer, which `finish` makes durable before anybody can refer to it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType

import zstandard
from blake3 import blake3

from workers.contract.errors import NoSpace, VaultError
from workers.contract.seams import Store
from workers.vault.index import FLUSH, Index, Packs, write_segment
from workers.vault.packs import DATA, PAGE, RAW, TARGET, ZERO_ID, ZSTD, PackBuilder, pack_name
from workers.vault.sealing import Keyring

_ZEROES = bytes(4 << 20)
_SPREAD = 16 << 20
"""Sealed bytes before a writer keeps more than one pack open."""


def is_zero(data: bytes | memoryview) -> bool:
    """Whether `data` is all zero bytes: memcmp, which stops at the first other byte; no copy."""
    if len(data) <= len(_ZEROES):
        return _ZEROES.startswith(data)
    step = len(_ZEROES)
    return all(_ZEROES.startswith(data[start : start + step]) for start in range(0, len(data), step))


@dataclass(slots=True)
class _Stats:
    """What one thread did; each is touched by its thread alone."""

    new: int = 0
    stored: int = 0
    metadata: int = 0
    cpu: float = 0.0
    write: float = 0.0


class _Lane(threading.local):
    """What a thread keeps to itself: its compressor and its figures."""

    def __init__(self, register: list[_Stats]) -> None:
        self.compressor = zstandard.ZstdCompressor(level=1)
        self.stats = _Stats()
        register.append(self.stats)


class BlockWriter:
    """Stores blocks that the vault does not have. Thread-safe. A context manager: left without `finish`, or by an
    exception, it removes what is unfinished (blocks in packs that are durable already stay known to later writers)."""

    def __init__(
        self,
        store: Store,
        keys: Keyring,
        index: Index,
        reliable: set[int],
        *,
        missing: Collection[bytes] = (),
        pack_size: int = TARGET,
        retain: datetime | None = None,
    ) -> None:
        """`reliable`: numbers of packs in the index; `missing`: packs (digests) that the index names and that the store
        does not have; `retain`: until when nobody is to delete the packs that it writes (`locks.py`)."""
        self._store = store
        self._keys = keys
        self._index = index
        self._reliable = reliable
        self._missing = missing
        self._pack_size = pack_size
        self._retain = retain
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._register: list[_Stats] = []
        self._lane = _Lane(self._register)
        self._idle: list[PackBuilder] = []
        """Open packs that no thread holds now."""
        self._held = 0
        self._appended = 0
        self._mine: set[bytes] = set()
        """Ids in packs of this writer that the index does not have yet."""
        self._durable: Packs = {}
        """Durable packs that no segment names yet."""
        self._state = "open"
        self._failure: BaseException | None = None
        """Why it failed; told to the threads that come too late, so that whoever is heard first gives the cause."""

    # --- figures ---------------------------------------------------------------------------------------------------

    @property
    def new_bytes(self) -> int:
        """Plain bytes of data blocks that the vault did not have."""
        return sum(stats.new for stats in self._register)

    @property
    def stored_bytes(self) -> int:
        """Sealed bytes written to packs, map pages included."""
        return sum(stats.stored for stats in self._register)

    @property
    def metadata_bytes(self) -> int:
        """Of `stored_bytes`, those of map pages."""
        return sum(stats.metadata for stats in self._register)

    @property
    def cpu_seconds(self) -> float:
        """Spent in hashing, look-up and compression, summed over threads."""
        return sum(stats.cpu for stats in self._register)

    @property
    def write_seconds(self) -> float:
        """Spent in sealing and writing packs, and in waiting to do so, summed over threads."""
        return sum(stats.write for stats in self._register)

    # --- what is lost ----------------------------------------------------------------------------------------------

    @property
    def doubtful(self) -> bool:
        """Whether blocks may be lost: damage is known, or packs or segments are missing."""
        return bool(self._missing) or self._index.doubtful()

    def lost(self, ids: Sequence[bytes]) -> set[bytes]:
        """Those of `ids` (at most 32,000) of which the vault has no good copy, as far as is known. Put, they are stored
        again, and every point that needs them is whole again."""
        return self._index.lost(ids, self._missing)

    # --- the way of a block ----------------------------------------------------------------------------------------

    def put(self, data: bytes | memoryview) -> bytes:
        """Store a data block unless it is known or all zero; its id. Raises NoSpace, VaultError."""
        started = time.perf_counter()
        if is_zero(data):
            self._lane.stats.cpu += time.perf_counter() - started
            return ZERO_ID
        return self._put(DATA, data, self._keys.data_id_key, started)

    def put_page(self, page: bytes) -> bytes:
        """Store a page of a block map; its id."""
        return self._put(PAGE, page, self._keys.page_id_key, time.perf_counter())

    def _put(self, kind: int, data: bytes | memoryview, key: bytes, started: float) -> bytes:
        lane = self._lane
        stats = lane.stats
        id = blake3(data, key=key).digest()
        if not self._claim(id):
            stats.cpu += time.perf_counter() - started
            return id
        try:
            packed = lane.compressor.compress(data)
            codec, payload = (ZSTD, packed) if len(packed) <= len(data) * 0.95 else (RAW, data)
            compressed = time.perf_counter()
            stats.cpu += compressed - started
            stored = self._append(kind, id, len(data), codec, payload)
            stats.write += time.perf_counter() - compressed
        except BaseException as error:
            self._fail(error)  # other threads may have been told that this block is known
            raise
        stats.stored += stored
        if kind == PAGE:
            stats.metadata += stored
        else:
            stats.new += len(data)
        return id

    def _claim(self, id: bytes) -> bool:
        """Whether the calling thread is to store the block."""
        if id in self._mine or self._index.has(id, self._reliable):
            return False
        with self._lock:
            if id in self._mine:
                return False
            self._mine.add(id)
            return True

    def _append(self, kind: int, id: bytes, plain: int, codec: int, payload: bytes | memoryview) -> int:
        pack = self._take()
        try:
            entry = pack.append(kind, id, plain, codec, payload)
        except BaseException:
            pack.abandon()
            self._give_back(None)
            raise
        full = pack.full(self._pack_size)
        self._give_back(None if full else pack, entry.stored)
        if full:
            self._store_pack(pack)
        return entry.stored

    def _take(self) -> PackBuilder:
        """An open pack for the calling thread alone."""
        with self._lock:
            while self._state == "open" and not self._idle and self._held and self._appended < _SPREAD:
                self._changed.wait()
            if self._failure is not None:
                raise self._failure
            if self._state != "open":
                raise VaultError(f"the writer is {self._state}: nothing can be added")
            self._held += 1
            if self._idle:
                return self._idle.pop()
        try:
            return PackBuilder(self._store.staging(), self._keys)
        except BaseException:
            self._give_back(None)
            raise

    def _give_back(self, pack: PackBuilder | None, appended: int = 0) -> None:
        """End what `_take` began; `pack` is None if it takes no more blocks."""
        with self._lock:
            self._held -= 1
            self._appended += appended
            unwanted = pack if self._state != "open" else None
            if pack is not None and unwanted is None:
                self._idle.append(pack)
            self._changed.notify()
        if unwanted is not None:
            unwanted.abandon()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._state = "failed"
            self._failure = self._failure or error
            self._changed.notify_all()

    # --- packs and segments ----------------------------------------------------------------------------------------

    def _store_pack(self, pack: PackBuilder) -> None:
        """Make a pack durable, outside the lock: other threads fill others meanwhile."""
        try:
            digest = pack.close()
            self._store.put_file(pack_name(digest), pack.path)
            if self._retain is not None:
                self._store.retain(pack_name(digest), self._retain)
        finally:
            pack.abandon()
        with self._lock:
            self._durable[digest] = pack.entries
            if sum(map(len, self._durable.values())) <= FLUSH:
                return
            ready, self._durable = self._durable, {}
        self._flush(ready)

    def _flush(self, packs: Packs) -> None:
        name = write_segment(self._store, self._keys, packs)
        numbers = self._index.add(name, packs)
        with self._lock:
            self._reliable |= numbers
            for entries in packs.values():
                self._mine.difference_update(entry.id for entry in entries)

    def finish(self) -> None:
        """Make all packs durable, then the index segments that name them. After it, all ids returned may be relied
        on. No other thread may be inside `put`. Raises VaultError if any `put` failed."""
        with self._lock:
            if self._state == "finished":
                return
            if self._state != "open":
                raise VaultError(f"the writer is {self._state}: its blocks cannot be relied on")
            self._state = "finishing"
            packs, self._idle = self._idle, []
        try:
            while packs:
                self._store_pack(packs.pop())
            ready, self._durable = self._durable, {}
            if ready:
                self._flush(ready)
        except BaseException:
            self._state = "failed"
            for pack in packs:
                pack.abandon()
            raise
        self._state = "finished"

    def abandon(self) -> None:
        """Give up: remove the unfinished pack, and index the durable ones so that the next attempt need not store
        their blocks again."""
        with self._lock:
            if self._state == "finished":
                return
            self._state = "abandoned"
            packs, self._idle = self._idle, []
            ready, self._durable = self._durable, {}
            self._changed.notify_all()
        for pack in packs:
            pack.abandon()
        if ready:
            with suppress(VaultError, NoSpace):
                self._flush(ready)

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()
