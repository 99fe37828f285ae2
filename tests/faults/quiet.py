"""A guest with a steady writer in it, and application scripts that misbehave: what the tests of quiescing share."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from orchestrator.demo.in_guest import guest_out
from tests.faults.place import Place, Ran
from tests.guests.machines import Guest

APPS = "/etc/stillframe/apps"
STAMPS = "/tmp/writes"
# No program is run in the loop: a shell's own write shows a frozen file system to the hundredth of a second. The stamps
# are in memory: a full disk holds up nobody.
WRITER = f"""while [ -e /tmp/write ]; do
    echo >/data/vda/written; echo >/data/vdb/written; read -r up rest </proc/uptime; echo "$up" >>{STAMPS}; usleep 10000
done"""


def once_frozen(act: str) -> str:
    """For a script's `pre`: `act` is done while the guest is frozen, when the agent has replied. The file is the
    agent's own mark, made when it begins to freeze; a frozen guest can be told nothing."""
    wait = "until [ -e /run/qga.state.isfrozen ]; do usleep 20000; done; sleep 4"
    return f"({wait}; {act}) >/dev/null 2>&1 </dev/null & exit 0"


@dataclass
class Quiet:
    """One guest, and a place to back it up to."""

    guest: Guest
    place: Place

    def backup(self, *options: str, at: tuple[str, int] | None = None, code: int | None = None) -> Ran:
        """Run a backup with the goal `application`; it must end with `code`, if one is given."""
        goal = ("--consistency", "application")
        ran = self.place.run("backup", "run", self.guest.name, *goal, *options, at=at, timeout=240)
        assert code is None or ran.code == code, ran
        return ran

    def point(self, *options: str, code: int = 3) -> dict[str, Any]:
        """What a backup that makes a point says of it; 3: it is worth less than was asked for."""
        return self.backup(*options, code=code).line("backup")

    def good(self) -> None:
        """The next backup works, and is worth what was asked for."""
        self.app("50-app", pre="exit 0")
        try:
            found = self.point(code=0)
        finally:
            self.no_apps()
        assert found["consistency"] == "application", found

    def app(self, name: str, *, pre: str = "exit 0", post: str = "exit 0") -> None:
        """Give the guest an application script of its own."""
        text = f"#!/bin/sh\ncase $1 in\npre)\n{pre}\n;;\npost)\n{post}\n;;\nesac\n"
        folder = f"{APPS}/{name}"
        self.out(f"mkdir -p {folder} && cat >{folder}/run && chmod 755 {folder}/run", stdin=text.encode())

    def no_apps(self) -> None:
        self.out(f"rm -rf {APPS}")

    def out(self, command: str, *, stdin: bytes | None = None) -> str:
        return guest_out(self.guest.domain, command, stdin=stdin)

    def seen(self, path: str) -> str:
        """A file of the guest; empty if it is not there."""
        return self.out(f"cat {path} 2>/dev/null || true").strip()

    def begin_writing(self) -> None:
        """Let a writer stamp each time that it has written to all disks."""
        self.out(f"touch /tmp/write; rm -f {STAMPS}; ({WRITER}) >/dev/null 2>&1 </dev/null &")

    def end_writing(self) -> float:
        """The longest time without a write, in seconds, since the writer began."""
        self.wait_for_agent()
        gap = self._gap(0.0)
        self.out("rm -f /tmp/write")
        return gap

    @contextmanager
    def writing(self) -> Iterator[Gap]:
        """How long the writer was held up meanwhile: to be read afterwards."""
        gap = Gap()
        since = float(self.out("cat /proc/uptime").split()[0])
        try:
            yield gap
        finally:
            self.wait_for_agent()
        gap.seconds = self._gap(since)

    def _gap(self, since: float) -> float:
        """Waits for a write that begins now: one that is held up for ever would not show."""
        now, deadline = float(self.out("cat /proc/uptime").split()[0]), time.monotonic() + 60
        while True:
            times = [float(line) for line in self.seen(STAMPS).splitlines()]
            if times and times[-1] > now:
                break
            assert time.monotonic() < deadline, f"the writer does not write: {times[-1:]}, now {now}"
        return max(later - earlier for earlier, later in itertools.pairwise(times) if later >= since)

    def wait_for_agent(self, seconds: float = 150.0) -> None:
        """Until commands can be run in the guest again."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.out("true")
            except Exception:  # noqa: BLE001 - frozen, restarting or silent: whatever it is, it may pass
                assert time.monotonic() < deadline, "the guest's agent runs nothing"
                time.sleep(0.1)
            else:
                return


@dataclass
class Gap:
    """The longest time between two writes, in seconds."""

    seconds: float = 0.0
