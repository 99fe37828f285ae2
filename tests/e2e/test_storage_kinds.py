"""Where disks lie and what they are: pools, files, encryption; machines that moved; names that nobody would choose."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import libvirt
import pytest

from orchestrator.catalog.points import seen_machines
from orchestrator.config import parse_config
from orchestrator.service import Service
from orchestrator.views import JobView
from tests.contracts.conftest import MIB, BlankFactory, BlankMachine, Room, blank_xml, make_image
from tests.faults.test_space import small
from workers.contract.points import Mode
from workers.hosts.local import LOCAL

URI = "qemu:///system"


@dataclass
class Lab:
    """A Stillframe on this host's libvirt, and machines without a guest."""

    connection: libvirt.virConnect
    folder: Path
    blank: BlankFactory
    open: list[Service] = field(default_factory=list)
    pools: list[libvirt.virStoragePool] = field(default_factory=list)

    def service(self, hypervisor: str = "here") -> Service:
        """With one hypervisor of that name: always this libvirt."""
        text = f"""
            [paths]
            state = "{self.folder}/state"
            runtime = "{self.folder}/run"
            cache = "{self.folder}/cache"
            [vaults.main]
            url = "file://{self.folder}/vault"
            key_file = "{self.folder}/main.key"
            [hypervisors.{hypervisor}]
            uri = "{URI}"
            [backup]
            consistency = "crash"
            scratch_floor = 1
        """
        while self.open:
            self.open.pop().close()
        service = Service.open(parse_config(text, self.folder / "stillframe.toml"))
        self.open.append(service)
        service.init_vault("main")
        return service

    def pool(self, folder: Path) -> libvirt.virStoragePool:
        folder.mkdir(mode=0o755, exist_ok=True)
        name = f"sf-test-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        xml = f"<pool type='dir'><name>{name}</name><target><path>{folder}</path></target></pool>"
        pool = self.connection.storagePoolDefineXML(xml)
        pool.create()
        self.pools.append(pool)
        return pool

    def backup(self, service: Service, machine: str, **options: object) -> JobView:
        return service.wait(service.start_backup(machine, **options))  # type: ignore[arg-type]

    def close(self) -> None:
        for service in self.open:
            service.close()
        self.blank.close()
        for pool in self.pools:
            if pool.isActive():
                pool.destroy()
            pool.undefine()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def lab(libvirt_host: libvirt.virConnect, guest_folder: Path) -> Iterator[Lab]:
    folder = guest_folder / f"storage-{uuid.uuid4().hex[:6]}"
    folder.mkdir(mode=0o755)
    lab = Lab(libvirt_host, folder, BlankFactory(Room(LOCAL, libvirt_host, URI), folder))
    yield lab
    lab.close()


def fill(image: Path, *pieces: tuple[int, int, int]) -> None:
    """`(offset, length, byte)`"""
    commands = [word for start, length, byte in pieces for word in ("-c", f"write -P {byte} {start} {length}")]
    format = image.suffix[1:]
    subprocess.run(["qemu-io", "-f", format, *commands, str(image)], check=True, stdout=subprocess.DEVNULL)


def same(one: Path, other: Path) -> bool:
    argv = ["qemu-img", "compare", "-q", "-f", one.suffix[1:], "-F", other.suffix[1:], str(one), str(other)]
    return subprocess.run(argv, check=False).returncode == 0


def modes(job: JobView) -> dict[str, tuple[str, str]]:
    return {disk["target"]: (disk["mode"], disk["reason"]) for disk in job.disks}


def succeeded(job: JobView) -> JobView:
    assert job.state == "succeeded", job.error
    return job


# --- pools and files -----------------------------------------------------------------------------------------------


def in_pools(lab: Lab) -> tuple[BlankMachine, Path]:
    """A machine, off, with a volume of a pool as vdp and a file that a guest has encrypted as vda; the volume."""
    home = lab.pool(lab.folder / "slow")
    volume = make_image(lab.folder / "slow" / "p.qcow2")
    fill(volume, (MIB, 3 * MIB, 7))
    home.refresh()
    drive = (
        f"<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/>"
        f"<source pool='{home.name()}' volume='p.qcow2'/><target dev='vdp' bus='virtio'/></disk>"
    )
    machine = lab.blank({"vda": "raw"}, start=False, extra=drive)
    with machine.disks["vda"].open("r+b") as image:  # as cryptsetup in the guest leaves it, to whoever has no key
        image.write(b"LUKS\xba\xbe\0\1" + os.urandom(4 * MIB))
    return machine, volume


def test_disks_of_pools_and_files_go_into_another_pool(lab: Lab) -> None:
    machine, volume = in_pools(lab)
    service = lab.service()
    point = succeeded(lab.backup(service, machine.name)).point
    assert point is not None
    fast = lab.pool(lab.folder / "fast")
    name = f"{machine.name}-b"
    job = succeeded(service.wait(service.start_restore_machine(point, name=name, pool=fast.name())))
    restored = lab.connection.lookupByName(name)
    lab.blank.made.append(BlankMachine(LOCAL, lab.connection, restored, lab.folder / "none", {}))
    files = {target: Path(path) for target, path in job.result["files"].items()}
    assert {file.parent for file in files.values()} == {lab.folder / "fast"}
    assert sorted(fast.listVolumes()) == sorted(file.name for file in files.values()), "libvirt sees them"
    assert same(files["vdp"], volume)
    assert same(files["vda"], machine.disks["vda"]), "what a guest has encrypted is data as any other"
    assert restored.blockInfo("vdp")[0] == 16 * MIB


def test_a_pool_that_cannot_take_a_machine_is_refused_before_anything_is_written(lab: Lab) -> None:
    machine, _ = in_pools(lab)
    service = lab.service()
    point = succeeded(lab.backup(service, machine.name)).point
    assert point is not None
    closed, small_one = lab.pool(lab.folder / "closed"), lab.folder / "small"
    closed.destroy()
    with small(small_one, 2 * MIB):
        tight = lab.pool(small_one)
        for pool, code, words in (
            ("no-such-pool", "NotFound", "no-such-pool"),
            (closed.name(), "UsageError", "is not active"),
            (tight.name(), "NoSpace", "MiB are free"),
            ("-rf ../*'\"\u202e", "NotFound", "storage pool"),
        ):
            job = service.wait(service.start_restore_machine(point, name=f"{machine.name}-b", pool=pool))
            assert job.state == "failed"
            assert job.error is not None
            assert (job.error.code, words in job.error.message) == (code, True), job.error
        assert list(small_one.iterdir()) == []
        tight.destroy()
    assert list((lab.folder / "closed").iterdir()) == []
    assert f"{machine.name}-b" not in [domain.name() for domain in lab.connection.listAllDomains()]
    assert list((lab.folder / "vault/sessions").iterdir()) == []


# --- encrypted on the host -----------------------------------------------------------------------------------------

LUKS = "<encryption format='luks'><secret type='passphrase' uuid='{}'/></encryption>"


def test_a_disk_that_is_encrypted_on_the_host_is_refused_unless_it_is_left_out(lab: Lab) -> None:
    """A point of it would hold it decrypted, and bring it back so."""
    machine = lab.blank({"vda": "qcow2"}, start=False)
    xml = machine.domain.XMLDesc(0)
    secret = LUKS.format(uuid.uuid4())
    for place in (f"{secret}</source>", f"</source>{secret}"):
        inside = f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/x.qcow2'>{place}"
        drive = f"{inside}<target dev='vdl' bus='virtio'/></disk>"
        lab.connection.defineXML(xml.replace("<controller", f"{drive}<controller", 1))
        service = lab.service()
        job = lab.backup(service, machine.name)
        assert job.state == "failed"
        assert job.error is not None
        assert "vdl" in job.error.message
        assert "encrypted on the host" in job.error.message
        assert "--exclude vdl" in job.error.hint
        job = succeeded(lab.backup(service, machine.name, exclude=["vdl"]))
        assert list(modes(job)) == ["vda"]


# --- machines that moved -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("carried", [True, False])
def test_the_chain_of_a_machine_that_moved_goes_on(lab: Lab, *, running: bool, carried: bool) -> None:
    """The same images on another hypervisor, whose libvirt knows no checkpoint; with or without the bitmap in them."""
    machine = lab.blank({"vda": "qcow2"})
    service = lab.service("old")
    machine.write("vda", MIB, MIB, 1)
    first = succeeded(lab.backup(service, machine.name))
    assert modes(first)["vda"][0] == Mode.FULL
    machine.write("vda", 5 * MIB, 64 << 10, 2)
    machine.stop()
    [bitmap] = machine.bitmaps("vda")
    xml = machine.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    machine.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
    machine.domain = lab.connection.defineXML(xml.replace(f"<name>{machine.name}<", f"<name>{machine.name}-r<"))
    if not carried:
        subprocess.run(["qemu-img", "bitmap", "--remove", str(machine.disks["vda"]), bitmap], check=True)
    if running:
        machine.start()
        machine.write("vda", 9 * MIB, MIB, 3)
    service = lab.service("new")
    second = succeeded(lab.backup(service, machine.uuid))
    mode, reason = modes(second)["vda"]
    assert mode == (Mode.INCREMENTAL if carried else Mode.FULL)
    assert ("changes since" if carried else "bitmap") in reason, reason
    if running:
        machine.stop()
    assert second.point is not None
    target = lab.folder / "restored.qcow2"
    succeeded(service.wait(service.start_restore_disk(second.point, "vda", to=target)))
    assert same(target, machine.disks["vda"])
    with service.catalog.read() as session:
        [row] = [row for row in seen_machines(session) if row.uuid == machine.uuid]
    assert (row.hypervisor, row.name) == ("new", machine.name)
    assert [point.machine for point in service.points(machine.uuid)] == [first.machine, second.machine]


# --- names ---------------------------------------------------------------------------------------------------------

NAMES = ["-rf", "$(touch pwned)", "a'b\"c`id`;#", "* ?[a]", "..", "\u202egnp.exe", "name with blanks ", "x" * 200]


def test_names_that_libvirt_takes_are_listed_backed_up_and_restored(lab: Lab) -> None:
    """In one go, for each run costs a libvirt round: every name is a machine of its own."""
    made = []
    mark = uuid.uuid4().hex[:6]
    for name in NAMES:
        folder = lab.folder / f"n{len(made)}"
        folder.mkdir(mode=0o755)
        disk = make_image(folder / "a,b=c d.qcow2")
        full = f"{name} {mark}"
        xml = blank_xml("@", {"vda": disk}).replace("@", full.replace('"', "&quot;").replace("'", "&apos;"))
        domain = lab.connection.defineXML(xml)
        lab.blank.made.append(BlankMachine(LOCAL, lab.connection, domain, folder, {"vda": disk}))
        made.append((domain.UUIDString(), domain.name(), disk))
        fill(disk, (0, MIB, 1 + len(made)))
    service = lab.service()
    listed = {view.uuid: view.name for view in service.machines()}
    assert [listed[machine] for machine, _, _ in made] == [name for _, name, _ in made]
    for number, (machine, name, disk) in enumerate(made):
        job = succeeded(lab.backup(service, name))
        target = lab.folder / f"restored-{number}.qcow2"
        assert job.point is not None
        succeeded(service.wait(service.start_restore_disk(job.point, "vda", to=target)))
        assert same(target, disk)
        assert service.machine(machine).name == name
        assert [view.id for view in service.points(name)] == [job.point]
    assert not Path("pwned").exists()
    assert {entry.name for entry in lab.folder.iterdir()} <= {
        *("state", "run", "cache", "vault", "main.key"),
        *(f"n{number}" for number in range(len(made))),
        *(f"restored-{number}.qcow2" for number in range(len(made))),
    }
