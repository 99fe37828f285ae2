"""What `stillframe hypervisor check` looks at: whether a host can be reached, and has what backups need.

A line for each thing, in the order in which they are to be mended; what cannot be looked at without an earlier one is
left out. Nothing is changed there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.cli.checks import Check, Level
from orchestrator.cli.output import size
from workers.contract.errors import StillframeError

if TYPE_CHECKING:
    from workers.config import HypervisorConfig
    from workers.context import Context
    from workers.contract.hosts import Host
    from workers.snapshot import Places

_CLOCK_SECONDS = 5.0
_LOW_SPACE = 1 << 30
_UTILS = "apt-get install qemu-utils"
_PROGRAMS: dict[str, tuple[Level, str, str]] = {
    "qemu-img": ("FAIL", "no scratch can be made", _UTILS),
    "qemu-nbd": ("FAIL", "machines that are off cannot be read, and nothing be restored to it", _UTILS),
    "virsh": ("WARN", "no guard can thaw if Stillframe is killed during a freeze", "apt-get install libvirt-clients"),
}


def check_host(context: Context, name: str, config: HypervisorConfig) -> Iterator[Check]:
    """Findings on one hypervisor."""
    host, subject = context.host(name), f"hypervisor {name}"
    started = time.monotonic()
    try:
        host.run(["true"], timeout=30)
        since = time.monotonic()
        host.run(["true"], timeout=30)
    except StillframeError as error:
        yield Check("FAIL", subject, str(error), error.hint)
        return
    if not host.local:
        took = f"login {since - started:.1f} s, a question {1000 * (time.monotonic() - since):.0f} ms"
        pinned = "host key pinned" if config.host_key else "host key from known_hosts"
        yield Check("OK", subject, f"reached over SSH as {host.name} ({took}; {pinned})")
        yield from _clock(host, subject)
    yield from _programs(host, subject, libvirt=config.uri.startswith("qemu"))
    yield from _scratch(host, subject, context.places(name))
    yield from _machines(context, name, subject)


def _clock(host: Host, subject: str) -> Iterator[Check]:
    try:
        before = time.time()
        there = float(host.run(["date", "+%s.%N"]))
        off = there - (before + time.time()) / 2
    except (StillframeError, ValueError) as error:
        yield Check("WARN", subject, f"its clock cannot be read: {error}")
        return
    if abs(off) > _CLOCK_SECONDS:
        words = f"its clock is {abs(off):.0f} s {'ahead' if off > 0 else 'behind'}"
        yield Check("WARN", subject, words, f"on {host.name}: timedatectl set-ntp true")
    else:
        yield Check("OK", subject, f"its clock differs by {abs(off):.1f} s")


def _programs(host: Host, subject: str, *, libvirt: bool) -> Iterator[Check]:
    found = []
    for program, (level, consequence, mend) in _PROGRAMS.items():
        if program == "virsh" and not libvirt:
            continue
        try:
            version = re.search(r"\d+(\.\d+)+", host.run([program, "--version"], timeout=30))
            found.append(f"{program} {version[0] if version else '?'}")
        except StillframeError as error:
            yield Check(level, subject, f"{error}: {consequence}", f"on {host.name}: {mend}")
    if found:
        yield Check("OK", subject, ", ".join(found))


def _scratch(host: Host, subject: str, places: Places) -> Iterator[Check]:
    try:
        for what, folder in {"scratch": places.scratch, "runtime": places.runtime}.items():
            there = _existing(host, folder)
            if not host.writable(there):
                yield Check(
                    "FAIL", subject, f"{what} cannot be made in {there}", f"log in as root, or: chown … {there}"
                )
                continue
            free = host.free(there)
            if what == "scratch":
                low = free < max(places.floor, _LOW_SPACE)
                mend = "set scratch_dir of this hypervisor to a larger file system" if low else ""
                yield Check("WARN" if low else "OK", subject, f"{size(free)} free for scratch in {there}", mend)
    except StillframeError as error:
        yield Check("FAIL", subject, str(error), error.hint)


def _existing(host: Host, folder: Path) -> Path:
    above = [folder, *folder.parents]
    found = host.look(above)
    return next(path for path in above if found[path].exists)


def _machines(context: Context, name: str, subject: str) -> Iterator[Check]:
    try:
        hypervisor = context.hypervisor(name)
        machines = hypervisor.machines()
    except StillframeError as error:
        yield Check("FAIL", subject, str(error), error.hint)
        return
    version = hypervisor.features.version
    if not hypervisor.features.backup:
        yield Check("FAIL", subject, f"{version} cannot make backups", "libvirt 7.2 and QEMU 4.2 or newer")
        return
    yield Check("OK", subject, f"{version}, {len(machines)} machines")
    for machine in machines:
        for disk in machine.disks:
            if "cannot be read" in disk.excluded:
                mend = f"can {hypervisor.host.name} read {disk.source}?"
                yield Check("WARN", f"machine {machine.machine.name}", f"{disk.target}: {disk.excluded}", mend)
