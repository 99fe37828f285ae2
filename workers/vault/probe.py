"""What a store really honours, found out by doing it.

Many things speak S3, and some answer *done* to a condition that they do not know: of two jobs that commit under one
name, both would succeed. Network file systems differ in the same way. So a vault is made only where what FORMAT.md asks
of a store has been seen to hold; what is good to have is told. A look finds what a store does not know at all, not a
race that it loses once in a thousand times.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from workers.contract.errors import Corrupt, Locked, ObjectMissing, StoreUnreachable, VaultError
from workers.contract.seams import ObjectInfo, Store

_FOLDER = "probe/"
"""No part of a vault."""
_RETAINED = timedelta(seconds=3)


class Ability(StrEnum):
    CREATE = "conditional create"
    RANGE = "range reads"
    LIST = "list after write"
    DELETE = "delete"
    LOCK = "object lock"


_NEEDED = frozenset(Ability) - {Ability.LOCK}


@dataclass(frozen=True, slots=True)
class Probed:
    """What was found."""

    place: str
    lacks: dict[Ability, str] = field(default_factory=dict)
    """Ability → what was seen instead."""

    @property
    def unfit(self) -> dict[Ability, str]:
        """What a vault cannot do without."""
        return {ability: seen for ability, seen in self.lacks.items() if ability in _NEEDED}

    def require(self) -> None:
        """Raises VaultError if no vault can be kept there."""
        if self.unfit:
            seen = "; ".join(f"{ability}: {what}" for ability, what in self.unfit.items())
            hint = "choose another place; of S3 stores one that honours If-None-Match, in a current version"
            raise VaultError(f"{self.place} cannot hold a vault: {seen}", hint=hint)


def probe(store: Store, *, thorough: bool = False) -> Probed:
    """Create, read, list and remove a few small objects. `thorough` (for a new vault): a lock, too,
    that lasts some seconds. Raises VaultError, NoSpace, StoreUnreachable, if it cannot even be tried."""
    found = Probed(store.features.place)
    prefix = f"{_FOLDER}{secrets.token_hex(8)}-"
    tests: dict[Ability, Callable[[Store, str], str]] = {
        Ability.CREATE: _create,
        Ability.RANGE: _range,
        Ability.LIST: _list,
        Ability.DELETE: _delete,
    }
    if thorough:
        tests[Ability.LOCK] = _lock
    elif not store.features.locks:
        found.lacks[Ability.LOCK] = _NO_LOCK
    try:
        for ability, test in tests.items():
            if seen := test(store, prefix + ability.name.lower().replace("_", "-")):
                found.lacks[ability] = seen
    finally:
        for info in list(store.list(prefix)):
            with suppress(Locked):
                store.delete(info.name)
    return found


# Each says what was seen instead of what must be; nothing, if all is well.

_NO_LOCK = "locks are kept by this software, not by the place"


def _create(store: Store, name: str) -> str:
    if not store.put(name, b"the first"):
        return "a new name counts as taken"
    if store.put(name, b"the second"):
        return "a name that is taken can be created again"
    return "" if store.get(name) == b"the first" else "a refused create changes the object"


def _range(store: Store, name: str) -> str:
    content = secrets.token_bytes(1000)
    store.put(name, content)
    try:
        for offset, length in ((0, 1), (100, 300), (999, 1), (0, 1000)):
            if store.get(name, offset, length) != content[offset : offset + length]:
                return f"bytes {offset} to {offset + length} are not those that were written"
        with suppress(Corrupt):
            store.get(name, 990, 20)
            return "a read beyond the end succeeds"
    except StoreUnreachable:
        raise
    except VaultError as error:
        return str(error)
    return ""


def _list(store: Store, name: str) -> str:
    store.put(name, b"12345")
    return "" if list(store.list(name)) == [ObjectInfo(name, 5)] else "a new object is not listed at once"


def _delete(store: Store, name: str) -> str:
    store.put(name, b"x")
    store.delete(name)
    if list(store.list(name)):
        return "a removed object is still listed"
    try:
        store.get(name)
    except ObjectMissing:
        return ""
    return "a removed object can still be read"


def _lock(store: Store, name: str) -> str:
    if not store.features.locks:
        return _NO_LOCK
    store.put(name, b"x")
    until = datetime.now(UTC) + _RETAINED
    store.retain(name, until)
    try:
        store.delete(name)
    except Locked:
        time.sleep(max(0.0, (until - datetime.now(UTC)).total_seconds() + 1))
        return ""
    return "a retained object can be removed"
