"""What to keep, and why: pure rules over the points of one machine in one vault.

As in restic and Proxmox Backup: a rule cuts time into periods (hours, days, ISO weeks, months, years of the policy's
time zone) and keeps the newest point of each of the newest N periods that have points. Nothing here depends on the
present moment, and the newest point of a period stays the newest whatever is removed. Hence what the tests hold: to
apply the rules twice changes nothing, a larger count never keeps less, and to expire every day keeps exactly what
expiring once at the end would, as long as nothing is pinned or found damaged meanwhile.

Damage must not push good points out: a damaged point stands for its period only where there is no good one, and such
a period is kept without being counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo

from orchestrator.config_file import Policy, Retention
from orchestrator.schedules import zone_of

UNKEPT = "no rule keeps it"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A point, as far as the rules look at it."""

    id: str
    time: datetime
    pinned: str | None = None
    """Why; None: it is not."""
    damaged: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to keep a point. `reasons` is never empty."""

    point: Candidate
    keep: bool
    reasons: tuple[str, ...]


def _hour(time: datetime) -> str:
    # With its offset: the hour that is there twice when clocks are put back is two.
    return f"{time:%Y-%m-%d %H:00 %z}"


def _week(time: datetime) -> str:
    year, week, _ = time.isocalendar()
    return f"{year}-W{week:02d}"


_PERIODS: dict[str, Callable[[datetime], str]] = {
    "hourly": _hour,
    "daily": lambda time: f"{time:%Y-%m-%d}",
    "weekly": _week,
    "monthly": lambda time: f"{time:%Y-%m}",
    "yearly": lambda time: f"{time:%Y}",
}
"""Rule → name of the period that a local time is in."""


def retain(points: Iterable[Candidate], rules: Retention, zone: tzinfo) -> list[Decision]:
    """A decision for each point, newest first."""
    newest_first = _newest_first(points)
    why: dict[str, list[str]] = {point.id: [] for point in newest_first}
    for point in newest_first:
        if point.pinned is not None:
            why[point.id].append(f"pinned: {point.pinned}" if point.pinned else "pinned")
    for point in _of_last(newest_first, rules.last):
        why[point.id].append(f"last: one of the newest {rules.last}" if rules.last > 1 else "last: the newest")
    for rule, name_of in _PERIODS.items():
        periods = [name_of(point.time.astimezone(zone)) for point in newest_first]
        for period, point in _of_periods(newest_first, periods, getattr(rules, rule)):
            why[point.id].append(f"{rule}: the newest of {period}")
    for point in newest_first[:1]:
        why[point.id] = why[point.id] or ["it is the newest"]
    for point in [point for point in newest_first if not point.damaged][:1]:
        why[point.id] = why[point.id] or ["it is the newest that is not damaged"]
    return [
        Decision(point, keep=bool(reasons := why[point.id]), reasons=tuple(reasons) or (UNKEPT,))
        for point in newest_first
    ]


def decide(points: Sequence[Candidate], policies: Mapping[str, Policy]) -> list[Decision]:
    """What several policies keep of the same points together: whatever one of them does; newest first. A point that
    no policy is for, or one that says nothing of how long to keep, is kept."""
    silent = [name for name, policy in policies.items() if policy.retention is None]
    if silent or not policies:
        why = f"policy {silent[0]} has no retention" if silent else "no policy is for it in this vault"
        return [Decision(point, keep=True, reasons=(why,)) for point in _newest_first(points)]
    kept: dict[str, list[str]] = {point.id: [] for point in points}
    for name, policy in policies.items():
        if policy.retention is None:
            continue
        for decision in retain(points, policy.retention, zone_of(policy)):
            if decision.keep:
                kept[decision.point.id] += [f"{name}: {why}" if len(policies) > 1 else why for why in decision.reasons]
    return [
        Decision(point, keep=bool(kept[point.id]), reasons=tuple(kept[point.id]) or (UNKEPT,))
        for point in _newest_first(points)
    ]


def _newest_first(points: Iterable[Candidate]) -> list[Candidate]:
    return sorted(points, key=lambda point: (point.time, point.id), reverse=True)


def _of_last(newest_first: Sequence[Candidate], count: int) -> Iterable[Candidate]:
    """The newest `count` good points, and the damaged ones among them."""
    good = 0
    for point in newest_first:
        if good == count:
            return
        good += not point.damaged
        yield point


def _of_periods(
    newest_first: Sequence[Candidate], periods: Sequence[str], count: int
) -> Iterable[tuple[str, Candidate]]:
    """The newest `count` periods with a good point and the damaged ones among them, each with the point it keeps."""
    newest: dict[str, Candidate] = {}
    for point, period in zip(newest_first, periods, strict=True):
        if period not in newest or (newest[period].damaged and not point.damaged):
            newest[period] = point
    good = 0
    for period, point in sorted(newest.items(), key=lambda found: (found[1].time, found[1].id), reverse=True):
        if good == count:
            return
        good += not point.damaged
        yield period, point


@dataclass(frozen=True, slots=True)
class Simulation:
    """How points would live under a policy."""

    made: int
    peak: int
    """Most points that are kept at the same time."""
    kept: list[Decision]
    """What is there in the end, newest first."""


def simulate(moments: Iterable[datetime], rules: Retention, zone: tzinfo) -> Simulation:
    """Points made at `moments` (ascending), expired after each day's last."""
    made = peak = 0
    kept: list[Decision] = []
    today: list[Candidate] = []
    day = None

    def expire() -> None:
        nonlocal kept, peak, today
        alive = [*(decision.point for decision in kept), *today]
        peak = max(peak, len(alive))
        kept = [decision for decision in retain(alive, rules, zone) if decision.keep]
        today = []

    for moment in moments:
        if (date := moment.astimezone(zone).date()) != day:
            expire()
            day = date
        made += 1
        today.append(Candidate(f"{made:08d}", moment))
    expire()
    return Simulation(made, peak, kept)


def daily(start: datetime, days: int) -> Iterable[datetime]:
    """One moment a day: what is simulated for a policy without a schedule."""
    return (start + timedelta(days=day) for day in range(days))
