"""What is due is begun, and people see what will be.

The half of `Service` that concerns schedules. The rules are in `scheduler.py`; here they meet the catalog: a job is
made in the transaction that notes its moment as handled, guarded by what was read: of two controllers one makes it.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cache
from itertools import islice
from threading import RLock

from sqlmodel import Session

from orchestrator import alarms, scheduler
from orchestrator.apply_plan import Plan, plan
from orchestrator.catalog import duties as rows
from orchestrator.catalog.alerts import apply
from orchestrator.catalog.jobs import BACKUP, Ticket
from orchestrator.catalog.store import Catalog
from orchestrator.chores import Chore
from orchestrator.config import Config
from orchestrator.config_file import Policy
from orchestrator.job_desk import JobDesk
from orchestrator.leases import holder_of
from orchestrator.primary import require_primary
from orchestrator.scheduler import (
    Active,
    Adopt,
    Coming,
    Decision,
    Drop,
    Duty,
    Key,
    LeaveOut,
    Machine,
    Pointed,
    Run,
    Section,
    Wait,
)
from orchestrator.timetable import Timetable
from workers.contract.errors import Busy, NotFound, UsageError
from workers.contract.machines import MachineRef

TICK_SECONDS = 10.0
TOGETHER = 25
"""Jobs that are made in one transaction: others want to write too."""
AT_MOST = 100
"""Jobs that are made in one tick, which others wait for too; the rest in the next, in their order."""
_SHARE = 20
"""News bring a tick forward, but not so often that it takes more than this part of the time."""
_FRESH = timedelta(hours=6)
"""For how long the moments of a policy are kept before they are computed anew."""


class _Lost(Exception):
    """Somebody else has decided it meanwhile."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What the catalog says at a moment."""

    machines: list[Machine]
    duties: dict[Key, Duty]
    active: dict[str, Active]


@dataclass(frozen=True, slots=True)
class NotComing:
    """A machine that nothing begins by itself for, by `section`; empty: by none."""

    machine: Machine
    section: str
    why: str


class ScheduleDesk:
    """`config`: the one in force. `begin`: have these queued jobs begun, now or in their turn. `since`: from when on
    that configuration is in force."""

    def __init__(
        self,
        config: Callable[[], Config],
        catalog: Catalog,
        jobs: JobDesk,
        begin: Callable[[Sequence[str]], None],
        *,
        since: datetime,
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._jobs = jobs
        self._begin = begin
        self._since = since
        self._timetables: dict[str, tuple[datetime, Timetable]] = {}
        self._told: set[tuple[str, str, datetime]] = set()
        self._rests_until = 0.0
        self._reading = RLock()  # timetables learn while they are asked

    def chores(self) -> list[Chore]:
        return [Chore("schedule", TICK_SECONDS, self._turn)]

    def changes(self, now: datetime) -> None:
        """Another configuration will be in force in a moment: what fell due by this one is decided by the next."""
        self._since = now

    # --- what is in force ------------------------------------------------------------------------------------------

    def sections(self, now: datetime, config: Config | None = None) -> list[Section]:
        """Those that back something up, in the order of the file."""
        config = config or self._config()
        found = []
        for name, protect in config.protect.items():
            if not problem_of(config, name):
                vault = require_primary(config, protect.vault)
                policy = config.policies[protect.policy]
                found.append(Section(name, protect, protect.policy, policy, vault, self._timetable(policy, now)))
        return found

    def _fresh_sections(self, now: datetime) -> list[Section]:
        """With moments of their own: what they give may be read when the lock is free again."""
        return [replace(one, timetable=Timetable(one.policy, now)) for one in self.sections(now)]

    def _timetable(self, policy: Policy, now: datetime) -> Timetable:
        key = policy.model_dump_json()
        made, table = self._timetables.get(key, (None, None))
        if made is None or table is None or not timedelta(0) <= now - made < _FRESH:
            table = Timetable(policy, now)
            self._timetables[key] = (now, table)
        return table

    def standing(self, config: Config | None = None) -> Standing:
        with self._catalog.read() as session:
            hypervisors = (config or self._config()).worker.hypervisors
            return Standing(rows.machines(session, hypervisors), rows.duties(session), rows.active(session))

    def decide(self, now: datetime, config: Config | None = None) -> list[Decision]:
        """By the configuration in force, or by another one."""
        at = self.standing(config)
        since = self._since if config is None else now
        with self._reading:
            sections = self.sections(now, config)
            return scheduler.decide(
                sections, at.machines, at.duties, at.active, now, pointed=self._pointed, since=since
            )

    def _pointed(self) -> set[tuple[str, str]]:
        with self._catalog.read() as session:
            return rows.pointed(session)

    # --- what is due -----------------------------------------------------------------------------------------------

    def _turn(self, now: datetime) -> None:
        started = time.monotonic()
        if started >= self._rests_until:
            self.tick(now)
            self._rests_until = time.monotonic() + (time.monotonic() - started) * _SHARE

    def tick(self, now: datetime) -> list[str]:
        """Begin what is due and leave out what cannot be begun; the ids of the jobs that were made."""
        decisions = self.decide(now)
        self.put_in_force(decisions)
        for one in decisions:
            if isinstance(one, LeaveOut):
                self._leave_out(one)
            elif isinstance(one, Wait):
                self._waits(one, now)
        runs = [one for one in decisions if isinstance(one, Run)][:AT_MOST]
        return self._make(runs) if runs else []

    def put_in_force(self, decisions: Sequence[Decision]) -> None:
        """Note which sections cover which machines, by which policy, and up to when all is decided."""
        adopted = [one for one in decisions if isinstance(one, Adopt)]
        dropped = [one for one in decisions if isinstance(one, Drop)]
        if not (adopted or dropped):
            return
        with self._catalog.write() as session:
            rows.join(session, (one for one in adopted if one.before is None))
            for one in adopted:
                if one.before is not None:
                    rows.replace(session, one.machine.uuid, one.section.name, one.before, one.after)
            for gone in dropped:
                rows.drop(session, gone)

    def _make(self, runs: Sequence[Run]) -> list[str]:
        warnings = self._jobs.refresh_packages([run.section.policy for run in runs])
        made: list[str] = []
        for start in range(0, len(runs), TOGETHER):
            with self._catalog.write() as session:
                together = [self._job(session, run, warnings) for run in runs[start : start + TOGETHER]]
            ids = [job for job in together if job]
            made += ids
            if ids:
                self._begin(ids)
        return made

    def _job(self, session: Session, run: Run, warnings: Sequence[str]) -> str:
        """Make the job and note its moment, or neither; empty: somebody else was faster."""
        machine, section = run.machine, run.section
        ref = MachineRef(hypervisor=machine.hypervisor, uuid=machine.uuid, name=machine.name)
        ticket = Ticket(BACKUP - run.priority, section=section.name, due=run.due, deadline=run.deadline)
        try:
            with session.begin_nested():
                job = self._jobs.queue_backup(session, ref, section.vault, section.policy, ticket, warnings=warnings)
                if not rows.replace(session, machine.uuid, section.name, run.before, scheduler.outcome(run, job)):
                    raise _Lost
        except (Busy, _Lost):
            return ""
        return job

    def _leave_out(self, one: LeaveOut) -> None:
        machine, section = one.machine, one.section.name
        with self._catalog.write() as session:
            if rows.replace(session, machine.uuid, section, one.before, scheduler.left_out(one)):
                apply(session, [alarms.left_out(machine.uuid, machine.name, one.why)])

    def _waits(self, one: Wait, now: datetime) -> None:
        """Somebody is told once of what has waited for longer than it may take."""
        uuid, length = one.machine.uuid, now - one.due
        key = (uuid, one.section.name, one.due)
        if one.until is not None or key in self._told or length.total_seconds() < one.section.policy.deadline:
            return
        self._told.add(key)
        text = f"its backup was due {alarms.ago(length)} ago, and waits: {one.why}"
        overdue = alarms.of_machine(alarms.Topic.BACKUP_OVERDUE, uuid)
        verdict = alarms.Raise(overdue, alarms.Severity.WARNING, one.machine.name, text, "stillframe job list --active")
        with self._catalog.write() as session:
            apply(session, [verdict])

    def plan(self, now: datetime, config: Config | None = None) -> Plan:
        """What the configuration in force, or another one, would change for whom."""
        at = self.standing(config)
        return plan(self.decide(now, config), at.machines, at.duties, self.next_runs(now, config))

    def leader(self) -> str:
        """Who begins what is due; empty: nobody does."""
        with self._catalog.read() as session:
            return holder_of(session)

    # --- what is to come -------------------------------------------------------------------------------------------

    def next_runs(self, now: datetime, config: Config | None = None) -> dict[str, datetime]:
        """Machine UUID → when its next backup begins; not of those that nothing begins for."""
        at, found = self.standing(config), dict[str, datetime]()
        with self._reading:
            sections, pointed = self.sections(now, config), cache(self._pointed)
            for machine in at.machines:
                streams = self._streams(machine, sections, at, now, pointed)
                firsts = [one.at for stream in streams for one in islice(stream, 1)]
                if firsts:
                    found[machine.uuid] = min(firsts)
        return found

    def agenda(self, now: datetime, machine: str | None = None) -> tuple[Iterator[Coming], list[NotComing]]:
        """The next backups of one machine (by UUID, `hypervisor/name` or name), or the next one of each, soonest
        first, and why others have none. Raises NotFound, UsageError."""
        at = self.standing()
        machines = at.machines if machine is None else [named(at.machines, machine)]
        with self._reading:
            sections, pointed = self._fresh_sections(now), cache(self._pointed)
            streams = [stream for one in machines for stream in self._streams(one, sections, at, now, pointed)]
            if machine is None:
                streams = [islice(stream, 1) for stream in streams]
            soonest = heapq.merge(*streams, key=lambda one: (one.at, one.machine.name, one.machine.uuid))
            left = [found for one in machines if (found := self._not_coming(one, sections, at)) is not None]
        return soonest, left

    def find(self, wanted: str) -> Machine:
        """Of the machines that the catalog knows. Raises NotFound, UsageError."""
        return named(self.standing().machines, wanted)

    def _streams(
        self, machine: Machine, sections: Sequence[Section], at: Standing, now: datetime, pointed: Pointed
    ) -> Iterator[Iterator[Coming]]:
        if machine.away:
            return
        for section in scheduler.counting(sections, machine):
            before = at.duties.get((machine.uuid, section.name))
            duty = scheduler.in_force(section, machine, before, now, pointed=pointed, since=self._since)
            yield scheduler.coming(section, machine, duty, at.active.get(machine.uuid), now)

    def _not_coming(self, machine: Machine, sections: Sequence[Section], at: Standing) -> NotComing | None:
        if machine.away:
            return NotComing(machine, "", machine.away)
        found = scheduler.counting(sections, machine)
        if not found:
            config = self._config()
            covering = config.protections(machine.hypervisor, machine.name, machine.tags)
            why = next((problem_of(config, name) for name in covering), "no [protect.*] section covers it")
            return NotComing(machine, covering[0] if covering else "", why)
        for section in found:
            if not section.timetable.scheduled:
                return NotComing(machine, section.name, f"policy {section.policy_name} has no schedule")
            duty = at.duties.get((machine.uuid, section.name))
            if duty is not None and duty.outcome.startswith("left out"):
                local = duty.handled.astimezone(section.timetable.zone)
                return NotComing(machine, section.name, f"the one of {local:%a %Y-%m-%d %H:%M} was {duty.outcome}")
        return None


def problem_of(config: Config, section: str) -> str:
    """Why nothing is backed up by a section; empty: all is well."""
    try:
        require_primary(config, config.protect[section].vault)
    except (UsageError, NotFound) as error:
        return f"[protect.{section}]: {error}"
    return ""


def named(machines: Sequence[Machine], wanted: str) -> Machine:
    """Raises NotFound, UsageError."""
    import difflib

    hypervisor, _, name = wanted.rpartition("/")
    found = [one for one in machines if one.uuid == wanted]
    found = found or [one for one in machines if one.name == name and hypervisor in ("", one.hypervisor)]
    found = [one for one in found if not one.away] or found
    if len(found) > 1:
        names = ", ".join(f"{one.hypervisor}/{one.name}" for one in found)
        raise UsageError(f"several machines are named {wanted}", hint=f"say which: {names}")
    if not found:
        near = difflib.get_close_matches(name, {one.name for one in machines}, n=1, cutoff=0.5)
        raise NotFound(
            f"no machine {wanted!r} is known", hint=f"did you mean {near[0]}?" if near else "stillframe vm list"
        )
    return found[0]
