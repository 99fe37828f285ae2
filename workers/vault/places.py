"""From a vault's configuration to its store: where the wrappers are put together."""

from __future__ import annotations

from workers.config import VaultConfig
from workers.contract.seams import Store
from workers.vault.stores import open_store


def open_place(wanted: VaultConfig, *, create: bool = False) -> Store:
    """The store of a vault. With `create` it is made if it can be, and objects may be written before the marker is.
    Raises ConfigError, VaultMissing, StoreUnreachable."""
    return open_store(wanted.url, create=create)
