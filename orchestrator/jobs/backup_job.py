"""A backup as it is stored: everything that is known of it, whole, with every transition."""

from __future__ import annotations

from typing import Literal

from orchestrator.jobs.states import TERMINAL, JobState
from workers.contract.errors import ErrorInfo
from workers.contract.guests import ExtensionState, GuestReport
from workers.contract.machines import Disk, MachineRef, Value
from workers.contract.messages import DiskPlan, SnapshotInfo
from workers.contract.points import Consistency, DiskPoint, NotIncluded, Point

S = JobState


class BackupJob(Value):
    """One backup."""

    kind: Literal["backup"] = "backup"
    id: str
    machine: MachineRef
    vault: str
    point: str
    """Id that the point will have; 32 hex digits."""
    goal: Consistency = Consistency.APPLICATION
    goal_asked: bool = False
    """Somebody asked for that goal in so many words, here or in the configuration: less is worth an alert."""
    require: bool = False
    """Fail rather than fall back below the goal."""
    options: dict[str, str] = {}
    """Application → word, for its script in the guest."""
    force_full: bool = False
    exclude: list[str] = []
    block_size: int = 256 << 10
    block_size_rules: dict[str, int] = {}
    base: Point | None = None
    """Without definition and NVRAM, as the catalog holds it."""
    earlier: bool = False
    """Whether the vault has points of the machine at all."""

    state: JobState = S.QUEUED
    plans: list[DiskPlan] = []
    disks: list[Disk] = []
    """As the inventory found them; one for each plan."""
    not_included: list[NotIncluded] = []
    trusted: list[str] = []
    """Disks whose bitmap of the base stays good; see `plan.trusted_bitmaps`."""
    online: bool = False
    extension: ExtensionState | None = None
    """What the preparation found in the guest, if it looked."""
    guest: GuestReport | None = None
    """What quiescing the guest came to; without its records, which are the point's."""
    snapshot: SnapshotInfo | None = None
    transferred: dict[str, DiskPoint] = {}
    gone: list[str] = []
    """Disks whose transfer has failed or was cancelled: they will not report again."""
    alerts: dict[str, str] = {}
    """Target → how change tracking was found wrong."""
    healed: dict[str, int] = {}
    """Target → unchanged blocks that were read again because the vault had lost them."""
    new_point: Point | None = None
    """As sent to be committed."""

    must_thaw: bool = False
    """Obligation: the guest may be frozen, or held quiesced."""
    new_checkpoint: str | None = None
    """Obligation: deleted unless the point exists."""
    commit_sent: bool = False
    committed: Point | None = None
    leftover: bool = False
    """The release failed: obligations stand, and the reconciler tries again."""

    error: ErrorInfo | None = None
    """The first one; the later ones follow from it."""
    warnings: list[str] = []

    model_config = {"frozen": True, "extra": "forbid", "ser_json_bytes": "base64", "val_json_bytes": "base64"}

    @property
    def outstanding(self) -> list[str]:
        """Targets whose transfer has not reported yet."""
        if self.state is not S.TRANSFERRING:
            return []
        return [p.target for p in self.plans if p.target not in self.transferred and p.target not in self.gone]

    @property
    def stopping(self) -> bool:
        """Running commands should end themselves: nothing that they do is wanted any more."""
        return self.error is not None and self.state not in TERMINAL and self.state is not S.RELEASING
