"""A catalog of a fleet, for benches: machines on hypervisors, and points of them, as rows."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import insert

from orchestrator.catalog.schema import MachineRow, PointRow, SightingRow
from orchestrator.catalog.store import Catalog
from orchestrator.config import Config, parse_config
from tests.jobs.test_backup import run_backup
from tests.jobs.world import World
from workers.contract.machines import Disk, MachineRef, MachineSummary, Power

START = datetime(2026, 11, 24, 0, 30, tzinfo=UTC)
POLICIES = 10


def configuration(folder: Path, hypervisors: int) -> Config:
    """Ten policies and sections: machines are divided among them by their names."""
    text = [f'[paths]\nstate = "{folder}/state"\nruntime = "{folder}/run"']
    text.append(f'[vaults.main]\nurl = "file://{folder}/vault"\nkey_file = "{folder}/k"\n[extension]\ninstall = false')
    for number in range(hypervisors):
        text.append(f'[hypervisors.h{number:02d}]\nuri = "qemu:///system?socket=/nowhere/{number}"\nmax_jobs = 4')
    for number in range(POLICIES):
        blackout = 'blackout = ["weekdays 08:00 to 18:00"]\n' if number % 2 else ""
        text.append(
            f'[policies.p{number}]\nschedule = "daily at 0{number % 6}:00"\ntimezone = "Europe/Berlin"\n'
            f'spread = "2 hours"\nconsistency = "crash"\n{blackout}'
            f'[protect.s{number}]\nmachines = ["vm{number}-*"]\nexclude = ["tag:scratch"]\npolicy = "p{number}"'
        )
    return parse_config("\n".join(text), folder / "stillframe.toml")


def fill(catalog: Catalog, machines: int, points: int, hypervisors: int) -> None:
    """`points` in all, spread evenly, newest an hour before START."""
    world = World()
    run_backup(world, "p")
    made = world.points["p"]
    rows: list[dict[str, object]] = []
    sightings: list[dict[str, object]] = []
    for number in range(machines):
        host, name = f"h{number % hypervisors:02d}", f"vm{number % POLICIES}-{number:05d}"
        uuid = f"{number:08x}-0000-4000-8000-000000000000"
        row = {"uuid": uuid, "hypervisor": host, "name": name, "seen": START, "extension": "", "tags": "gold\nlinux"}
        rows.append({**row, "power": "running", "gone": None, "missed": None, "doubt": ""})
        ref = MachineRef(hypervisor=host, uuid=uuid, name=name)
        disks = [_disk(name, target) for target in ("vda", "vdb")]
        summary = MachineSummary(machine=ref, power=Power.RUNNING, disks=disks, tags=["gold", "linux"])
        sightings.append({"hypervisor": host, "uuid": uuid, "doc": summary.model_dump_json()})
    with catalog.write() as session:
        session.connection().execute(insert(MachineRow), rows)
        session.connection().execute(insert(SightingRow), sightings)
    each = points // machines
    doc = made.model_copy(update={"definition": "", "nvram": None}).model_dump_json()
    for first in range(0, machines, 500):
        batch = [
            {
                "id": f"{number:08x}{age:024x}",
                "vault": "main",
                "machine_uuid": f"{number:08x}-0000-4000-8000-000000000000",
                "machine_name": f"vm{number % POLICIES}-{number:05d}",
                "time": START - timedelta(hours=1 + 24 * age),
                "consistency": made.consistency.value,
                "has_checkpoint": True,
                "doc": doc,
            }
            for number in range(first, min(first + 500, machines))
            for age in range(each)
        ]
        with catalog.write() as session:
            session.connection().execute(insert(PointRow), batch)


def _disk(name: str, target: str) -> Disk:
    return Disk(
        target=target,
        source=f"/var/lib/libvirt/images/{name}-{target}.qcow2",
        format="qcow2",
        capacity=64 << 30,
        identity=f"/var/lib/libvirt/images/{name}-{target}.qcow2:1",
        tracks_changes=True,
    )
