"""`kill -9` at every step of a backup and of a restore, with a real guest (invariant 8).

The walk runs the command once to learn its steps, then once for each of them and dies there. After the next start of
any command nothing may be left of it; whatever was committed is read by a reader that is not ours and compared with
what the disk held at that moment.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import libvirt
import pytest

from orchestrator.demo.disks import make_empty_disk
from orchestrator.demo.host import remove_machine, shut_down
from orchestrator.demo.in_guest import guest_out
from orchestrator.demo.tiny_guest import TinyImage
from tests.faults import world
from tests.faults.conftest import NewPlace
from tests.faults.place import Place
from tests.faults.steps import chosen
from tests.guests.machines import MIB, Guest, GuestFactory
from tests.vault.second_reader import SecondReader

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

SIZE = 16 * MIB
PIECE = 48 << 10
WHOLE_EVERY = 8


@dataclass
class Walked:
    """One guest for all walks: ext4 on vda, to be frozen; bare vdb, whose every byte the test knows."""

    guest: Guest
    place: Place
    content: bytearray = field(default_factory=lambda: bytearray(SIZE))
    dice: random.Random = field(default_factory=lambda: random.Random(8))
    hashes: dict[str, str] = field(default_factory=dict)
    """Point → what vdb held at its time."""
    written: int = 0

    def change(self) -> None:
        """Write something to both disks, in the guest or (off) to the image of vdb."""
        self.written += 1
        data, at = self.dice.randbytes(PIECE), self.dice.randrange(SIZE // PIECE) * PIECE
        self.content[at : at + PIECE] = data
        if self.guest.domain.isActive():
            write = f"dd of=/dev/vdb bs={PIECE} seek={at // PIECE} conv=fsync,notrunc 2>/dev/null"
            guest_out(
                self.guest.domain, f"{write} && echo {self.written} > /data/vda/mark && sync /data/vda/mark", stdin=data
            )
            return
        piece = self.guest.folder / "piece"
        piece.write_bytes(data)
        command = f"write -s {piece} {at} {PIECE}"
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", command, self.guest.disk("vdb")], check=True, capture_output=True
        )

    def remember(self) -> None:
        """Whatever points are new were made of the content as it is."""
        for point in world.points(self.place):
            self.hashes.setdefault(point, hashlib.sha256(self.content).hexdigest())

    def settle(self, at: tuple[str, int]) -> None:
        """The next start of any command cleans up; nothing is left, no guest is frozen."""
        self.place.good("job", "list")
        assert world.strays(self.place, self.guest) == [], f"killed {at}"
        if self.guest.domain.isActive():
            assert not world.frozen(self.guest), f"killed {at}"
        self.remember()

    def check_points(self) -> None:
        """Every point ever committed is there, and holds what the disk held."""
        reader = SecondReader(self.place.vault, key=self.place.key)
        reader.load_segments()
        points = reader.points()
        assert sorted(points) == sorted(self.hashes)
        for point, expected in self.hashes.items():
            assert hashlib.sha256(reader.disk(points[point], "vdb")).hexdigest() == expected, point
        self.place.good("vault", "verify", "--full")


def disk_content(image: Path) -> bytes:
    """What a guest would read of a qcow2 image."""
    raw = image.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    content = raw.read_bytes()
    raw.unlink()
    return content


@pytest.fixture(scope="module")
def walked(
    libvirt_host: libvirt.virConnect, tiny_guest_image: TinyImage, guest_folder: Path, new_place: NewPlace
) -> Iterator[Walked]:
    factory = GuestFactory(libvirt_host, tiny_guest_image, guest_folder)
    try:
        guest = factory({"vda": 64 * MIB, "vdb": SIZE}, label="kill", start=False)
        guest.disk("vdb").unlink()
        make_empty_disk(guest.disk("vdb"), SIZE)
        guest.start()
        walked = Walked(guest, new_place())
        walked.change()
        walked.place.backed_up(guest.name)
        walked.remember()
        yield walked
    finally:
        factory.close()


Undo = Callable[[], None]


def nothing() -> None:
    pass


def walk(walked: Walked, *command: str, undo: Undo = nothing, writes: bool = True) -> int:
    """Die at each step of `command`; how many steps that were. After every few, a whole run must succeed. `writes`:
    the disks change before each run."""
    place, change = walked.place, walked.change if writes else nothing
    record = place.folder / "steps"
    record.unlink(missing_ok=True)
    if writes:  # what a boot or a shutdown has written is not in the run that counts
        change()
        ran = place.run(*command)
        assert ran.code == 0, ran
        walked.remember()
    change()
    counted = place.run(*command, count=record)
    assert counted.code == 0, counted
    undo()
    walked.remember()
    steps = chosen(record.read_text().splitlines())
    missed = []
    for number, at in enumerate(steps):
        change()
        ran = place.run(*command, at=at)
        assert ran.code in (-9, 0), f"killed {at}: {ran}"
        if ran.code == 0:
            missed.append(at)
        walked.settle(at)
        undo()
        if number % WHOLE_EVERY == WHOLE_EVERY - 1:
            change()
            ran = place.run(*command)
            assert ran.code == 0, f"after {at}: {ran}"
            walked.settle(at)
            undo()
    # Two disks race: how often a step occurs may differ by one or two from run to run, but no step may be unheard of.
    assert len(missed) <= len(steps) // 20, missed
    assert all(nth > 1 for _, nth in missed), missed
    return len(steps)


def test_every_step_of_an_incremental_backup(walked: Walked) -> None:
    assert walk(walked, "backup", "run", walked.guest.name) > 50
    walked.change()
    point = walked.place.backed_up(walked.guest.name)
    assert [disk["mode"] for disk in point["disks"]] == ["incremental", "incremental"]
    walked.remember()
    walked.check_points()


def test_every_step_of_a_full_backup(walked: Walked) -> None:
    assert walk(walked, "backup", "run", walked.guest.name, "--full") > 50
    walked.check_points()


def test_every_step_of_a_restored_machine(walked: Walked, libvirt_host: libvirt.virConnect, memory: Path) -> None:
    folder, name = memory / "walked", f"{walked.guest.name}-r"
    folder.mkdir(mode=0o755)
    walked.change()
    walked.place.backed_up(walked.guest.name)
    walked.remember()
    files = [f"{name}-vda.qcow2", f"{name}-vdb.qcow2"]

    def undo() -> None:
        """All of it is there, or nothing."""
        machines = [domain for domain in libvirt_host.listAllDomains() if domain.name() == name]
        found = sorted(path.name for path in folder.iterdir())
        assert (len(machines), found) in ((0, []), (1, files)), found
        for machine in machines:
            assert disk_content(folder / files[1]) == walked.content
            remove_machine(machine)
        for path in folder.iterdir():
            path.unlink()

    command = ("restore", "vm", f"{walked.guest.name}@latest", "--name", name, "--dir", str(folder))
    assert walk(walked, *command, undo=undo, writes=False) > 25


def test_every_step_of_a_backup_of_a_machine_that_is_off(walked: Walked) -> None:
    shut_down(walked.guest.domain)
    try:
        assert walk(walked, "backup", "run", walked.guest.name) > 40
        walked.check_points()
    finally:
        walked.guest.start()
    walked.change()
    point = walked.place.backed_up(walked.guest.name)
    assert [disk["mode"] for disk in point["disks"]] == ["incremental", "incremental"]
    walked.remember()
    walked.check_points()
    assert world.strays(walked.place, walked.guest) == []


@pytest.mark.parametrize(
    "begun",
    [
        "agent fsfreeze-freeze",
        "virDomainBackupBegin begin_backup",
        "agent fsfreeze-thaw",
        "virDomainAbortJob end_backup",
    ],
)
def test_in_the_middle_of_a_call(walked: Walked, begun: str) -> None:
    """libvirt goes on with a call whose caller is dead: a freeze or a backup may begin after its process has ended."""
    for late in (0.002, 0.02, 0.1):
        walked.change()
        ran = walked.place.run("backup", "run", walked.guest.name, at=(f"before {begun}", 1), late=late)
        assert ran.code in (-9, 0), ran
        walked.settle((f"during {begun}, after {late} s", 1))
    walked.change()
    walked.place.backed_up(walked.guest.name)
    walked.settle((begun, 0))
    walked.check_points()


def test_every_step_of_settling_what_a_kill_has_left(walked: Walked) -> None:
    """Who cleans up can be killed as well; the next one goes on. Here it finds a frozen guest and a running backup."""
    left_at = "after virDomainBackupBegin begin_backup"
    place, record = walked.place, walked.place.folder / "settling"
    backup = ("backup", "run", walked.guest.name)
    walked.change()
    assert place.run(*backup, at=(left_at, 1)).code == -9
    record.unlink(missing_ok=True)
    assert place.run("job", "list", count=record).code == 0
    walked.settle((left_at, 1))
    steps = chosen(record.read_text().splitlines())
    assert len(steps) > 15
    for at in steps:
        assert place.run(*backup, at=(left_at, 1)).code == -9
        assert place.run("job", "list", at=at).code in (-9, 0)
        walked.settle(at)
    walked.check_points()
