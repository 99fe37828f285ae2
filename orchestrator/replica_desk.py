"""A second copy of what a vault holds: replicas elsewhere, mirrors beside it, and which of them has a point.

The half of `Service` that concerns copies of vaults; copying needs no key, and neither Celery nor a hypervisor.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import find
from orchestrator.catalog.points import note_replica
from orchestrator.catalog.store import Catalog
from orchestrator.config import Config
from orchestrator.desk import Desk
from workers.context import Context
from workers.contract.errors import NewerFormat, NotFound, UsageError, VaultError, VaultMissing, WrongKey
from workers.contract.machines import Value
from workers.contract.seams import Store

if TYPE_CHECKING:
    from workers.vault.mirror_sync import SyncReport
    from workers.vault.replicate import Progress, ReplicaReport


class MirrorState(Value):
    """One store of a mirror, beside the one that decides."""

    url: str
    new: bool
    """There is no vault in it: all is copied."""
    outdated: list[str] = []
    """What it has and should not have: it was away while that was deleted."""


class ReplicaDesk(Desk):
    def __init__(self, config: Config, catalog: Catalog, context: Context) -> None:
        self._config = config
        self._catalog = catalog
        self._context = context

    # --- replicas --------------------------------------------------------------------------------------------------

    def targets(self, name: str | None, to: str | None) -> tuple[str, list[str]]:
        """The vault that is meant, and the replicas of it to write: `to`, else all. Raises UsageError, NotFound."""
        vaults = self._config.worker.vaults
        original = vaults[self._config.vault_name(to)].replica_of if to else None
        source = self._config.vault_name(name or original)
        if to is not None and original != source:
            hint = f'replica_of = "{source}" under [vaults.{to}]'
            raise UsageError(f"vault {to} is not configured as a replica of {source}", hint=hint)
        found = [to] if to else [one for one, vault in vaults.items() if vault.replica_of == source]
        if not found:
            hint = f'add a [vaults.NAME] section with replica_of = "{source}"'
            raise UsageError(f"vault {source} has no replica in {self._config.path}", hint=hint)
        return source, found

    def replicate(
        self,
        source: str,
        to: str,
        *,
        bandwidth: int | None = None,
        force: bool = False,
        dry_run: bool = False,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> ReplicaReport:
        """Bring replica `to` of vault `source` up to date, and note in the catalog which points it has. `bandwidth`:
        bytes a second, else as configured. `force`: let more than half of its points go at once if they are due."""
        from workers.vault.places import open_place
        from workers.vault.replicate import replicate

        wanted = self._config.worker.vaults[to]
        with self._replica(to, dry_run=dry_run) as target:
            report = replicate(
                open_place(self._config.worker.vaults[source]),
                target,
                delay=timedelta(days=wanted.delete_delay_days),
                rate=bandwidth or wanted.bandwidth,
                force=force,
                dry_run=dry_run,
                on_progress=on_progress,
            )
            if not dry_run:
                self._note(source, to, target)
        return report

    @contextmanager
    def _replica(self, name: str, *, dry_run: bool) -> Iterator[Store]:
        """The store of a replica; a dry run of one that does not exist yet looks at an empty folder instead."""
        from workers.vault.places import open_place
        from workers.vault.stores import DirectoryStore

        try:
            yield open_place(self._config.worker.vaults[name], create=not dry_run)
        except VaultMissing:
            if not dry_run:
                raise
            with tempfile.TemporaryDirectory() as folder:
                yield DirectoryStore(Path(folder), create=True)

    def _note(self, source: str, replica: str, store: Store) -> None:
        held = {info.name.removeprefix("points/") for info in store.list("points/")}
        with self._catalog.write() as session:
            note_replica(session, source, replica, held)

    def holder(self, point: str, asked: str | None) -> tuple[str, list[str]]:
        """The vault to restore a point from, and what is to be said of that: the one that was `asked` for, else its
        own, else a replica that has it. Where there is none, the job will say what is wrong with its own."""
        if asked is not None:
            return self._config.vault_name(asked), []
        with self._catalog.read() as session:
            row = find.point_named(session, point)
            own, id, noted = row.vault, row.id, row.replicas.split()
        try:
            if self._context.vault(own).readable(id):
                return own, []
            why = f"it has no point {id[:8]} any more"
        except (WrongKey, NewerFormat):
            return own, []  # perhaps a worker has the key; a replica would not open either
        except (VaultError, NotFound) as error:
            why = str(error)
        configured = self._config.worker.vaults
        others = [name for name, vault in configured.items() if vault.replica_of == own and name not in noted]
        for name in (*noted, *others):
            if name in configured and name != own and self._has(name, id):
                return name, [f"vault {own} cannot be used ({why}): restored from {name}"]
        return own, []

    def _has(self, name: str, point: str) -> bool:
        try:
            return self._context.vault(name).readable(point)
        except VaultError:
            return False

    # --- mirrors ---------------------------------------------------------------------------------------------------

    def mirrors(self, name: str | None) -> list[MirrorState]:
        """How far the stores of a vault are apart. Raises UsageError if it has one only, VaultMissing if none of them
        holds it."""
        from workers.vault.mirror_sync import outdated

        source, others = self._stores(name)
        return [
            MirrorState(url=url, new=store is None, outdated=outdated(source, store) if store else [])
            for url, store in others.items()
        ]

    def sync_mirrors(
        self, name: str | None, states: list[MirrorState], on_progress: Callable[[Progress], None] = lambda _: None
    ) -> list[SyncReport]:
        """Make the stores of a vault equal, as `states` say that they are not."""
        from workers.vault.identity import read_marker
        from workers.vault.locks import forget_covered
        from workers.vault.mirror_sync import sync_store
        from workers.vault.places import single_stores

        wanted = self._config.worker.vaults[self._config.vault_name(name)]
        source, others = self._stores(name)
        reports = []
        for state in states:
            target = others[state.url] or single_stores(wanted)[state.url](create=True)
            reports.append(sync_store(source, target, state.outdated, on_progress))
        forget_covered(self._config.worker.cache_dir, read_marker(source))
        return reports

    def _stores(self, name: str | None) -> tuple[Store, dict[str, Store | None]]:
        """The store that decides, and the others by URL; None: there is no vault in it."""
        from workers.vault.places import single_stores

        vault = self._config.vault_name(name)
        found: dict[str, Store | None] = {}
        for url, opener in single_stores(self._config.worker.vaults[vault]).items():
            try:
                found[url] = opener(create=False)
            except VaultMissing:
                found[url] = None
        if len(found) == 1:
            hint = f'mirrors = ["file:///another/disk"] under [vaults.{vault}]'
            raise UsageError(f"vault {vault} has no mirrors", hint=hint)
        for url, store in found.items():
            if store is not None:
                return store, {other: one for other, one in found.items() if other != url}
        raise VaultMissing(f"there is no vault {vault} in any of its stores", hint="are its file systems mounted?")
