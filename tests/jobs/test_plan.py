"""Full or incremental, and why: one row per thing that happens to disks between two backups."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from orchestrator.plan import block_size_for, plan_disks, trusted_bitmaps
from tests.jobs.world import GIB, MACHINE, disk
from workers.contract.errors import UsageError
from workers.contract.machines import BitmapState, Disk, Inventory, Power
from workers.contract.messages import DiskPlan
from workers.contract.points import Consistency, DiskPoint, Mode, NotIncluded, Point

MIB = 1 << 20
VALID = BitmapState.VALID


def base(**changes: object) -> Point:
    """A point of `vda` alone; `changes` to that disk."""
    old = DiskPoint(
        target="vda",
        source="/images/web-vda.qcow2",
        format="qcow2",
        identity="/images/web-vda.qcow2:1",
        capacity=GIB,
        block_size=MIB,
        root="ab" * 32,
        mode=Mode.FULL,
        reason="it is the first backup",
        checkpoint="sf-old",
    ).model_copy(update=changes)
    return Point(
        id="0123456789abcdef" * 2,
        job="old",
        machine=MACHINE,
        time=datetime(2026, 11, 22, 2, 0, 5, tzinfo=UTC),
        definition="",
        disks=[old],
        consistency=Consistency.CRASH,
        consistency_goal=Consistency.CRASH,
        consistency_reason="",
    )


def inventory(*disks: Disk) -> Inventory:
    return Inventory(machine=MACHINE, power=Power.RUNNING, disks=list(disks), definition="")


def plan_of(found: Disk, old: Point | None, *, force_full: bool = False, block_size: int = MIB) -> DiskPlan:
    [plan], _ = plan_disks(inventory(found), old, force_full=force_full, block_size_of=lambda _: block_size)
    return plan


def test_a_disk_that_the_base_left_out_is_not_called_new() -> None:
    old = base().model_copy(update={"not_included": [NotIncluded(target="vdc", reason="excluded by you")]})
    assert plan_of(disk("vdc", bitmap=VALID), old).reason == "it was left out of the base point"


def test_a_machine_with_points_but_no_base_is_not_called_new() -> None:
    found = inventory(disk("vda"), disk("vdb", format="raw", tracks_changes=False))
    plans, _ = plan_disks(found, None, earlier=True, block_size_of=lambda _: MIB)
    assert "no earlier point has a checkpoint" in plans[0].reason
    assert plans[1].reason == "it is raw: no change tracking"


FULL = [
    (disk("vda"), None, "it is the first backup"),
    (disk("vdc", bitmap=VALID), base(), "it is a new disk"),
    (
        disk("vda", source="/images/b.qcow2", identity="/images/b.qcow2:1", bitmap=VALID),
        base(),
        "its image changed from /images/web-vda.qcow2 to /images/b.qcow2",
    ),
    (
        disk("vda", identity="/images/web-vda.qcow2:2", bitmap=VALID),
        base(),
        "its image changed from /images/web-vda.qcow2 to /images/web-vda.qcow2 (another file of that name)",
    ),
    (disk("vda", capacity=GIB // 2, bitmap=VALID), base(), f"it shrank from {GIB} to {GIB // 2} bytes"),
    (disk("vda", bitmap=BitmapState.MISSING), base(), "the bitmap is missing"),
    (disk("vda", bitmap=None), base(), "the bitmap is missing"),
    (
        disk("vda", bitmap=BitmapState.INCONSISTENT, bitmap_detail="in-use"),
        base(),
        "the bitmap was in use after a crash (inconsistent) (in-use)",
    ),
    (disk("vda", bitmap=VALID), base(checkpoint=None), "the base point kept no checkpoint of it"),
    (disk("vda", format="raw", tracks_changes=False), base(), "it is raw: no change tracking"),
    (
        disk("vda", bitmap=VALID),
        base(block_size=4 * MIB),
        "its block size changed from 4194304 to 1048576 bytes",
    ),
]


@pytest.mark.parametrize(("found", "old", "reason"), FULL, ids=[row[2][:40] for row in FULL])
def test_full_and_why(found: Disk, old: Point | None, reason: str) -> None:
    plan = plan_of(found, old)
    assert (plan.mode, plan.reason) == (Mode.FULL, reason)
    assert (plan.base_checkpoint, plan.base_root) == (None, None)
    assert plan.tracks_changes is found.tracks_changes


def test_full_because_it_was_asked_for() -> None:
    plan = plan_of(disk("vda", bitmap=VALID), base(), force_full=True)
    assert (plan.mode, plan.reason) == (Mode.FULL, "you asked for it")


def test_incremental_names_its_base() -> None:
    plan = plan_of(disk("vda", bitmap=VALID), base())
    assert plan == DiskPlan(
        target="vda",
        mode=Mode.INCREMENTAL,
        reason="changes since 01234567 (2026-11-22 02:00:05 UTC) are known",
        block_size=MIB,
        base_checkpoint="sf-old",
        base_root="ab" * 32,
        base_capacity=GIB,
    )


def test_grown_disk_stays_incremental_and_knows_where_the_base_ends() -> None:
    plan = plan_of(disk("vda", capacity=2 * GIB, bitmap=VALID), base())
    assert (plan.mode, plan.base_capacity) == (Mode.INCREMENTAL, GIB)
    assert plan.reason.endswith(f"; it grew from {GIB} to {2 * GIB} bytes")


def test_doubt_about_one_disk_leaves_the_other_alone() -> None:
    old = base()
    other = old.disks[0].model_copy(update={"target": "vdb", "identity": "b", "source": "b"})
    old = old.model_copy(update={"disks": [*old.disks, other]})
    found = inventory(disk("vda", bitmap=BitmapState.MISSING), disk("vdb", source="b", identity="b", bitmap=VALID))
    plans, _ = plan_disks(found, old, block_size_of=lambda _: MIB)
    assert [(p.target, p.mode) for p in plans] == [("vda", Mode.FULL), ("vdb", Mode.INCREMENTAL)]
    assert trusted_bitmaps(found, old) == ["vdb"]


def test_what_is_left_out_is_said() -> None:
    found = inventory(disk("vda"), disk("sda", excluded="CD-ROM"), disk("vdb"))
    plans, left_out = plan_disks(found, None, exclude=["vdb"], block_size_of=lambda _: MIB)
    assert [p.target for p in plans] == ["vda"]
    assert [(n.target, n.reason) for n in left_out] == [("sda", "CD-ROM"), ("vdb", "excluded by you")]


@pytest.mark.parametrize(
    ("found", "exclude", "message"),
    [
        (inventory(), [], "nothing to back up in web: it has no disks"),
        (inventory(disk("sda", excluded="CD-ROM")), [], "nothing to back up in web: sda: CD-ROM"),
        (inventory(disk("vda")), ["vda"], "nothing to back up in web: vda: excluded by you"),
        (inventory(disk("vda")), ["vdz"], "web has no disk vdz"),
    ],
)
def test_nothing_to_back_up(found: Inventory, exclude: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_disks(found, None, exclude=exclude, block_size_of=lambda _: MIB)


def test_forced_full_keeps_its_trust_in_the_bitmap() -> None:
    assert trusted_bitmaps(inventory(disk("vda", bitmap=VALID)), base()) == ["vda"]
    assert trusted_bitmaps(inventory(disk("vda", bitmap=VALID)), None) == []


def test_block_size_by_the_first_rule_that_fits() -> None:
    rules = {"db-*/vdb": 64 << 10, "*/vdb": 256 << 10}
    sizes = [block_size_for(rules, MIB, *name) for name in (("db-1", "vdb"), ("web", "vdb"), ("db-1", "vda"))]
    assert sizes == [64 << 10, 256 << 10, MIB]
