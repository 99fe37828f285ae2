"""Which of the jobs that wait begin now: slots per hypervisor and per vault, in the order of their priorities.

A job is added as `queued` and nothing is sent. Whoever may have made room (a job ended), or has added one, dispatches:
in one transaction that only one process at a time can be in, the jobs under way are counted, and the first of those
that wait are begun as far as there are slots; their commands are sent after the commit. So two processes never count
the same slot as free, and a job whose process died between both is found by the reconciler.

A scheduled backup does not begin in a blackout of its policy, however long it waited before.

A restore never waits behind backups: one slot more than `max_jobs` is there for restores alone. Upkeep neither takes a
slot nor waits for one here: whoever runs it does one at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from sqlmodel import Session

from orchestrator.catalog import owner
from orchestrator.catalog.jobs import owner_of
from orchestrator.catalog.owner import Owner
from orchestrator.catalog.queue import Entry, anything_queued, entries, lock_dispatch
from orchestrator.catalog.schema import JobRow
from orchestrator.catalog.store import Catalog
from orchestrator.config import Config
from orchestrator.controller import Controller
from orchestrator.schedules import blackouts, zone_of

RESTORE_KIND, UPKEEP_KIND = "restore", "upkeep"


@dataclass(frozen=True, slots=True)
class Limits:
    """Jobs that may be under way at once; a name without a number has no limit."""

    hypervisors: Mapping[str, int]
    vaults: Mapping[str, int]
    closed: Mapping[str, str] = field(default_factory=dict)
    """Section → why none of its backups begins now."""

    @staticmethod
    def of(config: Config, now: datetime | None = None) -> Limits:
        return Limits(
            closed=in_blackout(config, now or datetime.now(UTC)),
            hypervisors={name: one.max_jobs for name, one in config.worker.hypervisors.items()},
            vaults={name: one.max_jobs for name, one in config.worker.vaults.items() if one.max_jobs is not None},
        )


def in_blackout(config: Config, now: datetime) -> dict[str, str]:
    """Section → until when its policy lets nothing begin."""
    closed = {}
    for name, section in config.protect.items():
        policy = config.policies[section.policy]
        for _, ends in blackouts(policy, now, now + timedelta(seconds=1)) if policy.blackout else ():
            closed[name] = f"in a blackout of policy {section.policy} until {ends.astimezone(zone_of(policy)):%a %H:%M}"
    return closed


def decide(
    active: Iterable[Entry], limits: Limits, mine: Owner, *, served: Collection[str] | None = None
) -> dict[str, str]:
    """For each queued job of `mine`, in the order in which they are to begin: why it waits; empty: it begins now.

    `served`: hypervisors that have a living worker; None: all have.
    """
    hosts: Counter[str] = Counter()
    vaults: Counter[str] = Counter()
    waiting = []
    for entry in active:
        if entry.kind == UPKEEP_KIND:
            continue
        if not entry.queued:
            hosts[entry.hypervisor] += 1
            vaults[entry.vault] += 1
        elif entry.owner == mine:
            waiting.append(entry)
    verdicts = {}
    for entry in sorted(waiting, key=lambda one: (one.priority, one.moment, one.id)):
        why = _why_not(entry, limits, hosts, vaults, served)
        verdicts[entry.id] = why
        if not why:
            hosts[entry.hypervisor] += 1
            vaults[entry.vault] += 1
    return verdicts


def _why_not(
    entry: Entry, limits: Limits, hosts: Counter[str], vaults: Counter[str], served: Collection[str] | None
) -> str:
    if entry.section in limits.closed:
        return limits.closed[entry.section]
    extra = 1 if entry.kind == RESTORE_KIND else 0
    host, vault = entry.hypervisor, entry.vault
    if host and served is not None and host not in served:
        return f"no worker of hypervisor {host} is heard of"
    if host in limits.hypervisors and hosts[host] >= limits.hypervisors[host] + extra:
        return f"{_jobs(hosts[host])} on hypervisor {host} before it (max_jobs = {limits.hypervisors[host]})"
    if vault in limits.vaults and vaults[vault] >= limits.vaults[vault] + extra:
        return f"{_jobs(vaults[vault])} in vault {vault} before it (max_jobs = {limits.vaults[vault]})"
    return ""


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"


Served = Callable[[Session], Collection[str] | None]


def _all_served(_session: Session) -> None:
    return None


class Dispatcher:
    """Thread-safe; any number of them on one catalog. Begins the jobs of `mine` only, and counts all."""

    def __init__(
        self,
        catalog: Catalog,
        controller: Controller,
        limits: Callable[[], Limits],
        mine: Owner,
        *,
        served: Served = _all_served,
    ) -> None:
        self._catalog = catalog
        self._controller = controller
        self._limits = limits
        self._mine = mine
        self._served = served

    def dispatch(self) -> list[str]:
        """Begin what can begin; the ids."""
        with self._catalog.read() as session:
            if not anything_queued(session, self._mine):
                return []

        def choose(session: Session) -> list[str]:
            lock_dispatch(session)
            verdicts = decide(living(session), self._limits(), self._mine, served=self._served(session))
            return [job for job, why in verdicts.items() if not why]

        return self._controller.start_chosen(choose)


def living(session: Session) -> list[Entry]:
    """All active jobs but those under way whose process is dead: they take no slot until they are settled."""
    return [entry for entry in entries(session) if entry.queued or not owner.is_dead(entry.owner)]


def why_queued(session: Session, config: Config, job: JobRow) -> str:
    """Why a queued job waits, in words; empty: it is about to begin."""
    of = owner_of(job)
    return decide(living(session), Limits.of(config), of, served=None).get(job.id, "")
