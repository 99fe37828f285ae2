"""Machines and their disks as plain data, whatever the hypervisor."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict


class Value(BaseModel):
    """A frozen value; unknown fields are errors, so that versions that differ are noticed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class MachineRef(Value):
    """Which machine: the UUID is its identity, `hypervisor` the configured name of where it runs now."""

    hypervisor: str
    uuid: str
    name: str
    """Only for people and messages; names change."""


class Power(StrEnum):
    RUNNING = "running"
    PAUSED = "paused"
    OFF = "off"


class BitmapState(StrEnum):
    """What is known of one disk's share of a checkpoint."""

    VALID = "valid"
    MISSING = "missing"
    INCONSISTENT = "inconsistent"
    """The image says in-use: QEMU was killed; only removal is legal."""


class Disk(Value):
    """One virtual disk of a machine."""

    target: str
    """`vda`; unique in a machine."""
    source: str
    """Path or name of the top image on the hypervisor."""
    format: str
    """`qcow2`, `raw`, …"""
    capacity: int
    """Virtual size, bytes."""
    identity: str
    """Changes when another image takes the place of this one (path and inode, for a local file)."""
    tracks_changes: bool
    """Whether a dirty bitmap can be kept for it (qcow2 version 3, writable)."""
    excluded: str = ""
    """Why it is not part of backups (CD-ROM, shared, transient …); empty: it is included."""
    refused: bool = False
    """Excluded, and a point without it would not be what its owner takes it for: who wants one has to name the disk as
    left out."""
    danger: str = ""
    """Why reading it while the machine runs would harm the machine; empty: nothing is known."""
    bitmap: BitmapState | None = None
    """State of the asked base on this disk; None if none was asked for."""
    bitmap_detail: str = ""
    """The hypervisor's own words where the bitmap is not VALID."""
    address: str = ""
    """How the guest sees it: `pci:0000:00:07.0`, with `/bus:target:unit` behind it on a SCSI controller; empty: that is
    not known, or the machine is off."""
    source_options: dict[str, str] = {}
    """Format options worth keeping for a restore: cluster_size, compat …"""


class Inventory(Value):
    """A machine as found at one moment."""

    machine: MachineRef
    power: Power
    disks: list[Disk]
    definition: str
    """Enough to define the machine again, secrets included: inactive domain XML, or a QEMU's command line as JSON."""
    nvram_path: str | None = None
    orderly_off: bool = False
    """Off because the guest shut itself down, as far as the hypervisor remembers."""
    agent: bool = False
    """A guest agent answered."""
    foreign_job: str = ""
    """What job of somebody else runs on the machine; empty: none."""
    remarks: list[str] = []
    """What whoever looks after it should know."""


class MachineSummary(Value):
    """A line of `vm list`."""

    machine: MachineRef
    power: Power
    disks: list[Disk]
    tags: list[str] = []
    """From its metadata and description; none where a hypervisor keeps none."""


class Leftovers(Value):
    """What carries our names on a machine: found by `Hypervisor.leftovers`, for the reconciler and doctor."""

    machine: MachineRef
    backup_job: str | None = None
    """Our job (its id, without `sf-`) whose libvirt backup job runs now."""
    checkpoints: list[str] = []
    """Names that begin with `sf-`, oldest first."""
