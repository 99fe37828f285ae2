"""Recovery points: the manifest that is written last and makes a backup exist."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from workers.contract.machines import MachineRef, Value


class Consistency(StrEnum):
    """What a point is worth; ordered crash < filesystem < application."""

    CRASH = "crash"
    FILESYSTEM = "filesystem"
    APPLICATION = "application"

    @property
    def rank(self) -> int:
        return list(Consistency).index(self)


class Mode(StrEnum):
    FULL = "full"
    INCREMENTAL = "incremental"


class Bottleneck(StrEnum):
    """What a transfer waited for most."""

    READ = "read"
    CPU = "cpu"
    WRITE = "write"


class Figures(Value):
    """What a transfer measured; bytes and seconds."""

    read_bytes: int = 0
    """Read from the hypervisor, the audit's sample included."""
    new_bytes: int = 0
    """Of the read bytes, those whose block the vault did not know."""
    stored_bytes: int = 0
    """Written to packs, after compression and sealing, map pages included."""
    metadata_bytes: int = 0
    """Of the stored bytes, those of map pages."""
    seconds: float = 0.0
    bottleneck: Bottleneck | None = None


class DiskPoint(Value):
    """One disk of a point: enough to restore it byte for byte."""

    target: str
    source: str
    format: str
    identity: str
    capacity: int
    block_size: int
    root: str
    """Id of the block map's root, 64 hex digits."""
    mode: Mode
    reason: str
    """Why full or incremental, in words for people."""
    checkpoint: str | None
    """Checkpoint whose bitmap holds every change of this disk since this map, or earlier (invariant 2)."""
    options: dict[str, str] = {}
    figures: Figures = Figures()


def healed_words(blocks: int) -> str:
    """What is said where blocks were read again because the vault had lost them."""
    return f"{blocks} damaged block{'s' if blocks > 1 else ''} of the vault read again"


class NotIncluded(Value):
    target: str
    reason: str


class Point(Value):
    """The manifest of a recovery point."""

    schema_version: int = 2
    id: str
    """32 hex digits, random."""
    job: str
    machine: MachineRef
    time: datetime
    """The moment of the snapshot, UTC."""
    definition: str
    """Domain XML of the machine."""
    nvram: bytes | None = None
    """Content of the UEFI variable store, if the machine has one. JSON: base64."""
    disks: list[DiskPoint]
    not_included: list[NotIncluded] = []
    checkpoint_xml: str | None = None
    """To redefine the checkpoint where the hypervisor lost it."""
    consistency: Consistency
    consistency_goal: Consistency
    consistency_reason: str
    frozen_ms: int | None = None
    """From the freeze's reply to the thaw's; None if nothing was frozen."""
    alerts: list[str] = []
    records: dict[str, str] = {}
    """What applications gave to be kept with the point, as text: `50-postgresql/backup_label`."""
    locked_until: datetime | None = None
    """Until then no deletion of the point becomes final; None: the vault had no lock. Since schema 2."""

    model_config = {"frozen": True, "extra": "forbid", "ser_json_bytes": "base64", "val_json_bytes": "base64"}
