"""A new secret in place of the one in a key file or passphrase file.

The file and the slots cannot change in one step, so the order is the safety argument: the new secret's slot exists, and
was seen to open the vault, before the file is replaced; the old slots go after that. Whoever dies in between leaves a
file that opens the vault, and beside it what the next rotation needs to clear away what was left.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

from workers.contract.errors import VaultError, WrongKey
from workers.contract.machines import Value
from workers.contract.seams import Store
from workers.vault.identity import read_marker
from workers.vault.keys import (
    Opened,
    SlotInfo,
    make_slot,
    opened_slots,
    read_key_file,
    read_passphrase_file,
    sync_folder,
    unwrap,
    write_secret,
)

Secret = Literal["keyfile", "passphrase"]


class Rotated(Value):
    """What a rotation has changed."""

    added: SlotInfo
    removed: list[str]
    """Ids of slots."""
    kept: list[str] = []
    """Slots of the old secret, which were to stay."""


def rotate(store: Store, file: Path, kind: Secret, text: bytes, *, keep_old: bool = False) -> Rotated:
    """Put the secret in `text` (the content of such a file) into `file` and a slot of its own, and remove the slots of
    the one that was there, unless `keep_old`. Recovery phrases are never removed. What an interrupted rotation has left
    is cleared away first. Raises WrongKey (nothing was touched), VaultError."""
    vault_id = read_marker(store)
    file = file.resolve()  # a link stays a link
    fresh, former = file.with_name(f".{file.name}.rotating"), file.with_name(f".{file.name}.rotated")
    key, passphrase = _read(file, kind)
    master = unwrap(store, vault_id, key=key, passphrase=passphrase)
    for left in (fresh, former):
        _retire(store, vault_id, file, left, kind)
    write_secret(fresh, text)
    if _opened(store, vault_id, fresh, kind):
        fresh.unlink()
        raise VaultError("the new secret opens the vault already", hint="choose another one")
    added = make_slot(store, vault_id, master, kind, _secret(fresh, kind))
    if not any(one.master == master for one in _opened(store, vault_id, fresh, kind)):
        raise VaultError("the new secret does not open the vault: the old one does, as before")
    old = _opened(store, vault_id, file, kind)
    if not keep_old:
        os.link(file, former)
    fresh.replace(file)
    sync_folder(file.parent)
    removed = _retire(store, vault_id, file, former, kind)
    return Rotated(added=added, removed=removed, kept=[one.slot.id for one in old] if keep_old else [])


def _secret(file: Path, kind: Secret) -> bytes:
    """Raises WrongKey."""
    return read_key_file(file) if kind == "keyfile" else read_passphrase_file(file)


def _read(file: Path, kind: Secret) -> tuple[bytes | None, bytes | None]:
    """Key and passphrase. Raises WrongKey."""
    secret = _secret(file, kind)
    return (secret, None) if kind == "keyfile" else (None, secret)


def _opened(store: Store, vault_id: str, file: Path, kind: Secret) -> list[Opened]:
    """Slots of that kind which the secret in `file` opens. Raises WrongKey."""
    key, passphrase = _read(file, kind)
    found = opened_slots(store, vault_id, key=key, passphrase=passphrase)
    return [one for one in found if one.slot.kind == kind]


def _retire(store: Store, vault_id: str, file: Path, left: Path, kind: Secret) -> list[str]:
    """Remove the slots of the secret in `left`, and then `left`; never one that the secret in `file` opens. The ids of
    those slots."""
    if not left.exists():
        return []
    removed = []
    with suppress(WrongKey):  # cut off while it was written: it has no slot
        stays = {one.slot.id for one in _opened(store, vault_id, file, kind)}
        for one in _opened(store, vault_id, left, kind):
            if one.slot.id not in stays:
                store.delete(f"keys/{one.slot.id}")
                removed.append(one.slot.id)
    left.unlink()
    return removed
