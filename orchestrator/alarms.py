"""What somebody must be told, and when it has passed: pure rules over what was found, with words for people.

An alert is a thing that stands, not a message: its key says what makes two of them the same, so that the tenth failure
of a machine is the same alert counted to ten, and the success after it resolves the one that was told. What a person
did on purpose (a cancellation, a disk left out by hand) is no alert: an alert that is always there is read by nobody.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum

from orchestrator.jobs.backup_job import BackupJob
from orchestrator.jobs.docs import AnyJob
from orchestrator.jobs.restore import RestoreJob
from orchestrator.jobs.states import JobState
from orchestrator.jobs.upkeep import UpkeepJob
from workers.contract.points import Consistency


class Severity(StrEnum):
    """Ordered: info < warning < critical."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        return list(Severity).index(self)


class Topic(StrEnum):
    """What an alert is about: the first word of its key."""

    BACKUP_FAILED = "backup-failed"
    BACKUP_OVERDUE = "backup-overdue"
    BACKUP_DEGRADED = "backup-degraded"
    TRACKING_WRONG = "tracking-wrong"
    DISK_LEFT_OUT = "disk-left-out"
    UNRELEASED = "unreleased"
    UPKEEP_FAILED = "upkeep-failed"
    VAULT_FULL = "vault-full"
    VAULT_DAMAGED = "vault-damaged"
    VAULT_UNVERIFIED = "vault-unverified"
    VAULT_AWAY = "vault-away"
    NOTIFY_FAILED = "notify-failed"


@dataclass(frozen=True, slots=True)
class Raise:
    """Tell of something."""

    key: str
    severity: Severity
    subject: str
    text: str
    hint: str = ""
    event: bool = False
    """It happened once more, and is counted; False: a state that lasts, found again."""


@dataclass(frozen=True, slots=True)
class Resolve:
    """What the alert of that key told of has passed. Harmless where none stands."""

    key: str
    ending: str = ""
    """By what, in words."""


Verdict = Raise | Resolve

FAILURES_CRITICAL = 3
"""So many in a row, and it will not go away by itself."""
FREE_WARNING, FREE_CRITICAL = 0.10, 0.03
"""Share of what a vault has and could have that is still free."""
DAYS_WARNING, DAYS_CRITICAL = 14, 2
"""Days until it is full, if it goes on to grow as it did."""
FLOOR = 1 << 30
"""Bytes. Less than that is critical, however small the vault."""


def of_machine(topic: Topic, uuid: str, more: str = "") -> str:
    """The key of an alert about a machine."""
    return f"{topic} machine:{uuid}" + (f" {more}" if more else "")


def of_vault(topic: Topic, name: str, more: str = "") -> str:
    return f"{topic} vault:{name}" + (f" {more}" if more else "")


# --- a job has ended -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Before:
    """What was known of a job's machine, or of its vault's upkeep, when the job ended."""

    failures: int = 0
    """Jobs of the kind that failed in a row, without this one."""
    best: Consistency | None = None
    """The best that one of the machine's last points had; None: it has no points."""
    included: frozenset[str] = frozenset()
    """Disks of its last point."""
    standing: frozenset[str] = field(default_factory=frozenset)
    """Keys of alerts that stand."""


def job_ended(job: AnyJob, before: Before) -> list[Verdict]:
    """What follows from how a job ended. A cancelled one says nothing, unless it could not be released."""
    match job:
        case BackupJob():
            return [*_released(job, job.machine.name, before), *_backup_ended(job, before)]
        case RestoreJob():
            return _released(job, job.name or job.to or "restore", before)
        case UpkeepJob():
            return _upkeep_ended(job, before)


def _released(job: BackupJob | RestoreJob, subject: str, before: Before) -> list[Verdict]:
    key = f"{Topic.UNRELEASED} job:{job.id}"
    if job.leftover:
        text = f"{job.kind} {job.id} could not be released: {job.warnings[-1] if job.warnings else 'see its events'}"
        return [Raise(key, Severity.CRITICAL, subject, text, f"stillframe job show {job.id}", event=True)]
    return [Resolve(key, "released")] if key in before.standing else []


def _backup_ended(job: BackupJob, before: Before) -> list[Verdict]:
    uuid, name = job.machine.uuid, job.machine.name
    failed = of_machine(Topic.BACKUP_FAILED, uuid)
    if job.state is JobState.FAILED:
        if f"{Topic.UNRELEASED} job:{job.id}" in before.standing:
            return []  # it failed before, and was told then: only its release was tried again
        message = job.error.message if job.error else "for a reason that is not known"
        count = before.failures + 1
        text = f"its backup failed{f' {count} times in a row' if count > 1 else ''}: {message}"
        severity = Severity.CRITICAL if count >= FAILURES_CRITICAL else Severity.WARNING
        hint = (job.error.hint if job.error else "") or f"stillframe job show {job.id}"
        return [Raise(failed, severity, name, text, hint, event=True)]
    if job.committed is None:
        return []
    ending = f"point {job.point[:8]} was made"
    gone = [key for key in (failed, of_machine(Topic.BACKUP_OVERDUE, uuid)) if key in before.standing]
    well: list[Verdict] = [Resolve(key, ending) for key in gone]
    return [*well, *_worth(job, before), *_tracking(job, before), *_disks(job, before)]


def _worth(job: BackupJob, before: Before) -> list[Verdict]:
    """Consistency that was asked for in so many words, or that the machine's points had until now."""
    assert job.committed is not None
    key, got = of_machine(Topic.BACKUP_DEGRADED, job.machine.uuid), job.committed.consistency
    asked = job.goal if job.goal_asked else Consistency.CRASH
    best = min(before.best or Consistency.CRASH, job.goal, key=lambda one: one.rank)
    wanted = max(asked, best, key=lambda one: one.rank)
    if got.rank < wanted.rank:
        why = "as asked" if asked.rank >= wanted.rank else "as points before it"
        text = f"point {job.point[:8]} is {got}, not {wanted} {why}: {job.committed.consistency_reason}"
        hint = f"stillframe vm show {job.machine.name}"
        return [Raise(key, Severity.WARNING, job.machine.name, text, hint, event=True)]
    return [Resolve(key, f"point {job.point[:8]} is {got}")] if key in before.standing else []


def _tracking(job: BackupJob, before: Before) -> list[Verdict]:
    key = of_machine(Topic.TRACKING_WRONG, job.machine.uuid)
    if job.alerts:
        what = "; ".join(f"{target}: {text}" for target, text in sorted(job.alerts.items()))
        hint = f"stillframe backup run {job.machine.name} --full; stillframe job show {job.id}"
        return [Raise(key, Severity.WARNING, job.machine.name, what, hint, event=True)]
    return [Resolve(key, "changes were tracked rightly")] if key in before.standing else []


def _disks(job: BackupJob, before: Before) -> list[Verdict]:
    """Disks that were in the last point and are not in this one, unless somebody left them out by name."""
    name, uuid = job.machine.name, job.machine.uuid
    reasons = {one.target: one.reason for one in job.not_included if one.target not in job.exclude}
    verdicts: list[Verdict] = [
        Raise(
            of_machine(Topic.DISK_LEFT_OUT, uuid, target),
            Severity.WARNING,
            name,
            f"{target} is no longer included: {reason}",
            f"stillframe vm show {name}",
            event=True,
        )
        for target, reason in sorted(reasons.items())
        if target in before.included
    ]
    prefix = of_machine(Topic.DISK_LEFT_OUT, uuid, "")
    for key in sorted(before.standing):
        target = key.removeprefix(prefix + " ")
        if key.startswith(prefix + " ") and target not in reasons:
            included = target in {plan.target for plan in job.plans}
            verdicts.append(Resolve(key, f"{target} is included again" if included else f"{target} is gone"))
    return verdicts


def _upkeep_ended(job: UpkeepJob, before: Before) -> list[Verdict]:
    key = of_vault(Topic.UPKEEP_FAILED, job.vault, job.what)
    if job.state is JobState.FAILED and job.error is not None:
        count = before.failures + 1
        severity = Severity.CRITICAL if count >= FAILURES_CRITICAL else Severity.WARNING
        text = f"its {job.what} failed{f' {count} times in a row' if count > 1 else ''}: {job.error.message}"
        hint = job.error.hint or f"stillframe job show {job.id}"
        return [Raise(key, severity, f"vault {job.vault}", text, hint, event=True)]
    if job.state is JobState.SUCCEEDED and key in before.standing:
        return [Resolve(key, f"{job.what} succeeded")]
    return []


# --- what has not happened -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Watched:
    """A machine whose backups have a schedule."""

    uuid: str
    name: str
    period: timedelta
    """The longest time between two moments of its schedule."""
    last: datetime | None
    """When its last point was made; None: it has none."""


def stale(machine: Watched, standing: Mapping[str, tuple[Severity, str]], now: datetime) -> list[Verdict]:
    """A last point older than twice the schedule: whatever stands about its failures becomes critical, and where
    nothing stands, nobody noticed until now. `standing`: key → severity and text."""
    failed, overdue = (of_machine(t, machine.uuid) for t in (Topic.BACKUP_FAILED, Topic.BACKUP_OVERDUE))
    if machine.last is None:
        return []  # what was due and has not come is `late`; how long nobody has wanted one is not known
    age = now - machine.last
    if age <= 2 * machine.period:
        return []
    old = f"its last point is {ago(age)} old, and its schedule makes one in {ago(machine.period)}"
    if failed in standing:
        severity, text = standing[failed]
        if severity is Severity.CRITICAL:
            return []
        hint = f"stillframe backup run {machine.name}"
        return [Raise(failed, Severity.CRITICAL, machine.name, f"{text}; {old}", hint)]
    return [Raise(overdue, Severity.CRITICAL, machine.name, old, f"stillframe backup run {machine.name}")]


@dataclass(frozen=True, slots=True)
class Late:
    """A job that has not ended by its deadline."""

    job: str
    uuid: str
    name: str
    state: str
    deadline: datetime
    section: str = ""


def late(job: Late, now: datetime) -> Raise | None:
    """It runs still, or was never begun; None: its time is not over."""
    if now < job.deadline:
        return None
    begun = "still waits to begin" if job.state == JobState.QUEUED else f"is still {job.state}"
    text = f"backup {job.job} {begun}, {ago(now - job.deadline)} after its deadline"
    key = of_machine(Topic.BACKUP_OVERDUE, job.uuid)
    return Raise(key, Severity.WARNING, job.name, text, f"stillframe job show {job.job}")


def left_out(uuid: str, name: str, why: str, hint: str = "stillframe job list --active") -> Raise:
    """A due backup that was not begun."""
    key = of_machine(Topic.BACKUP_OVERDUE, uuid)
    return Raise(key, Severity.WARNING, name, f"a due backup was left out: {why}", hint, event=True)


def over(standing: Iterable[str], known: Collection[str]) -> list[Resolve]:
    """Alerts about machines that are no longer there, or no longer protected. `known`: UUIDs of those that are."""
    topics = (Topic.BACKUP_FAILED, Topic.BACKUP_OVERDUE, Topic.BACKUP_DEGRADED)
    found = []
    for key in standing:
        topic, _, subject = key.partition(" machine:")
        if topic in topics and subject and subject.partition(" ")[0] not in known:
            found.append(Resolve(key, "nobody asks for its backups any more"))
    return found


# --- vaults ----------------------------------------------------------------------------------------------------------


def vault_space(name: str, used: int | None, free: int | None, growth: float | None) -> Verdict:
    """Whether a vault fills up. `growth`: bytes a day; None: not known yet."""
    key = of_vault(Topic.VAULT_FULL, name)
    if used is None or free is None:
        return Resolve(key)
    share = free / (used + free) if used + free else 0.0
    days = free / growth if growth is not None and growth > 0 else None
    critical = free < FLOOR or share < FREE_CRITICAL or (days is not None and days < DAYS_CRITICAL)
    warning = share < FREE_WARNING or (days is not None and days < DAYS_WARNING)
    if not (critical or warning):
        return Resolve(key, "there is room again")
    soon = f"; at this rate it is full in {days:.0f} days" if days is not None and days < DAYS_WARNING else ""
    room = f"{free / (1 << 30):.1f} GiB" if free >= 1 << 30 else f"{free >> 20} MiB"
    text = f"only {room} free, {share:.0%} of its space{soon}"
    severity = Severity.CRITICAL if critical else Severity.WARNING
    return Raise(key, severity, f"vault {name}", text, f"stillframe vault sweep {name}")


def vault_away(name: str, problem: str) -> Verdict:
    key = of_vault(Topic.VAULT_AWAY, name)
    if problem:
        return Raise(key, Severity.CRITICAL, f"vault {name}", problem, "stillframe doctor")
    return Resolve(key, "it can be used again")


def vault_damage(name: str, points: int, copies: int) -> Verdict:
    """`points` that cannot be restored whole, `copies` of blocks or packs that are known to be damaged."""
    key = of_vault(Topic.VAULT_DAMAGED, name)
    if not points and not copies:
        return Resolve(key, "nothing is known to be damaged any more")
    what = [f"{points} points cannot be restored whole"] if points else []
    what += [f"{copies} damaged blocks or packs"] if copies else []
    severity = Severity.CRITICAL if points else Severity.WARNING
    return Raise(key, severity, f"vault {name}", "; ".join(what), f"stillframe vault repair {name}")


def vault_unverified(name: str, since: datetime | None, period: timedelta | None, now: datetime) -> Verdict:
    """Verification is overdue at three turns without one. `since`: its last, else since when there is anything;
    None: there is nothing to verify. `period`: between two turns; None: by hand only."""
    key = of_vault(Topic.VAULT_UNVERIFIED, name)
    if since is None or period is None or now - since <= 3 * period:
        return Resolve(key, "it was verified")
    text = f"nothing of it was verified for {ago(now - since)}"
    return Raise(key, Severity.WARNING, f"vault {name}", text, f"stillframe upkeep run verify {name}")


# --- ways of telling -------------------------------------------------------------------------------------------------


def target_failing(target: str, why: str) -> Raise:
    """A way to tell people that does not work: the others, and `stillframe status`, say so."""
    key = f"{Topic.NOTIFY_FAILED} target:{target}"
    return Raise(key, Severity.CRITICAL, f"notify {target}", why, "stillframe notify test", event=True)


def target_well(target: str) -> Resolve:
    return Resolve(f"{Topic.NOTIFY_FAILED} target:{target}", "messages go out again")


def ago(length: timedelta) -> str:
    """`40 minutes`, `26 hours`, `3 days`."""
    minutes = int(length.total_seconds() // 60)
    if minutes < 120:
        return f"{minutes} minute{'' if minutes == 1 else 's'}"
    hours = minutes // 60
    return f"{hours} hours" if hours < 48 else f"{hours // 24} days"
