"""What is due now, and what is not, with reasons: pure rules over policies, machines and what was decided before.

A moment of a schedule is decided once. `Duty.handled` says up to which beginning everything is: whatever lies between
that and now is due, however long nobody looked, and is made up for by one backup. A moment stays undecided only while
something stands in the way that will pass by itself (another job works on the machine, a blackout); if the next one
comes meanwhile, they are one.

- A machine that joins, or whose schedule changes, begins with its next moment. If it has no point in the vault, and
  that moment is more than a day away, it is owed a first backup at once (within `spread`, outside of blackouts).
- While the backup of one moment still goes on, the next one is left out: they never overlap.
- Of several sections that cover a machine and go into the same vault, the first one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from orchestrator.config_file import Policy, Protect
from orchestrator.protection import covers
from orchestrator.timetable import Beginning, Timetable

SOON = timedelta(hours=25)
"""A next moment within that is waited for by a machine without a point: a day, also when clocks are put back."""


@dataclass(frozen=True, slots=True)
class Section:
    """A `[protect.*]` section, resolved."""

    name: str
    protect: Protect
    policy_name: str
    policy: Policy
    vault: str
    timetable: Timetable


@dataclass(frozen=True, slots=True)
class Machine:
    uuid: str
    hypervisor: str
    name: str
    tags: tuple[str, ...] = ()
    away: str = ""
    """Why nothing can be begun on it now (it is gone, nobody has seen it); empty: one can."""


@dataclass(frozen=True, slots=True)
class Duty:
    """What is in force for a machine by a section."""

    handled: datetime
    """Up to this moment all is decided."""
    policy: str
    vault: str
    schedule: str
    """The `Timetable.words` by which it was decided."""
    first: datetime | None = None
    """When a first backup is owed, beside the schedule."""
    outcome: str = ""


@dataclass(frozen=True, slots=True)
class Active:
    """The job that has a machine for itself."""

    id: str
    kind: str
    section: str
    state: str


Key = tuple[str, str]
"""Machine UUID, section."""


@dataclass(frozen=True, slots=True)
class Run:
    """Begin a backup."""

    machine: Machine
    section: Section
    before: Duty
    due: datetime
    priority: int
    """Its policy's."""
    deadline: datetime
    why: str


@dataclass(frozen=True, slots=True)
class LeaveOut:
    """Begin nothing for what is due: it is over."""

    machine: Machine
    section: Section
    before: Duty
    due: datetime
    why: str


@dataclass(frozen=True, slots=True)
class Wait:
    """What is due stays undecided for now."""

    machine: Machine
    section: Section
    due: datetime
    until: datetime | None
    """None: nobody knows."""
    why: str


@dataclass(frozen=True, slots=True)
class Adopt:
    """Put a duty in force, new or changed."""

    machine: Machine
    section: Section
    before: Duty | None
    after: Duty


@dataclass(frozen=True, slots=True)
class Drop:
    """The section covers the machine no more."""

    uuid: str
    section: str
    before: Duty


Decision = Run | LeaveOut | Wait | Adopt | Drop
Pointed = Callable[[], Collection[tuple[str, str]]]
"""(machine UUID, vault) of all that have a point. Called only if somebody has joined."""


def counting(sections: Sequence[Section], machine: Machine) -> list[Section]:
    """The sections by which the machine is backed up: of those that cover it, the first for each vault."""
    first: dict[str, Section] = {}
    for section in sections:
        if section.vault not in first and covers(section.protect, machine.hypervisor, machine.name, machine.tags):
            first[section.vault] = section
    return list(first.values())


def decide(
    sections: Sequence[Section],
    machines: Iterable[Machine],
    duties: Mapping[Key, Duty],
    active: Mapping[str, Active],
    now: datetime,
    *,
    pointed: Pointed,
    since: datetime,
) -> list[Decision]:
    """`active`: machine UUID → its job. `since`: from when on these sections are in force; what fell due by others
    before that is not made up for. Runs come last, those that are to begin first before others."""
    decisions: list[Decision] = []
    due: list[tuple[datetime, Run]] = []
    seen: dict[str, set[str]] = {}
    for machine in machines:
        seen[machine.uuid] = set()
        if machine.away:
            seen[machine.uuid] = {section.name for section in sections}  # its duties wait for it
            continue
        for section in counting(sections, machine):
            seen[machine.uuid].add(section.name)
            before = duties.get((machine.uuid, section.name))
            duty = in_force(section, machine, before, now, pointed=pointed, since=since)
            if duty is not before:
                decisions.append(Adopt(machine, section, before, duty))
            if (run := _due(section, machine, duty, now)) is not None:
                due.append((run.due, run))
    for (uuid, name), duty in duties.items():
        if name not in seen.get(uuid, ()):
            decisions.append(Drop(uuid, name, duty))
    return [*decisions, *_settled(due, active, now)]


def in_force(
    section: Section, machine: Machine, before: Duty | None, now: datetime, *, pointed: Pointed, since: datetime
) -> Duty:
    """The duty of a machine by a section that covers it: `before`, if nothing has changed."""
    table = section.timetable
    if before is not None and (before.schedule, before.vault) == (table.words, section.vault):
        if before.policy == section.policy_name:
            return before
        return Duty(before.handled, section.policy_name, before.vault, before.schedule, before.first, before.outcome)
    handled = now if before is None else max(before.handled, min(since, now))
    offset = table.offset(machine.uuid)
    latest, upcoming = table.latest(offset, now), table.next(offset, now)
    first = None
    far = table.scheduled and (upcoming is None or upcoming.at - now > SOON)
    if far and (latest is None or latest <= handled) and (machine.uuid, section.vault) not in pointed():
        first = table.open_from(now + offset)
    outcome = "joined" if before is None else "changed"
    return Duty(handled, section.policy_name, section.vault, table.words, first, outcome)


def _due(section: Section, machine: Machine, duty: Duty, now: datetime) -> Run | None:
    table = section.timetable
    offset = table.offset(machine.uuid)
    latest = table.latest(offset, now)
    why = []
    if latest is not None and latest <= duty.handled:
        latest = None
    if duty.first is not None and duty.first <= now and (latest is None or duty.first > latest):
        latest = duty.first
        why.append("the first backup into this vault")
    if latest is None:
        return None
    missed = table.missed(offset, duty.handled, latest)
    if missed:
        why.append(f"it stands for {missed} more that {'was' if missed == 1 else 'were'} missed")
    deadline = latest + timedelta(seconds=section.policy.deadline)
    if deadline <= now:  # it was due while nobody looked: it is given the time that it would have had
        deadline = now + timedelta(seconds=section.policy.deadline)
    return Run(machine, section, duty, latest, section.policy.priority, deadline, ", ".join(why))


def _settled(due: list[tuple[datetime, Run]], active: Mapping[str, Active], now: datetime) -> Iterator[Decision]:
    """What becomes of what is due. Of several that are due on a machine, the one that was due first begins."""
    begun: dict[str, Run] = {}
    runs: list[Run] = []
    for _, run in sorted(due, key=lambda found: found[0]):
        uuid, section = run.machine.uuid, run.section
        job, opens = active.get(uuid), section.timetable.open_from(now)
        if job is not None and job.section == section.name:
            why = f"{job.kind} {job.id} of the moment before still goes on ({job.state})"
            yield LeaveOut(run.machine, section, run.before, run.due, why)
        elif job is not None:
            yield Wait(run.machine, section, run.due, None, f"{job.kind} {job.id} works on it ({job.state})")
        elif opens > now:
            local = opens.astimezone(section.timetable.zone)
            yield Wait(run.machine, section, run.due, opens, f"in a blackout until {local:%a %H:%M}")
        elif uuid in begun:
            other = begun[uuid].section.name
            yield Wait(run.machine, section, run.due, None, f"the backup of section {other} comes first")
        else:
            begun[uuid] = run
            runs.append(run)
    yield from sorted(runs, key=lambda run: (-run.priority, run.due, run.machine.uuid))


# --- what is to come ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Coming:
    """A backup that will begin."""

    machine: Machine
    section: Section
    at: datetime
    """In the past: it is due, and waits."""
    due: datetime
    why: str


def coming(section: Section, machine: Machine, duty: Duty, active: Active | None, now: datetime) -> Iterator[Coming]:
    """The backups of a machine by a section that is in force, soonest first; without end, if its schedule has none."""
    table = section.timetable
    offset = table.offset(machine.uuid)
    after = max(duty.handled, now)
    if (run := _due(section, machine, duty, now)) is not None:
        for decision in _settled([(run.due, run)], {machine.uuid: active} if active else {}, now):
            match decision:
                case Wait(until=until, why=why):
                    yield Coming(machine, section, until or run.due, run.due, why)
                case Run():
                    yield Coming(machine, section, run.due, run.due, run.why or "due now")
    first = duty.first if duty.first is not None and duty.first > now else None
    while (beginning := table.next(offset, after)) is not None:
        if first is not None and first <= beginning.at:
            yield Coming(machine, section, first, first, "the first backup into this vault")
            first = None
        yield _coming(section, machine, beginning)
        after = beginning.at
    if first is not None:
        yield Coming(machine, section, first, first, "the first backup into this vault")


def _coming(section: Section, machine: Machine, beginning: Beginning) -> Coming:
    return Coming(machine, section, beginning.at, beginning.due, beginning.why)


def outcome(run: Run, job: str) -> Duty:
    """What is in force after a job was made of it."""
    duty = run.before
    text = f"job {job}" + (f": {run.why}" if run.why else "")
    return Duty(run.due, duty.policy, duty.vault, duty.schedule, _owed(duty, run.due), text)


def left_out(one: LeaveOut) -> Duty:
    duty = one.before
    return Duty(one.due, duty.policy, duty.vault, duty.schedule, _owed(duty, one.due), f"left out: {one.why}")


def _owed(duty: Duty, handled: datetime) -> datetime | None:
    return duty.first if duty.first is not None and duty.first > handled else None
