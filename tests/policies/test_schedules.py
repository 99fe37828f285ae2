"""When backups are due, on ordinary days and on those on which clocks change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from orchestrator.config_file import Policy
from orchestrator.schedules import blackouts, covers_the_week, moments, zone_of

BERLIN = ZoneInfo("Europe/Berlin")
WEEK = ("Mon 23", "Tue 24", "Wed 25", "Thu 26", "Fri 27", "Sat 28", "Sun 29")


def due(day: str, days: int = 1, **policy: str) -> list[str]:
    """Local times in Berlin from midnight of `day`."""
    start = datetime.fromisoformat(day).replace(tzinfo=BERLIN)
    end = (datetime.fromisoformat(day) + timedelta(days=days)).replace(tzinfo=BERLIN)
    found = list(moments(Policy(timezone="Europe/Berlin", **policy), start, end))
    assert found == sorted(set(found))
    assert all(moment.tzinfo is UTC for moment in found)
    return [f"{moment.astimezone(BERLIN):%a %d %H:%M}" for moment in found]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("daily at 02:00", [f"{day} 02:00" for day in WEEK]),
        ("weekdays at 22:30", [f"{day} 22:30" for day in WEEK[:5]]),
        ("weekends at 00:00", ["Sat 28 00:00", "Sun 29 00:00"]),
        ("weekly at 03:00", ["Sun 29 03:00"]),
        ("wednesdays at 23:59", ["Wed 25 23:59"]),
        ("monthly at 02:00", []),
        ("every 4 hours from 08:00 to 16:00", [f"{day} {hour}:00" for day in WEEK for hour in ("08", "12", "16")]),
    ],
)
def test_a_week(words: str, expected: list[str]) -> None:
    assert due("2026-11-23", 7, schedule=words) == expected


def test_within_a_day() -> None:
    assert due("2026-11-23", schedule="hourly") == [f"Mon 23 {hour:02d}:00" for hour in range(24)]
    assert due("2026-11-23", schedule="every 7 hours") == [
        "Mon 23 00:00",
        "Mon 23 07:00",
        "Mon 23 14:00",
        "Mon 23 21:00",
    ]
    assert len(due("2026-11-23", schedule="every 5 minutes")) == 288
    assert due("2026-11-23", cron="30 4,16 * * 1-5") == ["Mon 23 04:30", "Mon 23 16:30"]
    assert due("2026-12-01", 31, schedule="monthly at 02:00") == ["Tue 01 02:00"]


def test_the_day_with_a_missing_hour() -> None:
    assert due("2026-03-29", schedule="daily at 02:30") == ["Sun 29 03:00"]
    assert due("2026-03-29", schedule="every 1 hour from 01:00 to 04:00") == [
        "Sun 29 01:00",
        "Sun 29 03:00",
        "Sun 29 04:00",
    ]


def test_the_day_with_a_doubled_hour() -> None:
    assert due("2026-10-25", schedule="daily at 02:30") == ["Sun 25 02:30"]
    assert len(due("2026-10-25", schedule="hourly")) == 25


def test_nothing_without_a_schedule_and_before_the_start() -> None:
    assert due("2026-11-23") == []
    start = datetime(2026, 11, 23, 12, tzinfo=BERLIN)
    policy = Policy(timezone="Europe/Berlin", schedule="every 6 hours")
    assert [moment.hour for moment in moments(policy, start, start + timedelta(hours=12))] == [11, 17]


def test_the_zone_of_a_policy() -> None:
    assert zone_of(Policy(timezone="Asia/Kathmandu")) == ZoneInfo("Asia/Kathmandu")
    assert datetime.now(zone_of(Policy())).utcoffset() == datetime.now().astimezone().utcoffset()


def test_every_few_hours_across_midnight() -> None:
    assert due("2026-11-23", schedule="every 4 hours from 20:00 to 06:00") == [
        "Mon 23 00:00",
        "Mon 23 04:00",
        "Mon 23 20:00",
    ]
    assert due("2026-11-23", schedule="every 24 hours from 06:00 to 05:00") == ["Mon 23 06:00"]


# --- blackouts -----------------------------------------------------------------------------------------------------


def closed(day: str, *windows: str, days: int = 1) -> list[str]:
    """Local times in Berlin of the windows that touch the days from midnight of `day`."""
    start = datetime.fromisoformat(day).replace(tzinfo=BERLIN)
    end = (datetime.fromisoformat(day) + timedelta(days=days)).replace(tzinfo=BERLIN)
    found = blackouts(Policy(timezone="Europe/Berlin", blackout=list(windows)), start, end)
    local = [[moment.astimezone(BERLIN) for moment in window] for window in found]
    return [f"{opens:%a %H:%M} to {closes:%a %H:%M}" for opens, closes in local]


def test_windows_of_days_and_across_midnight() -> None:
    assert closed("2026-11-27", "weekdays 08:00 to 18:00", days=4) == [
        "Fri 08:00 to Fri 18:00",
        "Mon 08:00 to Mon 18:00",
    ]
    assert closed("2026-11-28", "fridays 22:00 to 06:00") == ["Fri 22:00 to Sat 06:00"]
    assert closed("2026-11-29", "fridays 22:00 to 06:00") == []
    assert closed("2026-11-28", "weekends 00:00 to 00:00", days=2) == ["Sat 00:00 to Mon 00:00"]
    assert closed("2026-11-28", "06:00 to 12:00", "11:00 to 14:00", "14:00 to 15:00") == ["Sat 06:00 to Sat 15:00"]
    assert closed("2026-11-28") == []


def test_windows_when_clocks_change() -> None:
    assert closed("2026-03-29", "01:00 to 02:30") == ["Sun 01:00 to Sun 03:00"]
    assert closed("2026-03-29", "02:30 to 05:00") == ["Sun 03:00 to Sun 05:00"]
    [(opens, closes)] = blackouts(
        Policy(timezone="Europe/Berlin", blackout=["02:15 to 02:45"]),
        datetime(2026, 10, 25, 0, tzinfo=UTC),
        datetime(2026, 10, 25, 2, tzinfo=UTC),
    )
    assert (opens, closes) == (datetime(2026, 10, 25, 0, 15, tzinfo=UTC), datetime(2026, 10, 25, 1, 45, tzinfo=UTC))


LATE_SUNDAY = ["sundays 20:00 to 00:00"]


@pytest.mark.parametrize(
    ("windows", "whole"),
    [
        (["00:00 to 00:00"], True),
        (["00:00 to 23:59"], False),
        (["weekdays 00:00 to 00:00", "weekends 00:00 to 00:00"], True),
        (["weekdays 00:00 to 00:00", "saturdays 00:00 to 00:00", "sundays 08:00 to 00:00"], False),
        (
            [
                "weekdays 00:00 to 00:00",
                "saturdays 00:00 to 00:00",
                "saturdays 22:00 to 20:00",
                "sundays 20:00 to 00:00",
            ],
            True,
        ),
        ([], False),
    ],
)
def test_windows_that_leave_no_time(windows: list[str], whole: bool) -> None:
    assert covers_the_week(windows) is whole
