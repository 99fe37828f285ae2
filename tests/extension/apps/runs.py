"""Runs one application script in a guest by hand, with the environment of the contract and nothing of the runner's.

`run` is handed over as an open file in a session of its own, as the contract says. With `busybox` everything but the
databases' own clients is busybox: its shell, and its applets in front on the PATH.
"""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import extensions
from tests.guests.machines import Guest

APPS = Path(extensions.__file__).parent / "linux" / "apps"
PLACE = "/opt/apps-under-test"
STATE = "/run/apps-under-test"
BUSYBOX = "/opt/busybox-only"
_CLIENTS = "psql mariadb mysql mongosh"


def put_apps(guest: Guest) -> None:
    """Put the application scripts, and a folder with nothing but busybox and clients, into the guest."""
    from orchestrator.demo.in_guest import guest_out

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(APPS, PLACE.lstrip("/"))
    links = f"for name in {_CLIENTS}; do ln -sf $(command -v $name || echo /usr/bin/$name) {BUSYBOX}/; done"
    command = f"tar xzf - -C / --no-same-owner && mkdir -p {BUSYBOX} && busybox --install -s {BUSYBOX} && {links}"
    guest_out(guest.domain, command, stdin=packed.getvalue())


@dataclass
class Script:
    """One application script of one job in `guest`."""

    guest: Guest
    name: str
    """Folder, `50-postgresql`."""
    shell: str = "dash"
    option: str = ""
    hold: int = 900
    """Seconds; longer than any test waits, so that it is not the time limit that lets go."""
    deadline: int = 60
    """Seconds; the runner gives 30, but the guest is emulated and the host is shared."""

    @property
    def home(self) -> str:
        return f"{STATE}/{self.name}"

    def fresh(self) -> None:
        """A new job: empty folders."""
        self.guest.out(f"rm -rf {self.home}; mkdir -p -m 0700 {self.home}/state {self.home}/records")

    def __call__(self, phase: str, **changed: str) -> tuple[int, str]:
        """Exit code, and what it said on standard error; it says nothing on standard output."""
        words = {"OPTION": self.option, "HOLD": str(self.hold), "DEADLINE": str(self.deadline), "JOB": "0123abcd"}
        words |= {"STATE": f"{self.home}/state", "RECORDS": f"{self.home}/records", "PHASE": phase, "RESULT": "ok"}
        words |= {
            "APP_DIR": f"{PLACE}/{self.name}",
            "GOAL": "application",
            "MOUNTS": "/dev/null",
            "UUID": "u",
        } | changed
        path = "/usr/sbin:/usr/bin:/sbin:/bin"
        shell = ""
        if self.shell == "busybox":
            path, shell = BUSYBOX, f"{BUSYBOX}/sh"
        environment = " ".join(f"'STILLFRAME_{name}={word}'" for name, word in words.items())
        out = f"{self.home}/stdout"
        code, said = self.guest.run(
            f"cd /; umask 077; exec 9<{PLACE}/{self.name}/run; env -i PATH={path} {environment} "
            f"/usr/bin/setsid -w {shell} /proc/self/fd/9 {phase} 2>&1 >{out} </dev/null; code=$?; "
            f"[ ! -s {out} ] || exit 99; echo; exit $code",
            timeout=300,
        )
        return code, said.strip()

    def holder(self) -> str:
        """Process id of the holder, or nothing."""
        return self.guest.out(f"cat {self.home}/state/holder 2>/dev/null || :").strip()

    def holder_lives(self) -> bool:
        pid = self.holder()
        return bool(pid) and self.guest.run(f"kill -0 {pid}")[0] == 0

    def records(self) -> dict[str, str]:
        listing = self.guest.out(f"cd {self.home}/records && ls").split()
        return {name: self.guest.out(f"cat {self.home}/records/{name}") for name in listing}

    def sweep(self) -> str:
        """End what is left of the scripts; the command lines of that: nothing, it should be. No named pipes, either."""
        own = "for p in $(grep -lsz STILLFRAME_JOB /proc/[0-9]*/environ); do"
        own += " tr '\\000' ' ' <${p%/*}/cmdline; echo; p=${p%/*}; kill -KILL ${p#/proc/}; done"
        return self.guest.out(f"{own}; find {STATE} -type p").strip()


def until(what: Callable[[], bool], *, timeout: float = 120.0) -> float:
    """Wait until `what` holds; the seconds that took."""
    begun = time.monotonic()
    while not what():
        assert time.monotonic() - begun < timeout, "it never came true"
        time.sleep(0.1)
    return time.monotonic() - begun
