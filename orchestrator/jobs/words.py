"""Events in words: the lines that `job show` and `job watch` print."""

from __future__ import annotations

from workers.contract.guests import ExtensionState
from workers.contract.messages import (
    BaseRefused,
    CancelRequested,
    DiskRestored,
    DiskTransferred,
    Event,
    Failed,
    MachineDefined,
    MachinesListed,
    PointCommitted,
    Prepared,
    Released,
    RestorePrepared,
    SnapshotTaken,
    Thawed,
    TimedOut,
    WorkerLost,
)


def describe(event: Event) -> str:
    """One line for people."""
    match event:
        case Prepared():
            disks = ", ".join(disk.target for disk in event.inventory.disks if not disk.excluded)
            return f"machine is {event.inventory.power}; disks {disks or 'none'}{_extension(event.extension)}"
        case SnapshotTaken(snapshot=snapshot):
            frozen = f", frozen for {snapshot.frozen_ms} ms" if snapshot.frozen_ms is not None else ""
            why = f" ({snapshot.consistency_reason})" if snapshot.consistency_reason else ""
            runs = [f"{run.name} {run.phase} {run.outcome} in {run.seconds:.1f} s" for run in snapshot.guest.scripts]
            return "; ".join([f"snapshot stands: {snapshot.consistency}{why}{frozen}", *runs])
        case BaseRefused():
            return f"{event.target or 'all disks'}: the base was refused: {event.reason}"
        case DiskTransferred(disk=disk):
            return f"{disk.target} transferred: {disk.mode}, because {disk.reason}" + (
                f"; ALERT: {event.alert}" if event.alert else ""
            )
        case PointCommitted():
            return f"point {event.point} is committed"
        case Failed():
            return f"{event.command}{f' {event.target}' if event.target else ''} failed: {event.error.message}"
        case _:
            return _describe_rest(event)


def _extension(found: ExtensionState | None) -> str:
    if found is None:
        return ""
    version = f" {found.version} over {found.channel}" if found.version else ""
    detail = f" ({found.detail})" if found.detail else ""
    return f"; extension{version} {found.use}{detail}"


def _describe_rest(event: Event) -> str:
    match event:
        case Released():
            return "released" + (": " + "; ".join(event.warnings) if event.warnings else "")
        case RestorePrepared():
            return "will write " + ", ".join(event.files.values())
        case DiskRestored():
            return f"{event.target} restored: {event.written_bytes} bytes, every block checked"
        case MachineDefined():
            return f"machine {event.name} is defined" + (" and started" if event.started else "")
        case CancelRequested():
            return f"{event.by} asked to cancel"
        case WorkerLost() | TimedOut():
            return event.detail
        case MachinesListed():
            return f"{event.hypervisor} has {len(event.machines)} machines"
        case Thawed():
            return f"thawed {event.thawed} file systems"
        case _:
            return event.kind.replace("_", " ")
