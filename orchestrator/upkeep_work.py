"""What each kind of upkeep does with a vault, through the same desks as the commands that people type."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from orchestrator.integrity_desk import IntegrityDesk
from orchestrator.jobs.upkeep import UpkeepJob, UpkeepKind
from orchestrator.lock_desk import LockDesk
from orchestrator.point_desk import PointDesk
from orchestrator.replica_desk import ReplicaDesk
from orchestrator.upkeep_desk import UpkeepDesk
from orchestrator.upkeep_runner import Check, Done
from workers.contract.errors import StillframeError, WrongClock


class UpkeepWork:
    def __init__(
        self, points: PointDesk, sweeps: UpkeepDesk, integrity: IntegrityDesk, replicas: ReplicaDesk, locks: LockDesk
    ) -> None:
        self._points = points
        self._sweeps = sweeps
        self._integrity = integrity
        self._replicas = replicas
        self._locks = locks
        self._kinds: dict[UpkeepKind, Callable[[str, Check], Done]] = {
            "sweep": self._sweep,
            "verify": self._verify,
            "replicate": self._replicate,
            "lock": self._lock,
        }

    def perform(self, job: UpkeepJob, check: Check) -> Done:
        return self._kinds[job.what](job.vault, check)

    def _sweep(self, vault: str, check: Check) -> Done:
        """Expire what no policy keeps, then give back the space."""
        lines, warnings = [], []
        try:
            expired = [view for view in self._points.expire(vault) if not view.keep]
            lines += [f"expired {len(expired)} points that no policy keeps"] if expired else []
        except WrongClock as error:
            warnings.append(f"nothing expires: {error}")
        report = self._sweeps.sweep(vault, on_progress=check)
        for count, size, verb in (
            (report.removed, report.removed_bytes, "removed"),
            (report.condemned, report.condemned_bytes, "condemned"),
            (report.compacted, report.copied_bytes, "compacted"),
        ):
            lines += [f"{verb} {count} packs, {_mib(size)}"] if count else []
        if report.no_points:
            warnings.append("there are packs and no point at all: nothing was condemned")
        warnings += [report.clock] if report.clock else []
        lines += self._points.forget(report.gone)
        return Done(lines=lines or ["nothing to give back"], warnings=warnings)

    def _verify(self, vault: str, check: Check) -> Done:
        """Every id, and today's share of the packs. Raises StillframeError if something is damaged."""
        from workers.vault.findings import Level, Share

        share = Share.parse("auto", datetime.now().astimezone().date())
        report = self._integrity.verify(vault, Level.IDS, check, share=share)
        if report.findings:
            first = report.findings[0]
            more = f", and {len(report.findings) - 1} more" if len(report.findings) > 1 else ""
            raise StillframeError(
                f"{first.object}: {first.problem}{more}", hint=f"stillframe vault repair {vault} --dry-run"
            )
        return Done(lines=[f"share {share}: {report.packs} packs, {_mib(report.read_bytes)} read, nothing wrong"])

    def _replicate(self, vault: str, check: Check) -> Done:
        lines, warnings = [], []
        source, replicas = self._replicas.targets(vault, None)
        for replica in replicas:
            report = self._replicas.replicate(source, replica, on_progress=check)
            lines.append(f"{replica}: {report.points} new points, {_mib(report.bytes)} copied")
            warnings += [f"{replica}: nothing more is removed: {report.held_back}"] if report.held_back else []
            warnings += [f"{replica}: not copied: {one.problem}" for one in report.not_copied[:10]]
        return Done(lines=lines, warnings=warnings)

    def _lock(self, vault: str, check: Check) -> Done:
        extended = self._locks.extend(vault, lambda done, total: check((done, total)))
        if extended.until is None:
            return Done(lines=["nothing is locked"])
        return Done(lines=[f"renewed {extended.objects}, {extended.covered} were covered, until {extended.until:%F}"])


def _mib(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MiB"
