"""Deletions of points that can be taken back, and pins that prevent them (FORMAT.md, "Deleting points").

Nobody waits for anybody here, and everybody may be killed at any step. Two things make that safe. One exclusive create
(`.end`) decides how a deletion ends, so a restore from the trash and a sweep cannot both win. And whoever relies on
something creates its own object first and looks at the other side's second (a pin and a deletion; a session and a final
deletion), so of two that meet at least one sees the other. A manifest is removed before the objects that say that it
may be, and the one that says `final` goes last: whoever was killed in between is continued by the next one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING

from pydantic import AwareDatetime, ValidationError

from workers.contract.errors import Corrupt, Locked, NewerFormat, NotFound, ObjectMissing, WrongClock
from workers.contract.machines import Value
from workers.contract.seams import Store
from workers.vault.mirror import heal
from workers.vault.sealing import decode_plain, encode_plain
from workers.vault.sessions import SessionInfo, sessions

if TYPE_CHECKING:
    from workers.vault.vault import Vault

TRASH = "trash/"
PINS = "pins/"
SKEW = timedelta(minutes=10)
"""By how much the clocks of hosts may differ."""
_NAME = re.compile(r"trash/([a-z0-9][a-z0-9-]*)\.([1-9][0-9]*)(\.end)?")
_MOST_DAYS = 100 * 366
_DAMAGED = "(what is written of it cannot be read)"


class Outcome(StrEnum):
    RESTORED = "restored"
    FINAL = "final"


class Deletion(Value):
    """One deletion of a point. One that cannot be read stands until somebody takes it back."""

    by: str
    number: int
    point: str
    reason: str
    time: AwareDatetime
    until: AwareDatetime
    """Until then at least it can be taken back."""


class Removal(Value):
    """What became of a point whose deletion is final."""

    point: str
    waits: str = ""
    """Why its manifest stays for now; empty: it is gone."""


class _Last(Value):
    """The last deletion of a point, as far as names tell; number 0: there is none."""

    number: int = 0
    ended: bool = False


# --- looking -------------------------------------------------------------------------------------------------------


def final(store: Store, point: str) -> bool:
    """Whether a deletion of the point has become final: then its manifest goes as soon as nobody reads it."""
    return any(
        decode_plain(store.get(info.name), info.name).get("outcome") == Outcome.FINAL
        for info in store.list(f"{TRASH}{point}.")
        if info.name.endswith(".end")
    )


def standing(store: Store) -> dict[str, Deletion]:
    """Point → its deletion, where one stands: it can be taken back, or waits for its end."""
    found = {}
    for point, last in _lasts(store, TRASH).items():
        if not last.ended and (deletion := _read_deletion(store, point, last.number)) is not None:
            found[point] = deletion
    return found


def finals(store: Store) -> list[str]:
    """Points whose deletion is final, and of which something is still there. An end that cannot be read is none."""
    found = []
    for point, last in _lasts(store, TRASH).items():
        with suppress(Corrupt):
            if last.ended and _outcome(store, point, last.number) is Outcome.FINAL:
                found.append(point)
    return found


def pinned(store: Store) -> dict[str, str]:
    """Point → why it is not to be deleted."""
    return {
        point: reason
        for info in store.list(PINS)
        if (reason := pin_of(store, point := info.name.removeprefix(PINS))) is not None
    }


def pin_of(store: Store, point: str) -> str | None:
    """Why the point is not to be deleted; None: it is not pinned. A pin that cannot be read is one."""
    try:
        return str(decode_plain(store.get(PINS + point), PINS + point).get("reason", ""))
    except ObjectMissing:
        return None
    except Corrupt:
        return _DAMAGED


def check_clock(vault: Vault, deletions: Iterable[Deletion], now: datetime) -> None:
    """Raises WrongClock if `now` is before something in the vault was made. A clock that is ahead cannot be told by
    looking; what it has made is then in the future for everybody else, and stops them here."""
    times = [(point.time, f"point {point.id[:8]}") for point in vault.points()]
    times += [(deletion.time, f"the deletion of point {deletion.point[:8]}") for deletion in deletions]
    newest, what = max(times, default=(now, ""))
    if newest > now + SKEW:
        raise WrongClock(
            f"the clock of this host says {now:%Y-%m-%d %H:%M} UTC, but {what} was made {newest:%Y-%m-%d %H:%M} UTC: "
            "one of the two is wrong, and no deletion becomes final",
            hint="timedatectl",
        )


# --- deleting and taking back --------------------------------------------------------------------------------------


def delete(vault: Vault, point: str, *, now: datetime, until: datetime, by: str, reason: str) -> Deletion:
    """Delete a point so that it can be taken back until `until`, and until its lock ends. Deleted already: that
    deletion stands as it is. Raises NotFound, Locked if it is pinned, or locked and not to be deleted softly,
    WrongClock if it is younger than `now`."""
    store = vault.store
    deletable = check_deletable(vault, point, now=now, until=until)
    deletion = _begun(store, point, now=now, until=deletable, by=by, reason=reason)
    if (why := pin_of(store, point)) is not None:  # looked at again: a pin that came first must win
        _end(store, point, deletion.number, Outcome.RESTORED, now=now, by=by)
        raise _is_pinned(point, why)
    return deletion


def check_deletable(vault: Vault, point: str, *, now: datetime, until: datetime) -> datetime:
    """Until when a deletion could be taken back that is asked for until then. Raises as `delete` does."""
    locked = _locked_until(vault, point, now)
    if locked.made > now + SKEW:
        raise WrongClock(
            f"the clock of this host says {now:%Y-%m-%d %H:%M} UTC, but point {point[:8]} was made "
            f"{locked.made:%Y-%m-%d %H:%M} UTC: one of the two is wrong, and nothing was deleted",
            hint="timedatectl",
        )
    if locked.until is not None and locked.until > now >= until:
        raise Locked(
            f"point {point[:8]} is locked until {locked.until:%Y-%m-%d %H:%M} UTC: it cannot be deleted at once",
            hint=f"stillframe point delete {point[:8]}",
        )
    if (why := pin_of(vault.store, point)) is not None:
        raise _is_pinned(point, why)
    return max(until, locked.until or until)


def undelete(vault: Vault, point: str, *, now: datetime, by: str) -> bool:
    """Take a deletion back. False: the point was not deleted. Raises NotFound if it is gone for good."""
    if not _there(vault, point):
        raise _gone(point)
    last = _lasts(vault.store, f"{TRASH}{point}.").get(point, _Last())
    _check_kept(vault, point, _restored(vault.store, point, last, now=now, by=by))
    return last.number > 0 and not last.ended


def pin(vault: Vault, point: str, *, now: datetime, by: str, reason: str) -> None:
    """Keep a point from being deleted; a deletion that stands is taken back. Pinned already: the first reason stays.
    Raises NotFound if the point is gone for good."""
    if not _there(vault, point):
        raise _gone(point)
    store = vault.store
    store.put(PINS + point, encode_plain({"by": by, "point": point, "reason": reason, "time": now.isoformat()}))
    last = _lasts(store, f"{TRASH}{point}.").get(point, _Last())
    _check_kept(vault, point, _restored(store, point, last, now=now, by=by))


def unpin(store: Store, point: str) -> bool:
    """False: it was not pinned."""
    there = pin_of(store, point) is not None
    store.delete(PINS + point)
    return there


def _restored(store: Store, point: str, last: _Last, *, now: datetime, by: str) -> bool:
    """Take back the last deletion, if there is one; whether nothing is final."""
    return not last.number or _end(store, point, last.number, Outcome.RESTORED, now=now, by=by) is Outcome.RESTORED


def _check_kept(vault: Vault, point: str, restored: bool) -> None:
    """Raises NotFound if the point is given up. The manifest is looked at last: a whole removal may have passed
    between two steps of ours, and then nothing was there any more that could have told us so."""
    if not restored:
        vault.store.delete(PINS + point)
        raise _gone(point)
    if not _there(vault, point):
        _clear(vault.store, point)
        raise _gone(point)


def _begun(store: Store, point: str, *, now: datetime, until: datetime, by: str, reason: str) -> Deletion:
    """The deletion that stands: a new one, or the one that is there. Raises NotFound if one is final."""
    while True:
        last = _lasts(store, f"{TRASH}{point}.").get(point, _Last())
        if last.number and not last.ended:
            there = _read_deletion(store, point, last.number)
            if there is None:
                raise _gone(point)  # removed since it was listed
            return there
        if last.number and _outcome(store, point, last.number) is Outcome.FINAL:
            raise _gone(point)
        wanted = Deletion(by=by, number=last.number + 1, point=point, reason=reason, time=now, until=until)
        if store.put(_name(point, wanted.number), encode_plain(wanted.model_dump(mode="json"))):
            return wanted


# --- for good ------------------------------------------------------------------------------------------------------


def finalise(
    vault: Vault, now: datetime, *, points: Collection[str] | None = None, trust_clock: bool = False
) -> list[Deletion]:
    """Make deletions final whose time is over: those of `points`, or all. Those that became so.

    Not while a point is pinned (then its deletion is taken back) or locked. Raises WrongClock if `now` cannot be,
    unless a person has looked at it (`trust_clock`); nothing becomes final then."""
    stand = standing(vault.store)
    due = [d for d in stand.values() if d.until <= now and (points is None or d.point in points)]
    if due and not trust_clock:
        check_clock(vault, stand.values(), now)
    done = []
    for deletion in due:
        if pin_of(vault.store, deletion.point) is not None:  # who pinned it was killed before it ended the deletion
            _end(vault.store, deletion.point, deletion.number, Outcome.RESTORED, now=now, by=deletion.by)
            continue
        with suppress(NotFound):  # its manifest is gone already
            locked = _locked_until(vault, deletion.point, deletion.time).until
            if locked is not None and locked > now:
                continue
        outcome = _end(vault.store, deletion.point, deletion.number, Outcome.FINAL, now=now, by=deletion.by)
        if outcome is Outcome.FINAL:
            done.append(deletion)
    return done


def remove_finals(vault: Vault, *, points: Collection[str] | None = None) -> list[Removal]:
    """Remove the manifests of final deletions (of `points`, or all) that no session reads or may create again, then
    what the trash says of them. Raises Corrupt at a damaged session: it may read any point."""
    gone = [point for point in finals(vault.store) if points is None or point in points]
    if not gone:
        return []
    _complete_ends(vault.store, gone)
    busy = list(sessions(vault.store))  # after `.end` was seen: who announces itself later sees it too
    return [_remove(vault, point, busy) for point in gone]


def _remove(vault: Vault, point: str, busy: list[SessionInfo]) -> Removal:
    for session in busy:
        if session.reads is None or point in session.reads:
            return Removal(point=point, waits=f"session {session.session} of {session.host or 'a host'} reads it")
        if session.point == point:
            return Removal(point=point, waits=f"session {session.session}, which made it, has not ended")
    try:
        with suppress(NotFound):
            vault.delete_point(point)
    except Locked as error:
        return Removal(point=point, waits=str(error))
    _clear(vault.store, point)
    return Removal(point=point)


def _clear(store: Store, point: str) -> None:
    """Remove what pins and trash say of a point that is gone; last what says that it is, so that anybody can go on
    from wherever this is cut off."""
    store.delete(PINS + point)
    names = [match for info in store.list(f"{TRASH}{point}.") if (match := _NAME.fullmatch(info.name))]
    for match in sorted(names, key=lambda match: (int(match[2]), match[3] is not None)):
        store.delete(match[0])


# --- objects -------------------------------------------------------------------------------------------------------


def _name(point: str, number: int) -> str:
    return f"{TRASH}{point}.{number}"


def _lasts(store: Store, prefix: str) -> dict[str, _Last]:
    """Point → its last deletion, of all whose names begin with `prefix`."""
    found: dict[str, _Last] = {}
    for info in store.list(prefix):
        if (match := _NAME.fullmatch(info.name)) is None:
            continue
        point, number, ended = match[1], int(match[2]), match[3] is not None
        before = found.get(point, _Last())
        if number >= before.number:
            found[point] = _Last(number=number, ended=ended or (before.number == number and before.ended))
    return found


def _read_deletion(store: Store, point: str, number: int) -> Deletion | None:
    """None: it was removed."""
    name = _name(point, number)
    try:
        found = Deletion.model_validate(decode_plain(store.get(name), name))
    except ObjectMissing:
        return None
    except (Corrupt, ValidationError):
        found = None
    if found is None or (found.point, found.number) != (point, number):
        ends = datetime.max.replace(tzinfo=UTC)
        begun = datetime.min.replace(tzinfo=UTC)
        return Deletion(by="", number=number, point=point, reason=_DAMAGED, time=begun, until=ends)
    return found


def _outcome(store: Store, point: str, number: int) -> Outcome:
    """How a deletion has ended. One that is gone was final: nothing else is removed. Raises Corrupt."""
    name = f"{_name(point, number)}.end"
    try:
        return Outcome(str(decode_plain(store.get(name), name).get("outcome")))
    except ObjectMissing:
        return Outcome.FINAL
    except ValueError:
        raise Corrupt(f"{name} does not say how the deletion ended") from None


def _end(store: Store, point: str, number: int, outcome: Outcome, *, now: datetime, by: str) -> Outcome:
    """End a deletion, or learn how somebody else has. Raises Corrupt."""
    name = f"{_name(point, number)}.end"
    if store.put(name, encode_plain({"by": by, "outcome": outcome.value, "time": now.isoformat()})):
        return outcome
    return _outcome(store, point, number)


def _complete_ends(store: Store, points: Collection[str]) -> None:
    """Give the ends of deletions to each store of a mirror, between which their creation may have been cut off: whoever
    looks from now on sees them, whichever answers."""
    first, *others = store.copies()
    for point, last in _lasts(store, TRASH).items() if others else ():
        for other in others if point in points else ():
            heal(first, other, f"{_name(point, last.number)}.end")


class _Lock(Value):
    made: datetime
    """When the point was made, as far as is known."""
    until: datetime | None


def _locked_until(vault: Vault, point: str, since: datetime) -> _Lock:
    """The lock in the manifest. If that is damaged: the latest that it can be, as the point is older than `since`.
    Raises NotFound, NewerFormat."""
    try:
        found = vault.point(point)
    except Corrupt:
        days = _longest_lock(vault.store)
        return _Lock(made=since, until=since + timedelta(days=days) if days else None)
    return _Lock(made=found.time, until=found.locked_until)


def _longest_lock(store: Store) -> int:
    """Days of the longest lock that the vault ever had. Raises Corrupt."""
    locks = [decode_plain(store.get(info.name), info.name) for info in store.list("locks/")]
    days = [one for lock in locks if isinstance(one := lock.get("days"), int) and 0 <= one < _MOST_DAYS]
    if len(days) < len(locks):
        raise Corrupt("a lock of the vault does not say for how many days it is")
    return max(days, default=0)


def _there(vault: Vault, point: str) -> bool:
    """Whether there is a manifest of a point, readable or not."""
    try:
        with suppress(Corrupt, NewerFormat):
            vault.point(point)
    except NotFound:
        return False
    return True


def _gone(point: str) -> NotFound:
    return NotFound(f"point {point[:8]} is gone for good", hint="stillframe point list --all")


def _is_pinned(point: str, why: str) -> Locked:
    return Locked(f"point {point[:8]} is pinned{f': {why}' if why else ''}", hint=f"stillframe point unpin {point[:8]}")
