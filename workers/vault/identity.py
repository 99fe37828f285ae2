"""What a vault is before it holds anything: its marker and its keyring.

The marker is created last, so a vault whose creation was cut off does not exist. Key versions are objects of their
own, sealed under the master key: a new data key is a new object, and no slot is touched.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from workers.contract.errors import Corrupt, NewerFormat, ObjectMissing, VaultError, VaultMissing
from workers.contract.seams import Store
from workers.vault.sealing import (
    FORMAT,
    KEYRING,
    PLAIN_LIMIT,
    UPGRADE,
    Keyring,
    decode_plain,
    encode_plain,
    open_object,
    seal_object,
)
from workers.vault.stores import MARKER


def write_marker(store: Store, vault_id: str) -> None:
    """From here on the vault exists. Raises VaultError if another was quicker."""
    created = datetime.now(UTC).isoformat()
    marker = {"stillframe": "vault", "format": FORMAT, "id": vault_id, "created": created}
    if not store.put(MARKER, encode_plain(marker)):
        raise VaultError("somebody else made a vault here at the same time")


def read_marker(store: Store) -> str:
    """The vault's id. Raises VaultMissing, NewerFormat, Corrupt."""
    try:
        data = store.get(MARKER)
    except ObjectMissing:
        raise VaultMissing("there is no vault here", hint="`stillframe init` makes one") from None
    try:
        fields = json.loads(data) if len(data) <= PLAIN_LIMIT else None
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or not isinstance(fields.get("format"), int):
        raise Corrupt(f"{MARKER} is not what was written")
    if fields["format"] > FORMAT:
        raise NewerFormat(f"the vault is of format {fields['format']}, this Stillframe knows {FORMAT}", hint=UPGRADE)
    fields = decode_plain(data, MARKER)
    vault_id = fields.get("id")
    if (
        fields.get("stillframe") != "vault"
        or fields["format"] < 1
        or not isinstance(vault_id, str)
        or not re.fullmatch("[0-9a-f]{32}", vault_id)
    ):
        raise Corrupt(f"{MARKER} is not that of a vault")
    return vault_id


def check_empty(store: Store) -> None:
    """Make room for a new vault. Only keys may be swept aside: with nothing stored, they open nothing.

    Raises VaultError."""
    if any(info.name == MARKER for info in store.list(MARKER)):
        raise VaultError("there is a vault here already", hint="choose another place, or use the vault as it is")
    for prefix in ("packs/", "index/", "points/"):
        if next(store.list(prefix), None) is not None:
            raise VaultError(
                f"{prefix} of a vault is here, but its {MARKER} is missing",
                hint=f"bring {MARKER} back from a copy, or choose an empty place",
            )
    for prefix in ("keys/", "keyring/"):
        for info in list(store.list(prefix)):
            store.delete(info.name)


def add_keyring(store: Store, master: bytes, vault: bytes, version: int, id_key: bytes) -> None:
    """A new data key. Raises VaultError if that version exists."""
    name = f"keyring/{version:08d}"
    plain = json.dumps({"version": version, "data_key": secrets.token_hex(32), "id_key": id_key.hex()}).encode()
    if not store.put(name, seal_object(KEYRING, {0: master}, vault, name, plain)):
        raise VaultError(f"{name} exists already: somebody else changes keys at the same time")


def read_keyring(store: Store, master: bytes, vault: bytes) -> Keyring:
    """Every key version, those too that are made from now on. Raises Corrupt."""
    data, id_key = _read_keys(store, master, vault)
    return Keyring(vault, _Versions(data, lambda: _read_keys(store, master, vault)[0]), id_key)


class _Versions(dict[int, bytes]):
    """Data keys by version. One that is not here may have been made since, by another process: before what is sealed
    under it passes for damaged it is looked for. Raises what `look` raises."""

    def __init__(self, known: dict[int, bytes], look: Callable[[], dict[int, bytes]]) -> None:
        super().__init__(known)
        self._look = look

    def get(self, version: int, default: Any = None) -> Any:
        if version not in self:
            self.update(self._look())
        return super().get(version, default)


def _read_keys(store: Store, master: bytes, vault: bytes) -> tuple[dict[int, bytes], bytes]:
    """Data keys by version, and the id key."""
    data: dict[int, bytes] = {}
    id_keys: set[bytes] = set()
    for info in store.list("keyring/"):
        plain = open_object(KEYRING, {0: master}, vault, info.name, store.get(info.name))
        try:
            fields = json.loads(plain)
            version = fields["version"]
            right = info.name == f"keyring/{version:08d}"
            data[version] = bytes.fromhex(fields["data_key"])
            id_keys.add(bytes.fromhex(fields["id_key"]))
        except (KeyError, TypeError, ValueError, RecursionError):
            right = False
        if not right:
            raise Corrupt(f"{info.name} does not hold the keys of its version")
    if len(id_keys) != 1:
        raise Corrupt("the vault's keyring is missing or contradicts itself")
    return data, id_keys.pop()
