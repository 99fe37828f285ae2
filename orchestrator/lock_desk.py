"""A vault's lock: shown, set, lengthened by one person; shortened by two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.config import Config
from orchestrator.desk import Desk
from orchestrator.key_desk import KeyDesk
from orchestrator.primary import require_primary
from workers.context import Context
from workers.contract.machines import Value

if TYPE_CHECKING:
    from workers.vault.approval import Request
    from workers.vault.locks import Extended, Lock


class LockView(Value):
    """The lock of a vault, as people see it."""

    vault: str
    days: int
    number: int
    approvers: list[str]
    """Slots whose holders may approve that it is shortened."""
    own: list[str]
    """Slots that the configured key opens."""
    new: list[str]
    """Slots that may not approve yet: added since, or made before there were approvals."""
    wrong: list[str]
    """Locks in the vault that do not count, and why."""

    @property
    def others(self) -> list[str]:
        """Who could approve a request of ours."""
        return [slot for slot in self.approvers if slot not in self.own]


class LockDesk(Desk):
    def __init__(self, config: Config, context: Context, keys: KeyDesk, user: Callable[[], str]) -> None:
        self._config = config
        self._context = context
        self._keys = keys
        self._user = user

    def show(self, name: str | None) -> LockView:
        """Raises Corrupt."""
        from workers.vault.locks import present_approvers, read_chain

        vault_name = self._config.vault_name(name)
        vault = self._context.vault(vault_name)
        (lock, wrong), present = read_chain(vault.store, vault.id), present_approvers(vault.store)
        slots = [slot.id for slot in self._keys.slots(name)]
        may = sorted(slot for slot, key in lock.approvers.items() if present.get(slot) == key)
        return LockView(
            vault=vault_name,
            days=lock.days,
            number=lock.number,
            approvers=may,
            own=[slot.id for slot in self._keys.verify(name)],
            new=[slot for slot in slots if slot not in may],
            wrong=wrong,
        )

    def lengthen(self, name: str | None, days: int) -> Lock:
        """Raises Locked if that would shorten it."""
        from workers.vault.locks import lengthen

        return lengthen(self._context.vault(require_primary(self._config, name)), days, by=self._user())

    def request(self, name: str | None, days: int) -> Request:
        """A request to shorten the lock, or to let the present slots approve. Raises Locked if nobody can approve."""
        from workers.vault.locks import request

        vault = self._context.vault(self._config.vault_name(name))
        return request(vault, days, self._own(name), by=self._user())

    def change(self, name: str | None, days: int, approval: str) -> Lock:
        """Do what was approved. Raises Locked, UsageError."""
        from workers.vault.approval import parse_approval
        from workers.vault.locks import change

        vault = self._context.vault(require_primary(self._config, name))
        return change(vault, parse_approval(approval), days, self._own(name), by=self._user())

    def _own(self, name: str | None) -> list[str]:
        return [slot.id for slot in self._keys.verify(name)]

    def approve(self, name: str | None, asked: Request, key_file: Path | None, phrase_file: Path | None) -> str:
        """The approval of a request, made with the key in one of the files, or else with the configured one. Raises
        Locked, WrongKey, UsageError."""
        from workers.contract.errors import WrongKey
        from workers.key_sources import secrets_of
        from workers.vault.approval import approve
        from workers.vault.identity import read_marker
        from workers.vault.keys import opened_slots, read_key_file, read_passphrase_file
        from workers.vault.locks import check_request
        from workers.vault.places import open_place

        vault_name = self._config.vault_name(name)
        wanted = self._config.worker.vaults[vault_name]
        store = open_place(wanted)
        vault_id = read_marker(store)
        if key_file is not None:
            key, passphrase = read_key_file(key_file), None
        elif phrase_file is not None:
            key, passphrase = None, read_passphrase_file(phrase_file)
        else:
            key, passphrase = secrets_of(vault_name, wanted)
        opened = opened_slots(store, vault_id, key=key, passphrase=passphrase)
        if not opened:
            raise WrongKey(f"that key does not open vault {vault_name}", hint="approve with a key of this vault")
        return approve(asked, check_request(store, vault_id, asked).approvers, opened).text()

    def extend(self, name: str | None, on_progress: Callable[[int, int], None] | None) -> Extended:
        """Renew the retention of everything but packs that are condemned."""
        from workers.vault.condemned import read_condemned
        from workers.vault.locks import extend

        vault = self._context.vault(self._config.vault_name(name))
        condemned = read_condemned(vault.store, vault.keys)
        packs = {bytes.fromhex(info.name.removeprefix("packs/")) for info in vault.store.list("packs/")}
        return extend(vault, packs - condemned, on_progress=on_progress)
