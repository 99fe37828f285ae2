"""Disks with I/O threads, as libvirt's definitions have them, and what the trial says of programs that are no QEMU."""

from __future__ import annotations

from workers.contract.machines import Disk
from workers.hosts.local import LOCAL
from workers.hypervisors import iothreads

LIVE = """<domain><devices><emulator>/usr/bin/qemu</emulator>
<disk><driver iothread='1'/><target dev='vda' bus='virtio'/></disk>
<disk><driver name='qemu'/><target dev='vdb' bus='virtio'/></disk>
<disk><target dev='sda' bus='scsi'/><address type='drive' controller='0'/></disk>
<disk><target dev='sdb' bus='scsi'/><address type='drive' controller='1'/></disk>
<disk><target dev='hda' bus='ide'/><address type='drive' controller='1'/></disk>
<disk><driver><iothreads><iothread id='1'/></iothreads></driver><target dev='vdc' bus='virtio'/></disk>
<controller type='scsi' index='1'><driver iothread='2'/></controller>
<controller type='scsi' index='0'/></devices></domain>"""


def disk(target: str, excluded: str = "") -> Disk:
    return Disk(
        target=target, source="/x", format="raw", capacity=0, identity="", tracks_changes=False, excluded=excluded
    )


def test_the_disks_of_a_definition() -> None:
    assert iothreads.of_definition(LIVE) == ("/usr/bin/qemu", {"vda", "sdb", "vdc"})


def test_a_machine_without_such_disks_costs_no_trial() -> None:
    disks = [disk("vda"), disk("vdb", excluded="read-only")]
    assert iothreads.marked(LOCAL, disks, "/nonexistent", {"vdb"}) == disks


def test_what_cannot_be_tried_is_not_dared() -> None:
    found = iothreads.marked(LOCAL, [disk("vda"), disk("vdb")], "", {"vda"})
    assert "not known" in found[0].danger
    assert found[1].danger == ""
