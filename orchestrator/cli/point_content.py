"""`stillframe point diff` and `point export`: what is in points, compared and taken elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import command
from orchestrator.cli.output import size
from orchestrator.cli.point import PointRef, app
from orchestrator.cli.restore import FormatOption, ToOption, write_disk
from orchestrator.cli.run import DEGRADED, OK, Session

__all__ = ["app"]  # the whole group

if TYPE_CHECKING:
    from orchestrator.diff_desk import DiskDiff


@command(app, "diff")
def diff_points(
    session: Session,
    before: PointRef,
    after: PointRef,
    ranges: Annotated[bool, typer.Option("--ranges", help="List every changed range, in bytes.")] = False,
) -> int:
    """Show what changed between two points, per disk: from their maps, without reading data."""
    out = session.out
    found = session.service.diff.diff(before, after, ranges=ranges or out.as_json)
    for disk in found.disks:
        out.record("diff", {"before": found.before, "after": found.after, **disk.model_dump(mode="json")})
    if len(found.machines) > 1:
        out.note(f"these are points of different machines: {' and '.join(found.machines)}")
    out.table(
        ("disk", "size", "changed", "share", "ranges", "rewritten", "filled", "zeroed"),
        [_row(disk) for disk in found.disks if disk.compared],
        right=("changed", "share", "ranges", "rewritten", "filled", "zeroed"),
    )
    for disk in found.disks:
        if disk.capacity_before is None or disk.capacity_after is None:
            out.say(f"{disk.target}: only in the {'first' if disk.capacity_after is None else 'second'} point")
        elif disk.incomparable:
            out.say(f"{disk.target}: not compared: {disk.incomparable}")
    if ranges:
        for disk in found.disks:
            for part in disk.ranges:
                out.say(f"{disk.target}  {part.start:>16} +{part.length:<14} {part.change}")
    return DEGRADED if any(disk.incomparable for disk in found.disks) else OK


def _row(disk: DiskDiff) -> tuple[str, ...]:
    grew = disk.capacity_before != disk.capacity_after
    return (
        disk.target,
        f"{size(disk.capacity_before or 0)} → {size(disk.capacity_after or 0)}"
        if grew
        else size(disk.capacity_after or 0),
        size(disk.changed_bytes),
        f"{100 * disk.share:.2f} %",
        str(disk.range_count),
        *(size(disk.bytes.get(kind, 0)) for kind in ("rewritten", "filled", "zeroed")),
    )


@command(app, "export")
def export_disk(
    session: Session,
    point: PointRef,
    target: Annotated[str, typer.Argument(metavar="DISK", help="Disk of the point, like vda.")],
    to: ToOption,
    format: FormatOption = None,
) -> int:
    """Write one disk as an image for other systems: `restore disk`, under the name that people look for."""
    return write_disk(session, point, target, to, format)
