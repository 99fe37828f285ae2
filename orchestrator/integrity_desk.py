"""Whether a vault can be trusted: verifications and what they found, and repair from copies.

The half of `Service` that concerns damage; needs neither Celery nor a hypervisor. What a verification says is kept in
the catalog: which points are damaged, when blocks of each were last read, and which part of the packs was last looked
at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import TYPE_CHECKING

from orchestrator.catalog.checks import add_check, checks_of
from orchestrator.catalog.points import damaged_points, mark_damaged, mark_verified, points_of
from orchestrator.catalog.schema import CheckRow, now
from orchestrator.catalog.store import Catalog
from orchestrator.config import Config
from orchestrator.desk import Desk
from workers.context import Context
from workers.contract.errors import NotFound, UsageError
from workers.contract.machines import Value

if TYPE_CHECKING:
    from workers.contract.seams import Store
    from workers.vault.findings import Level, Progress, Share, VerifyReport
    from workers.vault.repair import RepairReport

Advance = Callable[["Progress"], None]
_READS_PACKS = ("packs", "full")
_READS_BLOCKS = ("sample", "full")


class VaultHealth(Value):
    """What is known of the integrity of a vault."""

    last: datetime | None
    """When it was last verified, at whatever level; None: never."""
    shares: dict[str, datetime | None]
    """Part of the packs (`3/30`) → when each of them was last hashed; None: never."""
    oldest: datetime | None
    """Every pack that was there then has been hashed since; None: some never were."""
    damaged_packs: int
    """That hold damaged blocks, or are missing."""
    damaged_blocks: int
    """Copies known to be damaged; a pack as a whole counts as one."""
    damaged_points: list[str]
    """Ids of points that cannot be restored whole."""


class IntegrityDesk(Desk):
    """Raises VaultMissing, WrongKey, NewerFormat, Corrupt wherever a vault is opened."""

    def __init__(self, config: Config, catalog: Catalog, context: Context) -> None:
        self._config = config
        self._catalog = catalog
        self._context = context

    def verify(
        self,
        name: str | None,
        level: Level,
        on_progress: Advance | None = None,
        *,
        points: list[str] | None = None,
        share: Share | None = None,
    ) -> VerifyReport:
        """Check the vault, or only some points of it, and remember in the catalog what was found."""
        from workers.vault.verify import verify

        vault_name = self._config.vault_name(name)
        began, started = now(), time.monotonic()
        vault = self._context.vault(vault_name)
        report = verify(vault, level, on_progress=on_progress, points=points, share=share)
        damage = _damage(report)
        with self._catalog.write() as session:
            for row in points_of(session, vault=vault_name):
                if points is None or row.id in points:
                    # Known damage counts at every level, so one that is not affected now is whole again.
                    mark_damaged(session, row.id, damage.get(row.id, ""))
                    if level.value in _READS_BLOCKS and row.id not in damage:
                        mark_verified(session, row.id, began)
            if points is None:
                add_check(
                    session,
                    CheckRow(
                        vault=vault_name,
                        time=began,
                        level=level.value,
                        share=report.share,
                        packs=report.packs,
                        blocks=report.blocks,
                        read_bytes=report.read_bytes,
                        seconds=round(time.monotonic() - started, 3),
                        findings=len(report.findings),
                    ),
                )
        return report

    def repair(
        self,
        name: str | None,
        *,
        source: str | None = None,
        dry_run: bool = False,
        on_progress: Advance | None = None,
    ) -> RepairReport:
        """Take good bytes for what is damaged from the vault's other stores, and from its replicas, or, for a replica,
        its original; `source`: only from this one. Raises NotFound, UsageError."""
        from workers.vault.repair import repair

        vault_name = self._config.vault_name(name)
        replicas = [self._store(one) for one in self._replicas(vault_name, source)]
        report = repair(self._context.vault(vault_name), replicas, dry_run=dry_run, on_progress=on_progress)
        if not dry_run:
            damage = _damage(report)
            with self._catalog.write() as session:
                for row in points_of(session, vault=vault_name):
                    mark_damaged(session, row.id, damage.get(row.id, ""))
        return report

    def _replicas(self, vault: str, source: str | None) -> list[str]:
        known = self._config.worker.vaults
        if source is None:
            original = known[vault].replica_of
            replicas = [name for name, wanted in known.items() if wanted.replica_of == vault]
            return [original, *replicas] if original in known else replicas
        if source not in known:
            raise NotFound(f"no vault {source!r} is configured", hint=f"there are: {', '.join(known)}")
        if source == vault:
            raise UsageError(f"{vault} cannot be repaired from itself", hint="its mirrors are looked at anyway")
        return [source]

    def _store(self, name: str) -> Store:
        from workers.vault.places import open_place

        return open_place(self._config.worker.vaults[name])

    def health(self, name: str | None) -> VaultHealth:
        """From the catalog, and what the vault itself knows of damage."""
        vault_name = self._config.vault_name(name)
        vault = self._context.vault(vault_name)
        _, missing = vault.packs()
        known = vault.index.damage()
        with self._catalog.read() as session:
            checks = checks_of(session, vault_name)
            shares = _shares(checks)
            damaged = damaged_points(session, vault_name)
        times = [time for time in shares.values() if time is not None]
        return VaultHealth(
            last=max((check.time for check in checks), default=None),
            shares=shares,
            oldest=min(times) if len(times) == len(shares) else None,
            damaged_packs=len({copy.pack for copy in known}) + len(missing),
            damaged_blocks=len(known),
            damaged_points=damaged,
        )


def _damage(report: VerifyReport | RepairReport) -> dict[str, str]:
    """Point → what is wrong with it."""
    damage: dict[str, str] = {}
    for finding in report.findings:
        if finding.object.startswith("points/"):
            damage.setdefault(finding.object.removeprefix("points/"), finding.problem)
        for hit in finding.affected:
            damage.setdefault(hit.point, f"{finding.object}: {finding.problem}")
    return damage


def _shares(checks: Iterable[CheckRow]) -> dict[str, datetime | None]:
    """When each part was last hashed: by a verification of it, or of everything."""
    from workers.vault.findings import AUTO

    shares: dict[str, datetime | None] = dict.fromkeys(f"{number}/{AUTO}" for number in range(1, AUTO + 1))
    for check in checks:
        hashed = [check.share] if check.share in shares else []
        if not check.share and check.level in _READS_PACKS:
            hashed = list(shares)
        for share in hashed:
            before = shares[share]
            shares[share] = check.time if before is None else max(before, check.time)
    return shares
