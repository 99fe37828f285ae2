"""Machines defined, started and forgotten on a real libvirt, and its storage pools."""

from __future__ import annotations

import uuid as uuids
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.contracts.conftest import MIB, BlankFactory, Room, make_image
from workers.contract.errors import HypervisorError, NotFound, TargetExists, UsageError
from workers.contract.machines import Power
from workers.hypervisors import domain_xml
from workers.hypervisors.libvirt_host import LibvirtHypervisor

NVRAM = b"variables" * 1000


@pytest.fixture(params=["libvirt", "ssh"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def fresh_uuid(hypervisor: LibvirtHypervisor) -> Iterator[str]:
    """A UUID for a machine that is removed afterwards."""
    uuid = str(uuids.uuid4())
    yield uuid
    hypervisor.undefine(uuid)


def with_nvram(definition: str, folder: Path) -> str:
    """The definition with a loader and a variable store (real firmware is not needed: nothing boots)."""
    (folder / "code.fd").write_bytes(b"\0" * 131072)
    (folder / "template.fd").write_bytes(b"template" * 16)
    root = ET.fromstring(definition)
    ET.SubElement(ET.SubElement(root, "features"), "acpi")
    os = root.find("os")
    assert os is not None
    loader = ET.SubElement(os, "loader", readonly="yes", type="pflash")
    loader.text = str(folder / "code.fd")
    ET.SubElement(os, "nvram", template=str(folder / "template.fd")).text = str(folder / "vars.fd")
    return ET.tostring(root, encoding="unicode")


class TestDefining:
    def test_a_copy_beside_its_original(
        self, hypervisor: LibvirtHypervisor, blank: BlankFactory, fresh_uuid: str
    ) -> None:
        network = "<interface type='user'><mac address='52:54:00:11:22:33'/></interface>"
        original = blank({"vda": "qcow2", "vdb": "raw"}, extra=network)
        found = hypervisor.inventory(original.uuid)
        image = make_image(original.folder / "restored.qcow2")
        copy = domain_xml.restored(
            found.definition,
            name=f"{original.name}-copy",
            uuid=fresh_uuid,
            disks={"vda": (str(image), "qcow2")},
            nvram_path=None,
            fresh_macs=True,
        )
        hypervisor.define(copy, None, start=True)
        defined = hypervisor.inventory(fresh_uuid)
        assert defined.power is Power.RUNNING
        assert [(disk.target, disk.source) for disk in defined.disks] == [("vda", str(image)), ("hda", "")]
        assert "52:54:00:11:22:33" in found.definition
        assert "52:54:00:11:22:33" not in defined.definition
        hypervisor.undefine(fresh_uuid)
        with pytest.raises(NotFound):
            hypervisor.inventory(fresh_uuid)
        hypervisor.undefine(fresh_uuid)
        assert image.exists()
        assert hypervisor.inventory(original.uuid).power is Power.PAUSED

    def test_nvram_is_read_and_put_in_place(
        self, hypervisor: LibvirtHypervisor, blank: BlankFactory, fresh_uuid: str
    ) -> None:
        original = blank({"vda": "qcow2"}, start=False)
        first = with_nvram(hypervisor.inventory(original.uuid).definition, original.folder)
        original.connection.defineXML(first)
        found = hypervisor.inventory(original.uuid)
        assert found.nvram_path == str(original.folder / "vars.fd")
        assert hypervisor.nvram(found) is None  # never ran
        Path(found.nvram_path).write_bytes(NVRAM)
        assert hypervisor.nvram(found) == NVRAM
        path = original.folder / "deep" / "copy.fd"
        copy = domain_xml.restored(
            found.definition,
            name=f"{original.name}-copy",
            uuid=fresh_uuid,
            disks={},
            nvram_path=str(path),
            fresh_macs=True,
        )
        hypervisor.define(copy, NVRAM, start=False)
        assert path.read_bytes() == NVRAM
        assert path.stat().st_mode & 0o077 == 0
        assert hypervisor.nvram(hypervisor.inventory(fresh_uuid)) == NVRAM
        hypervisor.undefine(fresh_uuid)
        assert not path.exists()

    def test_a_machine_with_checkpoints_can_be_forgotten(
        self, hypervisor: LibvirtHypervisor, blank: BlankFactory, fresh_uuid: str
    ) -> None:
        original = blank({"vda": "qcow2"}, start=False)
        image = make_image(original.folder / "restored.qcow2")
        hypervisor.define(
            domain_xml.restored(
                hypervisor.inventory(original.uuid).definition,
                name=f"{original.name}-copy",
                uuid=fresh_uuid,
                disks={"vda": (str(image), "qcow2")},
                nvram_path=None,
                fresh_macs=True,
            ),
            None,
            start=True,
        )
        domain = original.connection.lookupByUUIDString(fresh_uuid)
        domain.checkpointCreateXML("<domaincheckpoint><name>theirs</name></domaincheckpoint>")
        hypervisor.undefine(fresh_uuid)
        with pytest.raises(NotFound):
            hypervisor.inventory(fresh_uuid)

    def test_a_name_that_is_taken(self, hypervisor: LibvirtHypervisor, blank: BlankFactory, fresh_uuid: str) -> None:
        original = blank({"vda": "qcow2"}, start=False)
        definition = hypervisor.inventory(original.uuid).definition
        with pytest.raises(TargetExists, match="already exists"):
            hypervisor.define(definition.replace(original.uuid, fresh_uuid), None, start=False)
        with pytest.raises(HypervisorError, match="defining"):
            hypervisor.define("<domain", None, start=False)

    def test_a_start_that_fails_says_why(
        self, hypervisor: LibvirtHypervisor, blank: BlankFactory, fresh_uuid: str
    ) -> None:
        original = blank({"vda": "qcow2"}, start=False)
        lost = domain_xml.restored(
            hypervisor.inventory(original.uuid).definition,
            name=f"{original.name}-copy",
            uuid=fresh_uuid,
            disks={"vda": (str(original.folder / "none.qcow2"), "qcow2")},
            nvram_path=None,
            fresh_macs=True,
        )
        with pytest.raises(HypervisorError, match=r"starting .*none\.qcow2"):
            hypervisor.define(lost, None, start=True)


class TestPools:
    def test_a_folder_and_what_is_not_one(self, hypervisor: LibvirtHypervisor, room: Room, blank: BlankFactory) -> None:
        machine = blank({}, start=False)
        name = f"{machine.name}-pool"
        pool = room.connection.storagePoolCreateXML(
            f"<pool type='dir'><name>{name}</name><target><path>{machine.folder}</path></target></pool>"
        )
        other = room.connection.storagePoolDefineXML(
            f"<pool type='logical'><name>{name}-lvm</name><source><name>none</name></source></pool>"
        )
        try:
            assert hypervisor.volume_dir(name) == machine.folder
            make_image(machine.folder / "new.qcow2")
            assert pool.listVolumes() == []
            hypervisor.refresh_pool(name)
            assert pool.listVolumes() == ["new.qcow2"]
            with pytest.raises(UsageError, match="not a folder"):
                hypervisor.volume_dir(f"{name}-lvm")
            with pytest.raises(NotFound):
                hypervisor.volume_dir(f"{name}-none")
        finally:
            pool.destroy()
            other.undefine()

    def test_a_disk_named_as_a_volume_is_found(
        self, hypervisor: LibvirtHypervisor, room: Room, blank: BlankFactory
    ) -> None:
        folder = blank({}, start=False)
        make_image(folder.folder / "new.qcow2")
        pool = room.connection.storagePoolCreateXML(
            f"<pool type='dir'><name>{folder.name}</name><target><path>{folder.folder}</path></target></pool>"
        )
        try:
            disk = (
                f"<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/>"
                f"<source pool='{folder.name}' volume='new.qcow2'/><target dev='vda' bus='virtio'/></disk>"
            )
            for start in (False, True):
                disks = hypervisor.inventory(blank({}, start=start, extra=disk).uuid).disks
                found = next(each for each in disks if each.target == "vda")
                assert found.source == str(folder.folder / "new.qcow2")
                assert found.excluded == ""
                assert found.tracks_changes
                assert found.capacity == 16 * MIB
        finally:
            pool.destroy()
