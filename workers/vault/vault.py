"""The vault: a store with keys. Points are committed here, and nowhere else.

A point exists from the moment its manifest is created, exclusively, under its own name. Whoever must know whether a
lost writer committed takes the name with an *aborted* marker: either the point is there, or it can never be.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workers.contract.errors import (
    Corrupt,
    NewerFormat,
    NotFound,
    ObjectMissing,
    VaultError,
    WrongKey,
)
from workers.contract.machines import Value
from workers.contract.points import Point
from workers.contract.seams import Store
from workers.vault import trash
from workers.vault.condemned import read_condemned
from workers.vault.identity import add_keyring, check_empty, read_keyring, read_marker, write_marker
from workers.vault.index import Index
from workers.vault.keys import KEY_SIZE, format_phrase, make_slot, unwrap
from workers.vault.locks import check_unlocked, read_lock
from workers.vault.manifest import decode_manifest
from workers.vault.packs import TARGET, digest_of
from workers.vault.reader import BlockReader
from workers.vault.sealing import (
    POINT,
    Keyring,
    open_object,
    seal_object,
)
from workers.vault.sessions import SessionInfo, announce, sessions, withdraw
from workers.vault.slots import KeySlots
from workers.vault.writer import BlockWriter

_POINT_ID = re.compile(r"[a-z0-9][a-z0-9-]*")


class VaultStats(Value):
    """What a vault holds; bytes are of the store unless said otherwise."""

    objects: int
    bytes: dict[str, int]
    """Per kind: packs, index, points, keys, keyring, sessions."""
    total_bytes: int
    points: int
    damaged_points: int
    blocks: int
    """Different blocks, map pages included."""
    block_bytes: int
    """Their plain bytes."""
    logical_bytes: int
    """Capacities of all disks of all points."""
    dedup_ratio: float
    """Logical bytes per byte stored; 0 for an empty vault."""


class Vault:
    """An open vault. Thread-safe. Make one with `create` or `open`."""

    def __init__(self, store: Store, master: bytes, keys: Keyring, cache_dir: Path) -> None:
        self.store = store
        self.id = keys.vault.hex()
        self._master = master
        self._keys = keys
        self._cache_dir = cache_dir
        self._index = Index(store, keys, cache_dir)

    @staticmethod
    def create(
        store: Store, *, key: bytes | None = None, passphrase: bytes | None = None, cache_dir: Path
    ) -> tuple[Vault, str]:
        """A new vault that `key` and `passphrase` (at least one) open, and its recovery phrase, which is kept nowhere.

        The marker is written last: a vault whose creation was cut off does not exist. Raises VaultError if a vault
        is there already, or objects of one.
        """
        if key is None and passphrase is None:
            raise WrongKey("a vault needs a key file or a passphrase")
        check_empty(store)
        vault_id = secrets.token_hex(16)
        master = secrets.token_bytes(KEY_SIZE)
        add_keyring(store, master, bytes.fromhex(vault_id), 1, secrets.token_bytes(32))
        if key is not None:
            make_slot(store, vault_id, master, "keyfile", key)
        if passphrase is not None:
            make_slot(store, vault_id, master, "passphrase", passphrase)
        phrase = secrets.token_bytes(25)
        make_slot(store, vault_id, master, "recovery", phrase)
        write_marker(store, vault_id)
        return Vault.open(store, key=key, passphrase=passphrase, cache_dir=cache_dir), format_phrase(phrase)

    @staticmethod
    def open(store: Store, *, key: bytes | None = None, passphrase: bytes | None = None, cache_dir: Path) -> Vault:
        """Open with a key file's key, or with a passphrase or recovery phrase.

        Raises WrongKey, VaultMissing, NewerFormat, Corrupt."""
        vault_id = read_marker(store)
        master = unwrap(store, vault_id, key=key, passphrase=passphrase)
        keys = read_keyring(store, master, bytes.fromhex(vault_id))
        return Vault(store, master, keys, cache_dir)

    def close(self) -> None:
        """Let go of the look-up cache; the vault opens it again if it is used."""
        self._index.close()

    @property
    def keys(self) -> Keyring:
        return self._keys

    @property
    def slots(self) -> KeySlots:
        """Who can open it."""
        return KeySlots(self.store, self.id, self._master)

    @property
    def index(self) -> Index:
        return self._index

    @property
    def cache_dir(self) -> Path:
        """This host's folder for what can be made again."""
        return self._cache_dir / self.id

    # --- blocks ----------------------------------------------------------------------------------------------------

    def writer(self, *, pack_size: int = TARGET) -> BlockWriter:
        """A writer that knows what the vault has now; it closes packs at `pack_size` bytes. Whoever will commit has
        announced its session before. Raises VaultMissing, VaultError."""
        condemned = read_condemned(self.store, self._keys)  # before the packs: what left it meanwhile is not listed
        self._index.tell_damage()
        packs, missing = self.packs()
        reliable = self._index.numbers({digest_of(name) for name in packs} - condemned)
        missing_packs = {digest_of(name) for name in missing}
        retain = read_lock(self.store, self.id).covering(datetime.now(UTC))
        return BlockWriter(
            self.store, self._keys, self._index, reliable, missing=missing_packs, pack_size=pack_size, retain=retain
        )

    def packs(self) -> tuple[dict[str, int], frozenset[str]]:
        """Sizes in bytes of the packs that are there, and names of those that the index names and that are missing. The
        index is refreshed. Right beside writers and sweeps: who makes a pack creates it before its segment, who removes
        one removes its segments first."""
        sizes = {info.name: info.size for info in self.store.list("packs/")}
        self._index.refresh()
        if not set(self._index.packs()) <= sizes.keys():
            sizes |= {info.name: info.size for info in self.store.list("packs/")}  # one may be new
            if not set(self._index.packs()) <= sizes.keys():
                self._index.refresh()  # or just swept
        return sizes, frozenset(self._index.packs()) - sizes.keys()

    def tell_damage(self) -> None:
        """Write the damage that was met by readers of this vault into it, for every host to know; best effort."""
        self._index.tell_damage()

    def reader(self, *, refresh: bool = True) -> BlockReader:
        """A reader of what the vault has now, or had at the last look. Raises VaultError."""
        if refresh:
            self._index.refresh()
        return BlockReader(self.store, self._keys, self._index)

    # --- sessions --------------------------------------------------------------------------------------------------

    def announce(self, session: str, point: str = "", *, reads: Sequence[str] = ()) -> None:
        """See `sessions.announce`. Whoever reads a point asks `readable` afterwards."""
        announce(self.store, session, point=point, reads=reads)

    def withdraw(self, session: str) -> None:
        """End a session. Absent already: no error."""
        withdraw(self.store, session)

    def sessions(self) -> list[SessionInfo]:
        """Raises Corrupt at a damaged one."""
        return list(sessions(self.store))

    def readable(self, point_id: str) -> bool:
        """Whether the manifest of a committed point is there, and stays as long as a session that has announced to
        read it. Raises Corrupt, NewerFormat."""
        try:  # in this order: if nothing was final when the session was there, the manifest stays if it is there
            return not trash.final(self.store, point_id) and self._read_point(point_id) is not None
        except ObjectMissing:
            return False

    # --- points ----------------------------------------------------------------------------------------------------

    def commit(self, point: Point) -> Point:
        """Create the manifest, locked as the vault's lock says: from here on the point exists. All its packs and index
        segments must be durable. The same point again: no error. The point as it is in the vault.

        Raises VaultError if the name is taken by another, or fenced."""
        lock, name = read_lock(self.store, self.id), _point_name(point.id)
        dates = [date for date in (point.locked_until, lock.until(point.time)) if date is not None]
        locked = point.model_copy(update={"locked_until": max(dates, default=None)})
        if not self.store.put(name, self._seal_point(point.id, {"point": locked.model_dump(mode="json")})):
            there = self._read_point(point.id)
            if there is None:
                raise VaultError(f"point {point.id} was given up: its job was settled without it")
            if there.model_copy(update={"locked_until": None}) != point.model_copy(update={"locked_until": None}):
                raise VaultError(f"another point is committed under {point.id}")
            locked = there
        if locked.locked_until is not None:
            self.store.retain(name, locked.locked_until)
        return locked

    def settle(self, point_id: str) -> Point | None:
        """The committed point; or None, and then it can never be committed any more. Raises Corrupt."""
        if self.store.put(_point_name(point_id), self._seal_point(point_id, {"aborted": point_id})):
            return None
        return self._read_point(point_id)

    def points(self) -> Iterator[Point]:
        """Committed points, by name; damaged ones are passed over (see `damaged_points`)."""
        for point_id in self.point_ids():
            if isinstance(found := self.manifest(point_id), Point):
                yield found

    def damaged_points(self) -> list[tuple[str, str]]:
        """`(id, why)` of manifests that cannot be read."""
        return [(one, found) for one in self.point_ids() if isinstance(found := self.manifest(one), str)]

    def point(self, point_id: str) -> Point:
        """Raises NotFound, Corrupt, NewerFormat."""
        try:
            found = self._read_point(point_id)
        except ObjectMissing:
            found = None
        if found is None:
            raise NotFound(f"there is no point {point_id} in the vault", hint="`stillframe point list` shows them")
        return found

    def delete_point(self, point_id: str) -> None:
        """Remove a point's manifest, damaged or not: the last step of a deletion (`trash.remove_finals`). Its blocks
        stay until a sweep. Raises NotFound if there is no such point (a fence is not one, and stays), Locked."""
        with suppress(Corrupt, NewerFormat):
            check_unlocked(self.point(point_id))
        self.store.delete(_point_name(point_id))

    def point_ids(self) -> list[str]:
        """Of all manifests and markers, by name."""
        return [info.name.removeprefix("points/") for info in self.store.list("points/")]

    def manifest(self, point_id: str) -> Point | str | None:
        """A committed point; or why it cannot be read; or None for an aborted marker, and for one that is gone."""
        try:
            return self._read_point(point_id)
        except ObjectMissing:
            return None
        except (Corrupt, NewerFormat, NotFound) as error:
            return str(error)

    def _seal_point(self, point_id: str, content: dict[str, Any]) -> bytes:
        plain = json.dumps(content).encode()
        return seal_object(POINT, self._keys.data, self._keys.vault, _point_name(point_id), plain)

    def _read_point(self, point_id: str) -> Point | None:
        """None for an aborted marker. Raises ObjectMissing, Corrupt, NewerFormat."""
        return self.decoded(point_id, self.store.get(_point_name(point_id)))

    def decoded(self, point_id: str, data: bytes) -> Point | None:
        """What `data`, from wherever it is, says as the manifest of a point; None for an aborted marker. Only who has
        the vault's key could have made it, and only under that name. Raises Corrupt, NewerFormat."""
        name = _point_name(point_id)
        return decode_manifest(open_object(POINT, self._keys.data, self._keys.vault, name, data), point_id, name)

    # --- keys ------------------------------------------------------------------------------------------------------

    def rotate_data_key(self) -> int:
        """A new data key for what is written from now on by vaults opened from now on; its version."""
        vault = self._keys.vault
        version = read_keyring(self.store, self._master, vault).current + 1
        add_keyring(self.store, self._master, vault, version, self._keys.id_key)
        self._keys = read_keyring(self.store, self._master, vault)
        self._index.close()
        self._index = Index(self.store, self._keys, self._cache_dir)
        return version

    def check_keyring(self) -> None:
        """Read marker and keyring again. Raises Corrupt, NewerFormat, VaultMissing."""
        read_marker(self.store)
        read_keyring(self.store, self._master, self._keys.vault)

    # --- figures ---------------------------------------------------------------------------------------------------

    def stats(self) -> VaultStats:
        """Count everything. Reads every manifest and the index, no block."""
        sizes = dict.fromkeys(("packs", "index", "points", "keys", "keyring", "sessions"), 0)
        objects = 0
        for kind in sizes:
            for info in self.store.list(f"{kind}/"):
                sizes[kind] += info.size
                objects += 1
        self._index.refresh()
        blocks, block_bytes = self._index.count()
        points = list(self.points())
        logical = sum(disk.capacity for point in points for disk in point.disks)
        total = sum(sizes.values())
        return VaultStats(
            objects=objects,
            bytes=sizes,
            total_bytes=total,
            points=len(points),
            damaged_points=len(self.damaged_points()),
            blocks=blocks,
            block_bytes=block_bytes,
            logical_bytes=logical,
            dedup_ratio=logical / sizes["packs"] if sizes["packs"] else 0.0,
        )


def _point_name(point_id: str) -> str:
    if not _POINT_ID.fullmatch(point_id):
        raise NotFound(f"{point_id!r} is not the id of a point")
    return f"points/{point_id}"
