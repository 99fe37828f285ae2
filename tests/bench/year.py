"""A year of a large fleet in some minutes: the real rules of scheduler and queue on a virtual clock.

    python -m tests.bench.year [--machines 10000] [--hypervisors 50] [--days 365] [--seed 1]

What is modelled is only how long jobs take: most some minutes, a first backup longer, one in twenty thousand hangs for
thirty hours. Controllers are down twelve times for some hours and once for three days, hypervisors for two hours now
and then (nothing begins on them), machines join, and people restore. Held against the objectives:

- each moment of each schedule is decided once: run, left out because the one before still went on, or made up for;
- never two jobs at once on a machine, never more on a hypervisor than its slots;
- each backup has ended by its deadline: those that have not are counted by reason; a restore never waits for backups.

It ends with 1 if an objective is missed for no reason that is modelled.
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from orchestrator.catalog.owner import NOBODY
from orchestrator.catalog.queue import Entry
from orchestrator.config_file import Policy, Protect
from orchestrator.dispatcher import Limits
from orchestrator.dispatcher import decide as dispatch
from orchestrator.scheduler import Active, Adopt, Duty, LeaveOut, Machine, Run, Section, Wait, decide, left_out, outcome
from orchestrator.timetable import Timetable

START = datetime(2026, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
SLOTS = 4
HUNG = timedelta(hours=30)
POLICIES = [
    (0.40, {"schedule": "daily at 01:00", "spread": "4 hours"}),
    (0.20, {"schedule": "daily at 22:00", "spread": "6 hours", "priority": 1}),
    (0.15, {"schedule": "weekdays at 20:00", "spread": "2 hours", "blackout": ["08:00 to 18:00"]}),
    (0.10, {"schedule": "every 12 hours", "spread": "2 hours"}),
    (0.10, {"schedule": "weekly at 03:00", "spread": "8 hours", "priority": -1}),
    (0.05, {"schedule": "every 4 hours from 06:00 to 22:00", "spread": "30 minutes", "deadline": "8 hours"}),
]


@dataclass(slots=True)
class Job:
    number: int
    machine: int
    due: datetime
    deadline: datetime
    priority: int
    length: timedelta
    restore: bool = False
    hypervisor: str = ""
    created: datetime = START
    begun: datetime | None = None

    def __lt__(self, other: Job) -> bool:
        return (self.priority, self.due, self.number) < (other.priority, other.due, other.number)


@dataclass
class Host:
    queue: list[Job] = field(default_factory=list)
    running: list[Job] = field(default_factory=list)
    away: bool = False


@dataclass
class Found:
    """What is counted."""

    counts: Counter[str] = field(default_factory=Counter)
    late: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    """Minutes that restores waited."""
    most: int = 0


class Year:
    def __init__(self, machines: int, hypervisors: int, days: int, seed: int) -> None:
        self.chance = random.Random(seed)
        self.end = START + timedelta(days=days)
        self.hosts = {f"h{number:02d}": Host() for number in range(hypervisors)}
        self.limits = Limits(dict.fromkeys(self.hosts, SLOTS), {})
        self.sections = [self._section(number, keys) for number, (_, keys) in enumerate(POLICIES)]
        names = list(self.hosts)
        self.machines = [
            Machine(f"{number:08x}-0000-4000-8000-000000000000", names[number % hypervisors], f"vm{number}")
            for number in range(machines)
        ]
        self.index = {machine.uuid: number for number, machine in enumerate(self.machines)}
        self.of = self.chance.choices(range(len(POLICIES)), [share for share, _ in POLICIES], k=machines)
        self.joins = [START if self.chance.random() < 0.95 else self._when() for _ in range(machines)]
        self.duties: dict[int, Duty] = {}
        self.pointed: set[int] = {number for number, moment in enumerate(self.joins) if moment == START}
        self.active: dict[int, Active] = {}
        self.events: list[tuple[datetime, int, str, object]] = []
        self.looks: dict[datetime, set[int]] = {}
        self.numbers = 0
        self.down = False
        self.missed_looks: set[int] = set()
        self.after_downtime = START - timedelta(days=9)
        self.host_back: dict[str, datetime] = {}
        self.found = Found()
        self.lengths = [timedelta(minutes=min(self.chance.lognormvariate(1.2, 0.8), 120)) for _ in range(4096)]
        self._plan(days)

    def _section(self, number: int, keys: dict[str, object]) -> Section:
        policy = Policy.model_validate({"timezone": "Europe/Berlin", **keys})
        protect = Protect(machines=["*"], policy=f"p{number}")
        return Section(f"s{number}", protect, f"p{number}", policy, "main", Timetable(policy, START))

    def _when(self) -> datetime:
        return START + self.chance.random() * (self.end - START)

    def _plan(self, days: int) -> None:
        """What will happen to everybody, whatever is decided."""
        for number, moment in enumerate(self.joins):
            self._look(number, moment)
        lengths = [self.chance.uniform(1, 8) for _ in range(max(1, days // 30))] + ([72.0] if days >= 60 else [])
        for hours in lengths:
            moment = self._when()
            self._at(moment, "down", None)
            self._at(moment + timedelta(hours=hours), "up", None)
        for _ in range(days // 3):
            host, moment = self.chance.choice(list(self.hosts)), self._when()
            self._at(moment, "away", host)
            self._at(moment + timedelta(hours=2), "back", host)
        for _ in range(days * len(self.machines) // 500):
            self._at(self._when(), "restore", self.chance.randrange(len(self.machines)))

    def _at(self, moment: datetime, what: str, value: object) -> None:
        self.numbers += 1
        heapq.heappush(self.events, (moment, self.numbers, what, value))

    def _look(self, machine: int, moment: datetime) -> None:
        """Have the next tick at or after `moment` look at a machine."""
        tick = moment.replace(second=0, microsecond=0)
        tick = tick if tick == moment else tick + MINUTE
        if tick not in self.looks:
            self.looks[tick] = set()
            self._at(tick, "tick", tick)
        self.looks[tick].add(machine)

    # --- the year --------------------------------------------------------------------------------------------------

    def run(self) -> Found:
        while self.events:
            now, _, what, value = heapq.heappop(self.events)
            if now >= self.end:
                break
            getattr(self, f"_{what}")(now, value)
        self._count()
        return self.found

    def _tick(self, now: datetime, tick: object) -> None:
        assert isinstance(tick, datetime)
        machines = self.looks.pop(tick)
        if self.down:
            self.missed_looks |= machines
            return
        by_section: dict[int, list[int]] = {}
        for machine in machines:
            by_section.setdefault(self.of[machine], []).append(machine)
        hosts = set()
        for number, found in by_section.items():
            hosts |= self._decide(self.sections[number], found, now)
        for host in hosts:
            self._dispatch(host, now)

    def _decide(self, section: Section, found: list[int], now: datetime) -> set[str]:
        duties = {(self.machines[one].uuid, section.name): self.duties[one] for one in found if one in self.duties}
        active = {self.machines[one].uuid: self.active[one] for one in found if one in self.active}
        pointed = {(self.machines[one].uuid, "main") for one in found if one in self.pointed}
        decisions = decide(
            [section], [self.machines[one] for one in found], duties, active, now, pointed=lambda: pointed, since=now
        )
        waiting: dict[int, datetime | None] = {}
        hosts = set()
        for decision in decisions:
            number = self.index[decision.machine.uuid]  # type: ignore[union-attr]
            match decision:
                case Adopt(after=after):
                    self.duties[number] = after
                    self.joins[number] = after.handled
                case LeaveOut():
                    self._passed(number, section, decision.before, decision.due, "left out")
                    self.duties[number] = left_out(decision)
                case Wait(until=until):
                    waiting[number] = until
                case Run():
                    self._passed(number, section, decision.before, decision.due, "run")
                    self._begin(number, decision, now)
                    hosts.add(decision.machine.hypervisor)
        for one in found:
            if one in waiting:
                self._look(one, waiting[one] or now + timedelta(minutes=5))
            else:
                self._next(one, section, now)
        return hosts

    def _next(self, number: int, section: Section, now: datetime) -> None:
        duty = self.duties[number]
        coming = section.timetable.next(section.timetable.offset(self.machines[number].uuid), max(duty.handled, now))
        moments = [moment for moment in (coming and coming.at, duty.first) if moment is not None]
        if moments:
            self._look(number, min(moments))

    def _passed(self, number: int, section: Section, before: Duty, due: datetime, what: str) -> None:
        """A moment is decided; those before it that were not are made up for by it."""
        table = section.timetable
        self.found.counts[what] += due != before.first
        self.found.counts["first backups"] += due == before.first
        missed = table.missed(table.offset(self.machines[number].uuid), before.handled, due)
        self.found.counts["made up for by another"] += missed
        if due <= before.handled:
            self.found.wrong.append(f"{due} of machine {number} was decided twice")

    def _begin(self, number: int, run: Run, now: datetime) -> None:
        if number in self.active:
            self.found.wrong.append(f"machine {number} has two jobs at {now}")
        length = self.lengths[self.chance.randrange(4096)]
        if number not in self.pointed:
            length *= 6
        if self.chance.random() < 1 / 20_000:
            length = HUNG
        host = run.machine.hypervisor
        self.numbers += 1
        job = Job(self.numbers, number, run.due, run.deadline, 10 - run.priority, length, hypervisor=host, created=now)
        self.duties[number] = outcome(run, str(job.number))
        self.active[number] = Active(str(job.number), "backup", run.section.name, "queued")
        heapq.heappush(self.hosts[host].queue, job)

    # --- jobs ------------------------------------------------------------------------------------------------------

    def _restore(self, now: datetime, machine: object) -> None:
        assert isinstance(machine, int)
        host = self.machines[machine].hypervisor
        self.numbers += 1
        length = timedelta(minutes=self.chance.uniform(5, 60))
        job = Job(self.numbers, machine, now, now + HUNG, 0, length, restore=True, hypervisor=host, created=now)
        heapq.heappush(self.hosts[host].queue, job)
        self._dispatch(host, now)

    def _dispatch(self, name: str, now: datetime) -> None:
        """The rule of the queue: in order, as far as there are slots, and one more for restores."""
        host = self.hosts[name]
        if self.down or host.away:
            return
        if self.chance.random() < 1 / 2_000:
            self._compare(name)
        while host.queue and len(host.running) < SLOTS + host.queue[0].restore:
            job = heapq.heappop(host.queue)
            job.begun = now
            host.running.append(job)
            self.found.most = max(self.found.most, len(host.running))
            backups = sum(not one.restore for one in host.running)
            if backups > SLOTS or len(host.running) > SLOTS + 1:
                self.found.wrong.append(f"{name} has {len(host.running)} jobs at {now}")
            if job.restore:
                self._waited(job, now)
            self._at(now + job.length, "ended", job)

    def _waited(self, job: Job, now: datetime) -> None:
        calm = max(self.after_downtime, self.host_back.get(job.hypervisor, START))
        self.found.waits.append((now - max(job.created, calm)).total_seconds() / 60 if now > calm else 0.0)

    def _compare(self, name: str) -> None:
        """Now and then: the queue as it is here against the dispatcher's own rule."""
        host = self.hosts[name]
        entries = [_entry(job, queued=False) for job in host.running] + [_entry(job, queued=True) for job in host.queue]
        wanted = [id for id, why in dispatch(entries, self.limits, NOBODY).items() if not why]
        taken, running, queue = [], len(host.running), sorted(host.queue)
        for job in queue:
            if running >= SLOTS + job.restore:
                break
            taken.append(str(job.number))
            running += 1
        if wanted != taken:
            self.found.wrong.append(f"the queue of {name} begins {taken}, the dispatcher {wanted}")

    def _ended(self, now: datetime, job: object) -> None:
        assert isinstance(job, Job)
        host = self.hosts[job.hypervisor]
        host.running.remove(job)
        if not job.restore:
            del self.active[job.machine]
            self.pointed.add(job.machine)
            self.found.counts["ended"] += 1
            if now > job.deadline:
                self.found.late[self._why_late(job, now)] += 1
        self._dispatch(job.hypervisor, now)

    def _why_late(self, job: Job, now: datetime) -> str:
        assert job.begun is not None
        if job.length >= HUNG:
            return "it hung"
        if job.created - job.due > timedelta(minutes=2) or job.due < self.after_downtime < now:
            return "its controller was down"
        if self.host_back.get(job.hypervisor, START) > job.due:
            return "its hypervisor was away"
        return "no reason"

    # --- what happens to them --------------------------------------------------------------------------------------

    def _down(self, _now: datetime, _value: object) -> None:
        self.down = True

    def _up(self, now: datetime, _value: object) -> None:
        self.down, self.after_downtime = False, now
        for machine in self.missed_looks:
            self._look(machine, now)
        self.missed_looks = set()
        for name in self.hosts:
            self._dispatch(name, now)

    def _away(self, _now: datetime, host: object) -> None:
        self.hosts[str(host)].away = True

    def _back(self, now: datetime, host: object) -> None:
        self.hosts[str(host)].away = False
        self.host_back[str(host)] = now
        self._dispatch(str(host), now)

    def _count(self) -> None:
        """Every moment of the year, counted anew, against those that were decided."""
        expected = 0
        for number, machine in enumerate(self.machines):
            if number not in self.duties:
                continue
            table = self.sections[self.of[number]].timetable
            offset, at = table.offset(machine.uuid), self.joins[number]
            until = self.duties[number].handled
            while (coming := table.next(offset, at)) is not None and coming.at <= until:
                expected += 1
                at = coming.at
        counts = self.found.counts
        decided = counts["run"] + counts["left out"] + counts["made up for by another"]
        if decided != expected:
            self.found.wrong.append(f"{decided} moments were decided, and there were {expected}")
        counts["moments"] = expected
        if idle := [number for number in self.duties if self._forgotten(number)]:
            self.found.wrong.append(f"{len(idle)} machines were forgotten, like {idle[0]}")

    def _forgotten(self, number: int) -> bool:
        """Due for longer than a day, and nothing is under way."""
        table = self.sections[self.of[number]].timetable
        coming = table.next(table.offset(self.machines[number].uuid), self.duties[number].handled)
        return coming is not None and coming.at < self.end - timedelta(days=4) and number not in self.active


def _entry(job: Job, *, queued: bool) -> Entry:
    return Entry(
        id=str(job.number),
        kind="restore" if job.restore else "backup",
        machine=str(job.machine),
        hypervisor=job.hypervisor,
        vault="main",
        queued=queued,
        priority=job.priority,
        moment=job.due,
        owner=NOBODY,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machines", type=int, default=10_000)
    parser.add_argument("--hypervisors", type=int, default=50)
    parser.add_argument("--days", type=int, default=365)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    started = time.perf_counter()
    found = Year(chosen.machines, chosen.hypervisors, chosen.days, chosen.seed).run()
    counts, late = found.counts, found.late
    print(f"{chosen.days} days of {chosen.machines} machines in {time.perf_counter() - started:.0f} s")
    print(f"moments          {counts['moments']}")
    print(f"  run            {counts['run']}")
    print(f"  left out       {counts['left out']}  (the backup of the moment before still went on)")
    print(f"  made up for    {counts['made up for by another']}  (by the next backup, after downtime)")
    print(f"first backups    {counts['first backups']}  (of machines that joined with a weekly schedule)")
    print(f"ended late       {sum(late.values())}  " + ", ".join(f"{why}: {n}" for why, n in sorted(late.items())))
    if waits := found.waits:
        long = sum(wait > 1 for wait in waits)
        print(f"restores         {len(waits)}, waited at most {max(waits):.0f} min; {long} for more than a minute")
    print(f"slots            {SLOTS} and one for restores; {found.most} used at most")
    for text in found.wrong[:20]:
        print(f"WRONG: {text}")
    sys.exit(1 if found.wrong or late["no reason"] else 0)


if __name__ == "__main__":
    main()
