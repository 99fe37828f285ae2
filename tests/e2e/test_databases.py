"""The proof on live databases: points taken under a steady load of transactions, each brought back: the first one as a
machine that boots, of the others the disk with the database, which lies beside in that machine and takes its turn.

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
from tests.guests.database_guest import MARIADB, POSTGRESQL, database_guest_up, only
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
    where = memory / kind
    with restored(libvirt_host, place, points[0]["id"], f"{live.name}-{kind}", where) as domain:
        others = [beside(domain, place, point["id"], where, number) for number, point in enumerate(points[1:])]
        domain.create()
        wait_for_agent(domain, timeout=300)
        guest = replace(live, domain=domain)
        for point, device in zip(points, ["", *others], strict=True):
            if device:
                only(guest)
                guest.out(f"umount /data/vdb && mount {device} /data/vdb")
            highest = check_database(guest, kind)
            assert highest >= point["acked"], "a transaction that was acknowledged before the freeze is missing"
            assert highest <= point["later"], "there is more in the point than its moment held"


def beside(domain: libvirt.virDomain, place: Place, point: str, folder: Path, number: int) -> str:
    """Restore the database's disk of `point` and give it to a machine that is off; its name in there."""
    target = f"vd{chr(ord('c') + number)}"
    image = folder / f"{target}.qcow2"
    place.good("restore", "disk", point, "vdb", "--to", image, "--format", "qcow2")
    domain.attachDeviceFlags(
        f"<disk type='file'><driver name='qemu' type='qcow2'/><source file='{image}'/>"
        f"<target dev='{target}' bus='virtio'/></disk>",
        libvirt.VIR_DOMAIN_AFFECT_CONFIG,
    )
    return f"/dev/{target}"


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
