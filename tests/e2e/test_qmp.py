"""The promise on a QEMU without libvirt: the same commands, the same files by their hashes, the same crashes.

The counterpart of `test_files_and_disks.py` and of what `tests/faults` does to libvirt's machines.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.demo.tiny_guest import TinyImage
from tests.contracts.qmp_blank import QmpBlank, QmpFactory, qmp
from tests.faults.conftest import NewPlace
from tests.faults.place import Place
from tests.guests.machines import MIB
from tests.guests.qmp_guest import QmpGuest, agent_at, hashes, wait_for_agent

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

APP = "/etc/stillframe/apps/50-app"


@pytest.fixture(scope="module")
def sockets(guest_folder: Path) -> Iterator[Path]:
    folder = guest_folder / "qemu"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def bare_place(new_place: NewPlace, sockets: Path) -> Place:
    return new_place(uri=f"qmp+unix://{sockets}", extension="")


@pytest.fixture(scope="module")
def guest(tiny_guest_image: TinyImage, guest_folder: Path, sockets: Path) -> Iterator[QmpGuest]:
    made = QmpGuest.make(tiny_guest_image, guest_folder / "bare", sockets, {"vda": 64 * MIB, "vdb": 64 * MIB})
    made.start()
    yield made
    made.close()


@pytest.fixture
def blank(guest_folder: Path, sockets: Path) -> Iterator[QmpFactory]:
    factory = QmpFactory(guest_folder, sockets)
    yield factory
    factory.close()


def modes(point: dict[str, list[dict[str, str]]]) -> dict[str, str]:
    return {disk["target"]: disk["mode"] for disk in point["disks"]}


def strays(place: Place) -> list[str]:
    found = [str(path) for folder in (place.scratch, place.runtime) for path in folder.glob("sf-*")]
    return found + [str(row) for row in place.query("select id, state from job where active or leftover")]


@contextmanager
def restored(place: Place, sockets: Path, point: str, name: str, folder: Path) -> Iterator[Path]:
    """The machine of a point, brought back as a new one and started, for a while; its QMP socket."""
    folder.mkdir(mode=0o755)
    place.good("restore", "vm", point, "--name", name, "--dir", folder, "--start")
    monitor = sockets / f"{name}.sock"
    try:
        yield monitor
    finally:
        qmp(monitor, "quit")


def test_the_files_of_each_point_come_back(
    bare_place: Place, guest: QmpGuest, sockets: Path, guest_folder: Path
) -> None:
    place = bare_place
    guest.out("for d in vda vdb; do dd if=/dev/urandom of=/data/$d/kept bs=64k count=30 2>/dev/null; done")
    guest.out("cp /data/vda/kept /data/vdb/twin; echo one > /data/vda/changed; sync")
    first = place.backed_up(guest.name)
    guest.out("echo two > /data/vda/changed; rm /data/vdb/twin; mkdir /data/vdb/new; echo new > /data/vdb/new/file")
    guest.out("dd if=/dev/urandom of=/data/vda/kept bs=64k seek=7 count=1 conv=notrunc 2>/dev/null; sync")
    files = guest.hashes()
    second = place.backed_up(guest.name)
    guest.out("rm -r /data/vda/kept /data/vdb/new; sync")
    assert modes(first) == {"vda": "full", "vdb": "full"}
    assert modes(second) == {"vda": "incremental", "vdb": "incremental"}
    read = [sum(disk["read_bytes"] for disk in point["disks"]) for point in (first, second)]
    assert read[1] < read[0]
    name = "it's back, twice"
    with restored(place, sockets, second["id"], name, guest_folder / "here, 'it' is") as monitor:
        agent = agent_at(sockets / f"{name}-qga.sock")
        wait_for_agent(agent)
        assert hashes(agent) == files
        assert qmp(monitor, "query-uuid")["UUID"] != guest.uuid
        assert qmp(monitor, "query-name")["name"] == name
        images = {block["inserted"]["file"] for block in qmp(monitor, "query-block") if "inserted" in block}
        assert images.isdisjoint(map(str, guest.disks.values()))
    assert "new" not in guest.out("ls /data/vdb")  # the original went on, and its sockets are its own
    assert guest.strays() == strays(place) == []


def test_applications_are_held_and_nobody_stays_frozen(bare_place: Place, guest: QmpGuest) -> None:
    place = bare_place
    guest.out(f"mkdir -p {APP}; printf '#!/bin/sh\\necho $1 >>/tmp/app\\n' >{APP}/run; chmod 755 {APP}/run")
    found = place.backed_up(guest.name, "--consistency", "application")
    assert found["consistency"] == "application", found
    assert guest.out("cat /tmp/app").split() == ["pre", "post"]
    # Between freeze and thaw the socket's folder is made: there everything of ours is killed.
    died = place.run("backup", "run", guest.name, "--consistency", "application", at=("before mkdir _prepared", 1))
    assert died.code == -9
    deadline = time.monotonic() + 30  # the guard's doing; the watchdog's would take 90 s
    while guest.agent.frozen():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    guest.out("echo thawed >/data/vda/written; sync")
    assert place.good("job", "list").lines
    assert guest.strays() == strays(place) == []
    found = place.backed_up(guest.name, "--consistency", "application")
    assert (found["consistency"], modes(found)) == ("application", {"vda": "incremental", "vdb": "incremental"})


def test_killed_in_the_transfer(bare_place: Place, blank: QmpFactory) -> None:
    place, machine = bare_place, blank({"vda": "qcow2", "vdb": "raw"})
    machine.write("vda", 0, MIB)
    first = place.backed_up(machine.name)
    machine.write("vda", 3 * MIB, 65536, 0xBB)
    died = place.run("backup", "run", machine.name, at=("before mkdir _connection", 1))
    assert died.code == -9
    assert len(machine.ask("query-block-exports")) == 2
    place.good("job", "list")
    assert machine.ask("query-block-exports") == machine.ask("query-jobs") == strays(place) == []
    assert machine.checkpoints() == [f"sf-{first['job']}"]
    second = place.backed_up(machine.name)
    assert modes(second) == {"vda": "incremental", "vdb": "full"}
    compare(place, machine, "vda")
    compare(place, machine, "vdb")


def compare(place: Place, machine: QmpBlank, target: str) -> None:
    """The newest point's disk is, byte for byte, what the machine had when it was stopped."""
    machine.stop()
    file = place.folder / f"{machine.name}-{target}.raw"
    place.good("restore", "disk", f"{machine.name}@latest", target, "--to", file)
    done = subprocess.run(["qemu-img", "compare", file, machine.disks[target]], capture_output=True, check=False)
    assert done.returncode == 0, done


def test_what_qemu_does_meanwhile(bare_place: Place, blank: QmpFactory) -> None:
    place, machine = bare_place, blank({"vda": "qcow2"})
    machine.write("vda", 0, MIB)
    place.backed_up(machine.name)
    machine.stop()
    off = place.run("backup", "run", machine.name)
    assert off.code == 2
    assert "only while it runs" in off.out
    machine.start()
    machine.write("vda", MIB, 65536)
    [disk] = place.backed_up(machine.name)["disks"]
    assert disk["mode"] == "incremental"
    machine.stop()
    machine.start()
    machine.kill()
    machine.start()
    [disk] = place.backed_up(machine.name)["disks"]
    assert disk["mode"] == "full"
    assert "was in use when QEMU was killed" in disk["reason"]
    [disk] = place.backed_up(machine.name)["disks"]
    assert disk["mode"] == "incremental"
    assert machine.checkpoints() == [f"sf-{place.query('select id from job order by created desc limit 1')[0][0]}"]
    compare(place, machine, "vda")


def test_what_would_kill_the_machine_is_refused(bare_place: Place, blank: QmpFactory, guest_folder: Path) -> None:
    place, image = bare_place, guest_folder / "threaded.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "16M"], check=True)
    extra = ["-object", "iothread,id=t0", "-drive", f"file={image},if=none,id=two,format=qcow2"]
    machine = blank({"vda": "qcow2"}, extra=[*extra, "-device", "virtio-blk-pci,drive=two,id=vdt,iothread=t0"])
    if "I/O thread" not in place.run("doctor").out:
        return  # this QEMU survives it
    ran = place.run("backup", "run", machine.name)
    assert (ran.code, "I/O thread" in ran.out) == (1, True)
    assert machine.checkpoints() == strays(place) == []
    assert place.backed_up(machine.name, "--exclude", "vdt")["not_included"][0]["target"] in ("hda", "vdt")


def test_a_machine_is_replaced_by_its_point(bare_place: Place, blank: QmpFactory) -> None:
    place, machine = bare_place, blank({"vda": "qcow2"})
    machine.write("vda", 0, MIB)
    place.backed_up(machine.name)
    ran = place.good("restore", "vm", f"{machine.name}@latest", "--replace", "--start", "--yes").line("restore")
    assert machine.process is not None
    machine.process.wait(30)
    assert ran["replaced"] == [str(machine.disks["vda"])]
    assert qmp(machine.monitor, "query-uuid")["UUID"] == machine.uuid
    [disk] = place.backed_up(machine.name)["disks"]
    assert (disk["mode"], "its image changed" in disk["reason"]) == ("full", True), disk
    qmp(machine.monitor, "quit")
    start = next(machine.folder.glob("*.start"))
    assert ran["start_with"] == str(start)
    lost = place.run("restore", "vm", f"{machine.name}@latest", "--name", "x", "--pool", "default")
    assert (lost.code, "no storage pools" in lost.out) == (2, True)


def test_doctor_and_list(bare_place: Place, blank: QmpFactory) -> None:
    machine = blank({"vda": "qcow2", "vdb": "raw"})
    listed = [line for line in bare_place.good("vm", "list").lines if line["name"] == machine.name]
    assert [disk["target"] for disk in listed[0]["disks"] if not disk["excluded"]] == ["vda", "vdb"]
    found = bare_place.run("doctor").out
    assert "over QMP" in found
    assert "vdb is raw" in found
