"""The reading side: ids in, blocks out, every one checked.

The cipher binds a sealed block to its id, and the hash is computed again after decompression: whatever the store
returns, the caller gets the bytes that were written, or an error that names the pack. If a block has several copies,
a damaged one is passed over; if the vault has several stores, each one's bytes are tried. Whoever finds damage tells
the index, so that no later point is built on it. A pack that is gone may have been replaced by a sweep on another
host: then the index knows better after a refresh.

Who wants many blocks asks for spans: neighbours in a pack come with one read. Over a link with 30 ms to the store, one
read per block of 256 KiB brings 8 MB/s per thread, whatever the bandwidth. Memory stays bounded: a span is read by the
thread that decodes it, when it asks for it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from workers.contract.errors import Corrupt, NewerFormat, ObjectMissing, VaultError
from workers.contract.seams import Store
from workers.vault.index import Index, Location
from workers.vault.packs import DATA, LARGEST_BLOCK, PAGE, RAW, ZERO_ID, ZSTD, aad, nonce, pack_cipher
from workers.vault.sealing import TAG, Keyring, decompressed
from workers.vault.writer import is_zero

_PAGES = 256
_CIPHERS = 4096
V = TypeVar("V")
T = TypeVar("T")
WINDOW = 1024
"""Blocks among which neighbours are looked for; two threads that wrote a disk have put it into two packs, by turns."""
SPAN = 4 << 20
"""Bytes of one read, at most (a larger block is one read all the same)."""
GAP = 256 << 10
"""Unwanted bytes that are read rather than begin another read."""


class Piece(NamedTuple, Generic[T]):
    """One wanted block, what its reader calls it, and a copy of it; None where the index knows none."""

    tag: T
    id: bytes
    location: Location | None


Span = list[Piece[T]]
"""Blocks that one read brings: near each other in one pack, in order. Never empty."""


class _Recent(Generic[V]):
    """The most recently used values, at most `limit`. Thread-safe; two threads may make the same value at once."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            self._values[key] = value
            if len(self._values) > self._limit:
                self._values.popitem(last=False)
        return value


class _Lane(threading.local):
    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()


class BlockReader:
    """Reads blocks by id. Thread-safe; keeps at most 256 pages (8 MiB) in memory."""

    def __init__(self, store: Store, keys: Keyring, index: Index) -> None:
        self._store = store
        self._keys = keys
        self._index = index
        self._lane = _Lane()
        self._ciphers: _Recent[AESGCM] = _Recent(_CIPHERS)
        self._pages: _Recent[bytes] = _Recent(_PAGES)

    def get(self, id: bytes) -> bytes:
        """A data block (not ZERO_ID, which has no length). Raises ObjectMissing, Corrupt."""
        return self._get(DATA, id)

    def get_page(self, id: bytes) -> bytes:
        """A page of a block map (not ZERO_ID). Raises ObjectMissing, Corrupt."""
        return self._pages.get(id, lambda: self._get(PAGE, id))

    def spans(self, wanted: Iterator[tuple[T, bytes]]) -> Iterator[Span[T]]:
        """`(tag, id)` of data blocks, put together so that neighbours in a pack are one read. Nothing is read yet."""
        while window := list(islice(wanted, WINDOW)):
            packs: dict[str, list[Piece[T]]] = {}
            alone: list[Piece[T]] = []
            for tag, id in window:
                location = next(iter(self._index.find(id)), None)
                if location is not None and location.entry.stored > LARGEST_BLOCK + TAG:
                    location = None  # no block is; who reads it alone says so
                pieces = alone if location is None else packs.setdefault(location.pack, [])
                pieces.append(Piece(tag, id, location))
            for pack in packs.values():
                yield from _neighbours(pack)
            yield from ([piece] for piece in alone)

    def read(self, span: Span[T]) -> Iterator[tuple[T, bytes]]:
        """The blocks of a span, checked. What one read does not bring is read again alone, from another copy if there
        is one. Raises ObjectMissing, Corrupt, NewerFormat."""
        sealed, start = b"", 0
        if (first := span[0].location) is not None and (last := span[-1].location) is not None:
            start = first.entry.offset
            with suppress(Corrupt, NewerFormat, ObjectMissing):
                sealed = self._store.get(first.pack, start, last.entry.offset + last.entry.stored - start)
        for tag, id, location in span:
            data = None
            if sealed and location is not None:
                at = location.entry.offset - start
                with suppress(Corrupt, NewerFormat, ObjectMissing):
                    data = self._unseal(
                        self._store, location, DATA, memoryview(sealed)[at : at + location.entry.stored]
                    )
            yield tag, self.get(id) if data is None else data

    def block_id(self, data: bytes | memoryview) -> bytes:
        """The id that `data` has as a data block; ZERO_ID if it is all zero."""
        return ZERO_ID if is_zero(data) else blake3(data, key=self._keys.data_id_key).digest()

    def _get(self, kind: int, id: bytes) -> bytes:
        if id == ZERO_ID:
            raise ValueError("the zero block is not stored")
        tried: list[Location] = []
        first: Corrupt | NewerFormat | ObjectMissing | None = None
        while left := [location for location in self._index.find(id) if location not in tried]:
            for location in left:
                try:
                    return self.open(location, kind)
                except (Corrupt, NewerFormat, ObjectMissing) as error:
                    first = first or error
            tried += left
            self._index.refresh()
        if first is not None:
            raise first
        raise ObjectMissing(f"block {id.hex()[:16]}… is in no index segment of the vault", hint=_MISSING_HINT)

    def open(self, location: Location, kind: int) -> bytes:
        """One copy of a block, checked; one that is damaged is distrusted, even if another store of the vault has the
        right bytes. (One in a pack that is gone need not be: no writer relies on what it does not find.)
        Raises ObjectMissing, Corrupt, NewerFormat."""
        try:
            return self._opened(self._store, location, kind)
        except (Corrupt, NewerFormat, ObjectMissing) as error:
            if isinstance(error, Corrupt):
                self._index.distrust(location.entry.id, location.pack)
            places = self._store.copies()
            for place in places if len(places) > 1 else ():
                with suppress(VaultError):
                    return self._opened(place, location, kind)
            raise

    def _opened(self, store: Store, location: Location, kind: int) -> bytes:
        _require_block(location, kind)
        sealed = store.get(location.pack, location.entry.offset, location.entry.stored)
        return self._unseal(store, location, kind, sealed)

    def _unseal(self, store: Store, location: Location, kind: int, sealed: bytes | memoryview) -> bytes:
        _require_block(location, kind)
        name, entry = location
        where = _where(location)
        cipher = self._ciphers.get((store.features.place, name), lambda: pack_cipher(store, name, self._keys))
        try:
            data = cipher.decrypt(
                nonce(entry.offset), sealed, aad(self._keys.vault, kind, entry.codec, entry.id, entry.plain)
            )
            if entry.codec == ZSTD:
                data = decompressed(self._lane.decompressor, data, entry.plain)
            elif entry.codec != RAW:
                raise Corrupt(f"{where} has codec {entry.codec}, which this Stillframe does not know")
        except (InvalidTag, ValueError, zstandard.ZstdError):
            raise Corrupt(f"{where} is not what was written", hint=_CORRUPT_HINT) from None
        key = self._keys.data_id_key if kind == DATA else self._keys.page_id_key
        if len(data) != entry.plain or blake3(data, key=key).digest() != entry.id:
            raise Corrupt(f"{where} does not have the content that its id says", hint=_CORRUPT_HINT)
        return data


def _where(location: Location) -> str:
    return f"block {location.entry.id.hex()[:16]}… in {location.pack}"


def _require_block(location: Location, kind: int) -> None:
    """Raises Corrupt if the index says what cannot be, before anything of that size is read."""
    entry = location.entry
    if entry.kind != kind:
        raise Corrupt(f"{_where(location)} is of another kind than was asked for")
    if entry.plain > LARGEST_BLOCK or entry.stored > entry.plain + TAG:
        raise Corrupt(f"{_where(location)} is larger than a block can be")


def _neighbours(pieces: list[Piece[T]]) -> Iterator[Span[T]]:
    """Cut what is wanted of one pack where too much lies between, or a read would be too long."""
    span: Span[T] = []
    start = end = 0
    for piece in sorted(pieces, key=_offset):
        assert piece.location is not None
        entry = piece.location.entry
        if span and (entry.offset > end + GAP or entry.offset + entry.stored > start + SPAN):
            yield span
            span = []
        if not span:
            start = entry.offset
        span.append(piece)
        end = entry.offset + entry.stored
    yield span


def _offset(piece: Piece[Any]) -> int:
    return 0 if piece.location is None else piece.location.entry.offset


_MISSING_HINT = "`stillframe vault verify` lists the points that need it"
_CORRUPT_HINT = "`stillframe vault verify --full` lists what is damaged and which points need it"
