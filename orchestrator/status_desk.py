"""How everything stands, from the catalog alone: an answer in a moment, with a hypervisor away and a vault unmounted.

What an administrator looks at in the morning; `cli/status.py` shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from sqlmodel import Session

from orchestrator.alarms import Severity
from orchestrator.catalog import health
from orchestrator.catalog.alerts import recent_alerts, standing_alerts
from orchestrator.catalog.checks import checks_of
from orchestrator.catalog.fleet import newest_points
from orchestrator.catalog.schema import AlertRow, JobRow, VaultLookRow
from orchestrator.catalog.store import Catalog
from orchestrator.config import Config
from orchestrator.watch_desk import WatchDesk, protections
from workers.contract.errors import NotFound
from workers.contract.machines import Value
from workers.contract.messages import SILENT_SECONDS
from workers.contract.points import Consistency

LEADER = "leader"
FRESH = timedelta(hours=1)
"""A look at a vault that is older is made anew: nobody else makes one."""


class AlertView(Value):
    id: int
    key: str
    severity: Severity
    subject: str
    text: str
    hint: str
    first: datetime
    last: datetime
    count: int
    resolved: datetime | None
    ending: str
    """Resolved by what."""
    acknowledged: str
    """By whom."""
    told: datetime | None


class MachineStatus(Value):
    name: str
    uuid: str
    hypervisor: str
    protected: bool
    last: datetime | None
    """When its last point was made."""
    consistency: Consistency | None
    """Of that point."""
    next_run: datetime | None
    alert: Severity | None
    """The worst that stands and is not acknowledged."""
    job: str
    """State of the job that works on it now; empty: none does."""


class VaultStatus(Value):
    name: str
    looked: datetime | None
    """When these figures were taken."""
    used_bytes: int | None
    free_bytes: int | None
    growth: float | None
    """Bytes a day."""
    verified: datetime | None
    swept: datetime | None
    replicated: datetime | None
    problem: str


class JobStatus(Value):
    id: str
    kind: str
    machine: str
    state: str
    created: datetime


class WorkerStatus(Value):
    name: str
    hypervisors: list[str]
    seen: datetime
    alive: bool


class StatusView(Value):
    time: datetime
    alerts: list[AlertView]
    """Standing ones, worst first; those that somebody has acknowledged last."""
    machines: list[MachineStatus]
    """Worst first."""
    vaults: list[VaultStatus]
    jobs: list[JobStatus]
    leader: str
    """The controller that does what is due; empty: none does."""
    scheduled: bool
    """There are schedules that need one."""
    workers: list[WorkerStatus]

    @property
    def stands(self) -> bool:
        """Something is wrong that nobody has acknowledged."""
        bad = any(alert.severity is not Severity.INFO and not alert.acknowledged for alert in self.alerts)
        return bad or (self.scheduled and not self.leader)


NextRuns = Callable[[datetime], dict[str, datetime]]
"""Machine UUID → the next moment of its schedules, as of a moment."""


class StatusDesk:
    def __init__(self, config: Callable[[], Config], catalog: Catalog, watch: WatchDesk, next_runs: NextRuns) -> None:
        self._config = config
        self._catalog = catalog
        self._watch = watch
        self._next_runs = next_runs

    def status(self, now: datetime) -> StatusView:
        """Without a leading controller, what it would have looked for is looked for first."""
        config = self._config()
        with self._catalog.read() as session:
            leader = _leader(session, now)
            stale = [name for name in config.worker.vaults if not _fresh(health.last_look(session, name), now)]
        if not leader:
            self._watch.jobs(now)
            self._watch.machines(now)
        for name in stale:
            self._watch.vault(name, now)
        with self._catalog.read() as session:
            alerts = sorted((alert_view(row) for row in standing_alerts(session)), key=_worst_first)
            jobs = health.active_jobs(session)
            return StatusView(
                time=now,
                alerts=alerts,
                machines=self._machines(session, config, alerts, {job.machine_uuid: job for job in jobs}, now),
                vaults=[self._vault(session, name, now) for name in config.worker.vaults],
                jobs=[
                    JobStatus(id=job.id, kind=job.kind, machine=job.machine_name, state=job.state, created=job.created)
                    for job in jobs
                ],
                leader=leader,
                scheduled=any(
                    config.policies[one.policy].schedule or config.policies[one.policy].cron
                    for one in config.protect.values()
                ),
                workers=[
                    WorkerStatus(
                        name=row.name,
                        hypervisors=row.hypervisors.split(),
                        seen=row.seen,
                        alive=now - row.seen < timedelta(seconds=SILENT_SECONDS),
                    )
                    for row in health.workers(session)
                ],
            )

    def _machines(
        self, session: Session, config: Config, alerts: list[AlertView], jobs: dict[str, JobRow], now: datetime
    ) -> list[MachineStatus]:
        last, runs = newest_points(session), self._next_runs(now)
        worst: dict[str, Severity] = {}
        for alert in reversed(alerts):
            if not alert.acknowledged:
                worst[alert.key.partition(" machine:")[2].partition(" ")[0]] = alert.severity
        found = [
            MachineStatus(
                name=place.name,
                uuid=place.uuid,
                hypervisor=place.hypervisor,
                protected=bool(protections(config, place)),
                last=last[place.uuid].time if place.uuid in last else None,
                consistency=last[place.uuid].consistency if place.uuid in last else None,
                next_run=runs.get(place.uuid),
                alert=worst.get(place.uuid),
                job=jobs[place.uuid].state if place.uuid in jobs else "",
            )
            for place in health.places(session)
        ]
        return sorted(found, key=_neediest_first)

    def _vault(self, session: Session, name: str, now: datetime) -> VaultStatus:
        look = health.last_look(session, name)
        done = health.last_upkeep(session, name)
        checks = [check.time for check in checks_of(session, name)]
        return VaultStatus(
            name=name,
            looked=look.time if look else None,
            used_bytes=look.used_bytes if look else None,
            free_bytes=look.free_bytes if look else None,
            growth=health.growth(session, name, now),
            verified=max(checks, default=None),
            swept=done.get("sweep"),
            replicated=done.get("replicate"),
            problem=look.problem if look else "",
        )

    def leader(self, now: datetime) -> str:
        """The controller that does what is due; empty: none does."""
        with self._catalog.read() as session:
            return _leader(session, now)

    # --- alerts ----------------------------------------------------------------------------------------------------

    def alerts(self, *, all: bool = False, limit: int = 100) -> list[AlertView]:
        """Those that stand, worst first; `all`: also those that have passed, newest first, at most `limit`."""
        with self._catalog.read() as session:
            if all:
                return [alert_view(row) for row in recent_alerts(session, limit)]
            return sorted((alert_view(row) for row in standing_alerts(session)), key=_worst_first)

    def alert(self, id: int) -> AlertView:
        """Raises NotFound."""
        with self._catalog.read() as session:
            return alert_view(_alert(session, id))

    def acknowledge(self, id: int, by: str) -> AlertView:
        """Somebody has seen it and will see to it: it stands, and counts no more until it becomes worse. Raises
        NotFound."""
        with self._catalog.write() as session:
            row = _alert(session, id)
            row.acknowledged = by
            return alert_view(row)


def _alert(session: Session, id: int) -> AlertRow:
    row = session.get(AlertRow, id)
    if row is None:
        raise NotFound(f"no alert {id}", hint="stillframe alert list --all")
    return row


def alert_view(row: AlertRow) -> AlertView:
    assert row.id is not None
    fields = AlertView.model_fields.keys() - {"severity"}
    return AlertView(severity=Severity(row.severity), **{name: getattr(row, name) for name in fields})


def _worst_first(alert: AlertView) -> tuple[bool, int, float]:
    return bool(alert.acknowledged), -alert.severity.rank, -alert.last.timestamp()


def _neediest_first(machine: MachineStatus) -> tuple[int, bool, float, str]:
    """With an alert, then protected without a point, then the oldest points; what nobody protects comes last."""
    alert = -1 if machine.alert is None else machine.alert.rank
    return -alert, not machine.protected, machine.last.timestamp() if machine.last else 0.0, machine.name


def _leader(session: Session, now: datetime) -> str:
    for lease in health.leases(session):
        if lease.name == LEADER and lease.until is not None and lease.until > now:
            return lease.holder
    return ""


def _fresh(look: VaultLookRow | None, now: datetime) -> bool:
    return look is not None and now - look.time < FRESH
