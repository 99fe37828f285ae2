"""A full guest with live databases: PostgreSQL (two clusters) and MariaDB, as the distribution packages them.

What application scripts are worth shows only against real servers. Their data lies on the second disk, their
configuration on the first, as in many real machines: a point that is not one point across both disks would show. The
servers are kept small: the guest is emulated, and each megabyte that they write is a megabyte of every backup.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import libvirt

from orchestrator.demo.host import remove_machine
from orchestrator.demo.in_guest import guest_out
from orchestrator.demo.tiny_guest import TinyImage
from tests.guests.full_guest import PACKAGES, SETUP, Recipe, make_full_guest
from tests.guests.machines import MIB, Guest

POSTGRESQL = "postgresql"
MARIADB = "mariadb"
SECOND = "second"
"""Name of the second PostgreSQL cluster, on port 5433, started by hand: `only(guest, POSTGRESQL, SECOND)`."""

# Runs after the full guest's own. The servers' folders move to what becomes vdb, with links in their old places.
_DATABASES = r"""
version=$(ls "$1/etc/postgresql")
chroot "$1" pg_createcluster "$version" second -p 5433 --start-conf=manual >/dev/null
for cluster in main second; do
    printf '%s\n' "shared_buffers = 16MB" "min_wal_size = 32MB" "max_wal_size = 64MB" "log_checkpoints = on" \
        "logging_collector = off" "jit = off" >"$1/etc/postgresql/$version/$cluster/conf.d/small.conf"
done
printf '%s\n' "[mysqld]" "log_bin = mysql-bin" "server_id = 1" "max_binlog_size = 4M" "innodb_log_file_size = 8M" \
    "innodb_buffer_pool_size = 16M" "performance_schema = off" >"$1/etc/mysql/mariadb.conf.d/90-small.cnf"
rm -f "$1/var/lib/mysql/ib_buffer_pool"
for name in postgresql mysql; do
    mv "$1/var/lib/$name" "$1/data/vdb/$name"
    ln -s "/data/vdb/$name" "$1/var/lib/$name"
done
for unit in postgresql@ mariadb; do
    mkdir -p "$1/etc/systemd/system/$unit.service.d"
    printf '[Unit]\nRequiresMountsFor=/data/vdb\n' >"$1/etc/systemd/system/$unit.service.d/data.conf"
done
"""

DATABASES = Recipe(
    name="databases",
    packages=f"{PACKAGES},postgresql,mariadb-server,busybox-static",
    setup=SETUP + _DATABASES,
    size=3 << 30,
    data_size=384 * MIB,
)


def make_database_guest(
    connection: libvirt.virConnect,
    image: TinyImage,
    cache: Path,
    folder: Path,
    *,
    label: str = "databases",
    ssh_port: int | None = None,
) -> Guest:
    """The database guest, shut off: see `make_full_guest`."""
    return make_full_guest(connection, image, cache, folder, label=label, ssh_port=ssh_port, recipe=DATABASES)


@contextmanager
def database_guest_up(
    connection: libvirt.virConnect, image: TinyImage, cache: Path, folder: Path, *, label: str = "databases"
) -> Iterator[Guest]:
    """A booted database guest, removed afterwards; its servers may still be starting: see `only`."""
    guest = make_database_guest(connection, image, cache, folder, label=label)
    try:
        guest.start()
        yield guest
    finally:
        remove_machine(guest.domain)


def only(guest: Guest, *kinds: str) -> None:
    """Let just these servers run (POSTGRESQL, MARIADB, SECOND): the others are stopped. Returns when they answer."""
    units = {POSTGRESQL: "postgresql@*-main", MARIADB: "mariadb", SECOND: "postgresql@*-second"}
    version = guest.out("ls /etc/postgresql").strip()
    for kind, unit in units.items():
        verb = "start" if kind in kinds else "stop"
        guest.out(f"systemctl {verb} {unit.replace('*', version)}", timeout=300)


def psql(guest: Guest, sql: str, *, port: int = 5432, timeout: float = 120) -> str:
    """What PostgreSQL answers to `sql`, unaligned and without headers."""
    command = f"cd /; setpriv --reuid postgres --regid postgres --init-groups psql -XqAt -p {port} -v ON_ERROR_STOP=1"
    return guest_out(guest.domain, command, timeout=timeout, stdin=f"{sql};".encode()).strip()


def mariadb(guest: Guest, sql: str, *, timeout: float = 120) -> str:
    """What MariaDB answers to `sql`, as tab-separated lines without headers."""
    return guest_out(guest.domain, "mariadb -BN", timeout=timeout, stdin=f"{sql};".encode()).strip()
