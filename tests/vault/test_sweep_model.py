"""Writers, zombies, kills, deletions and sweeps on several hosts, interleaved call by call at random: no committed
point ever loses a byte (invariant 5), and when all is quiet the space comes back.

Each host has a look-up cache of its own. A schedule is a list of numbers, so that hypothesis shrinks it."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.vault.pictures import BLOCK, KEY, content, image, map_of, point_of, read_disk
from tests.vault.stepped import Actor, MemoryStore
from workers.contract.errors import StillframeError
from workers.contract.points import DiskPoint, Mode, Point
from workers.contract.seams import Store
from workers.vault import MapWriter, Vault
from workers.vault.sweep import Settings, sweep
from workers.vault.trash import delete, final, finalise, remove_finals

LATER = datetime(2030, 1, 1, tzinfo=UTC)
SMALL = 3 * BLOCK
"""Packs of three blocks: sweeps have something to choose from."""


@dataclass
class Session:
    actor: Actor
    job: str
    point: str
    picture: str


@dataclass
class World:
    """One vault, and who works in it. `truth`: point → picture, of all that may be committed."""

    folder: Path
    rng: random.Random
    truth: dict[str, str] = field(default_factory=dict)
    machines: dict[str, list[str]] = field(default_factory=dict)
    """Machine → points in the order of their commits, as a catalog knows them: perhaps deleted meanwhile."""
    backups: list[Session] = field(default_factory=list)
    others: list[Actor] = field(default_factory=list)
    number: int = 0

    def __post_init__(self) -> None:
        self.store = MemoryStore(self.folder)
        Vault.create(self.store, key=KEY, cache_dir=self.folder / "first")[0].close()

    def vault(self, store: Store, host: str) -> Vault:
        return Vault.open(store, key=KEY, cache_dir=self.folder / host)

    # --- what happens ------------------------------------------------------------------------------------------------

    def begin_backup(self) -> None:
        machine = self.rng.choice("ab")
        known = self.machines.setdefault(machine, [])
        base = self.rng.choice(known[-2:]) if known and self.rng.random() < 0.8 else None
        self.number += 1
        job, point = f"j{self.number}", f"p{self.number}"
        old = self.truth[base] if base else "000000"
        picture = "".join(letter if self.rng.random() < 0.6 else self.rng.choice("ABCDEF0") for letter in old)
        self.truth[point] = picture
        host = self.rng.choice(["h1", "h2"])

        def work(store: Store) -> None:
            vault = self.vault(store, host)
            vault.announce(job, point, reads=[base] if base else [])
            from_base = base if base and vault.readable(base) else None
            disk = _write(vault, picture, vault.point(from_base) if from_base else None, old)
            vault.commit(point_of(point, [disk]))
            known.append(point)
            vault.withdraw(job)

        self.backups.append(Session(Actor(job, self.store, work), job, point, picture))

    def begin_sweep(self) -> None:
        host, compact = self.rng.choice(["h1", "h2"]), self.rng.random() < 0.7

        def work(store: Store) -> None:
            chosen = Settings(empty=True, compact=compact, pack_size=SMALL, fence_after=timedelta(days=99999))
            sweep(self.vault(store, host), now=LATER, settings=chosen)

        self.others.append(Actor("sweep", self.store, work))

    def begin_delete(self) -> None:
        committed = [name.removeprefix("points/") for name in self.store.objects if name.startswith("points/p")]
        if not committed:
            return
        point = self.rng.choice(sorted(committed))

        def work(store: Store) -> None:
            vault = self.vault(store, "h1")
            delete(vault, point, now=LATER, until=LATER, by="anna", reason="a test")
            if self.rng.random() < 0.5:
                finalise(vault, LATER)
                remove_finals(vault)

        self.others.append(Actor("delete", self.store, work))

    def kill(self) -> None:
        alive = [one.actor for one in self.backups if not one.actor.ended] + [
            one for one in self.others if not one.ended
        ]
        if alive:
            self.rng.choice(alive).kill()

    def fence(self) -> None:
        """A session is given up, whether its writer is dead or not; as a reconciler or a sweep does it."""
        if self.backups:
            one = self.rng.choice(self.backups)

            def work(store: Store) -> None:
                vault = self.vault(store, "h2")
                if one.job in [found.session for found in vault.sessions()]:
                    vault.settle(one.point)
                    vault.withdraw(one.job)

            self.others.append(Actor("fence", self.store, work))

    def step(self, at_most: int) -> None:
        alive = [one.actor for one in self.backups if not one.actor.ended] + [
            one for one in self.others if not one.ended
        ]
        if alive:
            actor = self.rng.choice(alive)
            for _ in range(self.rng.randint(1, at_most)):
                actor.step()

    # --- what must hold ----------------------------------------------------------------------------------------------

    def check(self) -> int:
        """Every point that is committed, and not on its way out, is there to the last byte, on a host that has never
        seen the vault; the number of packs."""
        cache = Path(tempfile.mkdtemp(dir=self.folder))
        vault = Vault.open(self.store, key=KEY, cache_dir=cache)
        for point in vault.points():
            if not final(self.store, point.id):
                assert read_disk(vault, point.disks[0]) == image(self.truth[point.id]), point.id
        vault.close()
        return sum(name.startswith("packs/") for name in self.store.objects)

    def end(self) -> None:
        while alive := [one.actor for one in self.backups if not one.actor.ended]:
            self.rng.choice(alive).step()
        for one in self.others:
            one.run()
        for one in [*(each.actor for each in self.backups), *self.others]:
            if one.error is not None and not isinstance(one.error, StillframeError):
                raise one.error

    def close(self) -> None:
        for one in [*(each.actor for each in self.backups), *self.others]:
            if not one.ended:
                one.kill()


def _write(vault: Vault, picture: str, base: Point | None, old: str) -> DiskPoint:
    """What a transfer does, with every unchanged block inherited."""
    size = len(picture) * BLOCK
    disk = base.disks[0] if base else None
    with vault.writer(pack_size=SMALL) as writer:
        blocks = MapWriter(writer, vault.reader(), size, BLOCK, map_of(vault, disk) if disk else None)
        for index, letter in enumerate(picture):
            if disk is not None and letter == old[index]:
                blocks.inherit(index, 1)
            else:
                blocks.set(index, writer.put(memoryview(content(letter))))
        root = blocks.finish()
        writer.finish()
    mode = Mode.FULL if base is None else Mode.INCREMENTAL
    fields = {"source": "/v", "format": "raw", "identity": "i", "block_size": BLOCK, "reason": "a test"}
    return DiskPoint(target="vda", capacity=size, root=root.hex(), mode=mode, checkpoint=None, **fields)


@contextmanager
def world(seed: int) -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="sf-sweep-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    made = World(folder, random.Random(seed))
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)


def play(seed: int, moves: list[int]) -> None:
    with world(seed) as found:
        for move in moves:
            match move:
                case 0:
                    found.begin_backup()
                case 1:
                    found.begin_sweep()
                case 2:
                    found.begin_delete()
                case 3:
                    found.kill()
                case 4:
                    found.fence()
                case _:
                    found.step(at_most=12 if move == 5 else 60)
            if move == 7:
                found.check()
        found.end()
        found.check()
        settle(found)


def settle(found: World) -> None:
    """All is quiet: dead sessions are fenced, and two sweeps leave nothing that no point needs."""
    vault = found.vault(found.store, "last")
    for session in vault.sessions():
        vault.settle(session.point)
        vault.withdraw(session.session)
    for _ in range(2):
        report = sweep(vault, now=LATER, settings=Settings(empty=True, compact=False))
    assert report.waiting == []
    assert [name for name in found.store.objects if name.startswith(("condemned/", "verdicts/"))] == []
    packs = found.check()
    if not list(vault.points()):
        assert packs == 0
    with suppress(StillframeError):
        vault.close()


MOVES = st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 4, 5, 5, 5, 5, 6, 6, 7]), min_size=10, max_size=60)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 32), moves=MOVES)
def test_no_point_loses_a_byte(seed: int, moves: list[int]) -> None:
    play(seed, moves)


@pytest.mark.parametrize("seed", range(20))
def test_long_plays(seed: int) -> None:
    rng = random.Random(seed)
    play(seed, rng.choices(range(8), [3, 2, 2, 1, 1, 6, 6, 1], k=160))
