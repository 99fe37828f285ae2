"""The tiny guest in a QEMU without libvirt: the same kernel and programs, started as an administrator would by hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import uuid as uuids
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.demo.disks import make_ext4_disk
from orchestrator.demo.tiny_guest import CMDLINE, TinyImage
from tests.contracts.qmp_blank import qmp, wait_for
from tests.guests.machines import MACHINE_PREFIX
from workers.contract.errors import GuestError
from workers.guests.agent import AgentChannel
from workers.hypervisors import agent_socket

BOOT_SECONDS = 120.0


def agent_at(socket: Path) -> AgentChannel:
    """The agent behind a socket of QEMU's."""

    def command(request: str, timeout: float) -> str:
        try:
            return agent_socket.ask(str(socket), request, timeout)
        except (agent_socket.AgentSilent, OSError) as error:
            raise GuestError(str(error)) from None

    return AgentChannel(command)


def out(agent: AgentChannel, command: str) -> str:
    """Standard output of a shell command in the guest."""
    ran = agent.run(["/bin/sh", "-c", command], timeout=120)
    assert ran.code == 0, (command, ran)
    return ran.out.decode()


def wait_for_agent(agent: AgentChannel, alive: Callable[[], bool] = lambda: True) -> None:
    deadline = time.monotonic() + BOOT_SECONDS
    while not agent.ping():
        assert alive(), "QEMU ended"
        assert time.monotonic() < deadline, "the agent did not answer"
        time.sleep(0.05)


def hashes(agent: AgentChannel) -> dict[str, str]:
    """SHA-256 of every file under /data: path → hex digits."""
    lines = out(agent, "find /data -type f | sort | xargs -r sha256sum").splitlines()
    return {path: digest for digest, path in (line.split(maxsplit=1) for line in lines)}


@dataclass
class QmpGuest:
    """A tiny guest with ext4 disks `vda`, `vdb`…; its QMP socket is in the folder `sockets`."""

    image: TinyImage
    folder: Path
    sockets: Path
    disks: dict[str, Path]
    name: str
    uuid: str = field(default_factory=lambda: str(uuids.uuid4()))
    process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def make(image: TinyImage, folder: Path, sockets: Path, sizes: dict[str, int]) -> QmpGuest:
        folder.mkdir(mode=0o755)
        disks = {target: folder / f"{target}.qcow2" for target in sizes}
        for target, path in disks.items():
            make_ext4_disk(path, sizes[target])
        return QmpGuest(image, folder, sockets, disks, f"{MACHINE_PREFIX}{os.getpid()}-bare")

    @property
    def monitor(self) -> Path:
        return self.sockets / f"{self.name}.sock"

    @property
    def control(self) -> Path:
        return self.folder / "control.sock"

    @property
    def agent(self) -> AgentChannel:
        return agent_at(self.folder / "qga.sock")

    def command(self) -> list[str]:
        drives = [
            word
            for target, path in self.disks.items()
            for word in (
                *("-drive", f"file={path},if=none,id=drive-{target},format=qcow2,discard=unmap"),
                *("-device", f"virtio-blk-pci,drive=drive-{target},id={target}"),
            )
        ]
        return [
            *("qemu-system-x86_64", "-machine", "pc", "-accel", "tcg", "-m", "256", "-nodefaults", "-nographic"),
            *("-kernel", str(self.image.kernel), "-initrd", str(self.image.initramfs), "-append", CMDLINE),
            *("-name", self.name, "-uuid", self.uuid, "-serial", f"file:{self.folder}/console.log"),
            *("-qmp", f"unix:{self.monitor},server=on,wait=off", "-qmp", f"unix:{self.control},server=on,wait=off"),
            *("-device", "virtio-serial", "-device", "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0"),
            *("-chardev", "socket,path=qga.sock,server=on,wait=off,id=qga0"),
            *drives,
        ]

    def start(self) -> None:
        self.process = subprocess.Popen(self.command(), cwd=self.folder, stdin=subprocess.DEVNULL)
        wait_for(self.control)
        wait_for_agent(self.agent, lambda: self.process is not None and self.process.poll() is None)

    def out(self, command: str) -> str:
        return out(self.agent, command)

    def hashes(self) -> dict[str, str]:
        return hashes(self.agent)

    def stop(self) -> None:
        """An orderly end of QEMU, and a hard one for the guest."""
        assert self.process is not None
        qmp(self.control, "quit")
        self.process.wait(60)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(60)

    def strays(self) -> list[str]:
        """Jobs, exports, scratch and bitmaps in QEMU that carry our names, but for one checkpoint's bitmaps."""
        nodes = qmp(self.control, "query-named-block-nodes", {"flat": True})
        names = [job["id"] for job in qmp(self.control, "query-jobs")]
        names += [export["id"] for export in qmp(self.control, "query-block-exports")]
        names += [node["node-name"] for node in nodes if node["node-name"].startswith("sf-")]
        bitmaps = {bitmap.get("name", "") for node in nodes for bitmap in node.get("dirty-bitmaps", [])} - {""}
        return names + sorted(bitmaps)[1:]

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
