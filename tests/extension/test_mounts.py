"""Which file systems are named, from recorded tables of the kernel: what few machines have together in life."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.extension.sandbox import ROOT, VERSION, Sandbox
from workers.contract.guests import Quiesced

VDA, VDB, SCSI, SATA = (
    "pci0000:00/0000:00:07.0/virtio3/block/vda",
    "pci0000:00/0000:00:02.0/0000:01:00.0/virtio4/block/vdb",
    "pci0000:00/0000:00:05.0/virtio2/host2/target2:0:1/2:0:1:3/block/sda",
    "pci0000:00/0000:00:1f.2/ata3/host4/target4:0:0/4:0:0:0/block/sdb",
)
A, B, S = "pci:0000:00:07.0", "pci:0000:01:00.0", "pci:0000:00:05.0/0:1:3"


@dataclass
class Kernel:
    """A folder that stands for /sys, and a table of mounts, in the place of the real ones."""

    sandbox: Sandbox
    folder: Path
    table: str = "29 1 0:25 / /run rw - tmpfs run rw\n"
    number: int = 30

    def disk(self, path: str, device: str, *partitions: tuple[str, str]) -> None:
        self._device(path, device)
        for name, number in partitions:
            self._device(f"{path}/{name}", number)
            (self.folder / "sys/devices" / path / name / "partition").write_text("1\n")

    def virtual(self, name: str, device: str, *slaves: str, file: str = "") -> None:
        place = self._device(f"virtual/block/{name}", device)
        for slave in slaves:
            (place / "slaves").mkdir(exist_ok=True)
            (place / "slaves" / slave).symlink_to(self.folder / "sys/class/block" / slave)
        if file:
            (place / "loop").mkdir()
            (place / "loop" / "backing_file").write_text(f"{file}\n")

    def btrfs(self, *names: str) -> None:
        devices = self.folder / "sys/fs/btrfs/4d3f/devices"
        devices.mkdir(parents=True)
        for name in names:
            (devices / name).symlink_to(self.folder / "sys/class/block" / name)

    def _device(self, path: str, device: str) -> Path:
        place = self.folder / "sys/devices" / path
        place.mkdir(parents=True)
        (place / "dev").write_text(f"{device}\n")
        for link in (f"sys/dev/block/{device}", f"sys/class/block/{place.name}"):
            (self.folder / link).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / link).symlink_to(place)
        return place

    def mount(
        self, device: str, point: str, kind: str = "ext4", source: str = "/dev/x", options: str = "rw", root: str = "/"
    ) -> None:
        """`point` as it is: it is made, and escaped in the table."""
        raw = point.encode("utf-8", "surrogateescape")
        self.sandbox.out(f"mkdir -p \"$(printf '{''.join(f'%c{byte:03o}' % 92 for byte in raw)}')\"")
        escaped = "".join(f"\\{byte:03o}" if byte in b" \t\n\\" else chr(byte) for byte in raw)
        self.number += 1
        self.table += f"{self.number} 1 {device} {root} {escaped} rw,relatime - {kind} {source} {options},seclabel\n"

    def quiesced(self, *skip: str) -> Quiesced:
        (self.folder / "mountinfo").write_bytes(self.table.encode("latin-1"))
        words = [word for address in skip for word in ("--skip-disk", address)]
        said = self.sandbox.ext("quiesce", "--job", "j", *words)
        assert said.code == 0, said
        assert said.err == ""
        return Quiesced.model_validate(said.answer)


@pytest.fixture
def kernel(installed: Sandbox) -> Kernel:
    folder = installed.seen / "kernel"
    for name in ("lib/mounts.sh",):
        path = f"{ROOT}/{VERSION}/{name}"
        installed.out(f"sed -i 's#/proc/self/mountinfo#{folder}/mountinfo#; s#/sys/#{folder}/sys/#g' {path}")
    made = Kernel(installed, folder)
    made.disk(VDA, "254:0", ("vda1", "254:1"), ("vda2", "254:2"))
    made.disk(VDB, "254:16")
    made.disk(SCSI, "8:0", ("sda1", "8:1"))
    made.disk(SATA, "8:16")
    return made


def test_each_device_once_inner_ones_first(kernel: Kernel) -> None:
    kernel.mount("0:21", "/run/m/proc", "proc", "proc")
    kernel.mount("254:1", "/run/m")
    kernel.mount("254:16", "/run/m/data", "xfs")
    kernel.mount("254:16", "/run/m/bind", "xfs", root="/sub")
    kernel.mount("0:30", "/run/m/nfs", "nfs4", "host:/x")
    kernel.mount("0:31", "/run/m/overlay", "overlay", "overlay")
    kernel.mount("7:0", "/run/m/snap", "squashfs", options="ro")
    kernel.mount("7:1", "/run/m/boot", "vfat")
    kernel.mount("8:1", "/run/m/fixed", "ext4", options="ro")
    kernel.mount("8:16", "/run/m/new", "newfs")
    found = kernel.quiesced()
    assert found.mounts == ["/run/m/new", "/run/m/data", "/run/m"]
    assert not found.partial


def test_a_file_that_is_bound_upon_is_no_mount_point(kernel: Kernel) -> None:
    kernel.mount("254:1", "/run/m/file")
    kernel.sandbox.out("rmdir /run/m/file; touch /run/m/file")
    kernel.mount("254:1", "/run/m/folder")
    assert kernel.quiesced().mounts == ["/run/m/folder"]


@pytest.mark.parametrize(
    "name", ["with space", 'quo"te', "back\\slash", "new\nline", "t\tab", "Größe", "日本", "%s $x `y`"]
)
def test_names_are_kept_exactly(kernel: Kernel, name: str) -> None:
    kernel.mount("254:1", f"/run/m/{name}")
    found = kernel.quiesced()
    assert found.mounts == [f"/run/m/{name}"]
    assert kernel.sandbox.out("cat /run/stillframe/job.*/mounts") == f"/run/m/{name}\n"


@pytest.mark.parametrize(
    "raw", [b"\xff", b"ab\xc3", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe0\x80\x80"]
)
def test_a_name_that_json_cannot_say_is_left_out(kernel: Kernel, raw: bytes) -> None:
    kernel.mount("254:1", "/run/m/" + raw.decode("utf-8", "surrogateescape"))
    kernel.mount("254:16", "/run/m/fine")
    found = kernel.quiesced()
    assert found.mounts == ["/run/m/fine"]
    assert found.partial
    assert "UTF-8" in found.notes[0]


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_no_watchdog_where_its_memory_is_a_disk(kernel: Kernel, kind: str) -> None:
    """It writes that it fired before it thaws. The table is in no order that one could rely on."""
    kernel.table += "28 1 254:1 / / rw - ext4 /dev/vda1 rw\n"
    assert kernel.quiesced().watchdog
    kernel.table = kernel.table.replace("tmpfs run", f"{kind} /dev/vda1").replace("0:25", "254:1")
    found = kernel.quiesced()
    assert not found.watchdog
    assert "/run" in found.watchdog_detail


class TestSkippedDisks:
    def test_partitions_and_controllers(self, kernel: Kernel) -> None:
        for device, name in {"254:1": "a1", "254:2": "a2", "254:16": "b", "8:1": "s", "8:16": "sata"}.items():
            kernel.mount(device, f"/run/m/{name}")
        assert kernel.quiesced(A).mounts == ["/run/m/sata", "/run/m/s", "/run/m/b"]
        assert kernel.quiesced(B, S).mounts == ["/run/m/sata", "/run/m/a2", "/run/m/a1"]
        assert kernel.quiesced("pci:0000:00:05.0").mounts[1] == "/run/m/s", "another address than the disk's"
        assert len(kernel.quiesced("pci:0000:00:1f.2/0:0:0", "pci:0000:00:1f.2").mounts) == 5, "nobody knows SATA's"
        assert kernel.quiesced(A).partial
        assert not kernel.quiesced("pci:0000:00:09.0").partial

    def test_on_several_disks_only_if_all_are_skipped(self, kernel: Kernel) -> None:
        kernel.virtual("md0", "9:0", "vda2", "vdb")
        kernel.virtual("dm-0", "253:0", "md0")
        kernel.virtual("dm-1", "253:1", "vdb")
        kernel.mount("253:0", "/run/m/both", "xfs")
        kernel.mount("253:1", "/run/m/one")
        assert kernel.quiesced(B).mounts == ["/run/m/both"]
        assert kernel.quiesced(A).mounts == ["/run/m/one", "/run/m/both"]
        assert kernel.quiesced(A, B).mounts == []

    def test_loop_devices_follow_their_file(self, kernel: Kernel) -> None:
        kernel.virtual("loop0", "7:0", file="/run/m/b/dir/disk.img")
        kernel.virtual("loop1", "7:1", file="/run/m/bx/disk.img")
        kernel.virtual("loop2", "7:2", file="/dev/vdb")
        kernel.virtual("loop3", "7:3", file="/nowhere/known")
        kernel.mount("254:1", "/run/m")
        kernel.mount("254:16", "/run/m/b")
        for number in range(4):
            kernel.mount(f"7:{number}", f"/run/m/loop{number}")
        assert kernel.quiesced(B).mounts == ["/run/m/loop3", "/run/m/loop1", "/run/m"]
        assert kernel.quiesced().mounts[-2:] == ["/run/m/b", "/run/m"]

    def test_btrfs_and_all_its_disks(self, kernel: Kernel) -> None:
        kernel.btrfs("vda2", "vdb")
        kernel.mount("0:40", "/run/m/one", "btrfs", "/dev/vda2")
        kernel.mount("0:40", "/run/m/sub", "btrfs", "/dev/vda2", root="/sub")
        assert kernel.quiesced(A).mounts == ["/run/m/one"]
        assert kernel.quiesced(A, B).mounts == []
        assert kernel.quiesced().mounts == ["/run/m/one"]

    def test_what_is_not_known_is_frozen(self, kernel: Kernel) -> None:
        kernel.virtual("ram0", "1:0")
        kernel.mount("1:0", "/run/m/ram")
        kernel.mount("99:9", "/run/m/lost")
        assert kernel.quiesced(A, B, S).mounts == ["/run/m/lost", "/run/m/ram"]
