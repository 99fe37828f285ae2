"""Condemnations and verdicts: what a sweep says it will remove, and what it removes (FORMAT.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from workers.contract.errors import Corrupt, ObjectMissing
from workers.contract.seams import Store
from workers.vault.sealing import CONDEMNED, VERDICT, Keyring, open_object, seal_object
from workers.vault.sessions import CONDEMNED as PREFIX

VERDICTS = "verdicts/"
MOST_PACKS = 200_000
"""In one condemnation: a sealed object has a largest size."""
_DIGEST = 32
_UNREADABLE_HINT = (
    "`stillframe vault repair` takes it from a copy; else, while no sweep runs anywhere, remove that object and its"
    " verdict: they only say which packs may go"
)
"""Without it nobody can say on which packs to rely; and to store everything anew would fill the vault unasked."""


def condemn(store: Store, keys: Keyring, packs: Iterable[bytes]) -> str:
    """Put packs (digests) into a new condemnation, at most `MOST_PACKS`; its name."""
    data = seal_object(CONDEMNED, keys.data, keys.vault, "", b"".join(sorted(packs)))
    name = PREFIX + hashlib.sha256(data).hexdigest()
    store.put(name, data)
    return name


def read_condemnation(store: Store, keys: Keyring, name: str) -> frozenset[bytes]:
    """The packs in it. Raises ObjectMissing, Corrupt, NewerFormat."""
    data = store.get(name)
    if PREFIX + hashlib.sha256(data).hexdigest() != name:
        raise Corrupt(f"{name} is not what was written", hint=_UNREADABLE_HINT)
    return _digests(open_object(CONDEMNED, keys.data, keys.vault, "", data, what=name), name)


def read_condemnations(store: Store, keys: Keyring) -> dict[str, frozenset[bytes]]:
    """All that stand: name → packs. Raises Corrupt, NewerFormat."""
    found = {}
    for info in store.list(PREFIX):
        try:
            found[info.name] = read_condemnation(store, keys, info.name)
        except ObjectMissing:
            continue  # removed since it was listed: so are its dead packs
    return found


def read_condemned(store: Store, keys: Keyring) -> frozenset[bytes]:
    """Packs that are in any condemnation. Raises Corrupt, NewerFormat."""
    return frozenset().union(*read_condemnations(store, keys).values())


def give_verdict(store: Store, keys: Keyring, condemnation: str, dead: Iterable[bytes]) -> bool:
    """Say which packs of a condemnation are removed. False: somebody else was quicker, and that verdict counts."""
    name = verdict_name(condemnation)
    return store.put(name, seal_object(VERDICT, keys.data, keys.vault, name, b"".join(sorted(dead))))


def read_verdict(store: Store, keys: Keyring, condemnation: str) -> frozenset[bytes] | None:
    """None: there is none yet. Raises Corrupt, NewerFormat."""
    name = verdict_name(condemnation)
    try:
        data = store.get(name)
    except ObjectMissing:
        return None
    return _digests(open_object(VERDICT, keys.data, keys.vault, name, data), name)


def verdict_name(condemnation: str) -> str:
    return VERDICTS + condemnation.removeprefix(PREFIX)


def _digests(plain: bytes, what: str) -> frozenset[bytes]:
    if len(plain) % _DIGEST:
        raise Corrupt(f"{what} is cut short")
    return frozenset(plain[at : at + _DIGEST] for at in range(0, len(plain), _DIGEST))
