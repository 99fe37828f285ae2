"""Machines of a bare QEMU whose processor never runs; the counterpart of `conftest.BlankMachine`.

Each has two monitors: one in the folder that is the hypervisor, and one of the test's own, for what a guest or somebody
else would do.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import uuid as uuids
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workers.contract.points import Mode
from workers.contract.seams import BackupRequest, DiskRequest
from workers.hosts.local import LOCAL
from workers.hypervisors.host_files import bitmaps

MIB = 1 << 20
PATIENCE = 30.0


def qmp(path: Path, command: str, arguments: dict[str, Any] | None = None) -> Any:
    """What a QEMU answers on its socket at `path`; asked without the code under test."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(PATIENCE)
        link.connect(str(path))
        with link.makefile("rw") as lines:
            lines.readline()
            for execute, given in (("qmp_capabilities", {}), (command, arguments or {})):
                lines.write(json.dumps({"execute": execute, "arguments": given}) + "\n")
                lines.flush()
                while "event" in (said := json.loads(lines.readline() or '{"return": null}')):
                    pass
    assert "return" in said, said
    return said["return"]


def wait_for(path: Path) -> None:
    """Until somebody listens on the socket."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as link:
                link.connect(str(path))
                return
        except OSError:
            assert time.monotonic() < deadline, f"nobody listens at {path}"
            time.sleep(0.01)


@dataclass
class QmpBlank:
    """`disks` are its images by target; targets are the ids of its devices."""

    sockets: Path
    runtime: Path
    folder: Path
    name: str
    disks: dict[str, Path]
    sizes: dict[str, int]
    extra: list[str] = field(default_factory=list)
    uuid: str = field(default_factory=lambda: str(uuids.uuid4()))
    process: subprocess.Popen[bytes] | None = None
    opened: list[socket.socket] = field(default_factory=list)

    @property
    def monitor(self) -> Path:
        return self.sockets / f"{self.name}.sock"

    @property
    def control(self) -> Path:
        return self.folder / "control.sock"

    def command(self) -> list[str]:
        drives = [
            word
            for target, path in self.disks.items()
            for word in (
                *("-drive", f"file={path},if=none,id=drive-{target},format={path.suffix[1:]}"),
                *("-device", f"virtio-blk-pci,drive=drive-{target},id={target}"),
            )
        ]
        return [
            *("qemu-system-x86_64", "-machine", "pc", "-accel", "tcg", "-m", "32", "-S", "-nodefaults"),
            *("-display", "none", "-device", "ide-cd,id=hda", "-name", f"guest={self.name}", "-uuid", self.uuid),
            *("-qmp", f"unix:{self.monitor},server=on,wait=off", "-qmp", f"unix:{self.control},server=on,wait=off"),
            *drives,
            *self.extra,
        ]

    def start(self) -> None:
        self.process = subprocess.Popen(self.command(), cwd=self.folder, stdin=subprocess.DEVNULL)
        wait_for(self.control)
        self.ask("query-status")  # answered when its images are open

    def stop(self) -> None:
        """An orderly end of QEMU: bitmaps are saved into the images."""
        if self.process is not None and self.process.poll() is None:
            self.ask("quit")
            self.process.wait(PATIENCE)

    def kill(self) -> None:
        """The end that a power failure makes: nothing is saved."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(PATIENCE)

    def ask(self, command: str, **arguments: Any) -> Any:
        return qmp(self.control, command, arguments)

    def node(self, target: str) -> str:
        nodes = self.ask("query-named-block-nodes", flat=True)
        path, driver = self.disks[target], self.disks[target].suffix[1:]
        return next(str(node["node-name"]) for node in nodes if (node["file"], node["drv"]) == (str(path), driver))

    def write(self, target: str, offset: int, length: int, pattern: int = 0xAA) -> None:
        """What a guest would write."""
        line = f'qemu-io -d /machine/peripheral/{target}/virtio-backend "write -P {pattern} {offset} {length}"'
        answer = self.ask("human-monitor-command", **{"command-line": line})
        assert "wrote" in answer or not answer.strip(), answer

    def request(self, job: str, base: str | None = None, *, full: tuple[str, ...] = ()) -> BackupRequest:
        """A backup of all disks: qcow2 ones incremental if there is a `base` and they are not in `full`."""
        asked = []
        for target, path in self.disks.items():
            tracks = path.suffix == ".qcow2"
            scratch = self.folder / f"sf-{job}-{target}.scratch"
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", scratch, str(self.sizes[target])], check=True)
            based = base if tracks and target not in full else None
            asked.append(DiskRequest(target, Mode.INCREMENTAL if based else Mode.FULL, based, scratch, tracks))
        return BackupRequest(f"sf-{job}", asked, ["hda"])

    def checkpoints(self) -> list[str]:
        """While it is off, those in its images."""
        if self.process is None or self.process.poll() is not None:
            return sorted({name for target in self.disks for name in self.bitmaps(target)})
        nodes = self.ask("query-named-block-nodes", flat=True)
        return sorted(
            {bitmap["name"] for node in nodes for bitmap in node.get("dirty-bitmaps", []) if "name" in bitmap}
        )

    def bitmaps(self, target: str) -> list[str]:
        """Names of the bitmaps that the image holds on disk."""
        return sorted(bitmap.name for bitmap in bitmaps(LOCAL, self.disks[target], shared=True))

    def taken_socket(self, job: str) -> Path:
        """Where the backup of `job` will want to listen."""
        return self.runtime / f"sf-{job}" / "nbd.sock"

    def foreign_checkpoint(self, name: str) -> None:
        self.ask("block-dirty-bitmap-add", node=self.node("vda"), name=name, persistent=True)

    def foreign_backup(self) -> None:
        """As another program would begin one."""
        scratch = self.folder / "theirs.qcow2"
        size = str(self.sizes["vda"])
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", scratch, size], check=True)
        node = self.node("vda")
        file = {"driver": "file", "filename": str(scratch)}
        self.ask("blockdev-add", **{"driver": "qcow2", "node-name": "theirs", "file": file, "backing": node})
        self.ask("blockdev-backup", **{"job-id": "another", "device": node, "target": "theirs", "sync": "none"})

    def foreign_backup_runs(self) -> bool:
        return [job["id"] for job in self.ask("query-jobs")] == ["another"]

    def close(self) -> None:
        for link in self.opened:
            link.close()
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.monitor.unlink(missing_ok=True)


@dataclass
class QmpFactory:
    """`factory({"vda": "qcow2"}, start=True)`: images of 16 MiB."""

    folder: Path
    sockets: Path
    made: list[QmpBlank] = field(default_factory=list)

    def __call__(
        self, formats: dict[str, str], *, start: bool = True, extra: list[str] | None = None, size: int = 16 * MIB
    ) -> QmpBlank:
        name = f"sf-test-{os.getpid()}-qm{uuids.uuid4().hex[:6]}"
        folder = self.folder / name
        folder.mkdir(mode=0o755)
        disks = {target: folder / f"{target}.{format}" for target, format in formats.items()}
        for path in disks.values():
            subprocess.run(["qemu-img", "create", "-q", "-f", path.suffix[1:], path, str(size)], check=True)
        machine = QmpBlank(
            self.sockets, self.sockets.with_name("run"), folder, name, disks, dict.fromkeys(disks, size), extra or []
        )
        self.made.append(machine)
        if start:
            machine.start()
        return machine

    def close(self) -> None:
        for machine in self.made:
            machine.close()
