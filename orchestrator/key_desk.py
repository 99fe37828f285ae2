"""Who can open a vault: key slots, rotations, and the way back in with the recovery phrase.

Nothing here leaves a vault that the configured key does not open, unless another way in was asked for.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.config import Config
from orchestrator.desk import Desk
from orchestrator.primary import require_primary
from workers.context import Context
from workers.contract.errors import Locked, UsageError, WrongKey

if TYPE_CHECKING:
    from workers.vault import SlotInfo, Vault
    from workers.vault.keys import Opened
    from workers.vault.rotation import Rotated


class KeyDesk(Desk):
    """Raises VaultMissing, WrongKey, NewerFormat, Corrupt wherever a vault is opened."""

    def __init__(self, config: Config, context: Context) -> None:
        self._config = config
        self._context = context

    def _open(self, name: str | None) -> Vault:
        return self._context.vault(self._config.vault_name(name))

    def _primary(self, name: str | None) -> Vault:
        """The same, to be changed: slots and data keys come to a replica from its original only, or the two could never
        be one vault again. Raises UsageError for a replica."""
        return self._context.vault(require_primary(self._config, name))

    def slots(self, name: str | None) -> list[SlotInfo]:
        return self._open(name).slots.all()

    def own_slots(self, name: str | None) -> list[Opened]:
        """Those that the configured key opens. Raises WrongKey if there are none."""
        from workers.key_sources import secrets_of
        from workers.vault.keys import opened_slots

        vault_name, vault = self._config.vault_name(name), self._open(name)
        key, passphrase = secrets_of(vault_name, self._config.worker.vaults[vault_name])
        found = opened_slots(vault.store, vault.id, key=key, passphrase=passphrase)
        if not found:
            raise WrongKey(f"the configured key does not open vault {vault_name} any more")
        return found

    def verify(self, name: str | None) -> list[SlotInfo]:
        """The slots that the configured key opens, tried now. Raises WrongKey if there are none."""
        return [one.slot for one in self.own_slots(name)]

    def add_passphrase(self, name: str | None, passphrase: bytes) -> SlotInfo:
        return self._primary(name).slots.add(passphrase=passphrase)

    def add_key_file(self, name: str | None, path: Path) -> SlotInfo:
        """The key file at `path` opens the vault from now on; it is made if there is none."""
        from workers.vault.keys import read_key_file, write_key_file

        vault = self._primary(name)
        key = read_key_file(path) if path.exists() else write_key_file(path)
        return vault.slots.add(key=key)

    def remove(self, name: str | None, slot: str) -> None:
        """Raises UsageError for the one by which the configured key opens the vault: the next command could not."""
        vault_name, vault = self._config.vault_name(name), self._primary(name)
        if len(vault.slots.all()) > 1 and {one.slot.id for one in self.own_slots(name)} == {slot}:
            raise UsageError(
                f"slot {slot} is the one by which the configured key opens vault {vault_name}",
                hint=f"first name another key under [vaults.{vault_name}]; `stillframe vault key add` makes one",
            )
        self.check_may_go(name, {slot})
        vault.slots.remove(slot)

    def check_may_go(self, name: str | None, gone: Collection[str]) -> None:
        """Raises Locked if the vault is locked, and without the slots `gone` nobody could approve any more that the
        owner of the configured key shortens the lock."""
        from workers.vault.locks import present_approvers, read_lock

        vault = self._open(name)
        lock, present = read_lock(vault.store, vault.id), present_approvers(vault.store)
        own = {one.slot.id for one in self.own_slots(name)}
        others = {slot for slot, key in lock.approvers.items() if present.get(slot) == key} - own
        if lock.days and others and others <= set(gone):
            raise Locked(
                f"nobody could ever shorten the lock of {lock.days} days: no other key is left that may approve it",
                hint="keep it beside a new one until that may approve: `stillframe vault lock --approvers`",
            )

    # --- rotation --------------------------------------------------------------------------------------------------

    def secret_file(self, name: str | None) -> tuple[Path, bool]:
        """The file that holds the vault's key, and whether it is a passphrase. Raises UsageError if there is none."""
        vault_name = self._config.vault_name(name)
        wanted = self._config.worker.vaults[vault_name]
        if wanted.key_file is not None:
            return wanted.key_file, False
        if wanted.passphrase_file is not None:
            return wanted.passphrase_file, True
        raise UsageError(
            f"the key of vault {vault_name} comes from a program, which must be given the new one first",
            hint=f"`stillframe vault key add {vault_name} --key-file NEW`, put what NEW holds where key_command finds"
            f" it, `stillframe vault key verify {vault_name}`, then `stillframe vault key remove` for the old slot",
        )

    def rotate(self, name: str | None, passphrase: bytes | None, *, keep_old: bool) -> Rotated:
        """A new key, or `passphrase`, in the configured file and in a slot of its own; the old one opens the vault no
        more unless `keep_old`."""
        import secrets

        from workers.vault.keys import KEY_SIZE, key_text
        from workers.vault.rotation import rotate

        vault, (file, is_passphrase) = self._primary(name), self.secret_file(name)
        if is_passphrase:
            assert passphrase is not None
            return rotate(vault.store, file, "passphrase", passphrase + b"\n", keep_old=keep_old)
        return rotate(vault.store, file, "keyfile", key_text(secrets.token_bytes(KEY_SIZE)), keep_old=keep_old)

    def rotate_data_key(self, name: str | None) -> int:
        """A new data key for what is written from now on; its version."""
        return self._primary(name).rotate_data_key()

    # --- the recovery phrase ---------------------------------------------------------------------------------------

    def new_recovery(self, name: str | None) -> tuple[SlotInfo, str]:
        """One more recovery phrase, to be shown once. The older ones still open the vault."""
        return self._primary(name).slots.add_recovery()

    def recoveries(self, name: str | None) -> list[str]:
        """Ids of the slots that recovery phrases open."""
        return [slot.id for slot in self.slots(name) if slot.kind == "recovery"]

    def drop_recoveries(self, name: str | None, but: str) -> list[str]:
        """Remove all recovery slots but one; the ids of those that went. Raises UsageError if the vault is opened by
        one of them now, Locked as `check_may_go`."""
        gone = [slot for slot in self.recoveries(name) if slot != but]
        self.check_may_go(name, gone)
        for slot in gone:
            self.remove(name, slot)
        return gone

    def restore(self, name: str | None, phrase_file: Path, key_file: Path) -> tuple[SlotInfo, bool]:
        """Open the vault with the recovery phrase (or a passphrase) in `phrase_file`, and let the key file `key_file`,
        which is made if there is none, open it from now on. The slot, and whether the configuration names that file.
        Raises WrongKey; the configured key is not looked at."""
        from workers.vault.identity import read_marker
        from workers.vault.keys import make_slot, opened_slots, read_key_file, read_passphrase_file, unwrap
        from workers.vault.keys import write_key_file as write
        from workers.vault.places import open_place

        wanted = self._config.worker.vaults[self._config.vault_name(name)]
        store = open_place(wanted)
        vault_id = read_marker(store)
        master = unwrap(store, vault_id, key=None, passphrase=read_passphrase_file(phrase_file))
        key = read_key_file(key_file) if key_file.exists() else write(key_file)
        there = opened_slots(store, vault_id, key=key, passphrase=None)
        slot = there[0].slot if there else make_slot(store, vault_id, master, "keyfile", key)
        return slot, wanted.key_file == key_file
