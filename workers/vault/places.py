"""From a vault's configuration to its store: where the wrappers are put together."""

from __future__ import annotations

from functools import partial

from workers.config import VaultConfig
from workers.contract.seams import Store
from workers.vault.mirror import MirrorStore
from workers.vault.stores import open_store


def open_place(wanted: VaultConfig, *, create: bool = False) -> Store:
    """The store of a vault. With `create` it is made if it can be, and objects may be written before the marker is.
    Raises ConfigError, VaultMissing, StoreUnreachable."""
    stores = single_stores(wanted)
    if len(stores) == 1:
        return stores[wanted.url](create=create)
    return MirrorStore({url: partial(opener, create=create) for url, opener in stores.items()}, create=create)


def away(store: Store) -> list[str]:
    """Which stores of a mirror do not take part, and why."""
    return store.problems() if isinstance(store, MirrorStore) else []


def single_stores(wanted: VaultConfig) -> dict[str, partial[Store]]:
    """How to open each store of a vault by itself, by URL; the first decides."""
    return {url: partial(open_store, url) for url in (wanted.url, *wanted.mirrors)}
