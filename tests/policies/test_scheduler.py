"""What is due and what is not: no moment is run twice or lost, however often and by whom one looks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config_file import Policy, Protect
from orchestrator.scheduler import (
    Active,
    Adopt,
    Decision,
    Drop,
    Duty,
    Key,
    LeaveOut,
    Machine,
    Run,
    Section,
    Wait,
    coming,
    decide,
    in_force,
    left_out,
    outcome,
)
from orchestrator.schedules import moments
from orchestrator.timetable import Timetable

BERLIN = ZoneInfo("Europe/Berlin")
HOUR = timedelta(hours=1)
WEB = Machine("11111111-2222-3333-4444-555555555555", "lab", "web")
DB = Machine("99999999-2222-3333-4444-555555555555", "lab", "db")


def at(text: str) -> datetime:
    """A moment on Berlin's walls, like `2026-11-24 02:00`."""
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN).astimezone(UTC)


def section(
    name: str = "all", *, vault: str = "main", policy: str = "gold", machines: str = "*", **keys: object
) -> Section:
    rules = Policy.model_validate({"timezone": "Europe/Berlin", **keys})
    protect = Protect(machines=[machines], policy=policy, vault=vault)
    return Section(name, protect, policy, rules, vault, Timetable(rules, at("2026-11-24 00:00")))


@dataclass
class Desk:
    """Keeps what is decided, as the catalog does. `pointed`: machines with points, and vaults."""

    sections: list[Section]
    machines: list[Machine] = field(default_factory=lambda: [WEB])
    pointed: set[tuple[str, str]] = field(default_factory=lambda: {(WEB.uuid, "main"), (DB.uuid, "main")})
    duties: dict[Key, Duty] = field(default_factory=dict)
    active: dict[str, Active] = field(default_factory=dict)
    since: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    made: int = 0

    def decide(self, now: datetime) -> list[Decision]:
        return decide(
            self.sections, self.machines, self.duties, self.active, now, pointed=lambda: self.pointed, since=self.since
        )

    def apply(self, decisions: list[Decision]) -> list[Run]:
        """What of it could still be done: each change is guarded by what was read."""
        begun = []
        for one in decisions:
            match one:
                case Adopt(machine=machine, section=section, before=before, after=after):
                    self._replace((machine.uuid, section.name), before, after)
                case Drop(uuid=uuid, section=name, before=before):
                    if self.duties.get((uuid, name)) == before:
                        del self.duties[uuid, name]
                case LeaveOut(machine=machine, section=section, before=before):
                    self._replace((machine.uuid, section.name), before, left_out(one))
                case Run(machine=machine, section=section, before=before):
                    if machine.uuid in self.active:
                        continue
                    self.made += 1
                    if self._replace((machine.uuid, section.name), before, outcome(one, f"j{self.made}")):
                        self.active[machine.uuid] = Active(f"j{self.made}", "backup", section.name, "queued")
                        begun.append(one)
        return begun

    def _replace(self, key: Key, before: Duty | None, after: Duty) -> bool:
        if self.duties.get(key) != before:
            return False
        self.duties[key] = after
        return True

    def tick(self, now: datetime) -> list[str]:
        """Decide and apply; what was begun, and what waits or is left out, in words."""
        decisions = self.decide(now)
        said = [f"{one.machine.name}: {one.why}" for one in decisions if isinstance(one, Wait | LeaveOut)]
        return said + [_begun(run) for run in self.apply(decisions)]

    def end(self, machine: Machine = WEB) -> None:
        section = self.active.pop(machine.uuid).section
        self.pointed.add((machine.uuid, next(one.vault for one in self.sections if one.name == section)))


def _begun(run: Run) -> str:
    text = f"{run.machine.name} by {run.section.name} of {run.due.astimezone(BERLIN):%d %H:%M}"
    return f"{text}, {run.why}" if run.why else text


@pytest.fixture
def daily() -> Desk:
    desk = Desk([section(schedule="daily at 02:00")])
    assert desk.tick(at("2026-11-24 01:00")) == []
    return desk


# --- one machine ---------------------------------------------------------------------------------------------------


def test_a_moment_is_run_once(daily: Desk) -> None:
    assert daily.tick(at("2026-11-24 01:59")) == []
    assert daily.tick(at("2026-11-24 02:00")) == ["web by all of 24 02:00"]
    daily.end()
    assert daily.tick(at("2026-11-24 02:00")) == []
    assert daily.tick(at("2026-11-24 23:59")) == []
    assert daily.tick(at("2026-11-25 02:07")) == ["web by all of 25 02:00"]


def test_what_was_missed_is_made_up_for_once(daily: Desk) -> None:
    assert daily.tick(at("2026-11-27 09:30")) == ["web by all of 27 02:00, it stands for 3 more that were missed"]
    daily.end()
    assert daily.tick(at("2026-11-27 09:31")) == []
    assert daily.tick(at("2026-11-28 02:01")) == ["web by all of 28 02:00"]


def test_a_backup_that_still_goes_on_is_not_overlapped(daily: Desk) -> None:
    daily.tick(at("2026-11-24 02:00"))
    assert daily.tick(at("2026-11-25 02:00")) == ["web: backup j1 of the moment before still goes on (queued)"]
    assert daily.tick(at("2026-11-25 02:01")) == [], "it is left out once, and for good"
    daily.end()
    assert daily.tick(at("2026-11-25 06:00")) == []
    assert daily.duties[WEB.uuid, "all"].outcome.startswith("left out: backup j1")


def test_another_job_on_the_machine_is_waited_for(daily: Desk) -> None:
    daily.active[WEB.uuid] = Active("r", "restore", "", "restoring")
    assert daily.tick(at("2026-11-24 02:00")) == ["web: restore r works on it (restoring)"]
    assert daily.tick(at("2026-11-24 03:00")) == ["web: restore r works on it (restoring)"]
    del daily.active[WEB.uuid]
    assert daily.tick(at("2026-11-24 03:01")) == ["web by all of 24 02:00"]


def test_the_deadline_counts_from_the_moment_or_from_now_if_that_is_long_over() -> None:
    desk = Desk([section(schedule="daily at 02:00", deadline="4 hours", priority=2)])
    desk.tick(at("2026-11-24 01:00"))
    [run] = [one for one in desk.decide(at("2026-11-24 03:00")) if isinstance(one, Run)]
    assert (run.deadline, run.priority) == (at("2026-11-24 06:00"), 2)
    [late] = [one for one in desk.decide(at("2026-11-24 12:00")) if isinstance(one, Run)]
    assert late.deadline == at("2026-11-24 16:00")


# --- joining and changing ------------------------------------------------------------------------------------------


def test_a_new_machine_begins_with_its_next_moment() -> None:
    desk = Desk([section(schedule="daily at 02:00")], pointed=set())
    assert desk.tick(at("2026-11-24 02:01")) == []
    assert desk.tick(at("2026-11-24 23:00")) == []
    assert desk.tick(at("2026-11-25 02:00")) == ["web by all of 25 02:00"]


def test_a_new_machine_without_a_point_does_not_wait_for_longer_than_a_day() -> None:
    desk = Desk([section(schedule="weekly at 02:00")], pointed=set())
    assert desk.tick(at("2026-11-24 02:01")) == ["web by all of 24 02:01, the first backup into this vault"]
    desk.end()
    assert desk.tick(at("2026-11-24 02:02")) == []
    assert desk.tick(at("2026-11-29 02:00")) == ["web by all of 29 02:00"]
    with_point = Desk([section(schedule="weekly at 02:00")])
    assert with_point.tick(at("2026-11-24 02:01")) == []
    assert with_point.tick(at("2026-11-29 02:00")) == ["web by all of 29 02:00"]


def test_the_first_backup_respects_spread_and_blackout() -> None:
    keys = {"schedule": "monthly at 02:00", "spread": "4 hours", "blackout": ["08:00 to 18:00"]}
    desk = Desk([section(**keys)], [WEB, DB], pointed=set())
    assert desk.tick(at("2026-11-24 07:00")) == []
    begun = [(desk.tick(at("2026-11-24 07:00") + n * timedelta(minutes=10)), n) for n in range(100)]
    firsts = {words.split()[0]: 7 + n / 6 for said, n in begun for words in said if "first backup" in words}
    assert set(firsts) == {"web", "db"}
    assert all(hour < 8 or hour >= 18 for hour in firsts.values())


def test_on_the_day_of_25_hours_a_daily_machine_is_still_not_in_a_hurry() -> None:
    desk = Desk([section(schedule="daily at 02:30")], pointed=set())
    assert desk.tick(at("2026-10-24 02:31")) == []
    assert desk.tick(at("2026-10-25 02:31") + HOUR) == ["web by all of 25 02:30"]


def test_a_changed_schedule_makes_up_for_nothing() -> None:
    desk = Desk([section(schedule="daily at 02:00")])
    desk.tick(at("2026-11-24 01:00"))
    desk.tick(at("2026-11-24 02:00"))
    desk.end()
    desk.sections, desk.since = [section(schedule="daily at 03:00")], at("2026-11-24 14:00")
    assert desk.tick(at("2026-11-24 14:00")) == []
    assert desk.duties[WEB.uuid, "all"].schedule == "daily at 03:00 Europe/Berlin"
    assert desk.tick(at("2026-11-25 03:00")) == ["web by all of 25 03:00"]


def test_what_falls_due_right_after_a_change_is_run() -> None:
    desk = Desk([section(schedule="daily at 02:00")])
    desk.tick(at("2026-11-24 01:00"))
    desk.sections, desk.since = [section(schedule="daily at 02:01")], at("2026-11-24 02:00:30")
    assert desk.tick(at("2026-11-24 02:01:05")) == ["web by all of 24 02:01"]


def test_a_change_of_the_policy_s_name_alone_changes_nothing_else() -> None:
    desk = Desk([section(schedule="daily at 02:00")])
    desk.tick(at("2026-11-24 01:00"))
    desk.sections, desk.since = [section(schedule="daily at 02:00", policy="silver")], at("2026-11-24 03:00")
    assert desk.tick(at("2026-11-24 03:00")) == ["web by all of 24 02:00"]
    assert desk.duties[WEB.uuid, "all"].policy == "silver"


def test_another_vault_is_a_new_beginning() -> None:
    desk = Desk([section(schedule="weekly at 02:00")])
    desk.tick(at("2026-11-24 01:00"))
    desk.sections, desk.since = [section(schedule="weekly at 02:00", vault="far")], at("2026-11-24 12:00")
    assert desk.tick(at("2026-11-24 12:00")) == ["web by all of 24 12:00, the first backup into this vault"]


def test_what_no_section_covers_is_forgotten_and_begins_anew(daily: Desk) -> None:
    covering = daily.sections
    daily.sections = [section(schedule="daily at 02:00", machines="db")]
    assert daily.tick(at("2026-11-24 01:30")) == []
    assert daily.duties == {}
    daily.sections = covering
    assert daily.tick(at("2026-11-26 01:30")) == []
    assert daily.tick(at("2026-11-26 02:00")) == ["web by all of 26 02:00"]


def test_a_machine_that_is_away_keeps_its_duty(daily: Desk) -> None:
    daily.machines = [replace(WEB, away="it is gone")]
    assert daily.tick(at("2026-11-25 12:00")) == []
    daily.machines = [WEB]
    assert daily.tick(at("2026-11-26 12:00")) == ["web by all of 26 02:00, it stands for 2 more that were missed"]


def test_a_policy_without_a_schedule_begins_nothing() -> None:
    desk = Desk([section()], pointed=set())
    assert [desk.tick(at("2026-11-24 01:00") + n * timedelta(days=40)) for n in range(3)] == [[], [], []]


# --- several -------------------------------------------------------------------------------------------------------


def test_of_sections_into_one_vault_the_first_counts_and_of_two_vaults_both() -> None:
    near, far = section("near", schedule="daily at 02:00"), section("far", schedule="daily at 02:00", vault="far")
    shadow = section("shadow", schedule="hourly")
    desk = Desk([near, shadow, far])
    desk.tick(at("2026-11-24 01:00"))
    assert desk.tick(at("2026-11-24 02:00")) == [
        "web: the backup of section near comes first",
        "web by near of 24 02:00",
    ]
    assert desk.tick(at("2026-11-24 02:01")) == ["web: backup j1 works on it (queued)"]
    desk.end()
    assert desk.tick(at("2026-11-24 02:10")) == ["web by far of 24 02:00"]
    assert {name for _, name in desk.duties} == {"near", "far"}


def test_a_frequent_section_does_not_starve_another() -> None:
    desk = Desk([section("often", schedule="every 10 minutes"), section("far", schedule="daily at 02:00", vault="far")])
    desk.tick(at("2026-11-24 01:55"))
    desk.tick(at("2026-11-24 02:00"))
    desk.end()
    assert "web by far of 24 02:00" in desk.tick(at("2026-11-24 02:10"))


def test_higher_priorities_begin_first_then_what_was_due_first() -> None:
    low = section("low", schedule="daily at 01:00", machines="web", priority=-1)
    high = section("high", schedule="daily at 02:00", machines="db", priority=1)
    desk = Desk([low, high], [WEB, DB])
    desk.tick(at("2026-11-24 00:30"))
    assert desk.tick(at("2026-11-24 03:00")) == ["db by high of 24 02:00", "web by low of 24 01:00"]


def test_two_controllers_that_read_the_same_begin_one_backup(daily: Desk) -> None:
    now = at("2026-11-24 02:00")
    first, second = daily.decide(now), daily.decide(now)
    assert len(daily.apply(first)) == 1
    daily.end()
    assert daily.apply(second) == []


# --- blackouts and spread ------------------------------------------------------------------------------------------


def test_what_falls_into_a_blackout_begins_at_its_end_and_is_one() -> None:
    desk = Desk([section(schedule="hourly", blackout=["weekdays 08:00 to 18:00"])])
    desk.tick(at("2026-11-24 06:30"))
    assert desk.tick(at("2026-11-24 07:00")) == ["web by all of 24 07:00"]
    desk.end()
    assert [desk.tick(at(f"2026-11-24 {hour:02d}:00")) for hour in range(8, 18)] == [[]] * 10
    assert desk.tick(at("2026-11-24 18:00")) == ["web by all of 24 18:00"]


def test_what_was_missed_is_not_made_up_for_in_a_blackout() -> None:
    desk = Desk([section(schedule="daily at 02:00", blackout=["08:00 to 18:00"])])
    desk.tick(at("2026-11-24 01:00"))
    assert desk.tick(at("2026-11-24 12:00")) == ["web: in a blackout until Tue 18:00"]
    assert desk.tick(at("2026-11-24 18:00")) == ["web by all of 24 02:00"]


def test_machines_are_spread_and_each_keeps_its_place() -> None:
    table = Timetable(Policy(schedule="daily at 02:00", spread=3600, timezone="UTC"), at("2026-11-24 00:00"))
    offsets = [table.offset(f"{number:032x}").total_seconds() for number in range(2000)]
    assert offsets == [table.offset(f"{number:032x}").total_seconds() for number in range(2000)]
    assert min(offsets) >= 0
    assert max(offsets) < 3600
    assert all(abs(sum(low <= one < low + 600 for one in offsets) - 333) < 80 for low in range(0, 3600, 600))


# --- what is to come -----------------------------------------------------------------------------------------------


def next_ones(desk: Desk, now: datetime, count: int = 3) -> list[str]:
    found = []
    for one in desk.sections:
        duty = in_force(one, WEB, desk.duties.get((WEB.uuid, one.name)), now, pointed=lambda: desk.pointed, since=now)
        for come in islice(coming(one, WEB, duty, desk.active.get(WEB.uuid), now), count):
            found.append(f"{come.at.astimezone(BERLIN):%d %H:%M} {come.why}")
    return found


def test_the_next_backups_and_why() -> None:
    desk = Desk([section(schedule="every 6 hours", blackout=["05:00 to 07:00"])])
    assert next_ones(desk, at("2026-11-24 01:00")) == [
        "24 07:00 every 6 hours, postponed from Tue 06:00 by a blackout",
        "24 12:00 every 6 hours",
        "24 18:00 every 6 hours",
    ]
    desk.tick(at("2026-11-24 01:00"))
    desk.active[WEB.uuid] = Active("r", "restore", "", "restoring")
    assert next_ones(desk, at("2026-11-24 12:30"), 2) == [
        "24 12:00 restore r works on it (restoring)",
        "24 18:00 every 6 hours",
    ]


def test_the_first_backup_is_among_the_next_ones() -> None:
    desk = Desk([section(schedule="weekly at 02:00")], pointed=set())
    assert next_ones(desk, at("2026-11-24 01:00"), 2) == [
        "24 01:00 the first backup into this vault",
        "29 02:00 weekly at 02:00",
    ]


# --- all of it, at random ------------------------------------------------------------------------------------------

POLICIES = st.sampled_from(
    [
        {"schedule": "daily at 02:30"},
        {"schedule": "hourly"},
        {"schedule": "every 4 hours from 20:00 to 06:00"},
        {"schedule": "daily at 02:00", "spread": "3 hours"},
        {"schedule": "hourly", "blackout": ["08:00 to 18:00", "weekends 22:00 to 02:30"]},
        {"schedule": "every 30 minutes", "spread": "90 minutes", "blackout": ["01:00 to 04:00"]},
        {"cron": "15 */3 * * 1-6", "blackout": ["saturdays 00:00 to 00:00"]},
    ]
)
STEPS = st.lists(
    st.tuples(
        st.sampled_from([1, 10, 600, 3600, 7200, 40_000, 90_000, 300_000]),
        st.sampled_from(["tick", "tick", "tick", "two", "end", "restore", "away"]),
    ),
    min_size=5,
    max_size=40,
)
STARTS = st.sampled_from(["2026-03-27 12:00", "2026-10-23 12:00", "2026-11-24 01:00"])


@settings(max_examples=80, deadline=None)
@given(keys=POLICIES, steps=STEPS, start=STARTS)
def test_no_moment_is_run_twice_or_lost(keys: dict[str, object], steps: list[tuple[int, str]], start: str) -> None:
    one = section(**keys)
    desk, now = Desk([one]), at(start)
    desk.tick(now)
    joined, runs, left = now, list[datetime](), list[datetime]()
    for seconds, what in steps:
        now += timedelta(seconds=seconds)
        match what:
            case "end" if WEB.uuid in desk.active:
                desk.active.pop(WEB.uuid)
            case "restore" if WEB.uuid not in desk.active:
                desk.active[WEB.uuid] = Active("r", "restore", "", "restoring")
            case "away":
                desk.machines = [replace(WEB, away="" if desk.machines[0].away else "it is gone")]
            case _:
                decided = [desk.decide(now) for _ in range(2 if what == "two" else 1)]
                for decisions in decided:
                    before = desk.duties[WEB.uuid, "all"].handled
                    for run in desk.apply(decisions):
                        runs.append(run.due)
                        assert not in_blackout(one, now)
                    after = desk.duties[WEB.uuid, "all"]
                    if after.outcome.startswith("left out") and after.handled != before:
                        left.append(after.handled)
    # Each moment is decided once, in order; and all beginnings until the last look are decided or stand for a reason.
    assert sorted({*runs, *left}) == sorted([*runs, *left])
    assert runs == sorted(runs)
    begins = beginnings(one, joined, now)
    assert {*runs, *left} <= set(begins)
    handled = desk.duties[WEB.uuid, "all"].handled
    undecided = [moment for moment in begins if handled < moment <= now]
    desk.machines, desk.active = [WEB], {}
    later = one.timetable.open_from(now)
    if undecided or later > now:
        made = [run.due for run in desk.apply(desk.decide(later))]
        assert made == beginnings(one, handled, later)[-1:], "one backup makes up for all of them"


def beginnings(one: Section, after: datetime, until: datetime) -> list[datetime]:
    """In `(after, until]`, counted without any of the code's shortcuts."""
    offset = one.timetable.offset(WEB.uuid)
    found = set()
    for due in moments(one.policy, after - timedelta(days=10), until + timedelta(seconds=1)):
        moment = leave(one, leave(one, due) + offset)
        if after < moment <= until:
            found.add(moment)
    return sorted(found)


def leave(one: Section, moment: datetime) -> datetime:
    """The first whole minute from then on that is in no window, or the moment itself."""
    passed = []
    known = _LEFT.setdefault(one.timetable.words, {})
    while moment not in known and in_blackout(one, moment):
        passed.append(moment)
        moment = moment.replace(second=0, microsecond=0) + timedelta(minutes=1)
    moment = known.get(moment, moment)
    known.update(dict.fromkeys(passed, moment))
    return moment


_LEFT: dict[str, dict[datetime, datetime]] = {}


def in_blackout(one: Section, moment: datetime) -> bool:
    """By the clock on the wall, as people read the words; what the doubled hour leaves open belongs to the window."""
    before, after = ((moment + way * HOUR).astimezone(BERLIN).utcoffset() for way in (-1, 1))
    assert before is not None
    assert after is not None
    minutes = range(-60, 61) if before > after else range(1)
    around = [moment + timedelta(minutes=minute) for minute in minutes]
    for words in one.policy.blackout:
        found = [inside(words, each.astimezone(BERLIN).replace(tzinfo=None)) for each in around]
        if found[len(found) // 2] or (any(found[: len(found) // 2]) and any(found[len(found) // 2 :])):
            return True
    return False


def inside(words: str, wall: datetime) -> bool:
    *day, opens, _, closes = words.split()
    days = {"weekends": {5, 6}, "saturdays": {5}, "weekdays": set(range(5))}.get(day[0] if day else "", set(range(7)))
    time = f"{wall:%H:%M}"
    if opens < closes:
        return wall.weekday() in days and opens <= time < closes
    return (wall.weekday() in days and time >= opens) or ((wall.weekday() - 1) % 7 in days and time < closes)
