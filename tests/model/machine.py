"""A real machine whose processor never runs, and a picture of every byte on its disks.

QEMU's block layer, libvirt's checkpoints and qcow2 are what a model in memory cannot know; a guest is not needed for
them, and without one nothing is written that the picture does not hold. Writes go through the running QEMU's own
disks by its monitor, so that bitmaps and running backups see them, and into the images while the machine is off.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import libvirt
import libvirt_qemu

from orchestrator.demo.host import remove_machine
from tests.guests.machines import MACHINE_PREFIX
from workers.hypervisors.libvirt_host import END_SECONDS

CHUNK = 64 << 10
_EMPTY = bytes(CHUNK)


@dataclass
class Picture:
    """The content of a disk: chunks that are not zero."""

    size: int
    chunks: dict[int, bytes] = field(default_factory=dict)

    def fill(self, start: int, length: int, byte: int) -> None:
        end = start + length
        for number in range(start // CHUNK, -(-end // CHUNK)):
            low, high = max(start - number * CHUNK, 0), min(end - number * CHUNK, CHUNK)
            chunk = bytearray(self.chunks.get(number, _EMPTY))
            chunk[low:high] = bytes([byte]) * (high - low)
            self._set(number, bytes(chunk))

    def resize(self, size: int) -> None:
        if size < self.size:
            self.fill(size, self.size - size, 0)
        self.size = size

    def copy(self) -> Picture:
        return Picture(self.size, dict(self.chunks))

    def difference(self, image: Path) -> str:
        """What is wrong in the raw `image`; empty: nothing."""
        if image.stat().st_size != self.size:
            return f"{image.stat().st_size} bytes instead of {self.size}"
        with image.open("rb") as file:
            for number in range(-(-self.size // CHUNK)):
                found, expected = file.read(CHUNK), self.chunks.get(number, _EMPTY)
                if found != expected[: len(found)]:
                    at = next(at for at, byte in enumerate(found) if byte != expected[at])
                    return f"byte {number * CHUNK + at} is {found[at]} instead of {expected[at]}"
        return ""

    def _set(self, number: int, chunk: bytes) -> None:
        if chunk == _EMPTY:
            self.chunks.pop(number, None)
        else:
            self.chunks[number] = chunk


@dataclass
class ModelMachine:
    """`disks` are the images by target, `pictures` what they must hold."""

    connection: libvirt.virConnect
    folder: Path
    domain: libvirt.virDomain
    disks: dict[str, Path] = field(default_factory=dict)
    pictures: dict[str, Picture] = field(default_factory=dict)
    made: int = 0

    @staticmethod
    def define(connection: libvirt.virConnect, folder: Path) -> ModelMachine:
        """A machine without disks, shut off."""
        name = f"{MACHINE_PREFIX}{os.getpid()}-model-{uuid.uuid4().hex[:6]}"
        domain = connection.defineXML(
            f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>"
            "<os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features>"
            "<devices><controller type='usb' model='none'/><memballoon model='none'/></devices></domain>"
        )
        return ModelMachine(connection, folder, domain)

    @property
    def name(self) -> str:
        return str(self.domain.name())

    @property
    def on(self) -> bool:
        return bool(self.domain.isActive())

    @property
    def defined(self) -> bool:
        return self.name in [domain.name() for domain in self.connection.listAllDomains()]

    def remove(self) -> None:
        remove_machine(self.domain)

    # --- power -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)

    def stop(self) -> None:
        """QEMU ends in order: bitmaps are stored in the images."""
        self.domain.destroyFlags(libvirt.VIR_DOMAIN_DESTROY_GRACEFUL)

    def kill(self) -> None:
        """As a power cut after a flush: what was written is there, bitmaps are not stored."""
        for target in self.disks:
            self._command(target, "flush")
        os.kill(int(Path(f"/run/libvirt/qemu/{self.name}.pid").read_text()), 9)
        deadline = time.monotonic() + END_SECONDS
        while self.domain.isActive():
            assert time.monotonic() < deadline, "libvirt did not notice that QEMU was killed"
            time.sleep(0.01)

    # --- disks -----------------------------------------------------------------------------------------------------

    def add(self, target: str, size: int, format: str = "qcow2") -> None:
        """A new empty disk, plugged into the running QEMU too."""
        self.made += 1
        path = self.folder / f"{self.made}-{target}.{format}"
        subprocess.run(["qemu-img", "create", "-q", "-f", format, str(path), str(size)], check=True)
        path.chmod(0o666)
        self.domain.attachDeviceFlags(self._xml(target, path), self._affected())
        self.disks[target], self.pictures[target] = path, Picture(size)

    def remove_disk(self, target: str) -> None:
        """Only while it is off: unplugging needs a guest that answers."""
        self.domain.detachDeviceFlags(self._xml(target, self.disks[target]), libvirt.VIR_DOMAIN_AFFECT_CONFIG)
        self.disks.pop(target).unlink()
        del self.pictures[target]

    def resize(self, target: str, size: int) -> None:
        if self.on:
            self.domain.blockResize(target, size, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
        else:
            argv = ["qemu-img", "resize", "-q", "--shrink", "-f", self._format(target), str(self.disks[target])]
            subprocess.run([*argv, str(size)], check=True)
        self.pictures[target].resize(size)

    def fill(self, target: str, start: int, length: int, byte: int) -> None:
        self._command(target, f"write -P {byte} {start} {length}")
        self.pictures[target].fill(start, length, byte)

    def zero(self, target: str, start: int, length: int) -> None:
        """Zeroes that are known to be zeroes."""
        self._command(target, f"write -z -u {start} {length}")
        self.pictures[target].fill(start, length, 0)

    def discard(self, target: str, start: int, length: int) -> None:
        """Whole clusters: parts of one would keep their content."""
        self._command(target, f"discard {start} {length}")
        self.pictures[target].fill(start, length, 0)

    def difference(self, target: str) -> str:
        """What the image holds that the picture does not; empty: nothing. Nobody writes meanwhile."""
        self._command(target, "flush")
        raw = self.folder / "as-it-is.raw"
        argv = ["qemu-img", "convert", "-U", "-f", self._format(target), "-O", "raw", str(self.disks[target]), str(raw)]
        subprocess.run(argv, check=True)
        return self.pictures[target].difference(raw)

    def _command(self, target: str, command: str) -> None:
        if self.on:
            said = libvirt_qemu.qemuMonitorCommand(
                self.domain,
                f'qemu-io -d {self._device(target)} "{command}"',
                libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP,
            )
            assert not re.search("rror|failed|invalid", said), said
        else:
            argv = ["qemu-io", "-d", "unmap", "-f", self._format(target), "-c", command, str(self.disks[target])]
            done = subprocess.run(argv, capture_output=True, text=True, check=True)
            assert not re.search("rror|failed|invalid", done.stdout + done.stderr), (command, done.stdout, done.stderr)

    def _device(self, target: str) -> str:
        """QEMU's path of the disk: the alias that libvirt gave it tells."""
        found = re.search(rf"<target dev='{target}'.*?<alias name='([\w-]+)'/>", self.domain.XMLDesc(0), re.DOTALL)
        assert found is not None
        return f"/machine/peripheral/{found[1]}/virtio-backend"

    def _format(self, target: str) -> str:
        return self.disks[target].suffix[1:]

    def _affected(self) -> int:
        config: int = libvirt.VIR_DOMAIN_AFFECT_CONFIG
        return config | libvirt.VIR_DOMAIN_AFFECT_LIVE if self.on else config

    @staticmethod
    def _xml(target: str, path: Path) -> str:
        return (
            f"<disk type='file' device='disk'><driver name='qemu' type='{path.suffix[1:]}' discard='unmap'/>"
            f"<source file='{path}'/><target dev='{target}' bus='virtio'/></disk>"
        )

    # --- what can happen to checkpoints ----------------------------------------------------------------------------

    def checkpoints(self) -> list[str]:
        return sorted(found.getName() for found in self.domain.listAllCheckpoints())

    def lose_metadata(self) -> None:
        """libvirt forgets all checkpoints; the bitmaps stay."""
        for checkpoint in self.domain.listAllCheckpoints():
            checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)

    def lose_bitmaps(self, target: str) -> None:
        """The bitmaps of one disk are removed from its image behind libvirt's back; while it is off."""
        from workers.hosts.local import LOCAL
        from workers.hypervisors.host_files import bitmaps, remove_bitmap

        for bitmap in bitmaps(LOCAL, self.disks[target], shared=False) if self._format(target) == "qcow2" else []:
            remove_bitmap(LOCAL, self.disks[target], bitmap.name)
