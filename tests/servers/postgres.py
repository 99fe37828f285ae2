"""A PostgreSQL of a test's own: the distribution's programs, run as a user without rights, in a folder of its own.

`fsync` is off: what a killed process has written the kernel still has, and no test pulls a plug.
"""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import subprocess
from pathlib import Path

from tests.servers.process import Server, free_port

USER = "postgres"


def programs() -> Path:
    """Debian keeps them out of the path, by version. Raises AssertionError with what to type."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    assert found, "no PostgreSQL is installed; type: deploy/install-packages --dev"
    return found[-1]


def _as_user(argv: list[str | Path]) -> list[str | Path]:
    return (
        argv
        if os.getuid()
        else ["setpriv", "--pdeathsig", "KILL", "--reuid", USER, "--regid", USER, "--clear-groups", *argv]
    )


class Postgres(Server):
    def __init__(self, folder: Path) -> None:
        """`folder` is new, and one that others can pass through."""
        folder.mkdir(parents=True)
        if not os.getuid():
            found = pwd.getpwnam(USER)
            os.chown(folder, found.pw_uid, found.pw_gid)
        self.port = free_port()
        self.user = pwd.getpwuid(os.getuid()).pw_name if os.getuid() else USER
        data = folder / "data"
        made = ["-D", data, "-A", "trust", "-U", self.user, "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
        subprocess.run(_as_user([programs() / "initdb", *made]), check=True, capture_output=True, cwd=folder)
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(folder),
            "fsync": "off",
            "max_connections": "100",
        }
        settings = [word for key, value in options.items() for word in ("-c", f"{key}={value}")]
        self._databases = itertools.count()
        self._ready = [programs() / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        argv = _as_user([programs() / "postgres", "-D", data, *settings])
        log = folder / "postgres.log"
        super().__init__(argv, log, self._up)
        self._folder = folder

    def _up(self) -> bool:
        return subprocess.run(self._ready, check=False).returncode == 0

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://{self.user}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of an empty one."""
        import psycopg

        name = f"test{next(self._databases)}"
        address = f"host=127.0.0.1 port={self.port} user={self.user} dbname=postgres"
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}" STRATEGY wal_log'.encode())
        return self.url(name)

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
