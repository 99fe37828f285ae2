"""A backup job of a bare QEMU: begun in one transaction, ended from any state that it may be in.

What libvirt does for its machines is done here by hand, in the same way: per disk a scratch image that stands on the
disk (a *fleece*), a `blockdev-backup` of nothing (`sync=none`) that copies into it what the guest is about to
overwrite, and an NBD export of it. New bitmaps, copies of the bases' bitmaps and the jobs of all disks are one
transaction, and so one point in time.

Every job, node, export and temporary bitmap is called `sf-<job>.<number>`, and checkpoints `sf-<job>`: that is the
proof of ownership that invariant 4 asks for, and it lives and dies with the QEMU process. QEMU has one NBD server:
it is ours if our exports are on it, or if the process that listens on our socket is that QEMU.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from workers.contract.errors import Busy, CheckpointUnusable, HypervisorError, NoSpace
from workers.contract.points import Mode
from workers.contract.seams import BackupRequest, DiskRequest, Export
from workers.hypervisors import qemu_process
from workers.hypervisors.backup_xml import PREFIX
from workers.hypervisors.qmp_disks import Drive
from workers.hypervisors.qmp_wire import Json, Monitor, Refused, listener

END_SECONDS = 120.0
SOCKET_LIMIT = 107


def part(name: str, number: int) -> str:
    """What belongs to the disk `number` of job `name`."""
    return f"{name}.{number}"


def _is_part(word: object, name: str) -> bool:
    return str(word).startswith(f"{name}.")


def running(monitor: Monitor) -> str | None:
    """`sf-<job>` of our backup job that has something in this QEMU; None if none has."""
    names = [
        *(job["id"] for job in monitor.ask("query-jobs")),
        *(export["id"] for export in monitor.ask("query-block-exports")),
        *(node.get("node-name", "") for node in monitor.ask("query-named-block-nodes", {"flat": True})),
    ]
    found = sorted({str(name).partition(".")[0] for name in names if str(name).startswith(PREFIX) and "." in str(name)})
    return found[0] if found else None


def foreign_job(monitor: Monitor) -> str:
    """What job that is not ours runs; empty: none."""
    for job in monitor.ask("query-jobs"):
        if not (str(job["id"]).startswith(PREFIX) and "." in str(job["id"])):
            return f"a {job.get('type', 'block')} job ({job['id']})"
    migration = monitor.ask("query-migrate").get("status", "none")
    return "" if migration in ("none", "completed", "failed", "cancelled") else f"migration ({migration})"


# --- beginning -----------------------------------------------------------------------------------------------------


def begin(monitor: Monitor, drives: dict[str, Drive], request: BackupRequest, folder: Path) -> list[Export]:
    """After `check`. Everything or nothing: after an error `undo` is due, which takes away what was made. `folder` is
    for the socket. Raises Busy, NoSpace, HypervisorError."""
    chosen = [drives[disk.target] for disk in request.disks]
    socket = _prepared(monitor.peer.pid, folder, request)
    try:
        for number, (disk, drive) in enumerate(zip(request.disks, chosen, strict=True)):
            monitor.ask("blockdev-add", _scratch(part(request.name, number), disk, drive))
        monitor.ask("transaction", {"actions": _actions(request, chosen)})
        monitor.ask("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(socket)}}})
        for number, disk in enumerate(request.disks):
            monitor.ask("block-export-add", _export(part(request.name, number), disk))
    except Refused as error:
        raise _translated(str(error), "starting the backup") from None
    return [
        Export(
            target=disk.target,
            socket=str(socket),
            name=disk.target,
            bitmap=f"qemu:dirty-bitmap:{part(request.name, number)}" if _base(disk) else None,
        )
        for number, disk in enumerate(request.disks)
    ]


def check(monitor: Monitor, drives: dict[str, Drive], request: BackupRequest) -> None:
    """What would be refused is refused before anything is made. Raises Busy, CheckpointUnusable, HypervisorError."""
    _refuse_beside_another_job(monitor)
    for disk in request.disks:
        if disk.target not in drives:
            raise HypervisorError(f"disk {disk.target} was removed from the machine while its backup was prepared")
    _require_bases([drives[disk.target] for disk in request.disks], request)


def _refuse_beside_another_job(monitor: Monitor) -> None:
    job = foreign_job(monitor) or running(monitor)
    if job:
        raise Busy(f"a job runs on the machine: {job}")
    exports = [str(export["id"]) for export in monitor.ask("query-block-exports")]
    if exports:
        raise Busy(f"another program exports disks of the machine ({', '.join(exports)})", hint=_ONE_SERVER)


_ONE_SERVER = "a QEMU has one NBD server: end the other use of it (QMP: nbd-server-stop), and try again"


def _translated(words: str, doing: str) -> HypervisorError | Busy | NoSpace:
    if "already running" in words:
        return Busy("another program has started the NBD server of this QEMU", hint=_ONE_SERVER)
    message = f"{doing}: {words}"
    if "No space left" in words:
        return NoSpace(message)
    if "Failed to get" in words and "lock" in words:
        return Busy(message, hint="another process has the image open")
    hint = "QEMU's user must be able to open files in that folder" if "Permission denied" in words else ""
    return HypervisorError(message, hint=hint)


def _base(disk: DiskRequest) -> str | None:
    return disk.base if disk.mode is Mode.INCREMENTAL else None


def _require_bases(chosen: Sequence[Drive], request: BackupRequest) -> None:
    """Before anything is made: QEMU's own words for a bad bitmap name no disk."""
    for disk, drive in zip(request.disks, chosen, strict=True):
        base = _base(disk)
        if base is None:
            continue
        found = drive.bitmaps.get(base)
        if found is None or found.inconsistent or not found.recording:
            what = "is missing" if found is None else "was in use when QEMU was killed (inconsistent)"
            raise CheckpointUnusable(f"bitmap {base} of {disk.target} {what}", target=disk.target)


def _prepared(pid: int, folder: Path, request: BackupRequest) -> Path:
    """The socket's path. Its folder and the scratch are given to QEMU's user, where we may give."""
    socket = folder / "nbd.sock"
    if len(str(socket).encode()) > SOCKET_LIMIT:
        raise HypervisorError(
            f"the path of the socket is too long for the system: {socket}", hint="set `runtime` under [paths]"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o711)
        user = qemu_process.user_of(pid)
        if os.geteuid() == 0 and user is not None and user[0] != 0:
            for path in (folder, *(disk.scratch for disk in request.disks)):
                os.chown(path, *user)
    except OSError as error:
        raise HypervisorError(f"{error.filename} cannot be prepared for QEMU: {error.strerror}") from None
    return socket


def _scratch(node: str, disk: DiskRequest, drive: Drive) -> Json:
    return {
        "driver": "qcow2",
        "node-name": node,
        "file": {"driver": "file", "filename": str(disk.scratch)},
        "backing": drive.node,
    }


def _actions(request: BackupRequest, chosen: Sequence[Drive]) -> list[Json]:
    actions: list[Json] = []

    def act(kind: str, **data: object) -> None:
        actions.append({"type": kind, "data": data})

    for number, (disk, drive) in enumerate(zip(request.disks, chosen, strict=True)):
        mine = part(request.name, number)
        if base := _base(disk):
            act("block-dirty-bitmap-add", node=drive.node, name=mine, disabled=True)
            act("block-dirty-bitmap-merge", node=drive.node, target=mine, bitmaps=[base])
        if disk.tracks_changes:
            act("block-dirty-bitmap-add", node=drive.node, name=request.name, persistent=True)
        # `sync=none` never ends by itself, and QEMU forgets the job when it is cancelled.
        actions.append(
            {
                "type": "blockdev-backup",
                "data": {"job-id": mine, "device": drive.node, "target": mine, "sync": "none"},
            }
        )
    return actions


def _export(mine: str, disk: DiskRequest) -> Json:
    export = {"type": "nbd", "id": mine, "node-name": mine, "name": disk.target}
    return {**export, "bitmaps": [mine]} if _base(disk) else export


# --- ending --------------------------------------------------------------------------------------------------------


def end(monitor: Monitor, name: str, folder: Path) -> bool:
    """Take away all parts of job `name`, whichever there are. False: there was none."""
    socket = folder / "nbd.sock"
    serves = _end_exports(monitor, name, socket)
    with suppress(OSError):
        socket.unlink()
    jobs = _jobs(monitor, name)
    for job in jobs:
        with suppress(Refused):  # it has ended meanwhile
            monitor.ask("block-job-cancel", {"device": job, "force": True})
    if not monitor.until(lambda: not _jobs(monitor, name), END_SECONDS):
        raise HypervisorError(f"the backup job {name} did not end within {END_SECONDS:.0f} s")
    nodes = _remove_nodes(monitor, name)
    return bool(serves or jobs or nodes)


def _end_exports(monitor: Monitor, name: str, socket: Path) -> bool:
    """The server is stopped, and with it all exports, unless somebody else has some on it."""
    exports = [str(export["id"]) for export in monitor.ask("query-block-exports")]
    ours = [export for export in exports if _is_part(export, name)]
    if not ours and not _serves(monitor, socket):
        return False
    if ours == exports:
        with suppress(Refused):
            monitor.ask("nbd-server-stop", seconds=END_SECONDS)  # returns when its exports are gone
        return True
    for export in ours:
        with suppress(Refused):
            monitor.ask("block-export-del", {"id": export, "mode": "hard"})
    if not monitor.until(lambda: not _exported(monitor, name), END_SECONDS):
        raise HypervisorError(f"the exports of {name} did not end within {END_SECONDS:.0f} s")
    return True


def _exported(monitor: Monitor, name: str) -> bool:
    return any(_is_part(export["id"], name) for export in monitor.ask("query-block-exports"))


def _serves(monitor: Monitor, socket: Path) -> bool:
    """Whether this QEMU listens on our socket: it died on us before there were exports."""
    found = listener(socket) if socket.exists() else None
    return found is not None and found.pid == monitor.peer.pid


def _jobs(monitor: Monitor, name: str) -> list[str]:
    return [str(job["id"]) for job in monitor.ask("query-jobs") if _is_part(job["id"], name)]


def _remove_nodes(monitor: Monitor, name: str) -> bool:
    """Scratch, and copies of bitmaps."""
    nodes: list[Json] = monitor.ask("query-named-block-nodes", {"flat": True})
    found = False
    for node in nodes:
        if _is_part(node.get("node-name"), name):
            monitor.ask("blockdev-del", {"node-name": node["node-name"]})
            found = True
    for node in nodes:
        for bitmap in node.get("dirty-bitmaps", []):
            if _is_part(bitmap.get("name"), name):
                monitor.ask("block-dirty-bitmap-remove", {"node": node["node-name"], "name": bitmap["name"]})
                found = True
    return found


# --- checkpoints ---------------------------------------------------------------------------------------------------


def checkpoints(drives: Sequence[Drive]) -> list[str]:
    """Ours, by name: QEMU keeps no times."""
    return sorted({name for drive in drives for name in drive.bitmaps if name.startswith(PREFIX) and "." not in name})


def delete_checkpoint(monitor: Monitor, drives: Sequence[Drive], name: str) -> None:
    """From every disk that holds it, whatever state it is in."""
    for drive in drives:
        if name in drive.bitmaps:
            try:
                monitor.ask("block-dirty-bitmap-remove", {"node": drive.node, "name": name})
            except Refused as error:
                words = f"deleting checkpoint {name} of {drive.disk.target}: {error}"
                raise (Busy(words) if "busy" in str(error) else HypervisorError(words)) from None


def undo(monitor: Monitor, drives: Sequence[Drive], name: str, folder: Path) -> None:
    """After a `begin` that failed."""
    end(monitor, name, folder)
    delete_checkpoint(monitor, drives, name)
