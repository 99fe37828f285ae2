"""What a run may leave behind, looked for everywhere: libvirt, QEMU itself, files, processes, vault, catalog.

Nothing here asks Stillframe: a test that looks through the eyes of what it tests sees what that believes.
"""

from __future__ import annotations

import json
from pathlib import Path

import libvirt
import libvirt_qemu

from orchestrator.demo.in_guest import agent_command
from tests.faults.place import Place
from tests.guests.machines import Guest
from tests.vault.second_reader import SecondReader


def qmp(guest: Guest, command: str) -> object:
    """QEMU's own answer. It marks the domain as tainted, which only a test may."""
    answer: object = json.loads(libvirt_qemu.qemuMonitorCommand(guest.domain, json.dumps({"execute": command}), 0))[
        "return"
    ]
    return answer


def bitmaps(guest: Guest) -> set[str]:
    """Names of ours that a running QEMU tracks changes under, as `disk image/name`."""
    nodes = qmp(guest, "query-named-block-nodes")
    assert isinstance(nodes, list)
    return {
        f"{Path(node['file']).name}/{bitmap['name']}"
        for node in nodes
        for bitmap in node.get("dirty-bitmaps", [])
        if bitmap["name"].startswith("sf-")
    }


def frozen(guest: Guest) -> bool:
    return bool(agent_command(guest.domain, "guest-fsfreeze-status") == "frozen")


def backup_job(guest: Guest) -> str:
    """libvirt's document of the backup that runs; empty: none."""
    try:
        return str(guest.domain.backupGetXMLDesc())
    except libvirt.libvirtError:
        return ""


def checkpoints(guest: Guest) -> list[str]:
    return sorted(found.getName() for found in guest.domain.listAllCheckpoints())


def processes(folder: Path) -> list[str]:
    """Helpers of ours: qemu-nbd and qemu-img whose command line names something below `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if line.startswith(("qemu-nbd", "qemu-img")) and str(folder) in line:
            found.append(f"{entry.name}: {line}")
    return found


def sockets(guest: Guest) -> list[str]:
    folder = Path("/var/lib/libvirt/qemu")
    return [str(path) for path in folder.glob(f"domain-{guest.domain.ID()}-*/sf-*")] if guest.domain.isActive() else []


def points(place: Place) -> dict[str, dict[str, object]]:
    """The committed points, by a reader that is not ours."""
    if not (place.vault / "points").is_dir():
        return {}
    return SecondReader(place.vault, key=place.key).points()


def newest_base(place: Place, machine: str) -> str | None:
    """The checkpoint that the newest point of the machine with that UUID refers to."""
    mine = [point for point in points(place).values() if point["machine"]["uuid"] == machine]  # type: ignore[index]
    mine.sort(key=lambda point: str(point["time"]))
    disks = mine[-1]["disks"] if mine else []
    assert isinstance(disks, list)
    return next((disk["checkpoint"] for disk in disks if disk["checkpoint"]), None)


def strays(place: Place, guest: Guest) -> list[str]:
    """Everything that should not be there when nothing runs; the base of the newest point should."""
    found = [f"file {path}" for folder in (place.scratch, place.runtime) for path in folder.glob("sf-*")]
    found += [f"session {path.name}" for path in (place.vault / "sessions").glob("*")]
    found += [f"process {line}" for line in processes(place.folder)]
    found += [f"socket {path}" for path in sockets(guest)]
    found += [f"job {row}" for row in place.query("select id, state, leftover from job where active or leftover")]
    base = newest_base(place, guest.uuid)
    wanted = [base] if base else []
    if checkpoints(guest) != wanted:
        found.append(f"checkpoints {checkpoints(guest)}, wanted {wanted}")
    if guest.domain.isActive():
        found += [f"libvirt job {job}" for job in [backup_job(guest)] if job]
        names = {name.rpartition("/")[2] for name in bitmaps(guest)}
        if names != set(wanted):
            found.append(f"bitmaps {bitmaps(guest)}, wanted {wanted} on each disk")
    return found
