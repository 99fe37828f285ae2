"""Machines that run without running: QEMU is up and its CPUs stand still.

Most faults have to do with disks, bitmaps and jobs, for which QEMU is all that is needed; a guest would take seconds
to boot and write when it likes. Writes go through QEMU's own disks by its monitor, so that bitmaps and running backups
see them, and the test knows every byte.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import libvirt
import libvirt_qemu

from tests.guests.machines import MIB, Guest, GuestFactory
from workers.hypervisors.libvirt_host import END_SECONDS

SIZE = 8 * MIB
CREATED_PAUSED: int = libvirt.VIR_DOMAIN_START_PAUSED


@dataclass
class Paused:
    """A machine with empty disks; `content` is what each must hold."""

    guest: Guest
    content: dict[str, bytearray] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.guest.name

    @property
    def domain(self) -> libvirt.virDomain:
        return self.guest.domain

    def start(self) -> None:
        self.domain.createWithFlags(CREATED_PAUSED)

    def write(self, target: str, at: int, length: int, byte: int) -> None:
        """Fill a range with one byte, 0 too; by the running QEMU, or in the image of a machine that is off."""
        command = f"write -P {byte} {at} {length}"
        if self.domain.isActive():
            self._monitor(f'qemu-io -d {self._device(target)} "{command}"')
            self._monitor(f"qemu-io -d {self._device(target)} flush")
        else:
            subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, self.guest.disk(target)], check=True, stdout=-3)
        disk = self.content.setdefault(target, bytearray(SIZE))
        disk[at : at + length] = bytes([byte]) * length

    def _device(self, target: str) -> str:
        """QEMU's path of the disk: the alias that libvirt gave it tells."""
        found = re.search(rf"<target dev='{target}'.*?<alias name='([\w-]+)'/>", self.domain.XMLDesc(0), re.DOTALL)
        assert found is not None
        return f"/machine/peripheral/{found[1]}/virtio-backend"

    def _monitor(self, command: str) -> None:
        answer = libvirt_qemu.qemuMonitorCommand(self.domain, command, libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)
        assert "rror" not in answer, answer
        assert "failed" not in answer, answer

    def qmp(self, command: str, **arguments: object) -> object:
        """QEMU's own answer."""
        text = json.dumps({"execute": command, "arguments": arguments})
        answer: dict[str, object] = json.loads(libvirt_qemu.qemuMonitorCommand(self.domain, text, 0))
        return answer["return"]

    def nodes_with(self, bitmap: str) -> dict[str, str]:
        """Image file → QEMU's node that holds `bitmap`."""
        nodes = self.qmp("query-named-block-nodes")
        assert isinstance(nodes, list)
        return {
            node["file"]: node["node-name"]
            for node in nodes
            if bitmap in [each["name"] for each in node.get("dirty-bitmaps", [])]
        }

    def stop(self) -> None:
        """End QEMU in order: bitmaps are stored in the images."""
        self.domain.destroyFlags(libvirt.VIR_DOMAIN_DESTROY_GRACEFUL)

    def kill(self) -> None:
        """QEMU dies as after a power cut; returns when libvirt has noticed."""
        os.kill(int(Path(f"/run/libvirt/qemu/{self.name}.pid").read_text()), signal.SIGKILL)
        deadline = time.monotonic() + END_SECONDS
        while self.domain.isActive():
            assert time.monotonic() < deadline, "libvirt did not notice"
            time.sleep(0.02)


def paused_machine(factory: GuestFactory, *targets: str, start: bool = True, label: str = "paused") -> Paused:
    """A machine with empty disks of 8 MiB under `targets`."""
    guest = factory(dict.fromkeys(targets or ("vda", "vdb"), SIZE), ext4=False, start=False, label=label)
    machine = Paused(guest, {target: bytearray(SIZE) for target in targets or ("vda", "vdb")})
    if start:
        machine.start()
    return machine
