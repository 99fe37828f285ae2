"""A steady stream of transactions in a database guest, each stamped when the server has acknowledged it.

What was acknowledged before a freeze must be in the point; how long no acknowledgement came is what an application
feels of a backup. The stamps are the guest's uptime, in hundredths of a second, and lie in memory.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from orchestrator.demo.in_guest import guest_out
from tests.guests.database_guest import MARIADB, POSTGRESQL, mariadb, only, psql
from tests.guests.machines import Guest

ACKS = "/run/acks"
_CLIENT = {
    POSTGRESQL: "cd /; setpriv --reuid postgres --regid postgres --init-groups psql -XqAt postgres",
    MARIADB: "mariadb -BN -n ledger",
}
_INSERT = {
    POSTGRESQL: "insert into ledger(filler) values (repeat('x', 100)) returning id;",
    MARIADB: "insert into ledger(filler) values (repeat('x', 100)); select last_insert_id();",
}
_TABLE = {
    POSTGRESQL: "create table if not exists ledger(id bigserial primary key, filler text)",
    MARIADB: "create database if not exists ledger;"
    " create table if not exists ledger.ledger(id bigint auto_increment primary key, filler text) engine=InnoDB",
}
# The mark: what had been acknowledged when everything else was prepared for the freeze, kept with the point.
MARK = f"""#!/bin/sh
[ "$1" = pre ] || exit 0
tail -n 1 {ACKS} >"$STILLFRAME_RECORDS/acked"
"""
MARK_RECORD = "99-mark/acked"


@dataclass(frozen=True, slots=True)
class Ack:
    up: float
    """Guest's uptime, seconds."""
    id: int


@dataclass
class Load:
    """Transactions in one of the databases of a guest."""

    guest: Guest
    kind: str

    def acks(self) -> list[Ack]:
        """All acknowledgements until now."""
        lines = [line.split() for line in self.guest.out(f"cat {ACKS}").splitlines()]
        return [Ack(float(line[0]), int(line[1])) for line in lines if len(line) == 2]

    def up(self) -> float:
        return float(self.guest.out("cat /proc/uptime").split()[0])

    def stall(self, since: float) -> float:
        """The longest time without an acknowledgement since the guest's uptime `since`, seconds."""
        times = [ack.up for ack in self.acks() if ack.up >= since - 0.5]
        assert len(times) > 5, "the load has stopped"
        return max(later - earlier for earlier, later in itertools.pairwise(times))


@contextmanager
def loaded(guest: Guest, kind: str, *, pause: float = 0.02) -> Iterator[Load]:
    """With transactions running, each `pause` seconds after the one before was sent."""
    only(guest, kind)
    create = _TABLE[kind]
    (psql if kind == POSTGRESQL else mariadb)(guest, create)
    feed = f'while [ -e /run/load ]; do echo "{_INSERT[kind]}"; sleep {pause}; done'
    stamp = 'while read -r id; do read -r up rest </proc/uptime; echo "$up $id"; done'
    guest.out(f"touch /run/load; : >{ACKS}; ({feed} | {{ {_CLIENT[kind]}; }} | {stamp} >>{ACKS}) >/run/load.log 2>&1 &")
    load = Load(guest, kind)
    deadline = time.monotonic() + 60
    while len(load.acks()) < 20:
        assert time.monotonic() < deadline, guest.out("cat /run/load.log")
        time.sleep(0.2)
    try:
        yield load
    finally:
        guest.out("rm -f /run/load; sleep 1")


def mark_each_point(guest: Guest) -> None:
    """Put the script into the guest that keeps the last acknowledgement with each point."""
    folder = "/etc/stillframe/apps/99-mark"
    guest_out(guest.domain, f"mkdir -p {folder} && cat >{folder}/run && chmod 755 {folder}/run", stdin=MARK.encode())


def check_database(guest: Guest, kind: str) -> int:
    """Raises AssertionError or GuestError unless the database of a restored guest starts and is sound; the highest
    transaction in it."""
    # On a loaded host the disk may come later than the guest's own start of its servers waits for it.
    guest.out("systemctl start data-vdb.mount", timeout=300)
    only(guest, kind)
    deadline = time.monotonic() + 300
    while True:
        code, said = guest.run("mariadb-admin ping" if kind == MARIADB else "pg_isready")
        if code == 0:
            break
        if time.monotonic() > deadline:
            logs = guest.run(
                "systemctl --no-pager -n 20 status postgresql* mariadb; tail -n 30 /var/log/postgresql/*.log"
            )
            raise AssertionError(f"{kind} does not start: {said}\n{logs[1]}")
        time.sleep(0.2)
    if kind == MARIADB:
        checked = guest.out("mariadb-check --databases ledger", timeout=120)
        assert "OK" in checked, checked
        return int(mariadb(guest, "select max(id) from ledger.ledger"))
    as_postgres = "cd /; setpriv --reuid postgres --regid postgres --init-groups"
    guest.out(f"{as_postgres} /usr/lib/postgresql/*/bin/pg_amcheck --install-missing postgres", timeout=300)
    return int(psql(guest, "select max(id) from ledger"))
