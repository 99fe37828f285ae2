"""What nobody reports because it did not happen, or because it has no job: looked for again and again.

Backups that do not end or do not come, vaults that fill up, are damaged, or are away, verification that is overdue. The
rules are in `alarms.py`; here is where to look.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING

from sqlalchemy import func
from sqlmodel import Session, col, select

from orchestrator import alarms
from orchestrator.alarms import Severity, Watched
from orchestrator.catalog import health
from orchestrator.catalog.alerts import apply, standing_alerts
from orchestrator.catalog.fleet import newest_points
from orchestrator.catalog.schema import PointRow, VaultLookRow
from orchestrator.catalog.store import Catalog
from orchestrator.chores import Chore
from orchestrator.config import Config
from orchestrator.config_file import Policy
from orchestrator.timetable import Timetable
from workers.context import Context
from workers.contract.errors import StillframeError

if TYPE_CHECKING:
    from orchestrator.integrity_desk import IntegrityDesk
    from workers.vault import Vault

JOBS_SECONDS, MACHINES_SECONDS, VAULTS_SECONDS = 30.0, 300.0, 900.0
_FEW, _MANY, _WEEK = 4, 500, timedelta(days=8)
"""Moments of a schedule that are looked at: its longest pause is among those of a week, or the next few."""


class Sparing:
    """A chore that is not brought forward by news: it costs too much to be done with every job that ends."""

    def __init__(self, seconds: float, act: Callable[[datetime], None]) -> None:
        self._pause = timedelta(seconds=seconds) - timedelta(seconds=1)
        self._act = act
        self._last: datetime | None = None

    def __call__(self, now: datetime) -> None:
        if self._last is None or not timedelta(0) <= now - self._last < self._pause:
            self._act(now)
            self._last = now


class WatchDesk:
    """`config`: the one in force."""

    def __init__(
        self, config: Callable[[], Config], catalog: Catalog, context: Context, integrity: IntegrityDesk
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._context = context
        self._integrity = integrity

    def chores(self) -> list[Chore]:
        return [
            Chore("watch jobs", JOBS_SECONDS, self.jobs),
            Chore("watch machines", MACHINES_SECONDS, Sparing(MACHINES_SECONDS, self.machines)),
            Chore("watch vaults", VAULTS_SECONDS, Sparing(VAULTS_SECONDS, self.vaults)),
        ]

    # --- machines --------------------------------------------------------------------------------------------------

    def jobs(self, now: datetime) -> None:
        """Backups that have not ended by their deadline."""
        with self._catalog.read() as session:
            found = [verdict for job in health.late_jobs(session, now) if (verdict := alarms.late(job, now))]
        self._apply(found)

    def machines(self, now: datetime) -> None:
        """Last points that are older than twice what the schedule of their machine says."""
        config = self._config()
        pauses = {name: longest_pause(policy, now) for name, policy in config.policies.items()}
        with self._catalog.read() as session:
            places, last = health.places(session), newest_points(session)
            standing = {row.key: (Severity(row.severity), row.text) for row in standing_alerts(session)}
        protected: set[str] = set()
        found: list[alarms.Verdict] = []
        for place in places:
            policies = {config.protect[section].policy for section in protections(config, place)}
            if policies:
                protected.add(place.uuid)
            periods = [pause for name in policies if (pause := pauses[name]) is not None]
            if periods:
                newest = last.get(place.uuid)
                watched = Watched(place.uuid, place.name, min(periods), newest.time if newest else None)
                found += alarms.stale(watched, standing, now)
        if config.protect:
            found += alarms.over(standing, protected)
        self._apply(found)

    def _apply(self, verdicts: list[alarms.Verdict] | list[alarms.Raise]) -> None:
        if verdicts:
            with self._catalog.write() as session:
                apply(session, verdicts)

    # --- vaults ----------------------------------------------------------------------------------------------------

    def vaults(self, now: datetime) -> None:
        """Look into every vault; one that is away keeps nobody from the others."""
        for name in self._config().worker.vaults:
            self.vault(name, now)

    def vault(self, name: str, now: datetime) -> VaultLookRow:
        """How it is now, noted and told."""
        look = self.look(name, now)
        with self._catalog.write() as session:
            health.note_look(session, look)
            apply(session, self._verdicts(session, look, now))
        return look

    def look(self, name: str, now: datetime) -> VaultLookRow:
        from workers.vault.places import away

        try:
            vault = self._context.vault(name)
            used, free = _used(vault), vault.store.free_bytes()
            problem = "; ".join(away(vault.store))
        except StillframeError as error:
            return VaultLookRow(vault=name, time=now, problem=str(error) or type(error).__name__)
        return VaultLookRow(vault=name, time=now, used_bytes=used, free_bytes=free, problem=problem)

    def _verdicts(self, session: Session, look: VaultLookRow, now: datetime) -> list[alarms.Verdict]:
        name = look.vault
        found = [alarms.vault_away(name, look.problem)]
        if look.used_bytes is None:
            return found
        growth = health.growth(session, name, now)
        known = self._integrity.health(name)
        found.append(alarms.vault_space(name, look.used_bytes, look.free_bytes, growth))
        found.append(
            alarms.vault_damage(name, len(known.damaged_points), max(known.damaged_blocks, known.damaged_packs))
        )
        first = session.exec(select(func.min(PointRow.time)).where(col(PointRow.vault) == name)).first()
        config = self._config()
        words = config.upkeep.verify
        policy = None if words == "never" else Policy(schedule=words, timezone=config.upkeep.timezone)
        period = longest_pause(policy, now) if policy else None
        found.append(alarms.vault_unverified(name, known.last or first, period, now))
        return found


def _used(vault: Vault) -> int:
    return sum(info.size for info in vault.store.list("packs/"))


def protections(config: Config, place: health.Place) -> list[str]:
    """Names of the sections that cover a machine."""
    return config.protections(place.hypervisor, place.name, place.tags)


def longest_pause(policy: Policy, now: datetime) -> timedelta | None:
    """The longest time between two backups by a policy's schedule, in the time to come; None: it has none."""
    table, found = Timetable(policy, now), [now]
    while len(found) < _MANY and (len(found) < _FEW or found[-1] < now + _WEEK):
        following = table.next(timedelta(0), found[-1])
        if following is None:
            break
        found.append(following.at)
    pauses = [after - before for before, after in pairwise(found[1:])]
    return max(pauses) + timedelta(seconds=policy.spread) if pauses else None
