"""Which block is where: index segments in the vault, and this host's look-up cache of them.

Segments are the truth that writers share; the cache (SQLite, 55 bytes a block on disk and next to nothing in memory)
only makes it quick to ask, and is thrown away whenever it is doubted. It names the segments it holds: what vanished
from the vault leaves the cache at the next refresh, so that no writer relies on a block that is gone. The same holds
for damaged copies (`damage.py`): a refresh costs one more listing, and nothing else where there is no damage.
"""

from __future__ import annotations

import hashlib
import sqlite3
import struct
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from workers.contract.errors import Corrupt, NoSpace, ObjectMissing, VaultError
from workers.contract.seams import Store
from workers.vault import damage
from workers.vault.cache import environment, transaction
from workers.vault.damage import Copy
from workers.vault.packs import ENTRY_SIZE, Entry, decode_entries, digest_of, encode_entries, pack_name
from workers.vault.sealing import INDEX, Keyring, open_object, seal_object

FLUSH = 65_536
"""Entries after which a writer writes a segment."""
PREFIX = "index/"
_PACK = struct.Struct(">32sI")
T = TypeVar("T")
_SCHEMA_VERSION = 4
_SCHEMA = f"""
CREATE TABLE segments (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE packs (id INTEGER PRIMARY KEY AUTOINCREMENT, digest BLOB NOT NULL UNIQUE);
CREATE TABLE named (segment INTEGER NOT NULL, pack INTEGER NOT NULL, PRIMARY KEY (segment, pack)) WITHOUT ROWID;
CREATE TABLE blocks (
    id BLOB NOT NULL, pack INTEGER NOT NULL, offset INTEGER NOT NULL, stored INTEGER NOT NULL, plain INTEGER NOT NULL,
    kind INTEGER NOT NULL, codec INTEGER NOT NULL, PRIMARY KEY (id, pack)
) WITHOUT ROWID;
{damage.SCHEMA}
PRAGMA user_version = {_SCHEMA_VERSION};
"""
_BLOCKS = "blocks JOIN packs ON packs.id = blocks.pack"
_NAMED = """
SELECT segments.name, packs.id, packs.digest FROM named
    JOIN segments ON segments.id = named.segment JOIN packs ON packs.id = named.pack
"""
Packs = dict[bytes, list[Entry]]
"""SHA-256 of a pack → its entries."""


class Location(NamedTuple):
    """Where one copy of a block is."""

    pack: str
    entry: Entry


# --- segments ------------------------------------------------------------------------------------------------------


def encode_segment(packs: Packs) -> bytes:
    return b"".join(_PACK.pack(digest, len(entries)) + encode_entries(entries) for digest, entries in packs.items())


def decode_segment(plain: bytes, what: str) -> Packs:
    """Raises Corrupt."""
    packs: Packs = {}
    position = 0
    while position < len(plain):
        if position + _PACK.size > len(plain):
            raise Corrupt(f"{what} is cut short")
        digest, count = _PACK.unpack_from(plain, position)
        position += _PACK.size
        end = position + count * ENTRY_SIZE
        if end > len(plain):
            raise Corrupt(f"{what} is cut short")
        packs.setdefault(digest, []).extend(decode_entries(plain[position:end]))
        position = end
    return packs


def write_segment(store: Store, keys: Keyring, packs: Packs) -> str:
    """Write `packs`, all durable already, as a segment; its name. Raises VaultError for more than one can hold."""
    data = seal_object(INDEX, keys.data, keys.vault, "", encode_segment(packs))
    name = PREFIX + hashlib.sha256(data).hexdigest()
    store.put(name, data)
    return name


def write_segments(store: Store, keys: Keyring, packs: Packs) -> Iterator[tuple[str, Packs]]:
    """Write any number of packs as segments of about `FLUSH` entries; each with what is in it, once it is durable."""
    part: Packs = {}
    count = 0
    for digest, entries in packs.items():
        part[digest] = entries
        count += len(entries)
        if count >= FLUSH:
            yield write_segment(store, keys, part), part
            part, count = {}, 0
    if part:
        yield write_segment(store, keys, part), part


def read_segment(store: Store, keys: Keyring, name: str) -> Packs:
    """Raises Corrupt, ObjectMissing."""
    data = store.get(name)
    if PREFIX + hashlib.sha256(data).hexdigest() != name:
        raise Corrupt(f"{name} is not what was written")
    return decode_segment(open_object(INDEX, keys.data, keys.vault, "", data, what=name), name)


# --- the cache -----------------------------------------------------------------------------------------------------


class Index:
    """The cache of one vault's index on this host. Thread-safe; several processes may use the same file."""

    def __init__(self, store: Store, keys: Keyring, folder: Path) -> None:
        self._store = store
        self._keys = keys
        self._path = folder / keys.vault.hex() / "index.sqlite"
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None
        self.damaged: dict[str, str] = {}
        """Segments that could not be read at the last refresh: name → why. Their blocks count as unknown."""
        self.damaged_records: dict[str, str] = {}
        """The same of records of damage."""
        self._sound = False
        """No damage is known: nothing needs to be looked up, on the way of every block."""

    def refresh(self) -> None:
        """Take over the segments, and the records of damage, that the vault has now. Raises VaultError if the store
        cannot be listed."""
        self._use(self._refresh)

    def _refresh(self, db: sqlite3.Connection) -> None:
        while not self._took_over(db):
            pass
        self.damaged_records = damage.refresh(db, self._store, self._keys)
        self._sound = not damage.any_known(db)

    def _took_over(self, db: sqlite3.Connection) -> bool:
        """False: a segment was removed after it was listed; another one has taken its place, which must be found."""
        present = {info.name for info in self._store.list(PREFIX)}
        held = {name for (name,) in db.execute("SELECT name FROM segments")}
        self.damaged = {}
        whole = True
        for name in sorted(present - held):
            try:
                packs = read_segment(self._store, self._keys, name)
            except Corrupt as error:
                self.damaged[name] = str(error)
            except ObjectMissing:
                whole = False
            else:
                _insert(db, name, packs)
        # Last: a pack that stays is named by a new segment before the old one goes, so its blocks are never absent.
        if whole and held - present:
            _forget(db, held - present)
        return whole

    def add(self, name: str, packs: Packs) -> set[int]:
        """Take over a segment that this process wrote just now; the numbers of its packs."""
        self._use(lambda db: _insert(db, name, packs))
        return self.numbers(packs)

    def numbers(self, packs: Iterable[bytes]) -> set[int]:
        """Of those of `packs` (digests) that the index names, their numbers in the cache, which never uses a number
        again."""
        wanted = set(packs)
        return {number for number, digest in self.numbered().items() if digest in wanted}

    def numbered(self) -> dict[int, bytes]:
        """Number in the cache → pack (digest)."""
        return dict(self._use(lambda db: db.execute("SELECT id, digest FROM packs").fetchall()))

    def rows(self, size: int = 65_536) -> Iterator[list[tuple[bytes, int, int, bool]]]:
        """All copies of all blocks, in order of ids: `(id, number of the pack, stored bytes, good)`, some at a time."""
        last: tuple[bytes, int] = (b"", 0)
        while found := self._some_rows(last, size):
            yield found
            last = found[-1][:2]

    def _some_rows(self, last: tuple[bytes, int], size: int) -> list[tuple[bytes, int, int, bool]]:
        good, source = ("1", "blocks") if self._sound else (f"NOT {damage.IS_DAMAGED}", _BLOCKS)
        query = f"SELECT blocks.id, pack, stored, {good} FROM {source} WHERE (blocks.id, pack) > (?, ?)"
        ordered = f"{query} ORDER BY blocks.id, pack LIMIT ?"
        return self._use(lambda db: db.execute(ordered, (*last, size)).fetchall())

    def segments_of(self, packs: Iterable[bytes]) -> dict[str, list[bytes]]:
        """Segments that name one of `packs` (digests) → all packs that they name."""
        numbers = self.numbers(packs)
        named: dict[str, list[bytes]] = {}
        hit: set[str] = set()
        for segment, number, digest in self._use(lambda db: db.execute(_NAMED).fetchall()):
            named.setdefault(segment, []).append(digest)
            hit |= {segment} if number in numbers else set()
        return {segment: named[segment] for segment in hit}

    def has(self, id: bytes, reliable: set[int]) -> bool:
        """Whether a block need not be stored again: a copy of it is in one of those packs (numbers), and not
        known to be damaged."""
        query = "SELECT pack FROM blocks WHERE id = ?"
        if not self._sound:
            query = f"SELECT pack FROM {_BLOCKS} WHERE blocks.id = ? AND NOT {damage.IS_DAMAGED}"
        rows = self._use(lambda db: db.execute(query, (id,)).fetchall())
        return any(pack in reliable for (pack,) in rows)

    def find(self, id: bytes) -> list[Location]:
        """Every known copy of a block, those that are known to be damaged last."""
        columns = "packs.digest, offset, stored, plain, kind, codec"
        query = f"SELECT {columns} FROM {_BLOCKS} WHERE blocks.id = ? ORDER BY {damage.IS_DAMAGED}, packs.id"
        rows = self._use(lambda db: db.execute(query, (id,)).fetchall())
        return [Location(pack_name(digest), Entry(id, *rest)) for digest, *rest in rows]

    # --- damage ----------------------------------------------------------------------------------------------------

    def doubtful(self) -> bool:
        """Whether there is any block that may be lost, packs that are missing aside. Costs nothing to speak of."""
        return bool(self.damaged) or not self._sound

    def lost(self, ids: Sequence[bytes], missing: Collection[bytes]) -> set[bytes]:
        """Those of `ids` (at most 32,000) of which no good copy is known, whatever is condemned. `missing`: packs
        (digests) that the store does not have."""
        wanted = ",".join("?" * len(ids))
        query = (
            f"SELECT blocks.id, packs.digest FROM {_BLOCKS} WHERE blocks.id IN ({wanted}) AND NOT {damage.IS_DAMAGED}"
        )
        rows = self._use(lambda db: db.execute(query, ids).fetchall())
        return set(ids).difference(id for id, digest in rows if digest not in missing)

    def distrust(self, id: bytes, pack: str) -> None:
        """A copy turned out to be damaged (`WHOLE`: all in the pack): deduplication no longer relies on it, so that
        the next backup that reads the block stores it again. `tell_damage` lets the other hosts know."""
        copy = Copy(digest_of(pack), id)
        self._use(lambda db: damage.found(db, copy))
        self._sound = False

    def damage(self) -> set[Copy]:
        """Every copy that is known to be damaged."""
        return set(self._use(damage.known))

    def damage_objects(self) -> frozenset[str]:
        """The records that the last refresh found, and could read."""
        return frozenset(self._use(damage.objects))

    def tell_damage(self) -> None:
        """Write what was found here into the vault, for every host to know. Where that cannot be done (a store that
        is read-only, or full) it stays known here, and is tried again at the next call."""
        with suppress(NoSpace, VaultError):
            self._use(lambda db: damage.tell(db, self._store, self._keys))

    def settle_damage(self, good: Collection[bytes], objects: Collection[str]) -> None:
        """Strike the packs `good` off the records `objects`: they are whole again, or gone for good. Records that came
        since are left alone: they may be newer than what is known of the packs. Raises VaultError, Locked."""
        self._use(lambda db: damage.settle(db, self._store, self._keys, good, objects))

    # --- what it holds ---------------------------------------------------------------------------------------------

    def entries(self, pack: str) -> list[Entry]:
        """What the index says of one pack (`packs/…`), in order of offset; empty if it does not name it."""
        query = (
            "SELECT blocks.id, offset, stored, plain, kind, codec FROM blocks JOIN packs ON packs.id = blocks.pack"
            " WHERE packs.digest = ? ORDER BY offset"
        )
        return [Entry(*row) for row in self._use(lambda db: db.execute(query, (digest_of(pack),)).fetchall())]

    def packs(self) -> list[str]:
        """Names of the packs that the index names."""
        rows = self._use(lambda db: db.execute("SELECT digest FROM packs").fetchall())
        return [pack_name(digest) for (digest,) in rows]

    def count(self) -> tuple[int, int]:
        """Unique blocks, and their plain bytes."""
        query = "SELECT COUNT(*), COALESCE(SUM(plain), 0) FROM (SELECT MAX(plain) AS plain FROM blocks GROUP BY id)"
        blocks, size = self._use(lambda db: db.execute(query).fetchone())
        return int(blocks), int(size)

    def close(self) -> None:
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    # --- inside ----------------------------------------------------------------------------------------------------

    def _use(self, act: Callable[[sqlite3.Connection], T]) -> T:
        """`act` on the cache. One that SQLite finds damaged is thrown away and made again from the segments."""
        with self._lock:
            try:
                try:
                    return act(self._connection())
                except sqlite3.DatabaseError as error:
                    if environment(error):
                        raise
                    self._discard()
                    db = self._connection()
                    self._refresh(db)
                    return act(db)
            except (sqlite3.Error, OSError) as error:
                hint = "check the disk that holds it, or remove the file: it is made again"
                raise VaultError(f"the look-up cache {self._path} cannot be used: {error}", hint=hint) from error

    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._db = self._open()
        return self._db

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=60, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA cache_size = -16384")
            db.execute("BEGIN IMMEDIATE")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
            db.execute("COMMIT")
            if version not in (0, _SCHEMA_VERSION):
                raise sqlite3.DatabaseError(f"schema {version}")
        except sqlite3.Error:
            db.close()
            raise
        return db

    def _discard(self) -> None:
        self.close()
        for suffix in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)


def _insert(db: sqlite3.Connection, name: str, packs: Packs) -> None:
    with transaction(db):
        if not db.execute("INSERT OR IGNORE INTO segments (name) VALUES (?)", (name,)).rowcount:
            return  # another process was quicker
        (segment,) = db.execute("SELECT id FROM segments WHERE name = ?", (name,)).fetchone()
        for digest, entries in packs.items():
            db.execute("INSERT OR IGNORE INTO packs (digest) VALUES (?)", (digest,))
            (pack,) = db.execute("SELECT id FROM packs WHERE digest = ?", (digest,)).fetchone()
            db.execute("INSERT OR IGNORE INTO named VALUES (?, ?)", (segment, pack))
            # In order of ids, so that each page of the tree is touched once.
            rows = sorted((entry.id, pack, *entry[1:]) for entry in entries)
            db.executemany("INSERT OR IGNORE INTO blocks VALUES (?, ?, ?, ?, ?, ?, ?)", rows)


def _forget(db: sqlite3.Connection, names: Iterable[str]) -> None:
    """Drop segments, and the blocks of packs that no other segment names."""
    orphans = "(SELECT id FROM packs WHERE id NOT IN (SELECT pack FROM named))"
    with transaction(db):
        for name in names:
            db.execute("DELETE FROM named WHERE segment = (SELECT id FROM segments WHERE name = ?)", (name,))
            db.execute("DELETE FROM segments WHERE name = ?", (name,))
        db.execute(f"DELETE FROM blocks WHERE pack IN {orphans}")
        db.execute(f"DELETE FROM packs WHERE id IN {orphans}")
