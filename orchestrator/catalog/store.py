"""Open the catalog, bring it up to date, and give out transactions.

On SQLite: WAL, so that watching never blocks working; `synchronous=FULL`, because an obligation that a power cut
forgets is a guest that nobody thaws; writers take the lock when they begin, so that none fails half-way. alembic is
imported only when the schema is not the newest: its import costs more than most commands.

On PostgreSQL what several processes change is guarded by the statements themselves, as on SQLite. A connection is
tried before it is used, so that a server that was started again is no error of the next command.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlmodel import Session

from orchestrator.catalog.schema import HEAD
from workers.contract.errors import CatalogUnreachable, ConfigError, StillframeError

BUSY_SECONDS = 30
CONNECT_SECONDS = 10
_MIGRATION = 0x53F0  # an advisory lock of ours: two processes that open a new catalog at once make it once


def unreachable(error: DBAPIError) -> CatalogUnreachable:
    """A database that does not answer, as an error for people."""
    why = str(error.orig).strip().partition("\n")[0]
    return CatalogUnreachable(
        f"the catalog does not answer: {why}", hint="is its database up? jobs that run go on without this command"
    )


class Catalog:
    """One database; thread-safe. A context manager."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._writing = engine.execution_options(sf_write=True)

    @staticmethod
    def open(url: str) -> Catalog:
        """Open `url` (SQLAlchemy), create or migrate it. Raises ConfigError if it cannot be meant or reached."""
        engine = _engine(url)
        catalog = Catalog(engine)
        try:
            with catalog._writing.begin() if not _current(engine) else engine.connect() as connection:
                if not _is_head(connection, alone=True):
                    _migrate(connection)
        except DBAPIError as error:
            catalog.close()
            shown = engine.url.render_as_string(hide_password=True)
            raise ConfigError(f"the catalog {shown} cannot be opened: {error.orig}") from None
        except BaseException:
            catalog.close()
            raise
        return catalog

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that commits at the end, or not at all."""
        with Session(self._writing, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        with Session(self._engine, expire_on_commit=False) as session:
            yield session

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Catalog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            if not parsed.database or parsed.database == ":memory:":
                raise ConfigError(f"the catalog {url} must be a file: jobs are settled from it after a crash")
            file = Path(parsed.database)
            # QEMU, another user, passes this folder on its way to scratch; the file is for nobody else.
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o711)
            file.touch(mode=0o600)
        engine = _connected(parsed)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise ConfigError(
            f"the catalog {url} cannot be meant: {error}",
            hint='for example: url = "sqlite:////var/lib/stillframe/catalog.db"',
        ) from None
    except OSError as error:
        raise ConfigError(
            f"the catalog {url} cannot be made: {error.strerror}",
            hint="set `state` under [paths] to a folder that you may write",
        ) from None
    if _is_sqlite(url):
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _connected(url: URL) -> Engine:
    if url.get_backend_name() == "sqlite":
        return create_engine(url, connect_args={"timeout": BUSY_SECONDS})
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    return create_engine(url, connect_args={"connect_timeout": CONNECT_SECONDS}, pool_pre_ping=True)


def _is_sqlite(url: str) -> bool:
    return url.startswith("sqlite")


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions are begun below, not by the driver
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()
    _write_ahead(connection)


def _write_ahead(connection: Any) -> None:
    """Of several processes that open a new catalog at once, one changes its mode, and SQLite lets no other wait."""
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
        except sqlite3.OperationalError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
        else:
            return


def _begin_sqlite(connection: Connection) -> None:
    writing = connection.get_execution_options().get("sf_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _current(engine: Engine) -> bool:
    with engine.connect() as connection:
        return _is_head(connection)


def _is_head(connection: Connection, *, alone: bool = False) -> bool:
    """Whether the schema is the newest; `alone`: nobody else migrates it until the transaction ends. Raises
    StillframeError if a newer Stillframe has migrated it."""
    if alone and connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION})"))
    if not inspect(connection).has_table("alembic_version"):
        return False
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    if found is not None and found > HEAD:
        raise StillframeError(
            f"the catalog was written by a newer Stillframe (its schema is {found}, this one knows {HEAD})",
            hint="use that version, or name another catalog and run `stillframe vault rebuild-catalog`",
        )
    return bool(found == HEAD)


def _migrate(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "orchestrator.catalog:migrations")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
