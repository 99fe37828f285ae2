"""The disks of a running QEMU as its monitor tells them.

A disk's target must be the same after every start, and must not depend on what the guest calls it: the `id` of its
device, else the name of its drive (`virtio0`, in the order of the command line), else the name of its node. One that
has none of these is named after its place among QEMU's devices.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from workers.contract.errors import HypervisorError, StillframeError
from workers.contract.machines import BitmapState, Disk
from workers.hosts.local import LOCAL
from workers.hypervisors import host_files
from workers.hypervisors.qemu_process import Process
from workers.hypervisors.qmp_wire import Json, Monitor, Refused

_SECTOR = 512
_FILTERS = frozenset(("copy-before-write", "throttle", "copy-on-read", "compress", "preallocate", "blkdebug"))
_PROTOCOLS = frozenset(("file", "host_device"))
_LOCAL = frozenset(["qcow2", "raw", "qed", "vmdk", "vdi", "vpc", "vhdx", "file", "host_device"])
_ROOT_BUS = re.compile(r"/machine/(?!peripheral)[^/]+/(?:pci|pcie)\.0$")
_PERIPHERAL = re.compile(r"/machine/peripheral/([^/]+)")


@dataclass(frozen=True, slots=True)
class Bitmap:
    name: str
    persistent: bool
    recording: bool
    busy: bool
    inconsistent: bool


@dataclass(frozen=True, slots=True)
class Drive:
    """One disk: what a backup needs of it beside `disk`."""

    disk: Disk
    node: str
    """Of the image itself, below filters."""
    bitmaps: dict[str, Bitmap] = field(default_factory=dict)
    named: str = ""
    """QEMU's word for its image."""
    read_only: bool = False
    iothread: bool = False
    """QEMU serves it on a thread of its own."""
    firmware: bool = False
    """It is the machine's firmware or its variables, and no disk."""


def drives(monitor: Monitor, process: Process | None, *, lenient: bool) -> list[Drive]:
    """All drives with a medium or a device, in QEMU's order. `lenient`: one whose image cannot be read is listed as
    excluded; otherwise it is a HypervisorError, for a backup must not leave out a disk in silence."""
    blocks: list[Json] = monitor.ask("query-block")
    nodes: list[Json] = monitor.ask("query-named-block-nodes", {"flat": True})
    found: list[Drive] = []
    taken: set[str] = set()
    for block in blocks:
        if "inserted" not in block and ("qdev" not in block or _is_default(block)):
            continue
        target = _free(_target(block), taken)
        taken.add(target)
        found.append(_drive(monitor, process, nodes, block, target, lenient=lenient))
    return found


def _is_default(block: Json) -> bool:
    """A drive that QEMU adds by itself when nobody asks for one."""
    return str(block.get("qdev", "")).startswith("/machine/unattached/")


def _target(block: Json) -> str:
    device = str(block.get("qdev") or "")
    named = _PERIPHERAL.match(device)
    if named:
        return named[1]
    if device and "/" not in device:
        return device
    node = str(block.get("inserted", {}).get("node-name", ""))
    word = str(block.get("device") or "") or (node if not node.startswith("#") else "") or device.strip("/")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", word).strip("-.") or "disk"


def _free(word: str, taken: set[str]) -> str:
    if word not in taken:
        return word
    return next(f"{word}-{number}" for number in range(2, len(taken) + 3) if f"{word}-{number}" not in taken)


def _drive(
    monitor: Monitor, process: Process | None, nodes: Sequence[Json], block: Json, target: str, *, lenient: bool
) -> Drive:
    inserted: Json = block.get("inserted", {})
    device = str(block.get("qdev") or "")
    node = _image_node(nodes, inserted)
    named = _file_of(str(node.get("file", inserted.get("file", ""))))
    driver = str(node.get("drv", inserted.get("drv", "")))
    read_only = bool(inserted.get("ro", True))
    path = process.absolute(named) if process and named else Path(named)
    format = "raw" if driver in _PROTOCOLS else driver
    bare = Disk(
        target=target,
        source=str(path) if named else "",
        format=format or "raw",
        capacity=0,
        identity=str(path) if named else "",
        tracks_changes=False,
        excluded=_excluded(monitor, block, driver, path, named),
        address=address(monitor, device) if device else "",
        refused=bool(inserted.get("encrypted")) or driver == "luks",
    )
    drive = Drive(
        bare,
        str(node.get("node-name", "")),
        _bitmaps(node),
        named,
        read_only,
        iothread=_has_thread(monitor, device),
        firmware=is_firmware(block),
    )
    if bare.excluded:
        return drive
    size = int(inserted.get("image", {}).get("virtual-size", 0))
    try:
        disk = _with_facts(bare, path, size)
    except StillframeError as error:
        if not lenient:
            raise HypervisorError(f"{target}: {error}", hint=error.hint) from None
        disk = bare.model_copy(update={"excluded": f"its image cannot be read: {error}"})
    return replace(drive, disk=disk)


def _with_facts(disk: Disk, path: Path, size: int) -> Disk:
    seen = LOCAL.look([path], head=host_files.HEAD)[path]
    options = host_files.qcow2_options(path, seen) if disk.format == "qcow2" else {}
    return disk.model_copy(
        update={
            "capacity": -(-size // _SECTOR) * _SECTOR,
            "identity": host_files.identity(path, seen),
            "tracks_changes": options.get("compat") == "1.1" and "data_file" not in options,
            "source_options": options,
        }
    )


def _image_node(nodes: Sequence[Json], inserted: Json) -> Json:
    """Below a filter (our own backup puts one there too) stands the node of the same file that is none."""
    if inserted.get("drv") not in _FILTERS:
        name = inserted.get("node-name")
        return next((node for node in nodes if node.get("node-name") == name), inserted)
    wanted = _file_of(str(inserted.get("file", "")))
    same = [node for node in nodes if node.get("file") == wanted and node.get("drv") not in _FILTERS]
    formats = [node for node in same if node.get("drv") not in _PROTOCOLS]
    return (formats or same or [inserted])[0]


def _file_of(word: str) -> str:
    """QEMU's `json:{…}` for an image with options that a plain name cannot carry."""
    if not word.startswith("json:"):
        return word
    try:
        found = json.loads(word.removeprefix("json:"))
    except ValueError:
        return word
    while isinstance(found, dict):
        if isinstance(found.get("filename"), str):
            return str(found["filename"])
        found = found.get("file")
    return word


def _excluded(monitor: Monitor, block: Json, driver: str, path: Path, named: str) -> str:
    device, inserted = str(block.get("qdev") or ""), block.get("inserted", {})
    kind = ""
    if device and not device.startswith("/machine/system.flash"):
        kind = str(_property(monitor, device.removesuffix("/virtio-backend"), "type") or "")
    if kind.endswith("-cd"):
        return "CD-ROM"
    if kind == "floppy":
        return "floppy"
    if is_firmware(block):
        return "firmware: its variables are kept with each point"
    if not inserted:
        return "no medium"
    if inserted.get("ro", False):
        return "read-only"
    if kind == "scsi-block":
        return "SCSI device passed through"
    if kind and _property(monitor, device.removesuffix("/virtio-backend"), "share-rw") is True:
        return "shared between machines"
    if inserted.get("encrypted") or driver == "luks":
        return "encrypted on the host: QEMU alone does not give its secret to be kept"
    if driver not in _LOCAL or not named or re.match(r"[a-z0-9+]+:", named):
        return f"network disk, or of a kind unknown here ({driver})"
    if path.name.startswith("vl.") and not path.exists():
        return "transient"
    return ""


def is_firmware(block: Json) -> bool:
    return str(block.get("device", "")).startswith("pflash") or str(block.get("qdev", "")).startswith(
        "/machine/system.flash"
    )


def _bitmaps(node: Json) -> dict[str, Bitmap]:
    return {
        str(found["name"]): Bitmap(
            name=str(found["name"]),
            persistent=bool(found.get("persistent")),
            recording=bool(found.get("recording")),
            busy=bool(found.get("busy")),
            inconsistent=bool(found.get("inconsistent")),
        )
        for found in node.get("dirty-bitmaps", [])
        if found.get("name")
    }


def judged(drive: Drive, base: str) -> Disk:
    """Its disk, with the state of the checkpoint `base` on it."""
    found = drive.bitmaps.get(base)
    if found is None:
        why = "QEMU was killed before it was stored, or it was removed"
        state, detail = BitmapState.MISSING, f"{drive.disk.source} has no bitmap {base}: {why}"
    elif found.inconsistent:
        state, detail = (
            BitmapState.INCONSISTENT,
            f"bitmap {base} in {drive.disk.source} was in use when QEMU was killed",
        )
    elif not found.persistent:
        state, detail = BitmapState.INCONSISTENT, f"bitmap {base} would not outlive QEMU"
    elif not found.recording:
        state, detail = BitmapState.INCONSISTENT, f"bitmap {base} in {drive.disk.source} does not record"
    else:
        return drive.disk.model_copy(update={"bitmap": BitmapState.VALID})
    return drive.disk.model_copy(update={"bitmap": state, "bitmap_detail": detail})


# --- where the guest sees it ---------------------------------------------------------------------------------------


def _property(monitor: Monitor, path: str, name: str) -> object:
    try:
        return monitor.ask("qom-get", {"path": path, "property": name})
    except Refused:
        return None


def _has_thread(monitor: Monitor, device: str) -> bool:
    """Its own (virtio-blk), or that of its controller (SCSI)."""
    if not device:
        return False
    own = device.removesuffix("/virtio-backend")
    bus = str(_property(monitor, own, "parent_bus") or "")
    controller = bus.rpartition("/")[0].removesuffix("/virtio-backend")
    return any(_property(monitor, place, "iothread") for place in (own, controller) if place)


def address(monitor: Monitor, device: str) -> str:
    """See `machines.Disk.address`; empty behind a bridge, whose number only the guest knows."""
    own = device.removesuffix("/virtio-backend")
    if pci := _pci(monitor, own):
        return pci
    bus = str(_property(monitor, own, "parent_bus") or "")
    controller = bus.rpartition("/")[0].removesuffix("/virtio-backend")
    unit = [_property(monitor, own, name) for name in ("channel", "scsi-id", "lun")]
    if not controller or not all(isinstance(part, int) for part in unit):
        return ""
    host = _pci(monitor, controller)
    return f"{host}/{':'.join(str(part) for part in unit)}" if host else ""


def _pci(monitor: Monitor, device: str) -> str:
    place = _property(monitor, device, "addr")
    if not _ROOT_BUS.match(str(_property(monitor, device, "parent_bus") or "")):
        return ""
    if isinstance(place, int):  # slot and function in one
        slot, function = place >> 3, place & 7
    else:
        found = re.fullmatch(r"([0-9a-f]{1,2})(?:\.([0-7]))?", str(place))
        if not found:
            return ""
        slot, function = int(found[1], 16), int(found[2] or "0")
    return f"pci:0000:00:{slot:02x}.{function:x}"
