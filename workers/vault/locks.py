"""For how long a vault's points cannot be deleted, by anybody (FORMAT.md, "Locks").

A lock is set or lengthened by one person, and shortened only with the approval of a second key holder. Locks are a
chain: each is valid by the one before, so whoever reads them checks for himself that nobody has cut one short by
writing an object. A point carries its own date from its commit on, which no later lock changes.

The date also goes to the store, as retention of every object that the point needs. New packs get it from their writer,
manifests at the commit; index segments do without, since a sweep must replace them and they can be made again from the
packs. Packs that a point has in common with older ones would have to be looked up one by one
in the commit, which must be quick: so retention is given for more days than needed, and `extend` renews it before they
are over. As long as `extend` runs at least every `AHEAD` days (each sweep does it), there is no moment at which a
locked point's pack is not retained.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from workers.contract.errors import Busy, Corrupt, Locked, ObjectMissing, UsageError, WrongClock
from workers.contract.machines import Value
from workers.contract.points import Point
from workers.contract.seams import Store
from workers.parallel import share_out
from workers.vault import approval
from workers.vault.approval import Approval, Request
from workers.vault.keys import read_slots
from workers.vault.packs import pack_name
from workers.vault.sealing import decode_plain, encode_plain
from workers.vault.trash import SKEW

if TYPE_CHECKING:
    from workers.vault.vault import Vault

LOCKS = "locks/"
AHEAD = timedelta(days=10)
"""Retention is given for at least so much longer than needed, and in steps of so much."""
MAX_DAYS = 36500
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_IN_FLIGHT = 8
_LOST = "bring it back from a replica; without one, remove it by hand and set the lock again"


class Lock(Value):
    """The lock period from some moment on; `number` 0: there never was one."""

    number: int = 0
    days: int = 0
    approvers: dict[str, str] = {}
    """Who may approve that it is shortened: slot → public key."""
    by: str = ""
    time: datetime = _EPOCH
    approval: Approval | None = None

    def until(self, time: datetime) -> datetime | None:
        """Until when a point of `time` is locked; None: not at all. Never before the lock itself would have it: a
        clock that was set back does not make points that can be deleted at once."""
        return max(time, self.time) + timedelta(days=self.days) if self.days else None

    def covering(self, time: datetime) -> datetime | None:
        """Until when to retain an object that points of `time` and of the `AHEAD` days after need."""
        until = self.until(time)
        return _step(until) if until is not None else None


def _step(until: datetime) -> datetime:
    """`until` and `AHEAD`, rounded up to whole steps, so that one retention serves many points."""
    return _EPOCH + -((_EPOCH - until - AHEAD) // AHEAD) * AHEAD


# --- reading -------------------------------------------------------------------------------------------------------


def read_lock(store: Store, vault_id: str) -> Lock:
    """The lock that counts. Raises Corrupt: a damaged lock must not pass for none."""
    return read_chain(store, vault_id)[0]


def read_chain(store: Store, vault_id: str) -> tuple[Lock, list[str]]:
    """The lock that counts, and what is wrong with those that do not. Raises Corrupt."""
    lock, wrong = Lock(), []
    for info in sorted(store.list(LOCKS), key=lambda info: info.name):
        found = _read(store, info.name)
        if why := _invalid(found, lock, vault_id):
            wrong.append(f"{info.name} does not count: {why}")
        else:
            lock = found
    return lock, wrong


def _read(store: Store, name: str) -> Lock:
    try:
        fields = decode_plain(store.get(name), name)
        lock = Lock.model_validate({**fields, "approval": fields["approval"] or None})
    except (KeyError, ValidationError, Corrupt):
        raise Corrupt(f"{name} is not what was written: how long are points locked?", hint=_LOST) from None
    if name != _name(lock.number) or not 0 <= lock.days <= MAX_DAYS:
        raise Corrupt(f"{name} is not a lock", hint=_LOST)
    return lock


def _name(number: int) -> str:
    return f"{LOCKS}{number:08d}"


def _invalid(lock: Lock, before: Lock, vault_id: str) -> str:
    """Why `lock` cannot come after `before`; empty: it can."""
    if not before.days or (lock.days >= before.days and lock.approvers == before.approvers):
        return ""
    if lock.approval is None:
        return f"it shortens the lock from {before.days} to {lock.days} days, or changes who may, without an approval"
    asked = lock.approval.request
    told = (asked.vault, asked.number, asked.days_before, asked.days, asked.approvers)
    if told != (vault_id, lock.number, before.days, lock.days, lock.approvers):
        return "its approval is for something else"
    return approval.problem(lock.approval, before.approvers)


def check_unlocked(point: Point) -> None:
    """Raises Locked if the point may not be deleted yet."""
    if point.locked_until is not None and point.locked_until > datetime.now(UTC):
        raise Locked(
            f"point {point.id[:8]} is locked until {point.locked_until:%Y-%m-%d %H:%M} UTC",
            hint="nobody can delete it before; `stillframe vault lock` shows the vault's lock",
        )


# --- setting -------------------------------------------------------------------------------------------------------


def check_clock(vault: Vault, lock: Lock) -> None:
    """Raises WrongClock if this host's clock is behind what the vault has seen already: one of them is wrong, and
    dates must not be made from it."""
    newest = max((point.time for point in vault.points()), default=_EPOCH)
    if max(newest, lock.time) > datetime.now(UTC) + SKEW:
        raise WrongClock(
            f"the clock of this host is behind: the vault has seen {max(newest, lock.time):%Y-%m-%d %H:%M} UTC",
            hint="set the clock; if it was ahead before, the date in the vault has to pass first",
        )


def present_approvers(store: Store) -> dict[str, str]:
    """Slot → public key of the slots that there are now; those made by older versions have none."""
    return {slot.id: slot.approver for slot, _ in read_slots(store) if slot.approver}


def lengthen(vault: Vault, days: int, *, by: str) -> Lock:
    """Set the lock period, or make it longer: for points that are committed from now on. Raises Locked if that would
    shorten it, UsageError, VaultError, Busy."""
    lock = read_lock(vault.store, vault.id)
    if days < lock.days:
        raise Locked(f"the lock of {lock.days} days is not shortened to {days} by one person alone")
    if not 0 < days <= MAX_DAYS:
        raise UsageError(f"a lock is for 1 to {MAX_DAYS} days, not for {days}")
    check_clock(vault, lock)
    return _create(vault, lock, days, lock.approvers if lock.days else present_approvers(vault.store), by, None)


def request(vault: Vault, days: int, requesters: Iterable[str], *, by: str) -> Request:
    """Ask for another lock period, with the slots there are now as approvers of the change after. Raises Locked if
    nobody can approve it."""
    lock = read_lock(vault.store, vault.id)
    asking, present = sorted(requesters), present_approvers(vault.store)
    if not any(present.get(slot) == key and slot not in asking for slot, key in lock.approvers.items()):
        raise Locked(
            "nobody can approve this: no other key than yours was there when the lock was set, and is there still",
            hint="the lock stays as it is",
        )
    return Request(
        vault=vault.id,
        number=_next_number(vault.store),
        days_before=lock.days,
        days=days,
        approvers=present,
        requesters=asking,
        by=by,
        nonce=secrets.token_hex(16),
        expires=datetime.now(UTC).replace(microsecond=0) + approval.LIFETIME,
    )


def check_request(store: Store, vault_id: str, asked: Request) -> Lock:
    """The lock that `asked` would change. Raises Locked if it is not for this vault as it is now."""
    lock = read_lock(store, vault_id)
    if asked.vault != vault_id:
        raise Locked("that request is for another vault", hint="name the vault that it is for")
    if (asked.number, asked.days_before) != (_next_number(store), lock.days):
        raise Locked("that request was used already, or the lock was changed since", hint="make a new request")
    if approval.expired(asked):
        raise Locked(f"that request was good until {asked.expires:%Y-%m-%d %H:%M} UTC", hint="make a new request")
    return lock


def change(vault: Vault, given: Approval, days: int, requesters: Iterable[str], *, by: str) -> Lock:
    """Do what was approved; `requesters`: slots that the key of whoever enters it opens. Raises Locked."""
    lock = check_request(vault.store, vault.id, given.request)
    if given.request.days != days:
        raise Locked(f"the approval is for {given.request.days} days, not for {days}")
    if given.slot in set(requesters):
        raise Locked("the approval was made with your own key", hint="another key holder must approve")
    if given.slot not in present_approvers(vault.store):
        raise Locked(f"the approval was made with slot {given.slot}, which was removed since")
    if why := approval.problem(given, lock.approvers):
        raise Locked(f"the approval does not count: {why}")
    check_clock(vault, lock)
    return _create(vault, lock, days, given.request.approvers, by, given)


def _next_number(store: Store) -> int:
    """After the last one, whether that counts or not."""
    return max((int(info.name.removeprefix(LOCKS)) for info in store.list(LOCKS)), default=0) + 1


def _create(vault: Vault, before: Lock, days: int, approvers: dict[str, str], by: str, given: Approval | None) -> Lock:
    number = _next_number(vault.store)
    now = datetime.now(UTC).replace(microsecond=0)
    lock = Lock(number=number, days=days, approvers=approvers, by=by, time=now, approval=given)
    if why := _invalid(lock, before, vault.id):
        raise Locked(f"the lock was not changed: {why}")
    fields = lock.model_dump(mode="json")
    if not vault.store.put(_name(number), encode_plain({**fields, "approval": fields["approval"] or ""})):
        raise Busy("somebody else changes the lock at the same time", hint="look at `stillframe vault lock`")
    return lock


# --- retention in the store ----------------------------------------------------------------------------------------


_MEMO = "retained-"


class Extended(Value):
    """What a renewal of retention has done."""

    until: datetime | None = None
    """None: nothing is locked."""
    objects: int = 0
    """Whose retention was renewed."""
    covered: int = 0
    """Whose retention was long enough."""


Advance = Callable[[int, int], None]
"""Objects done, objects to do."""


def extend(vault: Vault, live_packs: Collection[bytes], *, on_progress: Advance | None = None) -> Extended:
    """Retain the packs `live_packs` (digests) and the locks until every locked point is free, and those that are
    committed within `AHEAD` from now; the manifests until their own date. What this host has done before
    is not done again; any number of hosts may do it at once, and stop at any step. Raises VaultError."""
    now = datetime.now(UTC)
    lock = read_lock(vault.store, vault.id)
    manifests = {f"points/{p.id}": p.locked_until for p in vault.points() if p.locked_until and p.locked_until > now}
    latest = max([*manifests.values(), lock.until(now) or now])
    if latest <= now:
        return Extended()
    target = _step(latest)
    names = [pack_name(digest) for digest in sorted(live_packs)]
    names += [info.name for info in vault.store.list(LOCKS)]
    done = _Done(vault, target)
    wanted = [(name, manifests.get(name, target)) for name in (*names, *manifests) if name not in done.names]
    count = 0

    def work(items: Iterator[tuple[str, datetime]]) -> None:
        nonlocal count
        for name, until in items:
            try:
                vault.store.retain(name, until)
            except ObjectMissing:
                continue  # swept since it was listed
            count = done.add(name)
            if on_progress is not None:
                on_progress(count, len(wanted))

    try:
        share_out(iter(wanted), work, _IN_FLIGHT)
    finally:
        done.close()
    return Extended(until=target, objects=count, covered=len(names) + len(manifests) - len(wanted))


def forget_covered(cache_dir: Path, vault_id: str) -> None:
    """Objects were put anew, perhaps without the retention that they had: the next `extend` of this host looks at every
    one again."""
    for memo in (cache_dir / vault_id).glob(f"{_MEMO}*"):
        memo.unlink(missing_ok=True)


class _Done:
    """What this host has retained until one date: a file in the cache, which may be lost at any time."""

    def __init__(self, vault: Vault, target: datetime) -> None:
        folder = vault.cache_dir
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / f"{_MEMO}{target:%Y%m%d}"
        for older in folder.glob(f"{_MEMO}*"):
            if older < path:
                older.unlink(missing_ok=True)
        self._lock = threading.Lock()
        self._file = path.open("a+")
        self._file.seek(0)
        self.names = set(self._file.read().split())
        self._count = 0

    def add(self, name: str) -> int:
        """How many were added until now."""
        with self._lock:
            self._file.write(f"{name}\n")
            self._count += 1
            return self._count

    def close(self) -> None:
        self._file.close()
