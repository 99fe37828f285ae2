"""The proof on live databases: points taken under a steady load of transactions, each brought back and booted.

The database must start clean, pass its own check, and hold every transaction that was acknowledged before the freeze.
Two points per database here; `STILLFRAME_PROOF_BACKUPS=10` takes ten, every other one full.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import libvirt
import pytest

from orchestrator.demo.in_guest import wait_for_agent
from orchestrator.demo.tiny_guest import TinyImage
from tests.e2e.test_files_and_disks import restored
from tests.faults.conftest import NewPlace
from tests.faults.place import Place
from tests.guests.database_guest import MARIADB, POSTGRESQL, database_guest_up
from tests.guests.load import MARK_RECORD, Load, check_database, loaded, mark_each_point
from tests.guests.machines import Guest

pytestmark = [pytest.mark.guest, pytest.mark.timeout(3000)]

BACKUPS = int(os.environ.get("STILLFRAME_PROOF_BACKUPS", "2"))
APPS = {POSTGRESQL: "50-postgresql", MARIADB: "50-mysql"}


@pytest.fixture(scope="module")
def live(
    libvirt_host: libvirt.virConnect, tiny_guest_image: TinyImage, guest_cache: Path, memory: Path
) -> Iterator[Guest]:
    with database_guest_up(libvirt_host, tiny_guest_image, guest_cache, memory, label="proof") as guest:
        mark_each_point(guest)
        yield guest


@pytest.mark.parametrize("kind", [POSTGRESQL, MARIADB])
def test_no_acknowledged_transaction_is_lost(
    kind: str, live: Guest, new_place: NewPlace, libvirt_host: libvirt.virConnect, memory: Path
) -> None:
    # PostgreSQL's first point in backup mode, the others after a checkpoint.
    place = new_place(extension='options = { postgresql = "backup" }')
    points = []
    with loaded(live, kind) as load:
        for number in range(BACKUPS):
            if number == 1:
                place.extension = ""
                place.configure()
            points.append(taken(place, load, full=number % 2 == 0))
    for number, point in enumerate(points):
        where = memory / f"{kind}-{number}"
        name = f"{live.name}-{kind}-{number}"
        with restored(libvirt_host, place, point["id"], name, where, "--start") as domain:
            wait_for_agent(domain, timeout=300)
            highest = check_database(replace(live, domain=domain), kind)
        assert highest >= point["acked"], "a transaction that was acknowledged before the freeze is missing"
        assert highest <= point["later"], "there is more in the point than its moment held"


def taken(place: Place, load: Load, *, full: bool) -> dict[str, Any]:
    """One point under load, with the last transaction acknowledged before it."""
    options = ["--consistency", "application", *(["--full"] if full else [])]
    ran = place.run("backup", "run", load.guest.name, *options, timeout=600)
    assert ran.code == 0, ran
    point = ran.line("backup")
    assert point["consistency"] == "application", point
    assert APPS[load.kind] in point["consistency_reason"]
    records = place.good("point", "show", point["id"]).line("point")["records"]
    if load.kind == MARIADB:
        assert "mysql-bin." in records["50-mysql/binlog_position"]
    elif full and place.extension:
        assert "START WAL LOCATION" in records["50-postgresql/backup_label"]
    return {**point, "acked": int(records[MARK_RECORD].split()[1]), "later": load.acks()[-1].id + 1}
