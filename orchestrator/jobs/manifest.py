"""The manifest of a new point, put together from what a backup has gathered.

The delicate part is which checkpoint each disk refers to: it decides what the next incremental may skip. A snapshot of
a running machine made a new checkpoint in the same transaction. One of a machine that is off made none: disks whose
bitmap was good keep the base's, older than needed and therefore safe (invariant 2); the others have none.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.plan import base_checkpoint
from workers.contract.machines import MachineRef
from workers.contract.messages import DiskPlan, SnapshotInfo
from workers.contract.points import Consistency, DiskPoint, NotIncluded, Point, healed_words


@dataclass(frozen=True, slots=True)
class Parts:
    """What a manifest is made of, besides the snapshot."""

    point: str
    job: str
    machine: MachineRef
    goal: Consistency
    base: Point | None
    plans: list[DiskPlan]
    trusted: list[str]
    """Targets whose bitmap of the base is still good."""
    transferred: dict[str, DiskPoint]
    not_included: list[NotIncluded]
    alerts: dict[str, str]
    healed: dict[str, int]


def build_point(parts: Parts, snapshot: SnapshotInfo) -> Point:
    disks = [
        parts.transferred[plan.target].model_copy(update={"checkpoint": _checkpoint(parts, snapshot, plan)})
        for plan in parts.plans
    ]
    keeps_base = not snapshot.online and any(disk.checkpoint for disk in disks)
    base_xml = parts.base.checkpoint_xml if parts.base and keeps_base else None
    return Point.model_validate(
        {
            "id": parts.point,
            "job": parts.job,
            "machine": parts.machine,
            "time": snapshot.time,
            "definition": snapshot.definition,
            "nvram": snapshot.nvram,
            "disks": disks,
            "not_included": parts.not_included,
            "checkpoint_xml": snapshot.checkpoint_xml if snapshot.online else base_xml,
            "consistency": snapshot.consistency,
            "consistency_goal": parts.goal,
            "consistency_reason": snapshot.consistency_reason,
            "frozen_ms": snapshot.frozen_ms,
            "records": snapshot.guest.records,
            "alerts": [
                *(f"{target}: {alert}" for target, alert in sorted(parts.alerts.items())),
                *(f"{target}: {healed_words(blocks)}" for target, blocks in sorted(parts.healed.items())),
            ],
        }
    )


def _checkpoint(parts: Parts, snapshot: SnapshotInfo, plan: DiskPlan) -> str | None:
    if snapshot.online:
        return snapshot.checkpoint if plan.tracks_changes else None
    return base_checkpoint(parts.base) if plan.target in parts.trusted else None
