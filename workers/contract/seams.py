"""The seams: what the moves (snapshot, transfer, restore) need of the parts.

Each has one contract suite in `tests/contracts/` that every implementation passes. Optional abilities are data
(`Features`), never `hasattr`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

from workers.contract.extents import Extent
from workers.contract.guests import GuestInfo, GuestOs, Quiesced, Ran, Resumed, Status
from workers.contract.hosts import Host
from workers.contract.machines import Inventory, Leftovers, MachineSummary
from workers.contract.points import Consistency, Mode

# --- hypervisors -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Features:
    """What a hypervisor can do."""

    version: str
    """Of the remote side, for people."""
    backup: bool
    """Pull-mode backup with checkpoints."""
    knows_off: bool = True
    """Machines that are off are known too, and can be backed up."""
    drop_checkpoint: str = "virsh checkpoint-delete {machine} {checkpoint}"
    """What a person types to remove a checkpoint by hand."""
    thaw_hint: str = "virsh domfsthaw {machine}"
    """And to thaw a guest."""


@dataclass(frozen=True, slots=True)
class DiskRequest:
    """One disk of a backup to begin. `scratch` exists already, qcow2, of the disk's exact capacity."""

    target: str
    mode: Mode
    base: str | None
    """Checkpoint to read changes since; None when full."""
    scratch: Path
    tracks_changes: bool
    """Include it in the new checkpoint."""


@dataclass(frozen=True, slots=True)
class BackupRequest:
    """One pull-mode backup across all `disks`, in one transaction (one point in time)."""

    name: str
    """`sf-<job>`: in checkpoint, socket and scratch names, so that ownership can be proved (invariant 4)."""
    disks: list[DiskRequest]
    excluded: list[str] = field(default_factory=list)
    """Targets that take no part."""


@dataclass(frozen=True, slots=True)
class Export:
    """Where one disk of a snapshot can be read over NBD."""

    target: str
    socket: str
    """On the hypervisor's host."""
    name: str
    """NBD export name."""
    bitmap: str | None
    """Full name of the meta context with the changes since the base (`qemu:dirty-bitmap:…`), if incremental."""


@dataclass(frozen=True, slots=True)
class Begun:
    exports: list[Export]
    checkpoint_xml: str | None


class GuestChannel(Protocol):
    """A way into one guest. Raises GuestError; every call returns within a time limit: its own or the one given."""

    def info(self) -> GuestInfo:
        """What can be done over this channel, right now."""
        ...

    def ping(self) -> bool:
        """Whether somebody answers; never raises GuestError."""
        ...

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float) -> Ran:
        """Run a program (no shell in between) as root or SYSTEM; its output, as far as the channel carries it (2 MiB
        always; who needs more gets a file). Raises GuestTimeout if it has not ended after `timeout` seconds: it may go
        on in the guest, which nobody outside can stop over an agent. A child that keeps the program's stdout open
        counts as the program."""
        ...

    def put_file(self, path: str, data: bytes) -> None:
        """Write a whole file, replacing one that is there. Its mode is the guest's affair: put it into a folder that
        only root can enter."""
        ...

    def get_file(self, path: str, *, limit: int) -> bytes:
        """At most the first `limit` bytes of a file."""
        ...

    def freeze(self, mounts: Sequence[str] = ()) -> int:
        """Freeze these mount points, or all file systems; the number frozen. After an error the guest may be frozen,
        or become so later, all the same: thaw."""
        ...

    def thaw(self) -> int:
        """Thaw what is frozen; the number thawed. Allowed at any time, by anybody (invariant 4)."""
        ...

    def frozen(self) -> bool: ...

    def close(self) -> None: ...


class Extension(Protocol):
    """The extension in one guest, over a channel: one implementation per kind of guest. Raises GuestError;
    ExtensionError for an answer that makes no sense, or a package that cannot be put in place."""

    def status(self, uuid: str) -> Status | None:
        """None: not installed. A machine whose UUID is not the one it was installed for (a clone, a restored copy)
        has its state reset by this call."""
        ...

    def install(self, package: Package, uuid: str) -> Status:
        """Install, or upgrade side by side; on any failure the version before is in force again. Raises
        PackageRefused for a downgrade, or another system's package."""
        ...

    def uninstall(self) -> bool:
        """False: there was none. Raises Busy while a job holds the guest."""
        ...

    def quiesce(self, request: QuiesceRequest) -> Quiesced:
        """Arm the watchdog, run the pre scripts. Whatever this came to, call `resume` afterwards."""
        ...

    def resume(self, job: str) -> Resumed:
        """Run the post scripts, disarm the watchdog. Idempotent. Only after the thaw: a frozen agent runs nothing."""
        ...


@dataclass(frozen=True, slots=True)
class Package:
    """A package whose signature and hashes have been verified: `guests/package.py` makes it, nobody else."""

    name: str
    version: str
    """With its build: `0.1.0+1a2b3c4d`; the name of its folder in the guest."""
    serial: int
    """Rises with every build: a lower one is a downgrade."""
    os: GuestOs
    contract: int
    time_limits: dict[str, int]
    """verb → seconds."""
    files: dict[str, PackageFile]
    """Path inside the package (`/`-joined) → file."""


@dataclass(frozen=True, slots=True)
class PackageFile:
    data: bytes
    sha256: str
    mode: int


@dataclass(frozen=True, slots=True)
class QuiesceRequest:
    """What the verb `quiesce` is told."""

    job: str
    uuid: str
    goal: Consistency
    freeze_s: int
    """Seconds from the answer to the watchdog's deadline: it thaws by itself then."""
    limit_s: int
    """Seconds for all pre scripts together."""
    skip_disks: Sequence[str] = ()
    """Addresses of disks that are not part of the backup: their file systems are not frozen. `pci:0000:00:07.0`, or
    with `/bus:target:unit` behind it for a disk on a SCSI, SATA or IDE controller."""
    options: dict[str, str] = field(default_factory=dict)
    """Application → word: `postgresql` → `backup`."""


@dataclass(frozen=True, slots=True)
class NewMachine:
    """What a point's definition is to become."""

    name: str
    uuid: str
    disks: Mapping[str, tuple[str, str]]
    """target → path and format of the restored image."""
    nvram_path: str | None
    fresh_macs: bool
    """It may live beside its original, and shares nothing with it that two machines cannot share."""


class Hypervisor(Protocol):
    """What runs machines. Raises HypervisorError and its kinds; NotFound for an unknown UUID. All paths are paths on
    its host."""

    features: Features
    host: Host
    """The machine room in which it runs."""

    def machines(self, *, disks: bool = True) -> list[MachineSummary]:
        """All machines, by name. Without `disks` they are left empty: quick, and not held up by a machine that is
        busy (libvirt waits up to 30 s for one that is just being started)."""
        ...

    def inventory(self, uuid: str, *, base: str | None = None, base_xml: str | None = None) -> Inventory:
        """The machine now. With `base`, each disk's `bitmap` says whether that checkpoint can serve as its base:
        the checkpoint is redefined from `base_xml` where libvirt lost it, and validated (a machine that is off is
        judged by its images)."""
        ...

    def nvram(self, inventory: Inventory) -> bytes | None: ...

    def agent_command(self, uuid: str) -> Callable[[str, float], str]:
        """A function that sends one JSON command to the guest agent and returns its JSON reply within that many
        seconds; `guests.agent.AgentChannel` makes a GuestChannel of it. Raises GuestError."""
        ...

    def thaw_command(self, uuid: str) -> list[str]:
        """A program with its arguments that thaws the guest through its agent, for a process that outlives this one."""
        ...

    def begin_backup(self, uuid: str, request: BackupRequest) -> Begun:
        """Raises CheckpointUnusable(target) when a disk's base turns out to be unusable; nothing is left then."""
        ...

    def end_backup(self, uuid: str, name: str) -> bool:
        """End our backup job `name` and wait until it is gone. False: no such job runs (another's is not touched)."""
        ...

    def delete_checkpoint(self, uuid: str, name: str) -> None:
        """Delete bitmap and metadata, or metadata only where the bitmap is gone. Absent already: no error."""
        ...

    def leftovers(self, uuid: str) -> Leftovers: ...

    def volume_dir(self, pool: str) -> Path:
        """Folder of a storage pool. Raises NotFound, UsageError for a pool that is no folder."""
        ...

    def refresh_pool(self, pool: str) -> None:
        """Let the hypervisor see files that were put into a storage pool. Raises NotFound."""
        ...

    def redefined(self, definition: str, new: NewMachine) -> str:
        """A point's definition as that of the machine `new`. Nothing is changed anywhere. Raises UsageError for a
        definition that this hypervisor cannot run."""
        ...

    def define(self, definition: str, nvram: bytes | None, *, start: bool) -> str:
        """Make the machine known, or known anew; NVRAM goes where the definition says. What a person types to start it.
        Raises TargetExists if its name is another's."""
        ...

    def undefine(self, uuid: str) -> None:
        """Stop (hard) and forget a machine; its disks stay. Absent: no error."""
        ...

    def close(self) -> None: ...


# --- disks -----------------------------------------------------------------------------------------------------


class BlockSource(Protocol):
    """A disk to be read, frozen at one moment."""

    size: int

    def extents(self, *, trust_changes: bool = True) -> Iterator[Extent]:
        """Tile `[0, size)` in order, streaming. Nothing is UNCHANGED where changes are not tracked, or not trusted."""
        ...

    def read(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]:
        """Read `(offset, length)` ranges over a connection of this call's own, some in flight at a time, and yield
        `(offset, bytes)` in any order. A yielded view is valid until the next step of the iterator. `ranges` may be
        shared between threads if it is itself thread-safe."""
        ...

    def close(self) -> None: ...


class BlockTarget(Protocol):
    """A disk to be written, all zero at first."""

    size: int

    def write(self, pieces: Iterable[tuple[int, bytes]]) -> None:
        """Write `(offset, bytes)` pieces, in any order; several threads may, each its own pieces. Raises NoSpace."""
        ...

    def close(self) -> None:
        """Durable when this returns."""
        ...


# --- stores ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    name: str
    size: int


@dataclass(frozen=True, slots=True)
class StoreFeatures:
    """What a store can do beyond keeping objects."""

    place: str
    """Where it is, for people: a path, or a URL without secrets."""
    locks: bool = False
    """`retain` is enforced by the place itself, against whoever has our credentials."""
    reads_at_once: int = 1
    """Reads in flight that it takes to get all there is to get: more than one where an answer comes from afar."""


class Store(Protocol):
    """Named immutable objects (`points/…`, `packs/…`). Names are `/`-joined words of [a-z0-9._-].

    Raises ObjectMissing, VaultMissing, NoSpace, Locked, StoreUnreachable, VaultError."""

    features: StoreFeatures

    def put(self, name: str, data: bytes) -> bool:
        """Create durably and exclusively, whole or not at all; False if the name is taken."""
        ...

    def put_file(self, name: str, path: Path) -> bool:
        """The same from a local file, which is consumed (moved where possible)."""
        ...

    def replace(self, name: str, path: Path) -> None:
        """The same in the place of an object that is damaged or missing; at no moment is there none. It is retained as
        that one was. Only for the very bytes that the object had when it was created."""
        ...

    def staging(self) -> Path:
        """A local folder to build files for `put_file` in, on the same file system where that helps."""
        ...

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Exactly the asked bytes; Corrupt if the object is shorter."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]: ...

    def delete(self, name: str) -> None:
        """Absent already: no error. Raises Locked for an object that is retained."""
        ...

    def retain(self, name: str, until: datetime) -> None:
        """`delete` of this object is refused until then; never shortens an earlier `retain`. Raises ObjectMissing."""
        ...

    def copies(self) -> Sequence[Store]:
        """The stores that each hold every object: more than one where objects are mirrored, else this one."""
        ...

    def free_bytes(self) -> int | None:
        """Space left, or None where that is unknowable."""
        ...
