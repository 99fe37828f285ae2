"""Whether a QEMU survives a backup of a disk that has an I/O thread.

Some versions do not: when the first reader of the backup lets go, QEMU aborts (`nbd_blockdev_client_closed: Assertion
qemu_in_main_thread()`), and the guest with it. Measured on QEMU 7.2.22 as Debian 12 has it, over libvirt and over QMP
alike. Versions tell nothing certain, since distributions pick single changes; so the very program that runs the machine
is started once, without any guest, and an export on an I/O thread is read and let go of. Where that kills it, such a
disk is not backed up while its machine runs.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from workers.contract.errors import DiskError
from workers.contract.hosts import Host
from workers.contract.machines import Disk
from workers.hypervisors import xml

SECONDS = 60.0
_LIVES, _DIES = "lives", "dies"
# $1: QEMU. Prints which of the two; nothing where that could not be found out.
_TRIAL = r"""
ulimit -c 0
folder=$(mktemp -d) || exit 0
trap 'rm -rf "$folder"' EXIT
mkfifo "$folder/in" || exit 0
"$1" -machine none -nodefaults -display none -S -object iothread,id=io -qmp stdio \
    -blockdev driver=null-co,node-name=disk,size=1048576,read-zeroes=on <"$folder/in" >"$folder/out" 2>&1 &
qemu=$!
exec 3>"$folder/in"
cat >&3 <<END
{"execute": "qmp_capabilities"}
{"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "$folder/nbd"}}}}
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "disk", "iothread": "io"}}
END
tries=0
until qemu-img info "nbd+unix:///disk?socket=$folder/nbd" >/dev/null 2>&1; do
    tries=$((tries + 1))
    [ $tries -lt 60 ] || { kill -9 $qemu; exit 0; }
    sleep 0.1
done
trap '' PIPE
echo '{"execute": "quit"}' >&3 2>/dev/null
exec 3>&-
wait $qemu
case $? in
0) echo lives ;;
134) echo dies ;;
esac
"""
_lock = threading.Lock()
_known: dict[tuple[str, str, int, int], str] = {}


def trouble(host: Host, program: str) -> str:
    """Why no disk with an I/O thread may be exported by `program`; empty: it may. Found out once per program."""
    seen = host.look([Path(program)])[Path(program)]
    key = (host.name, program, seen.inode, seen.mtime_ns)
    with _lock:
        if key not in _known:
            _known[key] = _tried(host, program)
        return _known[key]


def _tried(host: Host, program: str) -> str:
    try:
        said = program and host.run(["/bin/sh", "-c", _TRIAL, "stillframe-trial", program], timeout=SECONDS).strip()
    except DiskError as error:
        said = str(error)
    if said == _LIVES:
        return ""
    if said == _DIES:
        return f"it has an I/O thread, and this QEMU ({program}) crashes when a backup of such a disk ends (tried)"
    return f"it has an I/O thread, and whether this QEMU ({program}) survives a backup of such a disk is not known"


def of_definition(live: str) -> tuple[str, set[str]]:
    """Of a running machine of libvirt's: its QEMU, and the targets of its disks that have an I/O thread, by themselves
    or through their SCSI controller."""
    root = xml.parse(live)
    controllers = root.iterfind("devices/controller[@type='scsi']")
    with_thread = {each.get("index", "0") for each in controllers if _has_thread(each)}
    found = set()
    for disk in root.iterfind("devices/disk"):
        target, address = disk.find("target"), disk.find("address")
        if target is None:
            continue
        on_scsi = target.get("bus") == "scsi" and address is not None and address.get("controller", "0") in with_thread
        if _has_thread(disk) or on_scsi:
            found.add(target.get("dev", ""))
    return root.findtext("devices/emulator") or "", found


def _has_thread(element: ET.Element) -> bool:
    driver = element.find("driver")
    return driver is not None and (driver.get("iothread") is not None or driver.find("iothreads") is not None)


def marked(host: Host, disks: Sequence[Disk], program: str, threaded: Collection[str]) -> list[Disk]:
    """`disks` of a running machine, with the danger told of those of the targets `threaded`."""
    if not any(disk.target in threaded and not disk.excluded for disk in disks):
        return [*disks]
    why = trouble(host, program)
    return [disk.model_copy(update={"danger": why}) if disk.target in threaded else disk for disk in disks]
