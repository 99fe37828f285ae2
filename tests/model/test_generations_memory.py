"""Random generations of a machine in memory: whatever happens to it and to its backups, every point that was committed
holds what the machine held at that moment."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.model.world import PIECE, SEARCHING, Fault, ModelDisk, World, filling
from workers.contract.machines import Power
from workers.contract.points import Mode

SIZES = {"vda": 1 << 10, "vdb": 4 << 10, "vdc": 16 << 10, "vdd": 2 << 10}
"""Block sizes; vda is large enough for a tree of two levels of pages."""
TARGETS = list(SIZES)
PLACES = st.integers(0, 999)
TARGET = st.sampled_from(TARGETS)
LENGTHS = st.sampled_from([1, 2, 3, 8, 32, 33, 200])

Step = tuple[object, ...]
STEP: st.SearchStrategy[Step] = st.one_of(
    st.tuples(st.just("write"), TARGET, PLACES, LENGTHS, st.integers(1, 9)),
    st.tuples(st.just("write"), TARGET, PLACES, LENGTHS, st.integers(1, 9)),
    st.tuples(st.just("zero"), TARGET, PLACES, LENGTHS),
    st.tuples(st.just("discard"), TARGET, PLACES, LENGTHS),
    st.tuples(st.just("resize"), TARGET, st.integers(0, 120)),
    st.tuples(st.just("shrink_and_grow"), TARGET, PLACES, st.integers(0, 8)),
    st.tuples(st.just("lie"), TARGET, PLACES, st.integers(1, 9)),
    st.tuples(st.sampled_from(["replace", "unplug", "plug", "lose_bitmap", "put_aside", "take_back"]), TARGET),
    st.tuples(st.sampled_from(["crash", "off", "on"])),
)
FAULT = st.builds(Fault, st.sampled_from(["fail", "full", "die_before", "die_after", "watch"]), st.integers(0, 24))
RUN: st.SearchStrategy[Step] = st.one_of(
    st.tuples(st.just("backup")),
    st.tuples(st.just("backup")),
    st.tuples(st.just("full")),
    st.tuples(st.just("fault"), FAULT),
)
GENERATIONS = st.lists(st.tuples(st.lists(STEP, max_size=5), RUN), min_size=3, max_size=9)


class Player:
    """Plays steps on a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.lied: set[str] = set()
        self.aside: dict[str, ModelDisk] = {}
        world.add("vda", 1300 << 10)
        world.add("vdb", 61 << 10)
        world.add("vdc", (100 << 10) + PIECE, tracks=False)

    def play(self, step: Step) -> None:
        name, *rest = step
        act: Callable[..., None] = getattr(self, f"do_{name}")
        of_machine = name in ("crash", "off", "on", "backup", "full", "fault", "plug")
        if of_machine or rest[0] in self.world.disks:
            act(*rest)

    def _range(self, target: str, place: int, pieces: int) -> tuple[int, int]:
        size = self.world.disks[target].size
        start = size * place // 1000 // PIECE * PIECE
        return start, min(pieces * PIECE, size - start)

    def do_write(self, target: str, place: int, pieces: int, seed: int) -> None:
        start, length = self._range(target, place, pieces)
        self.world.disks[target].put(start, filling(seed, length))

    def do_zero(self, target: str, place: int, pieces: int) -> None:
        start, length = self._range(target, place, pieces)
        self.world.disks[target].put(start, bytes(length))

    def do_discard(self, target: str, place: int, pieces: int) -> None:
        start, length = self._range(target, place, pieces)
        self.world.disks[target].put(start, bytes(length), allocated=False)

    def do_resize(self, target: str, pieces: int) -> None:
        self.world.disks[target].resize((pieces + 1) * 3 * PIECE if target != "vda" else (pieces + 1) * 25 * PIECE)

    def do_shrink_and_grow(self, target: str, place: int, more: int) -> None:
        """As QEMU does it: the bitmaps hear nothing of what was cut off."""
        size = self.world.disks[target].size
        self.world.disks[target].resize(max(PIECE, self._range(target, place, 1)[0]))
        self.world.disks[target].resize(size + more * PIECE)

    def do_lie(self, target: str, place: int, seed: int) -> None:
        """What nobody was told of: a block that the base holds as data now has other data."""
        disk = self.world.disks[target]
        start, _ = self._range(target, place, 1)
        if self.world.points and disk.content[start] and disk.tracks:
            disk.put(start, bytes([disk.content[start] ^ (0x80 + seed)]) * PIECE, told=False)
            self.lied.add(target)

    def do_replace(self, target: str) -> None:
        old = self.world.disks[target]
        self.world.add(target, old.size, tracks=old.tracks).put(0, filling(5, min(old.size, 4 * PIECE)))

    def do_put_aside(self, target: str) -> None:
        self.aside[target] = self.world.copy_of(target)

    def do_take_back(self, target: str) -> None:
        """An older copy of the image takes its place, with the bitmaps that it had then."""
        if target in self.aside:
            self.world.disks[target] = self.aside.pop(target)

    def do_unplug(self, target: str) -> None:
        del self.world.disks[target]

    def do_plug(self, target: str) -> None:
        if target not in self.world.disks:
            self.world.add(target, SIZES[target] * 9 + PIECE).put(0, filling(6, 3 * PIECE))

    def do_lose_bitmap(self, target: str) -> None:
        self.world.disks[target].bitmaps.clear()

    def do_crash(self) -> None:
        self.world.crash()

    def do_off(self) -> None:
        self.world.power = Power.OFF

    def do_on(self) -> None:
        self.world.power = Power.PAUSED

    def _run(self, *, full: bool = False, fault: Fault | None = None) -> None:
        if not self.world.disks:
            return
        self.world.audit_blocks = SEARCHING if self.lied else 0
        job = self.world.backup(full=full, fault=fault)
        assert job.committed or fault, job.error
        if job.committed:
            self.lied.clear()

    def do_backup(self) -> None:
        self._run()

    def do_full(self) -> None:
        self._run(full=True)

    def do_fault(self, fault: Fault) -> None:
        self._run(fault=fault)


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory where there is one: a vault waits for the disk at every object."""
    base = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="stillframe-model-", dir=base if base.is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(GENERATIONS)
@example(
    [
        ([("write", "vdb", 0, 200, 5), ("write", "vda", 900, 200, 6)], ("backup",)),
        ([("shrink_and_grow", "vdb", 500, 0), ("shrink_and_grow", "vda", 950, 2)], ("backup",)),
        ([("off",), ("shrink_and_grow", "vdb", 300, 3), ("write", "vdb", 999, 1, 3)], ("backup",)),
        ([("on",), ("write", "vda", 0, 200, 8)], ("backup",)),
    ]
)
@example(
    [
        ([("write", "vdb", 0, 200, 5)], ("backup",)),
        ([("lie", "vdb", 500, 1)], ("backup",)),
        ([("discard", "vdb", 0, 33), ("zero", "vdb", 400, 8)], ("fault", Fault("die_after", 11))),
        ([("write", "vdb", 300, 8, 5)], ("fault", Fault("fail", 12))),
        ([("off",)], ("backup",)),
        ([("put_aside", "vdb")], ("backup",)),
        ([("write", "vdb", 600, 8, 6), ("crash",), ("on",)], ("backup",)),
        ([("put_aside", "vdb"), ("write", "vdb", 300, 8, 7)], ("backup",)),
        ([("take_back", "vdb")], ("backup",)),
    ]
)
@example(
    [
        ([("write", "vdb", 0, 200, 5)], ("backup",)),
        ([("off",), ("put_aside", "vdb"), ("write", "vdb", 300, 8, 7)], ("backup",)),
        ([("take_back", "vdb")], ("backup",)),
    ]
)
def test_every_point_holds_what_the_machine_held(generations: list[tuple[list[Step], Step]]) -> None:
    with memory_folder() as folder:
        world = World(folder, SIZES)
        player = Player(world)
        for steps, run in generations:
            for step in (*steps, run):
                player.play(step)
        player.do_on()
        player.do_plug("vdd")
        player.do_backup()
        player.do_backup()
        assert {disk.mode for disk in world.points[-1].disks if disk.format == "qcow2"} == {Mode.INCREMENTAL}
        world.check()
        world.check_restored()
        world.lose_index()
        world.check()
        world.reopen(cache="another")
        world.check_restored()
        world.vault.close()
