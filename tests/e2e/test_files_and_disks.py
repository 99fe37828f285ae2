"""The promise as a user sees it: files by their hashes from inside the guest, disks by QEMU's own comparison."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import libvirt
import pytest

from orchestrator.demo.host import remove_machine, shut_down
from orchestrator.demo.in_guest import guest_hashes, guest_out, wait_for_agent
from tests.faults import world
from tests.faults.place import Place
from tests.guests.machines import MIB, Guest, GuestFactory

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]


@contextmanager
def restored(
    connection: libvirt.virConnect, place: Place, point: str, name: str, folder: Path, *options: str
) -> Iterator[libvirt.virDomain]:
    """The machine of a point, brought back as a new one, for a while."""
    folder.mkdir(mode=0o755)
    place.good("restore", "vm", point, "--name", name, "--dir", folder, *options)
    domain = connection.lookupByName(name)
    try:
        yield domain
    finally:
        remove_machine(domain)


def compare(one: Path, other: Path) -> None:
    """Raises unless two images hold the same."""
    done = subprocess.run(["qemu-img", "compare", one, other], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_files_of_each_point_come_back(
    place: Place, tiny_guest: GuestFactory, libvirt_host: libvirt.virConnect, guest_folder: Path
) -> None:
    guest = tiny_guest({"vda": 64 * MIB, "vdb": 64 * MIB}, label="e2e")
    guest.out("for d in vda vdb; do dd if=/dev/urandom of=/data/$d/kept bs=64k count=30 2>/dev/null; done")
    guest.out("cp /data/vda/kept /data/vdb/twin; echo one > /data/vda/changed; sync")
    first_files = guest.hashes()
    first = place.backed_up(guest.name)
    guest.out("echo two > /data/vda/changed; rm /data/vdb/twin; mkdir /data/vdb/new; echo new > /data/vdb/new/file")
    guest.out("dd if=/dev/urandom of=/data/vda/kept bs=64k seek=7 count=1 conv=notrunc 2>/dev/null; sync")
    second_files = guest.hashes()
    second = place.backed_up(guest.name)
    guest.out("rm -r /data/vda/kept /data/vdb/new; sync; fstrim -a || fstrim /data/vda")
    assert first["consistency"] == second["consistency"] == "filesystem"
    assert {disk["mode"] for disk in second["disks"]} == {"incremental"}
    read = [sum(disk["read_bytes"] for disk in point["disks"]) for point in (first, second)]
    assert read[1] < read[0]
    for point, files in ((first, first_files), (second, second_files)):
        name = f"{guest.name}-{point['id'][:6]}"
        with restored(libvirt_host, place, point["id"], name, guest_folder / name, "--start") as domain:
            wait_for_agent(domain)
            assert guest_hashes(domain) == files
            assert domain.UUIDString() != guest.uuid
            # Two machines with the same MAC or disk would be one accident waiting for another.
            assert str(guest.disk("vda")) not in domain.XMLDesc(0)
    assert "kept" not in guest.out("ls /data/vda")
    assert world.strays(place, guest) == []


@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_a_restored_disk_compares_equal_with_its_source(place: Place, tiny_guest: GuestFactory, format: str) -> None:
    guest = tiny_guest({"vda": 64 * MIB}, formats={"vda": format}, label="equal")
    guest.out("dd if=/dev/urandom of=/data/vda/a bs=64k count=40 2>/dev/null; sync")
    place.backed_up(guest.name)
    guest.out("dd if=/dev/urandom of=/data/vda/b bs=64k count=40 2>/dev/null; sync; rm /data/vda/a; sync")
    guest.out("fstrim /data/vda")
    shut_down(guest.domain)
    place.backed_up(guest.name)
    for suffix in ("qcow2", "raw"):
        file = place.folder / f"back.{suffix}"
        place.good("restore", "disk", f"{guest.name}@latest", "vda", "--to", file)
        compare(file, guest.disk("vda"))
    # The disk of a running machine, between two states: crash consistent at the least, and clean after a freeze.
    guest.start()
    place.backed_up(guest.name)
    file = place.folder / "frozen.raw"
    place.good("restore", "disk", f"{guest.name}@latest", "vda", "--to", file)
    subprocess.run(["/usr/sbin/e2fsck", "-fn", file], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_machine_is_replaced_by_its_point(place: Place, tiny_guest: GuestFactory) -> None:
    guest = tiny_guest({"vda": 64 * MIB}, label="replace")
    guest.out("echo good > /data/vda/state; sync")
    files = guest.hashes()
    point = place.backed_up(guest.name)
    guest.out("echo bad > /data/vda/state; sync")
    source = guest.disk("vda")
    place.good("restore", "vm", point["id"], "--replace", "--start", "--yes")
    domain = guest.domain.connect().lookupByUUIDString(guest.uuid)
    assert (domain.name(), bool(domain.isActive())) == (guest.name, True)
    wait_for_agent(domain)
    assert guest_hashes(domain) == files
    assert source.exists()
    assert f"source file='{source}'" not in domain.XMLDesc(0)
    guest.domain = domain
    [disk] = place.backed_up(guest.name)["disks"]
    assert (disk["mode"], "its image changed" in disk["reason"]) == ("full", True), disk
    assert world.strays(place, guest) == []


SYSTEM = "/etc /usr/sbin /data/vdb"
MOUNTED = "for i in $(seq 400); do mountpoint -q /data/vdb && exit 0; sleep 0.3; done; exit 1"
"""The agent answers before systemd has mounted what fstab calls `nofail`."""


def test_a_whole_distribution_comes_back(
    place: Place, full_guest: Guest, libvirt_host: libvirt.virConnect, memory: Path
) -> None:
    def hashes(domain: libvirt.virDomain) -> set[str]:
        return set(guest_out(domain, f"find {SYSTEM} -xdev -type f | sort | xargs sha256sum", timeout=300).splitlines())

    full_guest.out(MOUNTED)
    full_guest.out("mkdir -p /data/vdb/e2e; head -c 3000000 /dev/urandom > /data/vdb/e2e/one; sync")
    first = place.backed_up(full_guest.name)
    full_guest.out("head -c 2000000 /dev/urandom > /data/vdb/e2e/two; echo changed > /etc/e2e; sync")
    files = hashes(full_guest.domain)
    assert {"/data/vdb/e2e/one", "/data/vdb/e2e/two"} <= {line.split()[1] for line in files}
    second = place.backed_up(full_guest.name)
    assert (first["consistency"], second["consistency"]) == ("filesystem", "filesystem")
    assert {disk["mode"] for disk in second["disks"]} == {"incremental"}
    name = f"{full_guest.name}-r"
    try:
        with restored(libvirt_host, place, f"{full_guest.name}@latest", name, memory / "full", "--start") as domain:
            wait_for_agent(domain, timeout=300)
            guest_out(domain, MOUNTED, timeout=150)
            assert hashes(domain) ^ files == set()
            guest_out(domain, "for i in $(seq 200); do systemctl -q is-active ssh && exit 0; sleep 0.3; done; exit 1")
        assert world.strays(place, full_guest) == []
    finally:
        for checkpoint in full_guest.domain.listAllCheckpoints():
            checkpoint.delete(0)
        full_guest.out("rm -rf /data/vdb/e2e /etc/e2e; sync")
