"""From a vault's configuration to its store: where the wrappers are put together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from urllib.parse import urlsplit

from workers.config import S3Access, VaultConfig
from workers.contract.errors import ConfigError
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
    return {url: partial(_open_url, url, wanted.s3) for url in (wanted.url, *wanted.mirrors)}


def _open_url(url: str, access: S3Access, *, create: bool = False) -> Store:
    try:
        kind = _KINDS[urlsplit(url).scheme]
    except (KeyError, ValueError):
        hint = "write file:///absolute/path or s3://bucket/folder"
        raise ConfigError(f"vault URL {url!r} is not of a known kind", hint=hint) from None
    return kind(url, access, create)


def _directory(url: str, _: S3Access, create: bool) -> Store:
    return open_store(url, create=create)


def _bucket(url: str, access: S3Access, create: bool) -> Store:
    from workers.vault.s3 import open_bucket  # boto's libraries take a second to import

    return open_bucket(url, access, create)


_KINDS: dict[str, Callable[[str, S3Access, bool], Store]] = {"file": _directory, "s3": _bucket}
"""By the scheme of the URL."""
