"""What happens to a machine while its backup runs: it stops, it starts, somebody else works on it, somebody cancels.

The command stands still in the middle of its transfer until the test has done its worst: no race decides the outcome.
"""

from __future__ import annotations

import time

import libvirt
import pytest

from orchestrator.demo.host import shut_down
from tests.faults import world
from tests.faults.paused import Paused, paused_machine
from tests.faults.place import Place
from tests.guests.machines import MIB, GuestFactory

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

TRANSFER = "before mkdir _connection"
"""The first step inside a transfer: the snapshot stands, nothing has been read."""


def modes(point: dict[str, object]) -> dict[str, str]:
    disks = point["disks"]
    assert isinstance(disks, list)
    return {disk["target"]: disk["mode"] for disk in disks}


def restored(place: Place, machine: Paused, target: str) -> bytes:
    """The disk of the newest point, brought back."""
    file = place.folder / "restored.raw"
    file.unlink(missing_ok=True)
    place.good("restore", "disk", f"{machine.name}@latest", target, "--to", file)
    return file.read_bytes()


def holds_everything(place: Place, machine: Paused) -> None:
    for target in machine.content:
        assert restored(place, machine, target) == machine.content[target], target


def begin_theirs(machine: Paused) -> None:
    """A backup as another program would make it."""
    socket = f"/var/lib/libvirt/qemu/other-{machine.domain.ID()}.sock"
    server = f"<server transport='unix' socket='{socket}'/>"
    machine.domain.backupBegin(f"<domainbackup mode='pull'>{server}</domainbackup>", None)


def wait_for_no_backup(machine: Paused) -> None:
    """libvirt ends jobs of all machines on one thread, which a machine whose QEMU was killed holds up for 30 s."""
    deadline = time.monotonic() + 120
    while job := world.backup_job(machine.guest):
        assert time.monotonic() < deadline, job
        time.sleep(0.02)


def test_a_guest_that_shuts_down_meanwhile(place: Place, tiny_guest: GuestFactory) -> None:
    guest = tiny_guest({"vda": 64 * MIB}, label="meanwhile")
    first = place.backed_up(guest.name)
    guest.out("echo new > /data/vda/new && sync")
    held = place.hold(TRANSFER, 1, "backup", "run", guest.name)
    shut_down(guest.domain)
    ran = held.finish()
    error = ran.line("backup")["error"]
    assert ran.code == 1, ran
    assert error["code"] in ("DiskError", "HypervisorError")
    assert error["hint"]
    assert world.strays(place, guest) == []
    assert list(world.points(place)) == [first["id"]]
    off = place.backed_up(guest.name)
    assert (off["consistency"], modes(off)) == ("application", {"vda": "incremental"}), off
    guest.start()
    assert modes(place.backed_up(guest.name)) == {"vda": "incremental"}
    assert world.strays(place, guest) == []


def test_a_power_cut_meanwhile(place: Place, machine: Paused) -> None:
    machine.write("vda", 0, MIB, 1)
    first = place.backed_up(machine.name)
    machine.write("vda", MIB, MIB, 2)
    held = place.hold(TRANSFER, 1, "backup", "run", machine.name)
    machine.kill()
    ran = held.finish()
    assert (ran.code, ran.line("backup")["error"]["code"]) == (1, "DiskError"), ran
    assert list(world.points(place)) == [first["id"]]
    machine.start()
    point = place.backed_up(machine.name)
    assert modes(point) == {"vda": "full", "vdb": "full"}
    assert world.strays(place, machine.guest) == []
    holds_everything(place, machine)


@pytest.mark.parametrize("first", ["full", "incremental"])
def test_a_start_wins_over_the_backup_of_a_machine_that_is_off(
    place: Place, tiny_guest: GuestFactory, first: str
) -> None:
    machine = paused_machine(tiny_guest)
    if first == "incremental":
        place.backed_up(machine.name)
        machine.write("vda", 0, MIB, 1)
    machine.stop()
    held = place.hold(TRANSFER, 1, "backup", "run", machine.name)
    machine.start()
    machine.write("vda", 0, MIB, 2)
    machine.write("vdb", MIB, MIB, 3)
    ran = held.finish()
    assert (ran.code, ran.line("backup")["error"]["code"]) == (11, "Yielded"), ran
    assert machine.domain.isActive()
    assert world.strays(place, machine.guest) == []
    assert modes(place.backed_up(machine.name)) == {"vda": first, "vdb": first}
    assert world.strays(place, machine.guest) == []
    holds_everything(place, machine)


def test_a_job_of_somebody_else_is_left_alone(place: Place, machine: Paused) -> None:
    place.backed_up(machine.name)
    base = world.checkpoints(machine.guest)
    begin_theirs(machine)
    theirs = world.backup_job(machine.guest)
    ran = place.run("backup", "run", machine.name)
    error = ran.line("backup")["error"]
    assert (ran.code, error["code"]) == (11, "Busy")
    assert "another program" in error["message"]
    place.good("job", "list")
    assert world.backup_job(machine.guest) == theirs
    assert world.checkpoints(machine.guest) == base
    machine.domain.abortJob()
    assert modes(place.backed_up(machine.name)) == {"vda": "incremental", "vdb": "incremental"}


def test_a_job_that_somebody_else_begins_after_ours_ended_is_left_alone(place: Place, machine: Paused) -> None:
    """The release of a backup whose job is gone must not end the one that took its place."""
    held = place.hold(TRANSFER, 1, "backup", "run", machine.name)
    machine.domain.abortJob()
    wait_for_no_backup(machine)
    begin_theirs(machine)
    theirs = world.backup_job(machine.guest)
    ran = held.finish()
    assert ran.code == 1, ran
    assert world.backup_job(machine.guest) == theirs
    machine.domain.abortJob()
    place.good("job", "list")
    wait_for_no_backup(machine)
    assert world.strays(place, machine.guest) == []
    place.backed_up(machine.name)


def test_cancelled_by_another_process(place: Place, machine: Paused) -> None:
    first = place.backed_up(machine.name)
    machine.write("vdb", 0, MIB, 5)
    held = place.hold(TRANSFER, 1, "backup", "run", machine.name)
    [active] = place.good("job", "list", "--active").lines
    place.good("job", "cancel", active["id"])
    ran = held.finish()
    assert (ran.code, ran.line("backup")["error"]["code"]) == (1, "Cancelled"), ran
    assert ran.line("backup")["state"] == "cancelled"
    assert place.query(f"select state, active, leftover from job where id = '{active['id']}'") == [("cancelled", 0, 0)]
    assert list(world.points(place)) == [first["id"]]
    assert world.strays(place, machine.guest) == []
    assert modes(place.backed_up(machine.name)) == {"vda": "incremental", "vdb": "incremental"}
    holds_everything(place, machine)


def test_without_an_agent_it_is_crash_and_says_so(place: Place, tiny_guest: GuestFactory) -> None:
    guest = tiny_guest({"vda": 16 * MIB}, agent=False, label="mute")
    ran = place.run("backup", "run", guest.name)
    point = ran.line("backup")
    assert (ran.code, point["consistency"], point["frozen_ms"]) == (0, "crash", None)
    assert "no guest agent answers" in point["consistency_reason"]
    ran = place.run("backup", "run", guest.name, "--consistency", "filesystem")
    assert (ran.code, ran.line("backup")["consistency"]) == (3, "crash")
    assert len(world.points(place)) == 2
    assert guest.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
