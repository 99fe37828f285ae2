"""What is read from a definition, and the definition of a restored machine: pure rules, odd inputs included."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from workers.hypervisors import domain_xml

ODD = """<domain type='kvm' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web-1</name>
  <uuid>11111111-1111-1111-1111-111111111111</uuid>
  <genid>22222222-2222-2222-2222-222222222222</genid>
  <sysinfo type='smbios'><system><entry name='serial'>S1</entry>
    <entry name='uuid'>11111111-1111-1111-1111-111111111111</entry></system></sysinfo>
  <os firmware='efi'><loader readonly='yes'>/usr/share/OVMF/CODE.fd</loader>
    <nvram template='/usr/share/OVMF/VARS.fd'>/var/lib/libvirt/qemu/nvram/web-1_VARS.fd</nvram></os>
  <seclabel type='dynamic' model='apparmor'/>
  <devices>
    <disk type='file' device='disk' snapshot='external'>
      <driver name='qemu' type='raw' cache='none' discard='unmap'/>
      <source file='/img/a.snap1'><seclabel model='dac' relabel='no'/></source>
      <backingStore type='file'><format type='raw'/><source file='/img/a'/></backingStore>
      <target dev='vda' bus='virtio'/><serial>A1</serial><boot order='1'/>
    </disk>
    <disk type='network' device='disk'><driver name='qemu'/>
      <source protocol='rbd' name='p/b'/><auth username='u'/><target dev='vdb'/></disk>
    <disk type='block' device='cdrom'><source dev='/dev/sr0'/><target dev='sda' bus='sata'/><readonly/></disk>
    <disk type='file' device='floppy'><target dev='fda'/></disk>
    <disk type='block' device='lun'><source dev='/dev/sdz'/><target dev='sdb'/></disk>
    <disk type='nvme' device='disk'><source type='pci' namespace='1'/><target dev='vdc'/></disk>
    <disk type='volume' device='disk'><driver type='qcow2'/><source pool='p' volume='v'/><target dev='vdd'/></disk>
    <disk type='file' device='disk'><target dev='vde'/></disk>
    <interface type='network'><mac address='52:54:00:00:00:01'/><source network='default'/>
      <target dev='tap-web'/><model type='virtio'/></interface>
    <channel type='unix'><source mode='bind' path='/var/lib/libvirt/qemu/web-1.agent'/>
      <target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
    <graphics type='vnc' port='5901' autoport='no'/>
    <vsock><cid auto='no' address='3'/></vsock>
    <tpm model='tpm-crb'><backend type='emulator'/></tpm>
  </devices>
  <qemu:commandline><qemu:arg value='-s'/></qemu:commandline>
</domain>"""
DISKS = {"vda": ("/new/vda.qcow2", "qcow2"), "vdb": ("/new/vdb.raw", "raw"), "vdz": ("/new/vdz.qcow2", "qcow2")}


def made(fresh: bool = True, nvram: str | None = "/new/vars.fd") -> ET.Element:
    text = domain_xml.restored(ODD, name="web-2", uuid="3" * 8, disks=DISKS, nvram_path=nvram, fresh_macs=fresh)
    return ET.fromstring(text)


def test_disks_are_listed_in_order_with_reasons() -> None:
    found = domain_xml.disks(ODD)
    assert [(disk.target, disk.excluded) for disk in found] == [
        ("vda", ""),
        ("vdb", "network disk (rbd)"),
        ("sda", "CD-ROM"),
        ("fda", "floppy"),
        ("sdb", "SCSI device passed through"),
        ("vdc", "nvme disk"),
        ("vdd", ""),
        ("vde", "no medium"),
    ]
    assert (found[0].path, found[0].format) == ("/img/a.snap1", "raw")
    assert (found[6].volume, found[6].format) == (("p", "v"), "qcow2")


def test_a_driver_without_a_type_is_raw() -> None:
    assert domain_xml.disks(ODD)[7].format == "raw"


@pytest.mark.parametrize(
    ("os", "expected"),
    [
        ("", None),
        ("<nvram/>", None),
        ("<nvram>/a</nvram>", "/a"),
        ("<nvram type='file'><source file='/b'/></nvram>", "/b"),
        ("<nvram type='network'><source protocol='iscsi' name='x'/></nvram>", None),
    ],
)
def test_where_the_nvram_is(os: str, expected: str | None) -> None:
    assert domain_xml.nvram_path(f"<domain><os>{os}</os></domain>") == expected


def test_the_agent_is_there_when_its_channel_is_connected() -> None:
    assert domain_xml.agent_connected(ODD)
    assert not domain_xml.agent_connected(ODD.replace("'connected'", "'disconnected'"))
    assert not domain_xml.agent_connected(ODD.replace("guest_agent.0", "other.0"))


def test_a_restored_machine_has_its_own_identity() -> None:
    root = made()
    assert root.get("id") is None
    assert (root.findtext("name"), root.findtext("uuid")) == ("web-2", "3" * 8)
    assert root.findtext("sysinfo/system/entry[@name='uuid']") == "3" * 8
    assert root.findtext("sysinfo/system/entry[@name='serial']") == "S1"
    assert [element.text for element in root.findall("genid")] == [None]
    assert root.findall("seclabel") == []
    assert root.find("devices/tpm") is not None
    assert "-s" in ET.tostring(root, encoding="unicode")


def test_a_restored_machine_has_the_restored_disks_and_no_other() -> None:
    root = made()
    disks = {disk.target: disk for disk in domain_xml.disks(ET.tostring(root, encoding="unicode"))}
    assert {target: (disk.path, disk.format) for target, disk in disks.items() if disk.path} == DISKS
    assert [(target, disk.excluded) for target, disk in disks.items() if not disk.path] == [
        ("sda", "CD-ROM"),
        ("fda", "floppy"),
    ]
    first = root.find("devices/disk")
    assert first is not None
    assert first.find("backingStore") is None
    assert first.findtext("serial") == "A1"
    driver = first.find("driver")
    assert driver is not None
    assert (driver.get("cache"), driver.get("discard")) == ("none", "unmap")
    assert "auth" not in ET.tostring(root, encoding="unicode")
    assert "/dev/sr0" not in ET.tostring(root, encoding="unicode")


def test_a_machine_beside_its_original_shares_no_address() -> None:
    root = made()
    assert root.find("devices/interface/mac") is None
    assert root.find("devices/interface/target") is None
    assert root.find("devices/interface/model") is not None
    graphics, cid, source = (
        root.find("devices/graphics"),
        root.find("devices/vsock/cid"),
        root.find("devices/channel/source"),
    )
    assert graphics is not None
    assert graphics.attrib == {"type": "vnc", "autoport": "yes"}
    assert cid is not None
    assert cid.attrib == {"auto": "yes"}
    assert source is not None
    assert source.get("path") is None


def test_a_replacement_keeps_its_addresses() -> None:
    root = made(fresh=False)
    mac, graphics = root.find("devices/interface/mac"), root.find("devices/graphics")
    assert mac is not None
    assert mac.get("address") == "52:54:00:00:00:01"
    assert graphics is not None
    assert graphics.get("port") == "5901"


def test_the_nvram_moves() -> None:
    text = ET.tostring(made(), encoding="unicode")
    assert domain_xml.nvram_path(text) == "/new/vars.fd"
    nvram = made(nvram=None).find("os/nvram")
    assert nvram is not None
    assert (nvram.text, nvram.get("template")) == (None, "/usr/share/OVMF/VARS.fd")


def test_pools() -> None:
    folder = "<target><path>/p</path></target>"
    assert domain_xml.pool_folder(f"<pool type='dir'>{folder}</pool>") == "/p"
    assert domain_xml.pool_folder(f"<pool type='logical'>{folder}</pool>") is None


def test_disks_are_named_as_the_guest_sees_them() -> None:
    pci = "<address type='pci' domain='0x0000' bus='0x{bus:02x}' slot='0x{slot:02x}' function='0x0'/>"
    drive = "<address type='drive' controller='1' bus='0' target='0' unit='3'/>"
    found = domain_xml.disks(
        "<domain><devices>"
        f"<disk><target dev='vda' bus='virtio'/>{pci.format(bus=0, slot=7)}</disk>"
        f"<disk><target dev='vdb' bus='virtio'/>{pci.format(bus=4, slot=0)}</disk>"
        f"<disk><target dev='sda' bus='scsi'/>{drive}</disk>"
        f"<disk><target dev='sdb' bus='sata'/>{drive}</disk>"
        "<disk><target dev='vdc' bus='virtio'/></disk>"
        f"<controller type='scsi' index='0'>{pci.format(bus=0, slot=1)}</controller>"
        f"<controller type='scsi' index='1'>{pci.format(bus=0, slot=9)}</controller>"
        "</devices></domain>"
    )
    assert [disk.address for disk in found] == [
        "pci:0000:00:07.0",
        "pci:0000:04:00.0",
        "pci:0000:00:09.0/0:0:3",
        "",
        "",
    ]
