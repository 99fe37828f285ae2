"""One vault on several stores, each of which holds every object: a disk may die, and nothing is lost or waits.

How this stays one vault. *The first store decides; an object exists while any of them has it.*

- A put reaches the first store first: of two that create a name it tells one that it is taken. It returns, with either
  answer, only when all have the object, so what somebody relies on is everywhere. Cut off between, it has told nobody;
  whoever tries the name again finds it taken and completes it.
- A delete reaches the first store last. So what the first lacks because it was deleted, no other has either, and a
  deleted object cannot come back from one of them. Whoever copies an object between stores looks afterwards whether
  it is still where it came from, and takes the copy away again if not.
- Puts and deletes need all stores: where one is down they are refused, rather than let it miss them. Reads go on.
- A list is the union over those that answer. Any one of them has everything whose put has returned: sessions,
  condemnations, packs. What is left of a delete that was cut off was doomed. A list may lack what a put that was cut
  off has left in the first alone, while that one does not answer: a session knows only what all stores have.
- Reads take the first store that has the object. One that lacks a pack or a segment is given it again, from bytes that
  are what the name says. A pack that is there and damaged inside is seen by whoever decrypts it: see `copies`.

The failure prevented: a store that was away while others went on (left out of the configuration, or an empty folder in
place of an unmounted disk) would bring deleted points back, and hide sessions from a sweep. So a store belongs to the
mirror only if it has the same marker, and no object, but packs and segments, that the first does not have. Until
`stillframe vault mirror-sync` has made it so, it counts as down.
"""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from workers.contract.errors import ConfigError, Corrupt, Locked, ObjectMissing, StoreUnreachable, VaultError
from workers.contract.errors import VaultMissing as Missing
from workers.contract.seams import ObjectInfo, Store, StoreFeatures
from workers.vault.copying import addressed, copy_object, listed
from workers.vault.packs import write_error
from workers.vault.stores import MARKER

SYNC = "stillframe vault mirror-sync"
DECIDING = (
    *("points/", "trash/", "pins/", "locks/", "sessions/", "condemned/", "verdicts/", "damage/"),
    *("keys/", "keyring/", "gone/"),
)
"""All but packs and segments: what must not come back."""
_REST = 30.0
"""Seconds for which a store that failed is asked last."""
Open = Callable[[], Store]
T = TypeVar("T")


class MirrorStore:
    """The stores that `places` (URL or path → how to open it) name; the first decides. Thread-safe."""

    def __init__(self, places: Mapping[str, Open], *, create: bool = False) -> None:
        """Raises what opening the first raises if none can be opened, or, with `create`, any; ConfigError if they
        hold different vaults."""
        self._places = list(places)
        self._openers = list(places.values())
        self._create = create
        self._marker: bytes | None = None
        self._opened: dict[int, Store] = {}
        self._rest: dict[int, float] = {}
        self._lock = threading.RLock()
        failed = [error for at in self._order() if (error := self._failure(at))]
        if failed and (create or not self._opened):
            raise failed[0]
        place = " and ".join(self._places)
        members = [store.features for store in self._opened.values()]
        self.features = StoreFeatures(
            place,
            locks=all(member.locks for member in members),
            reads_at_once=max(member.reads_at_once for member in members),
        )

    def problems(self) -> list[str]:
        """Why which stores do not take part now."""
        found = [(place, self._failure(at)) for at, place in enumerate(self._places)]
        return [f"{place}: {error}" for place, error in found if error]

    # --- members ---------------------------------------------------------------------------------------------------

    def _member(self, at: int) -> Store:
        """Store number `at`, opened again if it could not be before. Raises VaultError."""
        with self._lock:
            if at not in self._opened:
                store = self._openers[at]()
                self._check(at, store)
                self._opened[at] = store
            return self._opened[at]

    def _failure(self, at: int) -> VaultError | None:
        try:
            self._member(at)
        except VaultError as error:
            return error
        return None

    def _check(self, at: int, store: Store) -> None:
        """Whether it belongs to the mirror. Raises Missing, VaultError, ConfigError."""
        try:
            marker = store.get(MARKER)
        except ObjectMissing:
            if not self._create:
                raise Missing(f"{self._places[at]} is not part of the vault yet", hint=SYNC) from None
            return
        if self._marker is not None and marker != self._marker:
            raise ConfigError(f"{self._places[at]} holds another vault than {self._places[0]}")
        self._marker = marker
        if at == 0:
            for other, there in list(self._opened.items()):
                if extra(store, there):
                    del self._opened[other]
        elif 0 in self._opened and (found := extra(self._opened[0], store)):
            raise VaultError(
                f"{self._places[at]} has {len(found)} objects that {self._places[0]} has not, like {found[0]}: "
                "it was away while others were deleted",
                hint=SYNC,
            )

    def _all(self) -> list[Store]:
        """Every store, for what changes something. Raises StoreUnreachable if one is down."""
        try:
            return [self._member(at) for at in range(len(self._places))]
        except VaultError as error:
            hint = f"bring it back, or, for a new or replaced one: {SYNC}"
            raise StoreUnreachable(f"one of the vault's stores is away, so nothing changes: {error}", hint=hint) from (
                error
            )

    def _order(self) -> list[int]:
        """The first first; those that failed a moment ago last."""
        now = time.monotonic()
        return sorted(range(len(self._places)), key=lambda at: self._rest.get(at, 0.0) > now)

    def _answers(self, ask: Callable[[Store], T]) -> Iterator[tuple[int, T | VaultError]]:
        """What each store says, one after the other, errors included."""
        for at in self._order():
            try:
                yield at, ask(self._member(at))
            except (ObjectMissing, Corrupt) as error:
                yield at, error
            except VaultError as error:
                self._rest[at] = time.monotonic() + _REST
                yield at, error

    # --- reading ---------------------------------------------------------------------------------------------------

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        errors: dict[int, VaultError] = {}
        for at, answer in self._answers(lambda store: store.get(name, offset, length)):
            if isinstance(answer, bytes):
                self._repair(name, at, errors)
                return answer
            errors[at] = answer
        # Missing only if every store says so: of one that is down nobody knows.
        raise next((error for error in errors.values() if not isinstance(error, ObjectMissing)), errors[min(errors)])

    def _repair(self, name: str, source: int, errors: dict[int, VaultError]) -> None:
        """Give what has its hash for a name to those that turned out to lack it; a failure is for the next reader."""
        for at, error in errors.items():
            if addressed(name) and isinstance(error, ObjectMissing | Corrupt):
                with suppress(VaultError, OSError):
                    if isinstance(error, Corrupt):
                        self._opened[at].delete(name)
                    heal(self._opened[source], self._opened[at], name)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        found: dict[str, ObjectInfo] = {}
        errors = []
        for _, answer in self._answers(lambda store: list(store.list(prefix))):
            if isinstance(answer, VaultError):
                errors.append(answer)
                continue
            for info in answer:
                found.setdefault(info.name, info)
        if len(errors) == len(self._places):
            raise errors[0]
        yield from sorted(found.values(), key=lambda info: info.name)

    def free_bytes(self) -> int | None:
        known = [answer for _, answer in self._answers(lambda store: store.free_bytes()) if isinstance(answer, int)]
        return min(known, default=None)

    def copies(self) -> Sequence[Store]:
        """The stores that answer. A damaged copy in one is mended by `delete` and `put` on it, with verified bytes."""
        return [self._member(at) for at in range(len(self._places)) if not self._failure(at)]

    # --- writing ---------------------------------------------------------------------------------------------------

    def put(self, name: str, data: bytes) -> bool:
        first, *others = self._all()
        if self._taken(name, first, others):
            return False
        created = first.put(name, data)
        for other in others:
            if created or addressed(name):
                other.put(name, data)
            else:
                heal(first, other, name)
        return created

    def put_file(self, name: str, path: Path) -> bool:
        first, *others = self._all()
        copies = [self._staged(other, path) for other in others]
        try:
            if self._taken(name, first, others):
                return False
            created = first.put_file(name, path)
            for other, copy in zip(others, copies, strict=True):
                if created or addressed(name):
                    other.put_file(name, copy)
                else:
                    heal(first, other, name)
        finally:
            for left in (path, *copies):
                left.unlink(missing_ok=True)
        return created

    def replace(self, name: str, path: Path) -> None:
        stores = self._all()
        copies = [self._staged(store, path) for store in stores]
        try:
            for store, copy in zip(stores, copies, strict=True):
                store.replace(name, copy)
        finally:
            for left in (path, *copies):
                left.unlink(missing_ok=True)

    def _staged(self, store: Store, path: Path) -> Path:
        """A copy, and no link: two names of one file are damaged together."""
        copy = store.staging() / f"mirror-{secrets.token_hex(8)}"
        try:
            copy.touch(mode=0o600)
            shutil.copyfile(path, copy)
        except OSError as error:
            raise write_error(error) from error
        return copy

    def _taken(self, name: str, first: Store, others: Sequence[Store]) -> bool:
        """Whether another than the first has an object already. Then it exists: one that the first has lost is brought
        back, and all have it."""
        if addressed(name) or not any(name in listed(other, name) and heal(other, first, name) for other in others):
            return False
        for other in others:
            heal(first, other, name)
        return True

    def staging(self) -> Path:
        """The first store's, where its largest file need not be copied."""
        return self._all()[0].staging()

    def delete(self, name: str) -> None:
        for store in reversed(self._all()):
            store.delete(name)

    def retain(self, name: str, until: datetime) -> None:
        first, *others = self._all()
        first.retain(name, until)
        for other in others:
            heal(first, other, name)
            other.retain(name, until)


def heal(source: Store, target: Store, name: str) -> bool:
    """See that the target has an object that the source has; whether it has it then. Raises Corrupt for bytes that
    are not what the name says, and what stores raise."""
    info = listed(source, name).get(name)
    if info is None:
        return False
    if name in listed(target, name):
        return True
    try:
        created = copy_object(source, target, info)
    except ObjectMissing:
        return False
    if created and name not in listed(source, name):
        with suppress(Locked):
            target.delete(name)  # deleted while it was copied: it must not come back
        return False
    return True


def extra(first: Store, other: Store) -> list[str]:
    """Objects, but packs and segments, that `other` has and `first` has not. One that is just being deleted or created
    is none: it is gone from the other first, and there last."""
    there = listed(other, *DECIDING)
    here = listed(first, *DECIDING)
    return [name for name in there if name not in here and name in listed(other, name)]
