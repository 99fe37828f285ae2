"""Real machines for tests: made, found again after a killed run, removed.

Names and folders carry the process id of the test run that made them: several runs can share one libvirt, and what a
killed run left behind is recognised because its process is gone.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import libvirt

from orchestrator.demo.disks import make_empty_disk, make_ext4_disk
from orchestrator.demo.host import machines, remove_machine
from orchestrator.demo.in_guest import guest_hashes, guest_out, guest_run, wait_for_agent
from orchestrator.demo.tiny_guest import TinyDisk, TinyImage, define_tiny

MACHINE_PREFIX = "sf-test-"
FOLDER_PREFIX = "stillframe-test-"
MIB = 1 << 20


def fresh_folder() -> Path:
    """A folder that QEMU's user can pass through ($STILLFRAME_TEST_DIR or the system's place for temporary files)."""
    base = os.environ.get("STILLFRAME_TEST_DIR") or tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-", dir=base))
    folder.chmod(0o755)
    return folder


def remove_leftovers(connection: libvirt.virConnect) -> list[str]:
    """Remove machines and folders of test runs whose process is gone; what was removed."""
    removed = []
    for domain in machines(connection, MACHINE_PREFIX):
        if _owner_is_gone(domain.name(), MACHINE_PREFIX):
            removed.append(domain.name())
            remove_machine(domain)
    base = Path(os.environ.get("STILLFRAME_TEST_DIR") or tempfile.gettempdir())
    for folder in base.glob(f"{FOLDER_PREFIX}*"):
        if _owner_is_gone(folder.name, FOLDER_PREFIX):
            removed.append(str(folder))
            shutil.rmtree(folder)
    return removed


def _owner_is_gone(name: str, prefix: str) -> bool:
    found = re.fullmatch(re.escape(prefix) + r"(\d+)-.*", name)
    return found is not None and not Path("/proc", found.group(1)).exists()


@dataclass
class Guest:
    """A tiny guest of a test."""

    domain: libvirt.virDomain
    disks: list[TinyDisk]
    image: TinyImage
    folder: Path

    @property
    def name(self) -> str:
        return str(self.domain.name())

    @property
    def uuid(self) -> str:
        return str(self.domain.UUIDString())

    def disk(self, target: str) -> Path:
        return next(disk.path for disk in self.disks if disk.target == target)

    def run(self, command: str, *, timeout: float = 120.0) -> tuple[int, str]:
        return guest_run(self.domain, command, timeout=timeout)

    def out(self, command: str, *, timeout: float = 120.0) -> str:
        return guest_out(self.domain, command, timeout=timeout)

    def hashes(self, folder: str = "/data") -> dict[str, str]:
        return guest_hashes(self.domain, folder)

    def wait_for_word(self, word: str, *, timeout: float = 60.0) -> None:
        """Until the guest has said `word` on its console, which no freeze holds up."""
        console = self.folder / f"{self.name}.log"
        deadline = time.monotonic() + timeout
        while word not in console.read_text(errors="replace"):
            assert time.monotonic() < deadline, f"the guest never said {word}"
            time.sleep(0.05)

    def start(self) -> float:
        """Start and wait for the agent; the seconds until it answered."""
        self.domain.create()
        return wait_for_agent(self.domain)


@dataclass
class GuestFactory:
    """Makes tiny guests, and removes them all in `close`.

    `factory(disks={"vda": 64 * MIB}, formats={"vdb": "raw"}, ext4=True, agent=True, start=True)`."""

    connection: libvirt.virConnect
    image: TinyImage
    folder: Path
    made: list[Guest] = field(default_factory=list)
    numbers = itertools.count(1)

    def __call__(
        self,
        disks: dict[str, int] | None = None,
        *,
        label: str = "tiny",
        formats: dict[str, str] | None = None,
        ext4: bool = True,
        agent: bool = True,
        start: bool = True,
    ) -> Guest:
        """A guest with `disks` (target → bytes; two of 128 MiB if None); if `start`, booted until its agent answers.
        Without `agent`, `start` returns at once. `ext4=False`: the disks are empty."""
        name = f"{MACHINE_PREFIX}{os.getpid()}-{label}-{next(self.numbers)}"
        folder = self.folder / name
        folder.mkdir(mode=0o755)
        made = []
        for target, size in (disks if disks is not None else {"vda": 128 * MIB, "vdb": 128 * MIB}).items():
            kind = (formats or {}).get(target, "qcow2")
            path = folder / f"{target}.{kind}"
            (make_ext4_disk if ext4 else make_empty_disk)(path, size, format=kind)
            made.append(TinyDisk(target, path, kind))
        guest = Guest(
            define_tiny(self.connection, name, self.image, made, folder, agent=agent), made, self.image, folder
        )
        self.made.append(guest)
        if start and agent:
            guest.start()
        elif start:
            guest.domain.create()
        return guest

    def close(self) -> None:
        while self.made:
            guest = self.made.pop()
            remove_machine(guest.domain)
            shutil.rmtree(guest.folder, ignore_errors=True)
