"""A hypervisor on another host, from the first backup to the restored machine; and what can happen to the way there.

The machine's disks lie in a folder that only that host has, so nothing can be read as a local file by mistake.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import libvirt
import pytest

from orchestrator.demo.disks import make_ext4_disk
from orchestrator.demo.host import connect, remove_machine, shut_down
from orchestrator.demo.in_guest import agent_command, guest_hashes, wait_for_agent
from orchestrator.demo.tiny_guest import TinyDisk, TinyImage, define_tiny
from tests.contracts.sshd import Wire
from tests.faults import world
from tests.faults.conftest import NewPlace
from tests.faults.place import Place
from tests.guests.machines import MIB, Guest
from tests.hosts.host import Host as Lab
from tests.hosts.remote import config_lines, left_on, ssh_host
from workers.hypervisors.wires import SocketWire

pytestmark = [pytest.mark.guest, pytest.mark.timeout(400)]

FREEZE = "agent fsfreeze-freeze"
TRANSFER = "before mkdir _connection"
THERE = Path("/srv/lab")


@dataclass
class Elsewhere:
    lab: Lab
    wire: Wire
    guest: Guest
    place: Place

    @property
    def connection(self) -> libvirt.virConnect:
        return self.guest.domain.connect()

    def write(self, name: str, size: int) -> None:
        """New data that does not compress."""
        self.guest.out(f"dd if=/dev/urandom of=/data/vda/{name} bs=64k count={size >> 16} 2>/dev/null && sync")

    def clean(self) -> None:
        assert left_on(self.lab) == []
        assert self.place.query("select id, state, leftover from job where active or leftover") == []

    def mended(self) -> None:
        """Whatever was done to the wire, the next backup works, and goes on from the base."""
        mode = "incremental" if world.points(self.place) else "full"
        point = self.place.backed_up(self.guest.name)
        assert {disk["mode"] for disk in point["disks"]} == {mode}, point
        assert point["consistency"] == "filesystem"
        self.clean()


@pytest.fixture(scope="module")
def elsewhere(
    lab: Lab, tiny_guest_image: TinyImage, new_place: NewPlace, memory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Elsewhere]:
    wire = Wire(lab.port)
    place = new_place(uri=f"qemu+ssh://root@127.0.0.1:{wire.port}/system", hypervisor=config_lines(lab))
    folder = memory / "elsewhere"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    disks = [TinyDisk("vda", THERE / "vda.qcow2", "qcow2"), TinyDisk("vdb", THERE / "vdb.qcow2", "qcow2")]
    for disk in disks:
        made = folder / disk.path.name
        make_ext4_disk(made, 64 * MIB, format="qcow2")
        lab.run("mv", made, disk.path)
    with ssh_host(lab, tmp_path_factory.mktemp("run")) as host:
        control = SocketWire(host, "")
        connection = connect(control.dial())
        name = "sf-test-elsewhere"
        guest = Guest(define_tiny(connection, name, tiny_guest_image, disks, folder), disks, tiny_guest_image, folder)
        guest.start()
        yield Elsewhere(lab, wire, guest, place)
        remove_machine(guest.domain)
        connection.close()
        control.close()
    wire.close()
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def thawed(elsewhere: Elsewhere) -> Iterator[None]:
    yield
    elsewhere.wire.refusing = False
    elsewhere.place.let_go()
    if elsewhere.guest.domain.isActive() and world.frozen(elsewhere.guest):
        agent_command(elsewhere.guest.domain, "guest-fsfreeze-thaw")


def until(true: Callable[[], bool], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def test_from_the_first_backup_to_the_restored_machine(elsewhere: Elsewhere) -> None:
    place, guest, wire = elsewhere.place, elsewhere.guest, elsewhere.wire
    elsewhere.write("first", 8 * MIB)
    full = place.backed_up(guest.name)
    assert full["consistency"] == "filesystem"
    assert {disk["mode"] for disk in full["disks"]} == {"full"}
    elsewhere.clean()

    elsewhere.write("second", 2 * MIB)
    before = wire.passed
    point = place.backed_up(guest.name)
    crossed = wire.passed - before
    read = sum(disk["read_bytes"] for disk in point["disks"])
    assert {disk["mode"] for disk in point["disks"]} == {"incremental"}
    assert 2 * MIB < read < 10 * MIB
    assert crossed < read * 1.05 + (1 << 20), "only what changed crosses the wire"
    elsewhere.clean()

    hashes = guest_hashes(guest.domain, "/data")
    before = wire.passed
    name = "sf-test-elsewhere-copy"
    elsewhere.lab.run("mkdir", "-p", THERE / "restored")
    ran = place.good(
        "restore", "vm", f"{guest.name}@latest", "--name", name, "--dir", THERE / "restored", "--hypervisor", "lab",
        "--start",
    )  # fmt: skip
    crossed = wire.passed - before
    assert ran.line("restore")["state"] == "succeeded"
    held = sum(disk["read_bytes"] for disk in full["disks"]) + read
    assert crossed < held * 1.05 + (1 << 20) < 64 * MIB, "only data crosses the wire"
    assert not (THERE / "restored").exists(), "it is written there, and not here"
    copy = elsewhere.connection.lookupByName(name)
    try:
        wait_for_agent(copy)
        assert guest_hashes(copy, "/data") == hashes
        assert elsewhere.lab.run("sh", "-c", f"ls {THERE}/restored").stdout.split() == [
            f"{name}-vda.qcow2",
            f"{name}-vdb.qcow2",
        ]
    finally:
        remove_machine(copy)
        elsewhere.lab.run("rm", "-r", THERE / "restored")
    elsewhere.clean()


def test_a_machine_that_is_off_and_a_disk_to_a_file_here(elsewhere: Elsewhere) -> None:
    place, guest = elsewhere.place, elsewhere.guest
    elsewhere.write("third", MIB)
    shut_down(guest.domain)
    point = place.backed_up(guest.name)
    assert point["consistency"] == "application"
    assert {disk["mode"] for disk in point["disks"]} == {"incremental"}
    elsewhere.clean()
    file = place.folder / "vda.raw"
    place.good("restore", "disk", f"{guest.name}@latest", "vda", "--to", file)
    raw = THERE / "vda.raw"
    elsewhere.lab.run("qemu-img", "convert", "-O", "raw", guest.disk("vda"), raw)
    there = elsewhere.lab.run("sha256sum", raw).stdout.split()[0]
    assert hashlib.sha256(file.read_bytes()).hexdigest() == there
    elsewhere.lab.run("rm", raw)
    file.unlink()
    guest.start()
    elsewhere.mended()


def test_killed_in_the_middle_of_a_transfer(elsewhere: Elsewhere) -> None:
    elsewhere.write("fourth", MIB)
    ran = elsewhere.place.run("backup", "run", elsewhere.guest.name, at=(TRANSFER, 1))
    assert ran.code == -9
    assert left_on(elsewhere.lab) != []
    elsewhere.place.good("job", "list")
    elsewhere.clean()


def test_killed_while_frozen_the_guard_thaws_over_a_connection_of_its_own(elsewhere: Elsewhere) -> None:
    ran = elsewhere.place.run("backup", "run", elsewhere.guest.name, at=(f"after {FREEZE}", 1))
    assert ran.code == -9
    until(lambda: not world.frozen(elsewhere.guest))
    elsewhere.place.good("job", "list")
    elsewhere.clean()


def test_the_connection_is_cut_while_frozen(elsewhere: Elsewhere) -> None:
    held = elsewhere.place.hold(f"after {FREEZE}", 1, "backup", "run", elsewhere.guest.name)
    elsewhere.wire.refusing = True
    elsewhere.wire.cut()
    ran = held.finish()
    assert ran.code == 1, ran
    assert ran.line("backup")["error"]["code"] == "HypervisorUnreachable"
    assert world.frozen(elsewhere.guest)
    elsewhere.wire.refusing = False
    until(lambda: not world.frozen(elsewhere.guest))  # nobody but the guard is there to do it
    elsewhere.place.good("job", "list")
    elsewhere.clean()
    elsewhere.mended()


def test_the_connection_is_lost_in_the_middle_of_a_transfer(elsewhere: Elsewhere) -> None:
    """And is away for so long that nothing can be released at first."""
    held = elsewhere.place.hold(TRANSFER, 1, "backup", "run", elsewhere.guest.name)
    elsewhere.wire.refusing = True
    elsewhere.wire.cut()
    ran = held.finish()
    assert ran.code == 1, ran
    error = ran.line("backup")["error"]
    assert error["code"] in ("DiskError", "HypervisorUnreachable"), error
    assert left_on(elsewhere.lab) != []
    elsewhere.wire.refusing = False
    elsewhere.place.good("job", "list")
    elsewhere.clean()
    elsewhere.mended()


def test_no_space_there_is_found_before_anything_is_written(elsewhere: Elsewhere) -> None:
    small = THERE / "small"
    elsewhere.lab.run("mkdir", small)
    elsewhere.lab.run("mount", "-t", "tmpfs", "-o", "size=2m", "small", small)
    ran = elsewhere.place.run(
        "restore", "vm", f"{elsewhere.guest.name}@latest", "--name", "sf-test-small", "--dir", small
    )
    assert (ran.code, ran.line("restore")["error"]["code"]) == (1, "NoSpace"), ran
    assert str(small) in ran.line("restore")["error"]["message"]
    assert elsewhere.lab.run("ls", small).stdout == ""
    elsewhere.lab.run("umount", small)
    elsewhere.clean()


def test_another_host_key_is_loud_and_nothing_is_sent(elsewhere: Elsewhere, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True)
    other = " ".join((tmp_path / "key.pub").read_text().split()[:2])
    place, right = elsewhere.place, elsewhere.place.hypervisor
    sessions = (elsewhere.lab.folder / "sshd.log").read_text().count("Accepted publickey")
    place.hypervisor = right.replace(elsewhere.lab.host_key, other)
    place.configure()
    try:
        ran = place.run("backup", "run", elsewhere.guest.name)
        error = ran.line("error")
        assert (ran.code, error["code"]) == (1, "HypervisorRefused"), ran
        assert "HAS CHANGED" in error["message"]
        assert "hypervisor add lab" in error["hint"]
        assert not error["retryable"]
        place.hypervisor = right.replace(str(elsewhere.lab.client_key), str(tmp_path / "key"))
        place.configure()
        ran = place.run("backup", "run", elsewhere.guest.name)
        assert ran.line("error")["code"] == "HypervisorRefused"
        assert "refuses the login" in ran.line("error")["message"]
        assert "ssh-copy-id" in ran.line("error")["hint"]
        place.hypervisor = "\n".join(line for line in right.splitlines() if "host_key" not in line)
        place.configure()
        ran = place.run("backup", "run", elsewhere.guest.name)
        assert "is not known" in ran.line("error")["message"]
    finally:
        place.hypervisor = right
        place.configure()
    assert (elsewhere.lab.folder / "sshd.log").read_text().count("Accepted publickey") == sessions
    elsewhere.clean()
