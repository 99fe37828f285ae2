"""When a policy's backups are due: a pure function from words, or a cron expression, to moments.

Clocks that are put forward or back are cron's affair (`cronsim` does as Debian's cron does: what falls into the missing
hour runs right after it, what falls into the doubled one runs once). Only "every N hours" is counted here, by the clock
on the wall from midnight or from its first time: cron cannot say it across midnight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from typing import TYPE_CHECKING

from workers.contract.errors import ConfigError

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
_AT = re.compile(r"(\w+) at (\d\d):(\d\d)")
_EVERY = re.compile(r"every (\d+) (minute|hour)s?(?: from (\d\d):(\d\d) to (\d\d):(\d\d))?")


def zone_of(policy: Policy) -> tzinfo:
    """The time zone in which the policy is meant: its own, else that of this host."""
    if policy.timezone is not None:
        from zoneinfo import ZoneInfo

        return ZoneInfo(policy.timezone)
    from tzlocal import get_localzone

    return get_localzone()


def moments(policy: Policy, start: datetime, end: datetime) -> Iterator[datetime]:
    """When backups of the policy are due in `[start, end)`, UTC, ascending; nothing if it has no schedule. Raises
    ConfigError for what is no cron expression."""
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
    from cronsim import CronSim, CronSimError

    try:
        # From just before: cronsim gives what comes after a moment.
        yield from CronSim(expression, start.astimezone(zone) - timedelta(minutes=1))
    except CronSimError as error:
        raise ConfigError(f'"{expression}" is no cron expression: {error}', hint='like cron = "0 2 * * *"') from None


def _counted(every: re.Match[str], start: datetime, end: datetime, zone: tzinfo) -> Iterator[datetime]:
    step = timedelta(**{f"{every[2]}s": max(int(every[1]), 1)})
    first = timedelta(hours=int(every[3] or 0), minutes=int(every[4] or 0))
    last = timedelta(hours=int(every[5] or 23), minutes=int(every[6] or 59))
    day = start.astimezone(zone).replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
    before = start - timedelta(microseconds=1)
    while day.replace(tzinfo=zone) < end:
        at = first
        while at <= last:
            moment = (day + at).replace(tzinfo=zone).astimezone(UTC)
            if moment > before:  # in the missing hour, two times on the wall are one moment
                yield moment
                before = moment
            at += step
        day += timedelta(days=1)
