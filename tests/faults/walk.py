"""A walk: run a command once to learn its steps, then once for each of them, and die there.

After the next start of any command nothing may be left of it; whatever was committed is read by a reader that is not
ours and compared with what the disk held at that moment.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field

from orchestrator.demo.in_guest import guest_out
from tests.faults import world
from tests.faults.place import Place
from tests.faults.steps import chosen
from tests.guests.machines import MIB, Guest
from tests.vault.second_reader import SecondReader

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


Undo = Callable[[], None]


def nothing() -> None:
    pass


def walk(walked: Walked, *command: str, undo: Undo = nothing, writes: bool = True, last: bool = False) -> int:
    """Die at each step of `command`; how many steps that were. After every few, a whole run must succeed. `writes`:
    the disks change before each run. `last`: at the last occurrence of each step too, see `chosen`."""
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
    steps = chosen(record.read_text().splitlines(), last=last)
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
