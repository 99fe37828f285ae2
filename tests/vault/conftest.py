from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.vault.buckets import Server
from tests.vault.pictures import new_vault
from tests.vault.s3_proxy import Proxy, proxy_to
from workers.vault import Vault
from workers.vault.immutable import set_immutable


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return new_vault(tmp_path)


@pytest.fixture(autouse=True)
def flags_go(tmp_path: Path) -> Iterator[None]:
    """Takes immutable flags off again, so that what a test has locked can be removed."""
    yield
    for path in tmp_path.rglob("*"):
        with suppress(FileNotFoundError):  # a look-up cache that is closed just now
            if path.lstat().st_mode & 0o777 == 0o400:
                set_immutable(path, False)


@pytest.fixture
def proxy(moto: Server) -> Iterator[Proxy]:
    """In front of moto, without faults at first."""
    with proxy_to(moto.port) as server:
        yield server


@pytest.fixture
def proxied(moto: Server, proxy: Proxy) -> Iterator[Server]:
    """moto as seen through `proxy`."""
    server = moto.through(proxy.server_port)
    yield server
    server.close()
