"""The moments of one policy around now, computed once and asked for each of its machines. Pure.

A machine begins at a moment of its own: `spread` is divided among machines by a hash of their UUID, so that it stays
the same whatever joins or leaves, and a window in which nothing may begin postpones to its end. Both are monotone: of
two moments that are due, the later one never begins earlier. Hence the newest beginning until now is found by
bisection, and ten thousand machines of a policy cost what one costs, and a look each.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from orchestrator.config_file import Policy
from orchestrator.schedules import blackouts, moments, zone_of

NO_SCHEDULE = "no schedule"
_FIRST_LOOK = timedelta(days=2)
_AHEAD = timedelta(hours=2)
_MISSED = timedelta(days=400)
"""So far back, what was missed is counted."""
_FARTHEST = timedelta(days=9 * 366)
"""Leap days are eight years apart around 2100: what is not due until then never is."""


def share(uuid: str) -> float:
    """Where in a spread the machine begins: from 0 to just below 1, always the same for a UUID."""
    return int.from_bytes(hashlib.sha256(uuid.encode()).digest()[:6]) / (1 << 48)


@dataclass(frozen=True, slots=True)
class Beginning:
    """When a backup begins that was due at a moment."""

    at: datetime
    due: datetime
    """The moment of the schedule."""
    why: str


class Timetable:
    """Of `policy`, as seen at `now` and for some time after; `words` say all that beginnings depend on."""

    def __init__(self, policy: Policy, now: datetime) -> None:
        self.policy = policy
        self.zone = zone_of(policy)
        self.words = words_of(policy)
        self.scheduled = bool(policy.schedule or policy.cron)
        self._now = now.astimezone(UTC)
        self._low = self._high = self._now
        self._due: list[datetime] = []
        self._windows: list[tuple[datetime, datetime]] = []
        self._ends: list[datetime] = []
        self._reach(self._low - _FIRST_LOOK - timedelta(seconds=policy.spread), self._high + _FIRST_LOOK)

    def offset(self, uuid: str) -> timedelta:
        """How long after a moment that is due the machine begins; whole seconds."""
        spread = self.policy.spread
        return timedelta(seconds=int(share(uuid) * spread)) if spread else timedelta(0)

    def open_from(self, moment: datetime) -> datetime:
        """That moment, or the end of the window in which nothing may begin then."""
        if self.policy.blackout:
            self._reach(min(self._low, moment), max(self._high, moment))
        return self._open_from(moment)

    def _open_from(self, moment: datetime) -> datetime:
        place = bisect_right(self._ends, moment)
        if place < len(self._windows) and self._windows[place][0] <= moment:
            return self._windows[place][1]
        return moment

    def latest(self, offset: timedelta, now: datetime) -> datetime | None:
        """The newest beginning at or before `now`; None: there was none within living memory."""
        self._reach(self._low, now + _AHEAD)
        while self.scheduled:
            place = self._place(offset, now)
            if place:
                return self._begin(self._due[place - 1], offset)
            if not self._more_past():
                return None
        return None

    def next(self, offset: timedelta, after: datetime) -> Beginning | None:
        """The first beginning after that; None: there is none in this lifetime."""
        self._reach(min(self._low, after - _FIRST_LOOK), after + _AHEAD)
        while self.scheduled:
            place = self._place(offset, after)
            if place < len(self._due):
                return self._told(self._due[place], offset)
            if not self._more_future():
                return None
        return None

    def missed(self, offset: timedelta, after: datetime, last: datetime) -> int:
        """How many beginnings lie after `after` and before `last`, as far as one looks back."""
        self._reach(max(after, last - _MISSED) - _FIRST_LOOK, last + _AHEAD)
        due = self._due[self._place(offset, after) : self._place(offset, last)]
        return len({self._begin(moment, offset) for moment in due} - {last})

    def _begin(self, due: datetime, offset: timedelta) -> datetime:
        if not self._windows:
            return due + offset
        return self._open_from(self._open_from(due) + offset)

    def _place(self, offset: timedelta, moment: datetime) -> int:
        """How many of the known moments have begun by then."""
        if not self.policy.blackout:
            return bisect_right(self._due, moment - offset)
        return bisect_right(self._due, moment, key=lambda due: self._begin(due, offset))

    def _told(self, due: datetime, offset: timedelta) -> Beginning:
        at = self._begin(due, offset)
        why = [self.policy.schedule or f"cron {self.policy.cron}"]
        if offset:
            why.append(f"spread over {_length(self.policy.spread)}")
        if at != due + offset:
            wanted = (due if self._open_from(due) != due else due + offset).astimezone(self.zone)
            why.append(f"postponed from {wanted:%a %H:%M} by a blackout")
        return Beginning(at, due, ", ".join(why))

    # --- what is known ---------------------------------------------------------------------------------------------

    def _more_past(self) -> bool:
        length = max(self._now - self._low, _FIRST_LOOK)
        if length >= _FARTHEST:
            return False
        self._reach(self._low - length * 3, self._high)
        return True

    def _more_future(self) -> bool:
        length = max(self._high - self._now, _FIRST_LOOK)
        if length >= _FARTHEST:
            return False
        self._reach(self._low, self._high + length * 3)
        return True

    def _reach(self, low: datetime, high: datetime) -> None:
        """Know all moments and windows of `[low, high)`."""
        if low >= self._low and high <= self._high:
            return
        low, high = min(low, self._low), max(high, self._high)
        before = list(moments(self.policy, low, self._low)) if low < self._low else []
        after = list(moments(self.policy, self._high, high)) if high > self._high else []
        self._due = before + self._due + after
        self._low, self._high = low, high
        if self.policy.blackout:
            self._windows = blackouts(self.policy, self._low, self._high + timedelta(days=9))
            self._ends = [ends for _, ends in self._windows]


def words_of(policy: Policy) -> str:
    """All that its beginnings depend on, for people and to be compared."""
    if not (policy.schedule or policy.cron):
        return NO_SCHEDULE
    words = f"{policy.schedule or f'cron {policy.cron}'} {zone_of(policy)}"
    words += f", spread over {_length(policy.spread)}" if policy.spread else ""
    return words + (f", not {' or '.join(policy.blackout)}" if policy.blackout else "")


def _length(seconds: int) -> str:
    for size, unit in ((3600, "hour"), (60, "minute"), (1, "second")):
        if seconds % size == 0:
            return f"{seconds // size} {unit}{'' if seconds == size else 's'}"
    raise AssertionError(seconds)
