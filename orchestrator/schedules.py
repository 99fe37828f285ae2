"""When a policy's backups are due, and when none may begin: pure, from words or a cron expression to moments.

Clocks that are put forward or back are cron's affair (`cronsim` does as Debian's cron does: what falls into the missing
hour runs right after it, what falls into the doubled one runs once). Only "every N hours" is counted here, by the clock
on the wall from midnight or from its first time: cron cannot say it across midnight. A blackout window lasts from the
first to the last time that the clock shows its ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.config_file import Policy

_DAYS = {
    "daily": "* * *",
    "weekdays": "* * 1-5",
    "weekends": "* * 6,0",
    "weekly": "* * 0",
    "monthly": "1 * *",
    "mondays": "* * 1",
    "tuesdays": "* * 2",
    "wednesdays": "* * 3",
    "thursdays": "* * 4",
    "fridays": "* * 5",
    "saturdays": "* * 6",
    "sundays": "* * 0",
}
"""Word → day of month, month, day of week of cron. `weekly` is on Sundays, `monthly` on the first."""
_WEEKDAYS = {
    "daily": frozenset(range(7)),
    "weekdays": frozenset(range(1, 6)),
    "weekends": frozenset((0, 6)),
    "sundays": frozenset((0,)),
    "mondays": frozenset((1,)),
    "tuesdays": frozenset((2,)),
    "wednesdays": frozenset((3,)),
    "thursdays": frozenset((4,)),
    "fridays": frozenset((5,)),
    "saturdays": frozenset((6,)),
}
_DAY = timedelta(days=1)
_AT = re.compile(r"(\w+) at (\d\d):(\d\d)")
_BLACKOUT = re.compile(r"(?:(\w+) )?(\d\d):(\d\d) to (\d\d):(\d\d)")
_EVERY = re.compile(r"every (\d+) (minute|hour)s?(?: from (\d\d):(\d\d) to (\d\d):(\d\d))?")


def zone_of(policy: Policy) -> tzinfo:
    """The time zone in which the policy is meant: its own, else that of this host."""
    if policy.timezone is not None:
        from zoneinfo import ZoneInfo

        return ZoneInfo(policy.timezone)
    from tzlocal import get_localzone

    return get_localzone()


def moments(policy: Policy, start: datetime, end: datetime) -> Iterator[datetime]:
    """When backups of the policy are due in `[start, end)`, UTC, ascending; nothing if it has no schedule."""
    zone = zone_of(policy)
    words = policy.schedule or ""
    if every := _EVERY.fullmatch(words):
        found = _counted(every, start, end, zone)
    elif expression := policy.cron or _as_cron(words):
        found = _by_cron(expression, start, zone)
    else:
        return
    for moment in found:
        if moment >= end:
            return
        yield moment.astimezone(UTC)


def _as_cron(words: str) -> str:
    if words == "hourly":
        return "0 * * * *"
    at = _AT.fullmatch(words)
    return f"{int(at[3])} {int(at[2])} {_DAYS[at[1]]}" if at else ""


def _by_cron(expression: str, start: datetime, zone: tzinfo) -> Iterator[datetime]:
    from cronsim import CronSim

    # From just before: cronsim gives what comes after a moment.
    yield from CronSim(expression, start.astimezone(zone) - timedelta(minutes=1))


def _counted(every: re.Match[str], start: datetime, end: datetime, zone: tzinfo) -> Iterator[datetime]:
    step = timedelta(**{f"{every[2]}s": max(int(every[1]), 1)})
    first = timedelta(hours=int(every[3] or 0), minutes=int(every[4] or 0))
    last = timedelta(hours=int(every[5] or 23), minutes=int(every[6] or 59))
    if last < first:  # across midnight: the moments after it belong to the day before
        last += _DAY
    day = _midnight(start, zone) - (_DAY if last >= _DAY else timedelta(0))
    before = start - timedelta(microseconds=1)
    while day.replace(tzinfo=zone) < end:
        at = first
        while at <= last:
            moment = (day + at).replace(tzinfo=zone).astimezone(UTC)
            if moment > before:  # in the missing hour, two times on the wall are one moment
                yield moment
                before = moment
            at += step
        day += _DAY


def _midnight(moment: datetime, zone: tzinfo) -> datetime:
    """Of its day in the zone; without a zone."""
    return moment.astimezone(zone).replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)


# --- when no backup begins -----------------------------------------------------------------------------------------


def blackouts(policy: Policy, start: datetime, end: datetime) -> list[tuple[datetime, datetime]]:
    """The windows of the policy that touch `[start, end)`, UTC, ascending, those that meet joined. Each is `[from,
    to)`; a window that ends before it begins ends on the next day, and belongs to the day on which it begins."""
    zone = zone_of(policy)
    found: list[tuple[datetime, datetime]] = []
    parsed = [_window(words) for words in policy.blackout]
    # Wide enough that windows which meet are joined whole, whatever part is asked for: a week holds all there are.
    day, last = _midnight(start, zone) - timedelta(days=9), end + timedelta(days=9)
    while parsed and day.replace(tzinfo=zone) < last:
        for days, opens, closes in parsed:
            if day.isoweekday() % 7 in days:
                found.append((_reached(day + opens, zone)[0], _reached(day + closes, zone)[1]))
        day += _DAY
    return [window for window in _joined(sorted(found)) if window[0] < end and window[1] > start]


def covers_the_week(blackout: Sequence[str]) -> bool:
    """Whether these windows leave no moment in which a backup could begin."""
    week = timedelta(days=7)
    found: list[tuple[timedelta, timedelta]] = []
    for days, opens, closes in map(_window, blackout):
        for day in days:
            begins, ends = _DAY * day + opens, _DAY * day + closes
            found += [(begins, ends), (begins - week, ends - week)]  # Saturday's may reach into Sunday
    until = timedelta(0)
    for begins, ends in sorted(found):
        if begins > until:
            return False
        until = max(until, ends)
    return until >= week


def _window(words: str) -> tuple[frozenset[int], timedelta, timedelta]:
    """Days of the week (Sunday is 0), and from when to when after their midnight."""
    match = _BLACKOUT.fullmatch(words)
    assert match is not None, words
    hours, minutes, to_hours, to_minutes = (int(match[group]) for group in (2, 3, 4, 5))
    opens, closes = timedelta(hours=hours, minutes=minutes), timedelta(hours=to_hours, minutes=to_minutes)
    return _WEEKDAYS[match[1] or "daily"], opens, closes if closes > opens else closes + _DAY


def _reached(wall: datetime, zone: tzinfo) -> tuple[datetime, datetime]:
    """When the clock on the wall first and last comes to that time, or past it where it is put forward."""
    early, late = sorted(wall.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    if early.astimezone(zone).replace(tzinfo=None) == wall:
        return early, late
    while late - early > timedelta(seconds=1):  # the time is missing: it is reached when the clock jumps
        middle = early + (late - early) / 2
        if middle.astimezone(zone).replace(tzinfo=None) < wall:
            early = middle
        else:
            late = middle
    late = late.replace(microsecond=0)
    return late, late


def _joined(windows: Sequence[tuple[datetime, datetime]]) -> list[tuple[datetime, datetime]]:
    joined: list[tuple[datetime, datetime]] = []
    for begins, ends in windows:
        if joined and begins <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], ends))
        else:
            joined.append((begins, ends))
    return joined
