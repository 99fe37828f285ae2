"""Who can open a vault: its key slots, as somebody manages them who has opened it."""

from __future__ import annotations

import secrets

from workers.contract.errors import NotFound, VaultError
from workers.contract.seams import Store
from workers.vault.keys import SlotInfo, format_phrase, make_slot, read_slots


class KeySlots:
    """The slots of one open vault."""

    def __init__(self, store: Store, vault_id: str, master: bytes) -> None:
        self._store = store
        self._vault_id = vault_id
        self._master = master

    def all(self) -> list[SlotInfo]:
        """Raises Corrupt at a damaged one."""
        return [slot for slot, _ in read_slots(self._store)]

    def add(self, *, key: bytes | None = None, passphrase: bytes | None = None) -> SlotInfo:
        """One more way to open the vault: exactly one of the two. Raises VaultError."""
        if (key is None) == (passphrase is None):
            raise VaultError("a key slot is for a key file or for a passphrase")
        if key is not None:
            return make_slot(self._store, self._vault_id, self._master, "keyfile", key)
        assert passphrase is not None
        return make_slot(self._store, self._vault_id, self._master, "passphrase", passphrase)

    def add_recovery(self) -> tuple[SlotInfo, str]:
        """One more recovery phrase, which is kept nowhere."""
        secret = secrets.token_bytes(25)
        return make_slot(self._store, self._vault_id, self._master, "recovery", secret), format_phrase(secret)

    def remove(self, id: str) -> None:
        """Raises NotFound, and VaultError for the last one."""
        names = [info.name for info in self._store.list("keys/")]
        if f"keys/{id}" not in names:
            raise NotFound(f"the vault has no key slot {id}", hint="`stillframe vault key list` shows them")
        if len(names) < 2:
            raise VaultError("the last key slot cannot be removed: nothing would open the vault", hint="add one first")
        self._store.delete(f"keys/{id}")
