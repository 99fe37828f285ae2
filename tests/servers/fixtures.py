"""One Redis and one PostgreSQL for a whole run of tests; who kills them makes some of their own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.postgres import Postgres
from tests.servers.redis import Redis


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    server = Redis(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    folder = Path(tempfile.mkdtemp(prefix="stillframe-test-postgres-"))
    folder.chmod(0o755)
    server = Postgres(folder / "postgres")
    server.start()
    yield server
    server.remove()
    folder.rmdir()


@pytest.fixture(params=["sqlite", "postgresql"])
def catalog_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty catalog, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/folder/catalog.db"
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_database()
