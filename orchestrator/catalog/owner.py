"""Which process runs a job, so that its death can be proved.

A pid alone proves nothing: it is reused. Pid and start time and boot together name one process of one host for ever.
A process of another host is never declared dead from here.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Owner:
    host: str
    boot: str
    pid: int
    started: int
    """Clock ticks since boot: field 22 of /proc/<pid>/stat."""


NOBODY = Owner("", "", 0, 0)
"""Of jobs in the distributed form: any controller moves them on, any worker of their hypervisor performs them."""


def this_process() -> Owner:
    return owner_of(os.getpid())


def owner_of(pid: int) -> Owner:
    """The living process `pid` of this host. Raises ProcessLookupError if there is none."""
    started = _started(pid)
    if started is None:
        raise ProcessLookupError(f"no process {pid}")
    return Owner(socket.gethostname(), _boot(), pid, started)


def is_dead(owner: Owner) -> bool:
    """True only if it is certain."""
    if owner.host != socket.gethostname():
        return False
    return owner.boot != _boot() or _started(owner.pid) != owner.started


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _started(pid: int) -> int | None:
    """None if there is no such process, or only its zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the name may hold spaces and brackets; field 3 is the first after it
    return None if fields[0] in ("Z", "X") else int(fields[19])
