"""libvirt's backup and checkpoint documents: built and read, no I/O.

Every name in them carries `sf-<job>`, and the socket's file name *is* it: that is the proof of ownership that
invariant 4 asks for, and it survives a restart of everything but QEMU itself.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from xml.etree import ElementTree as ET

from workers.contract.errors import UsageError
from workers.contract.points import Mode
from workers.contract.seams import BackupRequest, DiskRequest, Export
from workers.hypervisors import xml

PREFIX = "sf-"
SOCKET_SUFFIX = ".sock"


def require_ours(name: str) -> None:
    """Raise UsageError unless `name` is one of ours (invariant 4)."""
    if not name.startswith(PREFIX) or len(name) == len(PREFIX) or "/" in name:
        raise UsageError(f"{name!r} is not a name that Stillframe gives; it is left alone")


def _incremental(disk: DiskRequest) -> bool:
    return disk.mode is Mode.INCREMENTAL and disk.base is not None


def _export_bitmap(name: str, target: str) -> str:
    return f"{name}-{target}"


def backup(request: BackupRequest, socket: Path) -> str:
    """`<domainbackup>` in pull mode over a unix socket, with scratch that exists already."""
    root = ET.Element("domainbackup", mode="pull")
    ET.SubElement(root, "server", transport="unix", socket=str(socket))
    disks = ET.SubElement(root, "disks")
    for disk in request.disks:
        element = ET.SubElement(disks, "disk", name=disk.target, backup="yes", type="file", exportname=disk.target)
        element.set("backupmode", "full")
        if _incremental(disk):
            element.set("backupmode", "incremental")
            element.set("incremental", str(disk.base))
            element.set("exportbitmap", _export_bitmap(request.name, disk.target))
        ET.SubElement(element, "driver", type="qcow2")
        ET.SubElement(element, "scratch", file=str(disk.scratch))
    for target in request.excluded:
        ET.SubElement(disks, "disk", name=target, backup="no")
    return ET.tostring(root, encoding="unicode")


def checkpoint(request: BackupRequest) -> str | None:
    """`<domaincheckpoint>` named after the job; None if no disk of it tracks changes."""
    if not any(disk.tracks_changes for disk in request.disks):
        return None
    return minimal_checkpoint(
        request.name,
        {disk.target for disk in request.disks if disk.tracks_changes},
        [*(disk.target for disk in request.disks), *request.excluded],
    )


def minimal_checkpoint(name: str, tracked: Collection[str], targets: Collection[str], *, definition: str = "") -> str:
    """A checkpoint of `tracked` among `targets`; with the `definition` of its machine it can be redefined."""
    root = ET.Element("domaincheckpoint")
    ET.SubElement(root, "name").text = name
    disks = ET.SubElement(root, "disks")
    for target in targets:
        if target in tracked:
            element = ET.SubElement(disks, "disk", name=target, checkpoint="bitmap")
            if definition:
                element.set("bitmap", name)
        else:
            ET.SubElement(disks, "disk", name=target, checkpoint="no")
    if definition:
        ET.SubElement(root, "creationTime").text = "0"
        root.append(xml.parse(definition))
    return ET.tostring(root, encoding="unicode")


def exports(request: BackupRequest, socket: Path) -> list[Export]:
    return [
        Export(
            target=disk.target,
            socket=str(socket),
            name=disk.target,
            bitmap=f"qemu:dirty-bitmap:{_export_bitmap(request.name, disk.target)}" if _incremental(disk) else None,
        )
        for disk in request.disks
    ]


def socket_path(description: str) -> Path:
    """Where the running backup in `description` listens; an empty path if it does not listen on a unix socket."""
    server = xml.parse(description).find("server")
    return Path((server.get("socket") or "") if server is not None else "")


def running_name(description: str) -> str | None:
    """The `sf-<job>` that the running backup in `description` belongs to; None if it is somebody else's."""
    file = socket_path(description).name
    if not file.startswith(PREFIX) or not file.endswith(SOCKET_SUFFIX):
        return None
    return file.removesuffix(SOCKET_SUFFIX)


def tracked_targets(checkpoint_xml: str) -> set[str]:
    """Disks that a checkpoint's document covers with a bitmap."""
    return {
        disk.get("name") or ""
        for disk in xml.parse(checkpoint_xml).iterfind("disks/disk")
        if disk.get("checkpoint") == "bitmap"
    }


def narrowed(checkpoint_xml: str, targets: Collection[str]) -> str:
    """The same checkpoint, covering only `targets`, and without a parent: libvirt refuses to redefine a checkpoint
    whose parent is gone, which is the usual fate of a parent, and bitmaps do not depend on each other."""
    root = xml.parse(checkpoint_xml)
    for parent in root.findall("parent"):
        root.remove(parent)
    for disk in root.iterfind("disks/disk"):
        if disk.get("checkpoint") == "bitmap" and disk.get("name") not in targets:
            disk.set("checkpoint", "no")
            disk.attrib.pop("bitmap", None)
    return ET.tostring(root, encoding="unicode")


def creation_time(checkpoint_xml: str) -> int:
    """Seconds since 1970; 0 if the document does not say."""
    return int(xml.parse(checkpoint_xml).findtext("creationTime") or 0)
