"""Everything that can go wrong around a freeze, on a real guest: nobody stays frozen, the verdict is right, the job
says what happened, and the next backup works.

A writer in the guest stamps every write with the guest's own clock: the longest gap is what an application would feel.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from orchestrator.demo.in_guest import wait_for_agent
from tests.contracts.relay import Relay
from tests.faults import world
from tests.faults.conftest import NewPlace
from tests.faults.quiet import Quiet, once_frozen
from tests.guests.machines import MIB, GuestFactory
from workers.quiesce import WATCHDOG_SECONDS

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

FREEZE = "agent fsfreeze-freeze"
RUN = ("backup", "run", "--consistency", "application")
SHORT = 5.0
"""Seconds: far below the watchdog's deadline, far above what a freeze takes under emulation."""


@pytest.fixture(scope="module")
def quiet(quiet_factory: GuestFactory, new_place: NewPlace) -> Quiet:
    found = Quiet(quiet_factory({"vda": 64 * MIB, "vdb": 16 * MIB}, label="quiet"), new_place(extension=""))
    found.good()  # the extension is installed
    return found


@pytest.fixture(autouse=True)
def watched(quiet: Quiet) -> Iterator[None]:
    """Whatever a test does, no file system is frozen longer than the watchdog allows."""
    quiet.begin_writing()
    yield
    quiet.place.let_go()
    assert quiet.end_writing() < WATCHDOG_SECONDS + 5
    quiet.no_apps()


# --- scripts -------------------------------------------------------------------------------------------------------


def test_scripts_run_before_and_after_and_their_output_is_in_the_job(quiet: Quiet) -> None:
    quiet.app(
        "50-app",
        pre="cat /proc/uptime >/tmp/pre; echo 'saying pre'; echo kept >$STILLFRAME_RECORDS/label; exit 0",
        post="cat /proc/uptime >/tmp/post; echo saying post",
    )
    with quiet.writing() as gap:
        found = quiet.point(code=0)
    assert found["consistency"] == "application"
    assert "50-app" in found["consistency_reason"]
    assert gap.seconds < SHORT
    assert float(quiet.seen("/tmp/pre").split()[0]) < float(quiet.seen("/tmp/post").split()[0])
    shown = quiet.place.good("job", "show", found["job"]).line("job")
    assert "saying pre" in shown["guest"]["log"]
    assert "saying post" in shown["guest"]["log"]
    point = quiet.place.good("point", "show", found["id"]).line("point")
    assert point["records"] == {"50-app/label": "kept\n"}


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("echo it is broken >&2; exit 1", "exit code 1"),
        ("trap '' TERM; while :; do sleep 1; done", "took too long"),
        ("exit 75", "exit code 75"),
    ],
    ids=["exits 1", "hangs", "asks again and again"],
)
def test_a_pre_script_that_fails_costs_the_word_application_and_no_more(quiet: Quiet, pre: str, words: str) -> None:
    quiet.app("40-first", post="echo undone >/tmp/first")
    quiet.app("50-app", pre=pre, post="echo undone >/tmp/undone")
    quiet.out("rm -f /tmp/undone /tmp/first")
    with quiet.writing() as gap:
        found = quiet.point()
    assert found["consistency"] == "filesystem"
    assert "50-app pre" in found["consistency_reason"]
    assert words in found["consistency_reason"]
    assert gap.seconds < SHORT
    assert quiet.seen("/tmp/first") == "undone"
    assert quiet.seen("/tmp/undone") == "undone"
    quiet.good()


def test_a_daemon_that_keeps_its_output_open_and_one_that_says_too_much(quiet: Quiet) -> None:
    quiet.app("50-daemon", pre="(sleep 300) & exit 0")
    quiet.app("51-loud", pre="dd if=/dev/zero bs=65536 count=1600 2>/dev/null; exit 0")
    begun = time.monotonic()
    found = quiet.point(code=0)
    assert found["consistency"] == "application"
    assert time.monotonic() - begun < 60
    shown = quiet.place.good("job", "show", found["job"]).line("job")
    assert len(shown["guest"]["log"]) < 1 << 18
    quiet.out("kill $(pidof sleep); true")


def test_a_post_script_that_fails_is_a_warning(quiet: Quiet) -> None:
    quiet.app("50-app", post="echo cannot undo >&2; exit 4")
    found = quiet.point(code=0)
    assert found["consistency"] == "application"
    assert any("50-app post failed" in warning for warning in found["warnings"])
    quiet.good()


def test_a_script_that_others_could_have_written_is_not_run(quiet: Quiet) -> None:
    quiet.app("50-app", pre="touch /tmp/was-run; exit 0")
    quiet.out("rm -f /tmp/was-run; chmod 777 /etc/stillframe/apps/50-app")
    found = quiet.point()
    assert (found["consistency"], quiet.seen("/tmp/was-run")) == ("filesystem", "")
    assert "50-app" in found["consistency_reason"]
    assert quiet.out("ls -l /tmp/was-run 2>&1 || true").count("No such file") == 1


def test_what_is_required_and_not_had_makes_no_point(quiet: Quiet) -> None:
    quiet.app("50-app", pre="exit 1")
    before = set(world.points(quiet.place))
    ran = quiet.backup("--require", code=1)
    error = ran.line("backup")["error"]
    assert "application consistency is required" in error["message"]
    assert "50-app pre failed" in error["message"]
    assert set(world.points(quiet.place)) == before
    assert world.strays(quiet.place, quiet.guest) == []
    quiet.good()


# --- the guest -----------------------------------------------------------------------------------------------------


def test_a_freeze_that_is_refused(quiet: Quiet) -> None:
    """A file system that somebody else has frozen refuses: the agent passes it over, and then thaws one more than it
    had frozen."""
    quiet.app("50-app", pre="fsfreeze --freeze /data/vdb; exit 0", post="fsfreeze --unfreeze /data/vdb; exit 0")
    with quiet.writing() as gap:
        found = quiet.point()
    assert found["consistency"] == "crash"
    assert "1 file systems frozen, 2 thawed" in found["consistency_reason"]
    assert gap.seconds < SHORT + 5
    assert not world.frozen(quiet.guest)
    quiet.good()


def test_a_guest_without_fsfreeze_has_a_watchdog_all_the_same(quiet: Quiet) -> None:
    quiet.out("mv /bin/fsfreeze /tmp/fsfreeze")
    try:
        quiet.good()
    finally:
        quiet.out("mv /tmp/fsfreeze /bin/fsfreeze")


def test_a_full_disk_in_the_guest(quiet: Quiet) -> None:
    quiet.out("dd if=/dev/zero of=/data/vda/ballast bs=65536 2>/dev/null; true")
    try:
        quiet.good()
    finally:
        quiet.out("rm -f /data/vda/ballast")


def test_a_root_that_cannot_be_written(quiet: Quiet) -> None:
    """The extension goes to memory, for as long as the guest runs."""
    quiet.place.good("extension", "uninstall", quiet.guest.name, "--yes")
    quiet.out("mount -t tmpfs -o ro none /opt")
    try:
        quiet.good()
        assert quiet.out("ls /opt") == ""
        assert "ext" in quiet.out("ls /run/stillframe-ext/current/")
    finally:
        quiet.place.good("extension", "uninstall", quiet.guest.name, "--yes")
        quiet.out("umount /opt")
    quiet.good()


def test_a_guest_that_forbids_commands_is_frozen_all_the_same(quiet: Quiet) -> None:
    """As EL 9 ships its agent: freeze and thaw, nothing else."""
    quiet.out("echo '-b guest-exec,guest-exec-status' >/run/agent-options")
    quiet.out("(sleep 1; kill $(pidof qemu-ga)) >/dev/null 2>&1 &")
    deadline = time.monotonic() + 60
    while runs_commands(quiet):
        assert time.monotonic() < deadline, "the agent was not restarted"
    try:
        found = quiet.point()
        assert found["consistency"] == "filesystem"
        assert "guest-exec" in found["consistency_reason"]
        assert quiet.backup("--require", code=1).line("backup")["error"]["code"] == "GuestError"
    finally:
        quiet.guest.domain.reset()
        quiet.wait_for_agent()
    quiet.begin_writing()  # the one before has gone with its stamps
    quiet.good()


def runs_commands(quiet: Quiet) -> bool:
    try:
        quiet.out("true")
    except libvirt.libvirtError as error:
        return "disabled" not in str(error) and "has been blocked" not in str(error)
    return True


def test_two_backups_at_once(quiet: Quiet, new_place: NewPlace) -> None:
    """One of the same Stillframe, which knows; one of another, which finds the guest held."""
    held = quiet.place.hold(f"before {FREEZE}", 1, *RUN, quiet.guest.name)
    try:
        assert quiet.backup(code=11).line("error")["code"] == "Busy"
        other = Quiet(quiet.guest, new_place(extension="")).point()
        assert other["consistency"] == "crash"
        assert "holds this guest" in other["consistency_reason"]
        quiet.guest.domain.checkpointLookupByName(f"sf-{other['job']}").delete()
    finally:
        ran = held.finish()
    assert ran.code in (0, 3), ran
    quiet.good()


# --- the host ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_controller_is_killed_around_the_freeze(quiet: Quiet, when: str) -> None:
    quiet.app("50-app", post="echo undone >/tmp/undone")
    quiet.out("rm -f /tmp/undone")
    with quiet.writing() as gap:
        assert quiet.backup(at=(f"{when} {FREEZE}", 1)).code == -signal.SIGKILL
    assert gap.seconds < SHORT + 5
    quiet.place.good("job", "list")
    assert world.strays(quiet.place, quiet.guest) == []
    assert quiet.seen("/tmp/undone") == "undone"
    quiet.good()


@pytest.mark.parametrize("signal_name", ["KILL", "TERM"])
def test_the_agent_is_ended_while_frozen(quiet: Quiet, signal_name: str) -> None:
    said = f"agent got {signal_name}"
    act = f"old=$(pidof qemu-ga); kill -{signal_name} $old"
    if signal_name == "KILL":
        act += "; until new=$(pidof qemu-ga) && [ $new != $old ]; do usleep 20000; done"
    quiet.app("50-app", pre=once_frozen(f"{act}; echo '{said}' >/dev/console"))
    with quiet.writing() as gap:
        held = quiet.place.hold(f"after {FREEZE}", 1, *RUN, quiet.guest.name)
        quiet.guest.wait_for_word(said)
        wait_for_agent(quiet.guest.domain)
        ran = held.finish()
    # Killed, init starts it again, it finds its note, and thaws as many as it had frozen; told to end, it waits for the
    # thaw: nothing was broken.
    assert ran.line("backup")["consistency"] == "application"
    assert 1 < gap.seconds < 30
    quiet.good()


def test_the_wire_to_the_hypervisor_is_cut_while_frozen(quiet: Quiet) -> None:
    relay = Relay(Path(f"/tmp/sf-relay-{os.getpid()}"))
    old, quiet.place.uri = quiet.place.uri, f"qemu+unix:///system?socket={relay.path}"
    try:
        with relay, quiet.writing() as gap:
            quiet.place.configure()
            relay.cut_at(b"guest-fsfreeze-thaw")
            ran = quiet.backup()
        assert relay.has_cut
    finally:
        quiet.place.uri = old
        quiet.place.configure()
    assert gap.seconds < 30, ran
    found = ran.line("backup")
    # Whether the guest had been told when the wire broke is libvirtd's affair: told, it has no count of the thawed.
    assert (ran.code, found["consistency"] in ("crash", "filesystem")) == (3, True), ran
    assert "thawed" in found["consistency_reason"]
    quiet.good()


def test_nobody_comes_back_and_the_watchdog_thaws(quiet: Quiet) -> None:
    """The controller is killed, and nobody can reach the agent either: it stands still until the watchdog has done all
    that is to be done."""
    act = "kill -STOP $(pidof qemu-ga); echo 'agent stands still' >/dev/console"
    act += "; until [ -e /tmp/undone ]; do usleep 100000; done; kill -CONT $(pidof qemu-ga)"
    quiet.app("50-app", pre=once_frozen(act), post="echo undone >/tmp/undone")
    quiet.out("rm -f /tmp/undone")
    with quiet.writing() as gap:
        held = quiet.place.hold(f"after {FREEZE}", 1, *RUN, quiet.guest.name)
        quiet.guest.wait_for_word("agent stands still")
        held.process.kill()
        held.process.wait()
        wait_for_agent(quiet.guest.domain, timeout=240)
        quiet.place.good("job", "list")  # the file systems are thawed long since; this tells the agent
    assert 20 < gap.seconds < WATCHDOG_SECONDS + 5
    assert world.strays(quiet.place, quiet.guest) == []
    assert quiet.seen("/tmp/undone") == "undone"
    quiet.good()
