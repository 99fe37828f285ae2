"""Upkeep of vaults: what gives their space back.

The half of `Service` that concerns sweeps; needs neither Celery nor a hypervisor.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from orchestrator.config import Config
from orchestrator.desk import Desk
from orchestrator.primary import require_primary
from workers.context import Context

if TYPE_CHECKING:
    from workers.vault.sweep import Progress, SweepReport


class UpkeepDesk(Desk):
    """Raises VaultMissing, WrongKey, NewerFormat, Corrupt wherever a vault is opened."""

    def __init__(self, config: Config, context: Context) -> None:
        self._config = config
        self._context = context

    def sweep(
        self,
        name: str | None,
        *,
        compact: bool = True,
        bandwidth: int | None = None,
        fence_days: int | None = None,
        empty: bool = False,
        dry_run: bool = False,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> SweepReport:
        """Give back the space of what no point needs. Raises VaultError if a point cannot be read."""
        from workers.vault.sweep import FENCE_AFTER, Settings, sweep

        vault = self._context.vault(require_primary(self._config, name))
        settings = Settings(
            compact=compact,
            bandwidth=bandwidth,
            empty=empty,
            fence_after=FENCE_AFTER if fence_days is None else timedelta(days=fence_days),
        )
        return sweep(vault, now=datetime.now(UTC), settings=settings, dry_run=dry_run, on_progress=on_progress)
