"""Machines without a guest: QEMU, its block layer and libvirt are real, and nothing has to boot. Each test of the
seam `Hypervisor` runs on libvirt and on bare QEMUs, unless it says otherwise."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import uuid as uuids
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import libvirt
import libvirt_qemu
import nbd
import pytest

from orchestrator.demo.host import connect
from tests.contracts.qmp_blank import QmpFactory
from tests.hosts.host import Host as Lab
from tests.hosts.remote import config_of, ssh_host
from workers.contract.hosts import Host
from workers.contract.points import Mode
from workers.contract.seams import BackupRequest, DiskRequest, Export, Hypervisor
from workers.hosts.local import LOCAL
from workers.hypervisors import open_hypervisor
from workers.hypervisors.libvirt_host import END_SECONDS
from workers.hypervisors.wires import SocketWire

MIB = 1 << 20
URI = "qemu:///system"
FOREIGN = "<domainbackup mode='pull'><server transport='unix' socket='{socket}'/></domainbackup>"
KINDS = ("libvirt", "ssh", "qmp")
"""libvirt here, libvirt on another host over SSH, bare QEMUs."""
only_libvirt = pytest.mark.parametrize("kind", ["libvirt", "ssh"], indirect=True)
only_here = pytest.mark.parametrize("kind", ["libvirt"], indirect=True)
"""What has to do with this host's libvirtd."""
only_qmp = pytest.mark.parametrize("kind", ["qmp"], indirect=True)


def make_image(path: Path, format: str = "qcow2", size: int = 16 * MIB, options: str = "") -> Path:
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", format, *(["-o", options] if options else []), str(path), str(size)],
        check=True,
    )
    return path


@dataclass(frozen=True)
class Room:
    """Where libvirt runs machines, and a connection of the test's own to it."""

    host: Host
    connection: libvirt.virConnect
    uri: str


@dataclass
class BlankMachine:
    """A machine whose processor never runs: `disks` are its images by target."""

    host: Host
    connection: libvirt.virConnect
    domain: libvirt.virDomain
    folder: Path
    disks: dict[str, Path]
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def uuid(self) -> str:
        return str(self.domain.UUIDString())

    @property
    def name(self) -> str:
        return str(self.domain.name())

    def start(self) -> None:
        self.domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)

    def stop(self) -> None:
        """An orderly end of QEMU: bitmaps are saved into the images."""
        self.domain.destroyFlags(libvirt.VIR_DOMAIN_DESTROY_GRACEFUL)

    def kill(self) -> None:
        """The end that a power failure makes: nothing is saved."""
        kill = 'kill -9 "$(cat "$0")"'
        self.host.run(["sh", "-c", kill, f"/run/libvirt/qemu/{self.name}.pid"])
        deadline = time.monotonic() + END_SECONDS
        while self.domain.isActive():
            assert time.monotonic() < deadline, "libvirt did not notice that QEMU was killed"
            time.sleep(0.02)

    def write(self, target: str, offset: int, length: int, pattern: int = 0xAA) -> None:
        """What a guest would write."""
        lines = self._hmp("info block").splitlines()
        named = next(number for number, line in enumerate(lines) if str(self.disks[target]) in line)
        attached = next(line for line in lines[named:] if "Attached to:" in line)
        answer = self._hmp(f'qemu-io -d {attached.split()[-1]} "write -P {pattern} {offset} {length}"')
        assert "wrote" in answer or not answer.strip(), answer

    def _hmp(self, command: str) -> str:
        return str(
            libvirt_qemu.qemuMonitorCommand(self.domain, command, libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)
        )

    def request(self, job: str, base: str | None = None, *, full: tuple[str, ...] = ()) -> BackupRequest:
        """A backup of all disks: qcow2 ones incremental if there is a `base` and they are not in `full`."""
        asked = []
        for target, path in self.disks.items():
            tracks = path.suffix == ".qcow2"
            scratch = make_image(self.folder / f"sf-{job}-{target}.scratch", size=self.sizes[target])
            based = base if tracks and target not in full else None
            asked.append(DiskRequest(target, Mode.INCREMENTAL if based else Mode.FULL, based, scratch, tracks))
        return BackupRequest(f"sf-{job}", asked, ["hda"])

    def checkpoints(self) -> list[str]:
        return sorted(found.getName() for found in self.domain.listAllCheckpoints())

    def bitmaps(self, target: str) -> list[str]:
        """Names of the bitmaps that the image holds on disk."""
        from workers.hypervisors.host_files import bitmaps

        return sorted(bitmap.name for bitmap in bitmaps(LOCAL, self.disks[target], shared=True))

    def socket(self) -> Path:
        folder = Path("/var/lib/libvirt/qemu")
        [found] = self.host.names(folder, f"domain-{self.domain.ID()}-*")
        return folder / found / "another.sock"

    def taken_socket(self, job: str) -> Path:
        """Where the backup of `job` will want to listen."""
        return self.socket().with_name(f"sf-{job}.sock")

    def foreign_checkpoint(self, name: str) -> None:
        self.domain.checkpointCreateXML(f"<domaincheckpoint><name>{name}</name></domaincheckpoint>")

    def foreign_backup(self) -> None:
        """As another program would begin one."""
        self.domain.backupBegin(FOREIGN.format(socket=self.socket()), None)

    def foreign_backup_runs(self) -> bool:
        return "another.sock" in self.domain.backupGetXMLDesc()


def blank_xml(name: str, disks: dict[str, Path], extra: str = "") -> str:
    drives = "".join(
        f"<disk type='file' device='disk'><driver name='qemu' type='{path.suffix[1:]}'/><source file='{path}'/>"
        f"<target dev='{target}' bus='virtio'/></disk>"
        for target, path in disks.items()
    )
    return f"""<domain type='qemu'><name>{name}</name><uuid>{uuids.uuid4()}</uuid><memory unit='MiB'>32</memory>
    <vcpu>1</vcpu><os><type arch='x86_64' machine='pc'>hvm</type></os><devices>{drives}
    <disk type='file' device='cdrom'><target dev='hda' bus='ide'/><readonly/></disk>{extra}
    <controller type='usb' model='none'/><memballoon model='none'/></devices></domain>"""


@dataclass
class BlankFactory:
    """`factory({"vda": "qcow2"}, start=True)`: images of 16 MiB."""

    room: Room
    folder: Path
    made: list[BlankMachine] = field(default_factory=list)

    def __call__(
        self, formats: dict[str, str], *, start: bool = True, extra: str = "", size: int = 16 * MIB
    ) -> BlankMachine:
        name = f"sf-test-{os.getpid()}-hv{uuids.uuid4().hex[:6]}"
        folder = self.folder / name
        folder.mkdir(mode=0o755)
        disks = {target: make_image(folder / f"{target}.{format}", format, size) for target, format in formats.items()}
        domain = self.room.connection.defineXML(blank_xml(name, disks, extra))
        machine = BlankMachine(self.room.host, self.room.connection, domain, folder, disks, dict.fromkeys(disks, size))
        self.made.append(machine)
        if start:
            machine.start()
        return machine

    def close(self) -> None:
        for machine in self.made:
            if machine.domain.isActive():
                machine.domain.destroy()
            machine.domain.undefineFlags(
                libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
            )
            shutil.rmtree(machine.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def over_ssh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    """Another host. Only /tmp and its like are the same on both."""
    lab: Lab = request.getfixturevalue("lab")
    with ssh_host(lab, tmp_path_factory.mktemp("run")) as host:
        wire = SocketWire(host, "")
        connection = connect(wire.dial())
        yield Room(host, connection, config_of(lab).uri)
        connection.close()
        wire.close()


@pytest.fixture
def room(kind: str, request: pytest.FixtureRequest) -> Room:
    if kind == "ssh":
        found: Room = request.getfixturevalue("over_ssh")
        return found
    return Room(LOCAL, request.getfixturevalue("libvirt_host"), URI)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Which implementation of the seam."""
    return str(request.param)


@pytest.fixture
def blank(kind: str, request: pytest.FixtureRequest, guest_folder: Path) -> Iterator[BlankFactory | QmpFactory]:
    factory: BlankFactory | QmpFactory
    if kind == "qmp":
        factory = QmpFactory(guest_folder, request.getfixturevalue("qmp_folder"))
    else:
        factory = BlankFactory(request.getfixturevalue("room"), guest_folder)
    try:
        yield factory
    finally:
        factory.close()


@pytest.fixture
def qmp_folder(guest_folder: Path) -> Iterator[Path]:
    """Where the QMP sockets of this test's machines are; their runtime folder stands beside it."""
    base = guest_folder / f"qmp-{uuids.uuid4().hex[:6]}"
    (base / "qemu").mkdir(parents=True)
    yield base / "qemu"
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def hypervisor(kind: str, request: pytest.FixtureRequest) -> Iterator[Hypervisor]:
    if kind == "qmp":
        folder = request.getfixturevalue("qmp_folder")
        opened = open_hypervisor(f"qmp+unix://{folder}", name="lab", runtime_dir=folder.with_name("run"))
    else:
        room: Room = request.getfixturevalue("room")
        opened = open_hypervisor(room.uri, name="lab", host=room.host)
    yield opened
    opened.close()


@contextmanager
def connected(host: Host, export: Export) -> Iterator[nbd.NBD]:
    handle = nbd.NBD()
    handle.add_meta_context("base:allocation")
    if export.bitmap:
        handle.add_meta_context(export.bitmap)
    handle.set_export_name(export.name)
    with host.socket(Path(export.socket)) as socket:
        handle.connect_unix(str(socket))
        try:
            yield handle
        finally:
            handle.shutdown()


def dirty_ranges(host: Host, export: Export) -> list[tuple[int, int]]:
    """Ranges that changed since the base, as `(offset, length)`."""
    found: list[tuple[int, int]] = []

    def collect(context: str, offset: int, entries: list[int], _error: object) -> int:
        if context == export.bitmap:
            for length, flags in zip(entries[::2], entries[1::2], strict=True):
                if flags & 1:
                    found.append((offset, length))
                offset += length
        return 0

    with connected(host, export) as handle:
        assert export.bitmap is not None
        assert handle.can_meta_context(export.bitmap)
        handle.block_status(handle.get_size(), 0, collect)
    return found
