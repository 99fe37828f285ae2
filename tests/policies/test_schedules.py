"""When backups are due, on ordinary days and on those on which clocks change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from orchestrator.config_file import Policy
from orchestrator.schedules import moments, zone_of
from workers.contract.errors import ConfigError

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


def test_what_is_no_cron_expression() -> None:
    with pytest.raises(ConfigError, match='"99 2 \\* \\* \\*" is no cron expression'):
        due("2026-11-23", cron="99 2 * * *")


def test_the_zone_of_a_policy() -> None:
    assert zone_of(Policy(timezone="Asia/Kathmandu")) == ZoneInfo("Asia/Kathmandu")
    assert datetime.now(zone_of(Policy())).utcoffset() == datetime.now().astimezone().utcoffset()
