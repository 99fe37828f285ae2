"""Where the demo lives: one folder, two machines, and how both are made and removed again.

A marker file shows that the folder is the demo's: `--clean` removes a folder only with it, and only machines of the
demo's names whose disks lie inside. A mistyped `--dir /home` must end in an error, not in an empty /home.
"""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from orchestrator.demo.disks import make_ext4_disk
from orchestrator.demo.host import connect, machines, remove_machine
from orchestrator.demo.tiny_guest import (
    TinyDisk,
    build_tiny_image,
    default_cache,
    define_tiny,
    require_traversable,
)
from workers.contract.errors import HypervisorUnreachable, TargetExists, UsageError

if TYPE_CHECKING:
    import libvirt

DEFAULT = Path("/var/lib/stillframe-demo")
MARKER = ".stillframe-demo"

_MIB = 1 << 20
DISKS = {"vda": 1024 * _MIB, "vdb": 512 * _MIB}
_DATABASE = 64 * _MIB
_CONFIG = """\
# Made by `stillframe demo`. Paths are relative to this file's folder.
[vaults.main]
url = "file://./vault"
key_file = "main.key"

[hypervisors.local]
uri = "qemu:///system"

[paths]
state = "state"
scratch = "scratch"
runtime = "run"
"""


@dataclass(frozen=True, slots=True)
class Place:
    """The demo's folder, and how its machines are named."""

    root: Path
    prefix: str = "stillframe-demo-"

    @property
    def machine(self) -> str:
        """Name of the machine that is backed up."""
        return f"{self.prefix}web"

    @property
    def copy(self) -> str:
        """Name of the machine that is restored."""
        return f"{self.prefix}restored"

    @property
    def config(self) -> Path:
        return self.root / "stillframe.toml"

    @property
    def phrase(self) -> Path:
        """The vault's recovery phrase, which a real user would write down elsewhere."""
        return self.root / "recovery-phrase.txt"

    @property
    def restored(self) -> Path:
        return self.root / "restored"

    @property
    def disks(self) -> list[TinyDisk]:
        return [TinyDisk(target, self.root / "machine" / f"{target}.qcow2") for target in DISKS]

    def make(self) -> None:
        """Make the folder and the configuration, as far as they are missing. Raises UsageError, GuestBuildError."""
        marker = self.root / MARKER
        if self.root.exists() and not marker.exists() and any(self.root.iterdir()):
            raise UsageError(f"{self.root} holds things that are not the demo's", hint="choose another --dir")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except PermissionError:
            raise UsageError(f"{self.root} cannot be made by this user", hint="run the demo as root") from None
        # QEMU runs as another user: it may pass through, not look around.
        self.root.chmod(0o711)
        require_traversable(self.root)
        marker.touch()
        for name in ("machine", "restored", "scratch"):
            (self.root / name).mkdir(mode=0o711, exist_ok=True)
        if not self.config.exists():
            self.config.write_text(_CONFIG)

    def write_phrase(self, phrase: str) -> None:
        with os.fdopen(os.open(self.phrase, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(phrase + "\n")

    def web(self, connection: libvirt.virConnect) -> libvirt.virDomain:
        """The demo's machine: as it is, or made anew, with its disks. Raises TargetExists, GuestBuildError."""
        for domain in self._named(connection, self.machine):
            self._require_ours(domain)
            if all(disk.path.exists() for disk in self.disks):
                return domain
            remove_machine(domain)
        cache = default_cache() if default_cache().is_dir() else self.root / "cache"
        image = build_tiny_image(self.root / "machine", cache)
        for disk in self.disks:
            if not disk.path.exists():
                self._make_disk(disk)
        # The same folder, the same machine: points of an earlier demo stay its points.
        identity = str(uuid.uuid5(uuid.NAMESPACE_URL, f"file://{self.root}"))
        return define_tiny(connection, self.machine, image, self.disks, self.root / "machine", uuid=identity)

    def _make_disk(self, disk: TinyDisk) -> None:
        content = self.root / "machine" / f"content-{disk.target}"
        shutil.rmtree(content, ignore_errors=True)
        content.mkdir()
        try:
            if disk.target == "vda":
                # Real files of many sizes that compress as real files do.
                library = Path(os.__file__).parent
                ignore = shutil.ignore_patterns("__pycache__", "site-packages", "dist-packages", "test")
                shutil.copytree(library, content / "site", ignore=ignore, symlinks=True)
            else:
                (content / "database.bin").write_bytes(os.urandom(_DATABASE))
            make_ext4_disk(disk.path, DISKS[disk.target], content=content)
        finally:
            shutil.rmtree(content)

    def drop_restored(self, connection: libvirt.virConnect) -> None:
        """Remove the machine that an earlier demo restored, with its disks. Raises TargetExists."""
        for domain in self._named(connection, self.copy):
            self._require_ours(domain)
            remove_machine(domain)
        shutil.rmtree(self.restored, ignore_errors=True)
        self.restored.mkdir(mode=0o711)

    def clean(self) -> list[str]:
        """Remove the demo's machines and folder; what was removed. Raises UsageError for a folder not the demo's."""
        if self.root.exists() and not (self.root / MARKER).exists():
            raise UsageError(f"{self.root} was not made by the demo", hint="nothing was removed")
        removed = []
        try:
            connection = connect()
        except HypervisorUnreachable:
            if self.root.exists():
                raise
            return []
        for domain in machines(connection, self.prefix):
            if self._is_ours(domain):
                removed.append(f"machine {domain.name()}")
                remove_machine(domain)
                Path("/var/log/libvirt/qemu", f"{domain.name()}.log").unlink(missing_ok=True)
        connection.close()
        if self.root.exists():
            shutil.rmtree(self.root)
            removed.append(str(self.root))
        return removed

    def _named(self, connection: libvirt.virConnect, name: str) -> list[libvirt.virDomain]:
        return [domain for domain in machines(connection, self.prefix) if domain.name() == name]

    def _require_ours(self, domain: libvirt.virDomain) -> None:
        if not self._is_ours(domain):
            raise TargetExists(
                f"a machine {domain.name()} exists whose disks are not in {self.root}",
                hint="another demo's? stillframe demo --clean --dir ITS_FOLDER",
            )

    def _is_ours(self, domain: libvirt.virDomain) -> bool:
        """Whether all disks of the machine lie in our folder."""
        tree = ElementTree.fromstring(domain.XMLDesc())
        sources = [source.get("file") for source in tree.iterfind("devices/disk/source")]
        return bool(sources) and all(source and Path(source).is_relative_to(self.root) for source in sources)
