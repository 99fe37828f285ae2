"""`stillframe point`: recovery points, also of machines that exist no more."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import command, group
from orchestrator.cli.output import moment, size
from orchestrator.cli.run import Session, worst
from orchestrator.cli.verify import level_of, show_report

if TYPE_CHECKING:
    from orchestrator.views import PointView

app = group("Recovery points.")

PointRef = Annotated[
    str, typer.Argument(metavar="POINT", help="Short id, VM@latest, or VM@2026-11-22T02:00 (the newest until then).")
]


SCREEN = 200
"""Points that a screen shows, if nobody asks for more."""


@command(app, "list")
def list_points(
    session: Session,
    vm: Annotated[str | None, typer.Argument(metavar="VM", help="Only this machine's.")] = None,
    deleted: Annotated[bool, typer.Option("--deleted", help="Those that are deleted, instead.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Those that are deleted, too.")] = False,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", min=1, help="The newest N (default: 200 on a screen, all with --json)."),
    ] = None,
) -> None:
    """List points, newest last."""
    most = limit or (None if session.out.as_json else SCREEN)
    desk = session.service.point_desk
    points = desk.points(vm, live=every or not deleted, deleted=every or deleted, limit=most and most + 1)
    more = most is not None and len(points) > most
    points = points[1:] if more else points
    for point in points:
        session.out.record("point", point.model_dump(mode="json"))
    if not points:
        of = f" of {vm}" if vm else ""
        session.out.say(f"No deleted points{of}." if deleted else f"No points{of} yet.")
        return
    session.out.table(
        ("point", "machine", "time", "consistency", "frozen", "disks", "read", "new", "stored", "vaults", "state"),
        [_row(point) for point in points],
        right=("frozen", "read", "new", "stored"),
    )
    if more and not limit:
        session.out.note(f"the newest {most}; name a machine, or --limit N for more")
    for point in points:
        if point.damaged:
            session.out.note(f"damaged: {point.id[:8]}: {point.damaged}")


def _row(point: PointView) -> tuple[str, ...]:
    modes = {disk.mode.value for disk in point.disks}
    return (
        point.id[:8],
        point.machine,
        moment(point.time),
        "damaged" if point.damaged else point.consistency.value,
        f"{point.frozen_ms} ms" if point.frozen_ms is not None else "–",
        f"{len(point.disks)} {'+'.join(sorted(modes))}",
        size(sum(disk.read_bytes for disk in point.disks)),
        size(sum(disk.new_bytes for disk in point.disks)),
        size(sum(disk.stored_bytes for disk in point.disks)),
        " ".join((point.vault, *point.replicas)),
        _state(point),
    )


def _state(point: PointView) -> str:
    """What keeps it, or ends it; in one word or two."""
    words = ["pinned"] if point.pinned else []
    if point.locked_until is not None and point.locked_until > datetime.now(UTC):
        words.append(f"locked until {moment(point.locked_until)[:10]}")
    if point.deleted_until is not None:
        words.append(f"deleted until {moment(point.deleted_until)[:10]}")
    return ", ".join(words)


@command(app, "show")
def show_point(session: Session, point: PointRef) -> None:
    """Show one point: what it is worth, each disk, and why it was read as it was."""
    from workers.contract.guests import printable

    found = session.service.point(point)
    out = session.out
    out.record("point", found.model_dump(mode="json"))
    out.say(f"point {found.id}")
    out.say(f"machine      {found.machine}  {found.machine_uuid}")
    out.say(f"time         {moment(found.time)}")
    goal = f" (asked: {found.consistency_goal.value})" if found.consistency_goal != found.consistency else ""
    reason = f": {found.consistency_reason}" if found.consistency_reason else ""
    out.say(f"consistency  {found.consistency.value}{goal}{reason}")
    if found.frozen_ms is not None:
        out.say(f"frozen       {found.frozen_ms} ms")
    out.say(f"vault        {found.vault}")
    if found.replicas:
        out.say(f"replicas     {' '.join(found.replicas)}")
    if found.pinned:
        out.say(f"pinned       {found.pinned}")
    if found.locked_until:
        out.say(f"locked       until {moment(found.locked_until)}")
    if found.deleted_until:
        why = f": {found.deleted_reason}" if found.deleted_reason else ""
        out.say(f"deleted      until {moment(found.deleted_until)} it can be taken back{why}")
    if found.damaged:
        out.say(f"damaged      {found.damaged}")
    out.say(f"verified     {moment(found.verified) if found.verified else 'never'}")
    out.table(
        ("disk", "size", "mode", "read", "new", "stored", "rate", "limit", "because"),
        [
            (
                disk.target,
                size(disk.capacity),
                disk.mode.value,
                size(disk.read_bytes),
                size(disk.new_bytes),
                size(disk.stored_bytes),
                f"{size(disk.read_bytes / disk.seconds)}/s" if disk.seconds else "–",
                disk.bottleneck or "–",
                disk.reason,
            )
            for disk in found.disks
        ],
        right=("size", "read", "new", "stored", "rate"),
    )
    for left_out in found.not_included:
        out.say(f"not included: {left_out.target}: {left_out.reason}")
    for alert in found.alerts:
        out.say(f"alert: {alert}")
    for name, text in found.records.items():
        out.say(f"record {name}:")
        for line in text.splitlines():
            out.say(f"    {printable(line)}")


@command(app, "verify")
def verify_points(
    session: Session,
    points: Annotated[list[str], typer.Argument(metavar="POINT", help="As for `point show`.")],
    ids: Annotated[bool, typer.Option("--ids", help="Every block is in the index.")] = False,
    sample: Annotated[bool, typer.Option("--sample", help="… and a sample of blocks is read and checked.")] = False,
    full: Annotated[bool, typer.Option("--full", help="… and every block is (the default).")] = False,
) -> int:
    """Check that points can be restored."""
    level = level_of(ids=ids, packs=False, sample=sample, full=full, default="full")
    service = session.service
    found = [service.point(point) for point in points]
    return worst(
        [show_report(session, f"point {one.id[:8]}", level, service.verify_point(one.id, level)) for one in found]
    )


Points = Annotated[list[str], typer.Argument(metavar="POINT", help="As for `point show`.")]


@command(app, "delete")
def delete_points(
    session: Session,
    points: Points,
    now: Annotated[bool, typer.Option("--now", help="At once and for good: it cannot be taken back.")] = False,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="For whoever looks later.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
) -> None:
    """Delete points; for some days that can be taken back. Other points stay whole: none depends on another."""
    desk = session.service.point_desk
    found = list({point.id: point for point in map(desk.point, points)}.values())
    if not dry_run:
        for point in found:
            session.out.note(f"{point.id[:8]}  {point.machine}  {moment(point.time)}  {point.consistency.value}")
        session.confirm(f"Delete {len(found)} point{'s' if len(found) > 1 else ''}{' for good' if now else ''}?")
    for point in found:
        gone = desk.delete(point.id, days=0 if now else None, reason=reason, dry_run=dry_run)
        session.out.record("deleted", {"dry_run": dry_run, "point": gone.model_dump(mode="json")})
        note = f" ({gone.note})" if gone.note else ""
        verb = "would delete" if dry_run else "deleted"
        session.out.say(f"{verb} {gone.id[:8]} of {gone.machine}, {moment(gone.time)}{note}")
        if not (dry_run or now):
            session.out.say(f"until {moment(gone.deleted_until)} back with: stillframe point undelete {gone.id[:8]}")


@command(app, "undelete")
def undelete_points(session: Session, points: Points) -> None:
    """Take deletions back, as long as they are not final."""
    desk = session.service.point_desk
    for one in points:
        _tell(session, "undeleted", desk.undelete(one))


@command(app, "pin")
def pin_points(
    session: Session,
    points: Points,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="For whoever looks later.")] = "",
) -> None:
    """Keep points: neither people nor policies delete them. A deleted one comes back."""
    desk = session.service.point_desk
    for one in points:
        _tell(session, "pinned", desk.pin(one, reason))


@command(app, "unpin")
def unpin_points(session: Session, points: Points) -> None:
    """Keep points no more than their policy does."""
    desk = session.service.point_desk
    for one in points:
        _tell(session, "unpinned", desk.unpin(one))


def _tell(session: Session, done: str, point: PointView) -> None:
    session.out.record(done, {"point": point.model_dump(mode="json")})
    what = f"{point.id[:8]} of {point.machine}, {moment(point.time)}"
    session.out.say(f"{what}: {point.note}" if point.note else f"{done} {what}")
