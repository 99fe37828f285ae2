"""What the rules keep, and why: drawn examples, then what holds for any points, counts and time zones."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config_file import Retention
from orchestrator.policies import Candidate, daily, retain, simulate

BERLIN = ZoneInfo("Europe/Berlin")
START = datetime(2026, 11, 2, 1, tzinfo=UTC)
"""A Monday, 02:00 in Berlin."""
RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


def at(*moments: str, damaged: str = "", pinned: str = "") -> list[Candidate]:
    """Points at these local times in Berlin, named after them; `damaged`, `pinned`: which, by the time's end."""
    return [
        Candidate(
            moment,
            datetime.fromisoformat(moment).replace(tzinfo=BERLIN).astimezone(UTC),
            pinned="audit" if pinned and moment.endswith(pinned) else None,
            damaged=bool(damaged) and moment.endswith(damaged),
        )
        for moment in moments
    ]


def kept(points: list[Candidate], zone: ZoneInfo = BERLIN, **counts: int) -> list[str]:
    """Oldest first."""
    return [one.point.id for one in reversed(retain(points, Retention(**counts), zone)) if one.keep]


def reasons(points: list[Candidate], **counts: int) -> dict[str, tuple[str, ...]]:
    return {one.point.id: one.reasons for one in retain(points, Retention(**counts), BERLIN)}


# --- examples ------------------------------------------------------------------------------------------------------


def test_each_rule_keeps_the_newest_of_its_periods_and_says_so() -> None:
    points = at("2026-11-20T02:00", "2026-11-21T02:00", "2026-11-21T22:00", "2026-11-22T01:10", "2026-11-22T01:50")
    assert reasons(points, last=2, hourly=1, daily=2, weekly=1, monthly=2, yearly=1) == {
        "2026-11-22T01:50": (
            "last: one of the newest 2",
            "hourly: the newest of 2026-11-22 01:00 +0100",
            "daily: the newest of 2026-11-22",
            "weekly: the newest of 2026-W47",
            "monthly: the newest of 2026-11",
            "yearly: the newest of 2026",
        ),
        "2026-11-22T01:10": ("last: one of the newest 2",),
        "2026-11-21T22:00": ("daily: the newest of 2026-11-21",),
        "2026-11-21T02:00": ("no rule keeps it",),
        "2026-11-20T02:00": ("no rule keeps it",),
    }


def test_periods_without_points_do_not_count() -> None:
    points = at("2024-02-29T02:00", "2026-01-01T02:00", "2026-11-22T02:00")
    assert kept(points, daily=2) == ["2026-01-01T02:00", "2026-11-22T02:00"]


def test_weeks_are_iso_weeks() -> None:
    """2027 begins on a Friday, in week 53 of 2026."""
    points = at("2026-12-27T02:00", "2026-12-31T02:00", "2027-01-02T02:00", "2027-01-04T02:00")
    assert reasons(points, weekly=3)["2027-01-02T02:00"] == ("weekly: the newest of 2026-W53",)
    assert kept(points, weekly=3) == ["2026-12-27T02:00", "2027-01-02T02:00", "2027-01-04T02:00"]


def test_days_are_those_of_the_time_zone() -> None:
    points = at("2026-11-21T23:30", "2026-11-22T00:30")
    assert kept(points, daily=2) == ["2026-11-21T23:30", "2026-11-22T00:30"]
    assert kept(points, ZoneInfo("UTC"), daily=2) == ["2026-11-22T00:30"]


def test_the_hour_that_is_there_twice_is_two() -> None:
    first = datetime(2026, 10, 25, 0, 30, tzinfo=UTC)  # 02:30 summer time
    points = [Candidate(str(number), first + timedelta(hours=number)) for number in range(3)]
    assert kept(points, hourly=3) == ["0", "1", "2"]
    assert kept(points, hourly=2) == ["1", "2"]


def test_a_pinned_point_is_kept_and_takes_nobodys_place() -> None:
    points = at("2026-11-20T02:00", "2026-11-21T02:00", "2026-11-22T02:00", pinned="20T02:00")
    assert kept(points, daily=2) == ["2026-11-20T02:00", "2026-11-21T02:00", "2026-11-22T02:00"]
    assert reasons(points, daily=2)["2026-11-20T02:00"] == ("pinned: audit",)


def test_a_damaged_point_stands_for_its_day_only_if_there_is_no_good_one() -> None:
    day = at("2026-11-21T02:00", "2026-11-22T02:00", "2026-11-22T10:00", damaged="T10:00")
    assert kept(day, daily=2) == ["2026-11-21T02:00", "2026-11-22T02:00", "2026-11-22T10:00"]
    assert reasons(day, daily=2)["2026-11-22T10:00"] == ("it is the newest",)
    alone = at("2026-11-20T02:00", "2026-11-21T02:00", "2026-11-22T10:00", damaged="T10:00")
    assert kept(alone, daily=2) == [point.id for point in alone], "damage pushes nothing good out"
    assert kept(alone, last=2) == [point.id for point in alone]


def test_the_newest_good_point_is_kept_whatever_the_rules_say() -> None:
    points = at("2026-11-21T02:00", "2026-11-22T10:00", damaged="T10:00")
    rules = Retention.model_construct(last=0, hourly=0, daily=0, weekly=0, monthly=0, yearly=0)
    assert [one.reasons for one in retain(points, rules, BERLIN)] == [
        ("it is the newest",),
        ("it is the newest that is not damaged",),
    ]


def test_no_points() -> None:
    assert retain([], Retention(daily=1), BERLIN) == []
    assert simulate([], Retention(daily=1), BERLIN).kept == []


def test_four_hundred_days_of_a_usual_policy() -> None:
    found = simulate(daily(START, 400), Retention(daily=7, weekly=4, monthly=12, yearly=3), BERLIN)
    days = [decision.point.time.astimezone(BERLIN).date() for decision in reversed(found.kept)]
    assert found.made == 400
    assert days[-7:] == [date(2027, 11, 30) + timedelta(days=day) for day in range(7)]
    assert days[0] == date(2026, 12, 31), "the newest of the first year"
    assert len(days) == 7 + 2 + 10 + 1, "seven days, two more weeks, ten more months, one more year"
    assert found.peak == 22


# --- what always holds ---------------------------------------------------------------------------------------------

zones = st.sampled_from(
    ["Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe", "Pacific/Apia", "Asia/Beirut"]
).map(ZoneInfo)
counts = st.fixed_dictionaries({rule: st.integers(0, 5) for rule in RULES}).filter(lambda found: any(found.values()))
"""Near each other, near a change of clocks and a change of year, and far apart."""
minutes = st.one_of(
    st.integers(0, 60 * 24 * 10), st.integers(60 * 24 * 355, 60 * 24 * 370), st.integers(0, 60 * 24 * 1500)
)
EPOCH = datetime(2026, 10, 20, tzinfo=UTC)


@st.composite
def points(draw: st.DrawFn) -> list[Candidate]:
    """Ascending."""
    times = sorted(draw(st.lists(minutes, max_size=40)))
    return [
        Candidate(
            f"{number:03d}",
            EPOCH + timedelta(minutes=minute),
            pinned=draw(st.sampled_from([None, None, None, None, "why"])),
            damaged=draw(st.sampled_from([False, False, False, True])),
        )
        for number, minute in enumerate(times)
    ]


def survivors(found: list[Candidate], rules: Retention, zone: ZoneInfo) -> list[Candidate]:
    return [one.point for one in reversed(retain(found, rules, zone)) if one.keep]


@given(points(), counts, zones)
def test_twice_is_once(found: list[Candidate], asked: dict[str, int], zone: ZoneInfo) -> None:
    once = survivors(found, Retention(**asked), zone)
    assert survivors(once, Retention(**asked), zone) == once


@given(points(), counts, zones, st.sampled_from(RULES), st.integers(1, 5))
def test_a_larger_count_never_keeps_less(
    found: list[Candidate], asked: dict[str, int], zone: ZoneInfo, rule: str, more: int
) -> None:
    fewer = survivors(found, Retention(**asked), zone)
    larger = survivors(found, Retention(**{**asked, rule: asked[rule] + more}), zone)
    assert set(fewer) <= set(larger)


@given(points(), counts, zones)
def test_to_expire_as_points_come_is_to_expire_at_the_end(
    found: list[Candidate], asked: dict[str, int], zone: ZoneInfo
) -> None:
    """Damage and pins are there from the beginning here: what they change later can no longer change the past."""
    rules = Retention(**asked)
    alive: list[Candidate] = []
    for point in found:
        alive = survivors([*alive, point], rules, zone)
    assert alive == survivors(found, rules, zone)


@given(points(), counts, zones)
def test_the_newest_the_newest_good_one_and_pinned_ones_live(
    found: list[Candidate], asked: dict[str, int], zone: ZoneInfo
) -> None:
    alive = survivors(found, Retention(**asked), zone)
    good = [point for point in found if not point.damaged]
    assert set(found[-1:]) | set(good[-1:]) | {p for p in found if p.pinned is not None} <= set(alive)


@given(points(), counts, zones)
def test_every_decision_has_its_reason_and_the_order_of_the_points_is_no_matter(
    found: list[Candidate], asked: dict[str, int], zone: ZoneInfo
) -> None:
    decisions = retain(found, Retention(**asked), zone)
    assert all(one.reasons for one in decisions)
    assert all(one.keep == (one.reasons != ("no rule keeps it",)) for one in decisions)
    assert retain(reversed(found), Retention(**asked), zone) == decisions


@given(points(), counts, zones)
def test_a_rule_keeps_as_many_periods_as_it_says(found: list[Candidate], asked: dict[str, int], zone: ZoneInfo) -> None:
    decisions = retain(found, Retention(**asked), zone)
    for rule in RULES:
        chosen = [d.point for d in decisions if any(reason.startswith(f"{rule}:") for reason in d.reasons)]
        assert sum(not point.damaged for point in chosen) <= asked[rule]


@given(points(), counts, zones)
def test_damage_never_costs_a_good_point(found: list[Candidate], asked: dict[str, int], zone: ZoneInfo) -> None:
    good = [point for point in found if not point.damaged]
    with_damage = survivors(found, Retention(**asked), zone)
    assert set(survivors(good, Retention(**asked), zone)) <= set(with_damage)


@pytest.mark.parametrize("zone", ["Europe/Berlin", "Pacific/Apia"])
def test_a_point_an_hour_for_a_year_of_changing_clocks(zone: str) -> None:
    hours = [EPOCH + timedelta(hours=hour) for hour in range(24 * 370)]
    found = simulate(hours, Retention(hourly=30, daily=370), ZoneInfo(zone))
    assert sum("hourly" in " ".join(one.reasons) for one in found.kept) == 30
    assert len({one.point.time.astimezone(ZoneInfo(zone)).date() for one in found.kept}) == 370
