"""Disks, bitmaps, checkpoints and names that change between two backups: each disk falls back to a full read by
itself, inside the same chain, and says why; and what is restored is what was there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import libvirt
import pytest

from orchestrator.demo.disks import make_empty_disk
from orchestrator.demo.host import remove_machine
from orchestrator.demo.tiny_guest import TinyDisk
from tests.faults import world
from tests.faults.paused import SIZE, Paused, paused_machine
from tests.faults.place import Place
from tests.guests.machines import MIB, GuestFactory

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

FULL, INCREMENTAL = "full", "incremental"


class Chain:
    """A place and a machine that has one point."""

    def __init__(self, place: Place, machine: Paused) -> None:
        self.place, self.machine = place, machine
        self.byte = 0

    def change(self) -> None:
        """Write another byte into every disk, and zeroes over what was written before that."""
        self.byte += 1
        for number, target in enumerate(self.machine.content):
            at = (self.byte * 192 << 10) % (4 * MIB)
            self.machine.write(target, at, 100 << 10, self.byte + number)
            self.machine.write(target, at + (50 << 10), 20 << 10, 0)

    def next(self, **expected: tuple[str, str]) -> dict[str, Any]:
        """Change all disks and back up: `vda=(mode, words of the reason)`. The point is restored and compared."""
        self.change()
        point = self.place.backed_up(self.machine.name)
        found = {disk["target"]: (disk["mode"], disk["reason"]) for disk in point["disks"]}
        assert found.keys() == expected.keys()
        for target, (mode, words) in expected.items():
            assert found[target][0] == mode, found
            assert words in found[target][1], found
        self.compare()
        assert world.strays(self.place, self.machine.guest) == []
        return point

    def compare(self) -> None:
        for target, content in self.machine.content.items():
            file = self.place.folder / f"{target}.raw"
            file.unlink(missing_ok=True)
            self.place.good("restore", "disk", f"{self.machine.name}@latest", target, "--to", file)
            assert file.read_bytes() == content, target

    def attach(self, target: str) -> None:
        """A new disk, for good and at once if the machine runs."""
        disk = TinyDisk(target, self.machine.guest.folder / f"{target}-{self.byte}.qcow2")
        make_empty_disk(disk.path, SIZE)
        self.machine.guest.disks.append(disk)
        self.machine.content[target] = bytearray(SIZE)
        flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG
        if self.machine.domain.isActive():
            flags |= libvirt.VIR_DOMAIN_AFFECT_LIVE
        self.machine.domain.attachDeviceFlags(disk_xml(target, disk.path), flags)

    def detach(self, target: str) -> None:
        """Of a machine that is off."""
        self.machine.domain.detachDeviceFlags(
            disk_xml(target, self.machine.guest.disk(target)), libvirt.VIR_DOMAIN_AFFECT_CONFIG
        )
        self.machine.guest.disks = [disk for disk in self.machine.guest.disks if disk.target != target]
        del self.machine.content[target]


def disk_xml(target: str, path: Path) -> str:
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{path}'/>"
        f"<target dev='{target}' bus='virtio'/></disk>"
    )


@pytest.fixture
def chain(place: Place, machine: Paused) -> Chain:
    chain = Chain(place, machine)
    chain.next(vda=(FULL, "first backup"), vdb=(FULL, "first backup"))
    return chain


def base(chain: Chain) -> str:
    [name] = world.checkpoints(chain.machine.guest)
    return name


def test_nothing_special(chain: Chain) -> None:
    chain.next(vda=(INCREMENTAL, "known"), vdb=(INCREMENTAL, "known"))


def test_metadata_of_the_checkpoint_lost(chain: Chain) -> None:
    checkpoint = chain.machine.domain.checkpointLookupByName(base(chain))
    checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
    assert world.checkpoints(chain.machine.guest) == []
    chain.next(vda=(INCREMENTAL, "known"), vdb=(INCREMENTAL, "known"))


def test_the_bitmap_of_one_disk_removed(chain: Chain) -> None:
    nodes = chain.machine.nodes_with(base(chain))
    node = nodes[str(chain.machine.guest.disk("vdb"))]
    chain.machine.qmp("block-dirty-bitmap-remove", node=node, name=base(chain))
    chain.next(vda=(INCREMENTAL, "known"), vdb=(FULL, "bitmap"))
    chain.next(vda=(INCREMENTAL, "known"), vdb=(INCREMENTAL, "known"))


def test_the_bitmap_of_one_disk_removed_while_the_machine_is_off(chain: Chain) -> None:
    name = base(chain)
    chain.machine.stop()
    subprocess.run(["qemu-img", "bitmap", "--remove", chain.machine.guest.disk("vda"), name], check=True)
    chain.next(vda=(FULL, "holds no bitmap"), vdb=(INCREMENTAL, "known"))
    chain.machine.start()
    chain.next(vda=(FULL, "kept no checkpoint"), vdb=(INCREMENTAL, "known"))
    chain.next(vda=(INCREMENTAL, "known"), vdb=(INCREMENTAL, "known"))


def test_qemu_killed_before_the_bitmaps_were_stored(chain: Chain) -> None:
    chain.machine.kill()
    chain.machine.start()
    chain.next(vda=(FULL, "bitmap is missing"), vdb=(FULL, "bitmap is missing"))
    chain.next(vda=(INCREMENTAL, "known"), vdb=(INCREMENTAL, "known"))


@pytest.mark.parametrize("then", ["off", "started"])
def test_qemu_killed_while_the_stored_bitmaps_were_in_use(chain: Chain, then: str) -> None:
    chain.machine.stop()
    chain.machine.start()
    chain.change()
    chain.machine.kill()
    if then == "started":
        chain.machine.start()
    chain.next(vda=(FULL, "after a crash"), vdb=(FULL, "after a crash"))
    if then == "off":
        chain.machine.start()
        chain.next(vda=(FULL, "bitmap is missing"), vdb=(FULL, "bitmap is missing"))
    chain.next(vda=(INCREMENTAL, "known"), vdb=(INCREMENTAL, "known"))


def test_a_disk_is_added_and_another_removed(chain: Chain) -> None:
    chain.attach("vdc")
    chain.next(vda=(INCREMENTAL, "known"), vdb=(INCREMENTAL, "known"), vdc=(FULL, "new disk"))
    chain.next(vda=(INCREMENTAL, "known"), vdb=(INCREMENTAL, "known"), vdc=(INCREMENTAL, "known"))
    chain.machine.stop()
    chain.detach("vdb")
    chain.next(vda=(INCREMENTAL, "known"), vdc=(INCREMENTAL, "known"))
    chain.machine.start()
    chain.next(vda=(INCREMENTAL, "known"), vdc=(INCREMENTAL, "known"))


def test_a_disk_grows(chain: Chain) -> None:
    chain.machine.domain.blockResize("vda", 2 * SIZE, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    chain.machine.content["vda"] += bytes(SIZE)
    chain.machine.write("vda", SIZE + 3 * MIB, MIB, 77)
    chain.next(vda=(INCREMENTAL, "it grew"), vdb=(INCREMENTAL, "known"))
    chain.next(vda=(INCREMENTAL, "known"), vdb=(INCREMENTAL, "known"))


@pytest.mark.parametrize("running", [True, False], ids=["started", "off"])
def test_a_disk_is_replaced_by_another_of_the_same_name(chain: Chain, running: bool) -> None:
    """A copy carries the bitmap along, and may hold anything: nothing that the bitmap says of it is believed."""
    chain.machine.stop()
    path = chain.machine.guest.disk("vdb")
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").rename(path)
    bitmap = world.checkpoints(chain.machine.guest)[0]
    assert bitmap in subprocess.run(["qemu-img", "info", path], check=True, capture_output=True, text=True).stdout
    if running:
        chain.machine.start()
    chain.next(vda=(INCREMENTAL, "known"), vdb=(FULL, "another file of that name"))


def test_a_disk_is_replaced_by_another_path(chain: Chain) -> None:
    chain.machine.stop()
    chain.detach("vdb")
    chain.attach("vdb")
    chain.machine.start()
    chain.next(vda=(INCREMENTAL, "known"), vdb=(FULL, "its image changed from"))
    chain.next(vda=(INCREMENTAL, "known"), vdb=(INCREMENTAL, "known"))


def test_the_machine_is_renamed(chain: Chain) -> None:
    chain.machine.stop()
    old = chain.machine.name
    chain.machine.domain.rename(f"{old}-renamed")
    chain.machine.start()
    assert chain.machine.name == f"{old}-renamed"
    chain.next(vda=(INCREMENTAL, "known"), vdb=(INCREMENTAL, "known"))
    points = chain.place.good("point", "list", chain.machine.name).lines
    assert len(points) == 2


def test_the_catalog_is_lost(chain: Chain) -> None:
    chain.place.catalog.unlink()
    for extra in ("-wal", "-shm"):
        chain.place.catalog.with_name(f"catalog.db{extra}").unlink(missing_ok=True)
    assert chain.place.good("vault", "rebuild-catalog").line("catalog")["points"] == 1
    chain.compare()
    chain.next(vda=(INCREMENTAL, "known"), vdb=(INCREMENTAL, "known"))


def test_a_raw_disk_is_read_in_full_beside_one_that_is_tracked(place: Place, tiny_guest: GuestFactory) -> None:
    guest = tiny_guest({"vda": SIZE, "vdb": SIZE}, formats={"vdb": "raw"}, ext4=False, start=False)
    machine = Paused(guest, {"vda": bytearray(SIZE), "vdb": bytearray(SIZE)})
    machine.start()
    chain = Chain(place, machine)
    chain.next(vda=(FULL, "first backup"), vdb=(FULL, "no change tracking"))
    chain.next(vda=(INCREMENTAL, "known"), vdb=(FULL, "no change tracking"))
    machine.stop()
    point = place.backed_up(machine.name)
    assert {disk["target"]: disk["mode"] for disk in point["disks"]} == {"vda": INCREMENTAL, "vdb": FULL}
    chain.compare()


OVMF = Path("/usr/share/OVMF/OVMF_CODE_4M.fd"), Path("/usr/share/OVMF/OVMF_VARS_4M.fd")


def test_the_uefi_variables_come_back(
    place: Place, tiny_guest: GuestFactory, libvirt_host: libvirt.virConnect, memory: Path
) -> None:
    """The kept variables are the original's, byte for byte, and the restored machine has a file of its own."""
    for part in OVMF:
        assert part.exists(), f"{part} is missing; on Debian: apt-get install ovmf"
    machine = paused_machine(tiny_guest, "vda", start=False, label="uefi")
    loader, template = OVMF
    store = machine.guest.folder / "vars.fd"
    nvram = f"<nvram template='{template}'>{store}</nvram>"
    firmware = f"<loader readonly='yes' type='pflash'>{loader}</loader>{nvram}"
    xml = machine.domain.XMLDesc(0).replace("</type>", f"</type>{firmware}", 1)
    machine.guest.domain = libvirt_host.defineXML(xml)
    machine.start()
    machine.stop()
    content = bytearray(store.read_bytes())
    content[-16:] = b"written by a boot"[:16]
    store.write_bytes(content)
    place.backed_up(machine.name)
    folder, name = memory / "uefi", f"{machine.name}-r"
    folder.mkdir(mode=0o755)
    place.good("restore", "vm", f"{machine.name}@latest", "--name", name, "--dir", folder)
    restored = libvirt_host.lookupByName(name)
    try:
        [kept] = folder.glob("*VARS*")
        assert kept.read_bytes() == content
        assert str(kept) in restored.XMLDesc(0)
        assert str(store) not in restored.XMLDesc(0)
        restored.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
    finally:
        remove_machine(restored)
    assert store.read_bytes() == content
