"""The small objects of a vault, each read once: which of them are not what was written.

Every kind fails in its own direction. A session, condemnation or verdict that cannot be read stops sweeps, and the
condemnation writers too; a deletion, pin or lock stops what would delete points; damage has to be found again if its
record is lost. None of them stops a restore.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from workers.contract.errors import Corrupt, NewerFormat, ObjectMissing, VaultMissing
from workers.vault import condemned, damage
from workers.vault.sealing import decode_plain
from workers.vault.sessions import CONDEMNED, SESSIONS
from workers.vault.stores import MARKER
from workers.vault.trash import PINS, TRASH
from workers.vault.vault import Vault

_PLAIN = ("keys/", SESSIONS, TRASH, PINS, "locks/")


def damaged_objects(vault: Vault) -> list[tuple[str, str]]:
    """`(name, why)` of those that cannot be read: all kinds but packs, segments and points."""
    checks: list[tuple[str, Callable[[], object]]] = [(MARKER, vault.check_keyring)]
    for prefix in _PLAIN:
        checks += [(info.name, partial(_plain, vault, info.name)) for info in vault.store.list(prefix)]
    kinds: list[tuple[str, Callable[[str], object]]] = [
        (CONDEMNED, lambda name: condemned.read_condemnation(vault.store, vault.keys, name)),
        (condemned.VERDICTS, lambda name: condemned.read_verdict(vault.store, vault.keys, _condemnation(name))),
        (damage.PREFIX, lambda name: damage.read_damage(vault.store, vault.keys, name)),
    ]
    for prefix, read in kinds:
        checks += [(info.name, partial(read, info.name)) for info in vault.store.list(prefix)]
    found = []
    for name, check in checks:
        try:
            with suppress(ObjectMissing):  # it was removed since it was listed
                check()
        except (Corrupt, NewerFormat, VaultMissing) as error:
            found.append((name, f"{error}; {error.hint}" if error.hint else str(error)))
    return found


def _plain(vault: Vault, name: str) -> None:
    decode_plain(vault.store.get(name), name)


def _condemnation(verdict: str) -> str:
    return CONDEMNED + verdict.removeprefix(condemned.VERDICTS)
