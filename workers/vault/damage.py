"""Damaged copies: what somebody found not to be what was written, told to every host (FORMAT.md, "Damaged copies").

A copy that is damaged must leave deduplication everywhere, or the next backup on another host relies on it. So whoever
finds damage writes it into the vault. A pack that is missing needs no record: every writer lists the packs.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Collection, Iterable
from typing import NamedTuple

from workers.contract.errors import Corrupt, NewerFormat, ObjectMissing
from workers.contract.seams import Store
from workers.vault.cache import transaction
from workers.vault.sealing import DAMAGE, Keyring, open_object, seal_object

PREFIX = "damage/"
WHOLE = bytes(32)
"""In place of a block's id: nothing in the pack is to be relied on."""
_DIGEST = 32
_LIMIT = 65_536
"""Copies in one object."""


_UNTOLD = ""
"""In the place of an object's name: damage that was found on this host and is not in the vault yet."""
SCHEMA = """CREATE TABLE damaged (
    digest BLOB NOT NULL, block BLOB NOT NULL, object TEXT NOT NULL, PRIMARY KEY (digest, block, object)
) WITHOUT ROWID;"""
IS_DAMAGED = f"""EXISTS (SELECT 1 FROM damaged WHERE damaged.digest = packs.digest
    AND damaged.block IN (blocks.id, x'{WHOLE.hex()}'))"""


class Copy(NamedTuple):
    """A copy of a block that is damaged."""

    pack: bytes
    """SHA-256, as in its name."""
    block: bytes
    """Its id, or WHOLE."""


def record_damage(store: Store, keys: Keyring, copies: Collection[Copy]) -> dict[str, list[Copy]]:
    """Tell every host of `copies`; the objects that were made. Raises NoSpace, VaultError."""
    ordered = sorted(copies)
    made: dict[str, list[Copy]] = {}
    for first in range(0, len(ordered), _LIMIT):
        part = ordered[first : first + _LIMIT]
        data = seal_object(DAMAGE, keys.data, keys.vault, "", b"".join(pack + block for pack, block in part))
        name = PREFIX + hashlib.sha256(data).hexdigest()
        store.put(name, data)
        made[name] = part
    return made


def read_damage(store: Store, keys: Keyring, name: str) -> list[Copy]:
    """Raises Corrupt, NewerFormat, ObjectMissing."""
    data = store.get(name)
    if PREFIX + hashlib.sha256(data).hexdigest() != name:
        raise Corrupt(f"{name} is not what was written", hint="remove it, and run `stillframe vault verify --full`")
    plain = open_object(DAMAGE, keys.data, keys.vault, "", data, what=name)
    if len(plain) % (2 * _DIGEST):
        raise Corrupt(f"{name} is cut short")
    return [
        Copy(plain[at : at + _DIGEST], plain[at + _DIGEST : at + 2 * _DIGEST])
        for at in range(0, len(plain), 2 * _DIGEST)
    ]


# --- in the look-up cache ------------------------------------------------------------------------------------------


def refresh(db: sqlite3.Connection, store: Store, keys: Keyring) -> dict[str, str]:
    """Take over the objects that the vault has now; those that cannot be read, and why."""
    present = {info.name for info in store.list(PREFIX)}
    held = objects(db)
    for name in held - present:
        db.execute("DELETE FROM damaged WHERE object = ?", (name,))
    unreadable = {}
    for name in sorted(present - held):
        try:
            _add(db, name, read_damage(store, keys, name))
        except (Corrupt, NewerFormat) as error:
            unreadable[name] = str(error)
        except ObjectMissing:
            continue  # removed since it was listed
    return unreadable


def objects(db: sqlite3.Connection) -> set[str]:
    """Names of the objects that the cache holds."""
    return {name for (name,) in db.execute("SELECT DISTINCT object FROM damaged")} - {_UNTOLD}


def known(db: sqlite3.Connection, name: str | None = None) -> list[Copy]:
    """What is damaged, as the object `name` says, or any."""
    query = "SELECT DISTINCT digest, block FROM damaged WHERE ?1 IS NULL OR object = ?1"
    return [Copy(digest, block) for digest, block in db.execute(query, (name,))]


def any_known(db: sqlite3.Connection) -> bool:
    return db.execute("SELECT 1 FROM damaged LIMIT 1").fetchone() is not None


def found(db: sqlite3.Connection, copy: Copy) -> None:
    """Note a copy, unless it is known."""
    if db.execute("SELECT 1 FROM damaged WHERE digest = ? AND block = ?", copy).fetchone() is None:
        _add(db, _UNTOLD, [copy])


def tell(db: sqlite3.Connection, store: Store, keys: Keyring) -> None:
    """Write into the vault what was noted. Raises NoSpace, VaultError."""
    if untold := known(db, _UNTOLD):
        for name, copies in record_damage(store, keys, untold).items():
            _add(db, name, copies)
            _drop(db, _UNTOLD, copies)


def settle(
    db: sqlite3.Connection, store: Store, keys: Keyring, good: Collection[bytes], names: Collection[str]
) -> None:
    """Strike packs off these objects, and off what is not told yet. The new object exists before the old one goes.
    Raises NoSpace, VaultError, Locked."""
    for name in (_UNTOLD, *names):
        copies = known(db, name)
        gone = [copy for copy in copies if copy.pack in good]
        if gone and name != _UNTOLD:
            left = [copy for copy in copies if copy.pack not in good]
            for made, part in record_damage(store, keys, left).items():
                _add(db, made, part)
            store.delete(name)
        _drop(db, name, copies if name != _UNTOLD and gone else gone)


def _add(db: sqlite3.Connection, name: str, copies: Iterable[Copy]) -> None:
    with transaction(db):
        rows = [(pack, block, name) for pack, block in copies]
        db.executemany("INSERT OR IGNORE INTO damaged VALUES (?, ?, ?)", rows)


def _drop(db: sqlite3.Connection, name: str, copies: Iterable[Copy]) -> None:
    with transaction(db):
        rows = [(pack, block, name) for pack, block in copies]
        db.executemany("DELETE FROM damaged WHERE digest = ? AND block = ? AND object = ?", rows)
