"""What people do with a vault itself: make it, look into it, and read back what was lost.

The half of `Service` that concerns vaults and not jobs; it needs neither Celery nor a hypervisor.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from orchestrator.catalog.points import note_replica, points_of, put_point, remove_point, see_machine
from orchestrator.catalog.store import Catalog
from orchestrator.config import Config
from orchestrator.desk import Desk
from orchestrator.point_desk import Trash
from orchestrator.primary import require_primary
from orchestrator.views import VaultView
from workers.context import Context
from workers.contract.errors import StillframeError, VaultError, VaultMissing
from workers.contract.points import Point

if TYPE_CHECKING:
    from orchestrator.integrity_desk import Advance
    from workers.vault import Vault, VaultStats
    from workers.vault.rebuild import Rebuilt


class VaultDesk(Desk):
    """Raises VaultMissing, WrongKey, NewerFormat, Corrupt wherever a vault is opened."""

    def __init__(self, config: Config, catalog: Catalog, context: Context) -> None:
        self._config = config
        self._catalog = catalog
        self._context = context

    def open(self, name: str | None) -> Vault:
        return self._context.vault(self._config.vault_name(name))

    def init(self, name: str) -> str | None:
        """Make the vault and its key file, as configured; the recovery phrase, to be shown once. None: it existed.
        Raises VaultError for a place that does not honour what a vault relies on."""
        from workers.key_sources import secrets_of
        from workers.vault import Vault
        from workers.vault.keys import write_key_file
        from workers.vault.places import open_place
        from workers.vault.probe import probe

        wanted = self._config.worker.vaults[require_primary(self._config, name)]
        try:
            open_place(wanted)
        except VaultMissing:
            store = open_place(wanted, create=True)
        else:
            self.open(name)  # a vault that is there must open: WrongKey otherwise
            return None
        probe(store, thorough=True).require()
        if wanted.key_file is not None and not wanted.key_file.exists():
            write_key_file(wanted.key_file)
        key, passphrase = secrets_of(name, wanted)
        _, phrase = Vault.create(store, key=key, passphrase=passphrase, cache_dir=self._config.worker.cache_dir)
        return phrase

    def views(self) -> list[VaultView]:
        from workers.vault.places import away

        views = []
        for name, wanted in self._config.worker.vaults.items():
            try:
                vault = self.open(name)
                found = sum(1 for _ in vault.store.list("points/"))
                view = VaultView(
                    name=name,
                    url=wanted.url,
                    replica_of=wanted.replica_of,
                    points=found,
                    free_bytes=vault.store.free_bytes(),
                    problem="; ".join(away(vault.store)),
                )
            except StillframeError as error:
                view = VaultView(
                    name=name,
                    url=wanted.url,
                    replica_of=wanted.replica_of,
                    points=None,
                    free_bytes=None,
                    problem=str(error),
                )
            views.append(view)
        return views

    def stats(self, name: str | None) -> VaultStats:
        return self.open(name).stats()

    def rebuild_catalog(self, name: str | None) -> int:
        """Read the points of one vault, or of all, into the catalog, and forget those that are gone; how many."""
        vaults = self._config.worker.vaults
        own = [one for one, vault in vaults.items() if vault.replica_of is None]
        names = [require_primary(self._config, name)] if name else own
        return sum(self._rebuild(one) for one in names)

    def rebuild_index(self, name: str | None, on_progress: Advance | None) -> Rebuilt:
        """Write a vault's index segments anew, from its packs."""
        from workers.vault.rebuild import rebuild_index

        return rebuild_index(self.open(name), on_progress=on_progress)

    def _rebuild(self, name: str) -> int:
        vault = self.open(name)
        trash = Trash.of(vault)
        found = sorted(vault.points(), key=lambda point: point.time)
        newest: dict[str, Point] = {point.machine.uuid: point for point in found}
        with self._catalog.write() as session:
            for gone in {row.id for row in points_of(session, vault=name)} - {point.id for point in found}:
                remove_point(session, gone)
            for point in found:
                put_point(session, name, point)
            trash.note(session, name)
            for point in newest.values():
                see_machine(session, point.machine, point.time)
        self._note_replicas(name)
        return len(found)

    def _note_replicas(self, original: str) -> None:
        """What replicas that can be reached have of a vault."""
        from workers.vault.places import open_place

        for name, wanted in self._config.worker.vaults.items():
            if wanted.replica_of == original:
                with suppress(VaultError):
                    held = {info.name.removeprefix("points/") for info in open_place(wanted).list("points/")}
                    with self._catalog.write() as session:
                        note_replica(session, original, name, held)
