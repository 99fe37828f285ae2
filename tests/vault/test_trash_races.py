"""Several hosts delete, restore, pin and read the same points at once, sweeps finish deletions beside them, and any of
them may be killed between two calls of the store; against a model that knows only what its callers were promised."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from tests.vault.faulty import FaultyStore, Plan
from tests.vault.pictures import new_vault, point_of, reopened
from tests.vault.stepped import Actor, SteppedStore
from workers.contract.errors import Locked, NotFound
from workers.vault import Vault, trash

DAY = timedelta(days=1)
START = datetime(2026, 11, 23, tzinfo=UTC)
LOCKED = START + 20 * DAY
"""Until then point `q` is locked."""
POINTS = ("p", "q")
ROUNDS = 4
"""Of a hundred races each."""
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""A folder in memory, where there is one: an example makes some hundred durable objects."""


@dataclass
class Promised:
    """What callers have been told of one point."""

    pinned: bool = False
    restored: bool = False
    readers: set[str] = field(default_factory=set)
    running: dict[str, int] = field(default_factory=lambda: {"delete": 0, "unpin": 0})
    begun: dict[str, int] = field(default_factory=lambda: {"delete": 0, "unpin": 0})

    def clean(self, act: str) -> Callable[[], bool]:
        """A function that tells whether no `act` has run since now."""
        running, begun = self.running[act], self.begun[act]
        return lambda: not running and begun == self.begun[act]


class Race:
    """One vault, its actors, and what they were promised."""

    def __init__(self, folder: Path) -> None:
        self.vault = reopened(folder)
        self.folder = folder
        self.promised = {point: Promised() for point in POINTS}
        self.latest = START
        """The latest time that a sweep went by."""

    def seen_by(self, actor: Actor, dies: int | None) -> Vault:
        store = FaultyStore(SteppedStore(self.vault.store, actor, self.watch), Plan(die_before=dies))
        return Vault(store, b"", self.vault.keys, self.folder / "cache")

    def watch(self, call: str, name: str) -> None:
        """A manifest goes: nobody may have been told that it stays."""
        point = name.removeprefix("points/")
        if call != "delete" or point not in self.promised or not self.there(point):
            return
        told = self.promised[point]
        assert trash.final(self.vault.store, point), f"{point} goes, and its deletion is not final"
        assert not told.pinned, f"{point} goes, and it is pinned"
        assert not told.restored, f"{point} goes, and it was restored"
        assert not told.readers, f"{point} goes, and {told.readers} read it"
        assert self.latest >= (LOCKED if point == "q" else START + 3 * DAY), f"{point} goes too early"

    def there(self, point: str) -> bool:
        return any(info.name == f"points/{point}" for info in self.vault.store.list("points/"))

    # --- what actors do --------------------------------------------------------------------------------------------

    def delete(self, vault: Vault, point: str) -> None:
        told = self.promised[point]
        told.restored = False
        told.begun["delete"] += 1
        told.running["delete"] += 1
        try:
            trash.delete(vault, point, now=START, until=START + 3 * DAY, by="us", reason="a test")
        except (NotFound, Locked):
            pass
        finally:
            told.running["delete"] -= 1

    def undelete(self, vault: Vault, point: str) -> None:
        undisturbed = self.promised[point].clean("delete")
        try:
            trash.undelete(vault, point, now=START, by="us")
        except NotFound:
            return
        self.promised[point].restored |= undisturbed()

    def pin(self, vault: Vault, point: str) -> None:
        told = self.promised[point]
        undisturbed, unpinned = told.clean("delete"), told.clean("unpin")
        try:
            trash.pin(vault, point, now=START, by="us", reason="a test")
        except NotFound:
            return
        told.restored |= undisturbed()
        told.pinned |= unpinned()

    def unpin(self, vault: Vault, point: str) -> None:
        told = self.promised[point]
        told.pinned = False
        told.begun["unpin"] += 1
        told.running["unpin"] += 1
        try:
            trash.unpin(vault.store, point)
        finally:
            told.running["unpin"] -= 1

    def sweep(self, vault: Vault, day: int) -> None:
        now = START + day * DAY
        self.latest = max(self.latest, now)
        trash.finalise(vault, now)
        trash.remove_finals(vault)

    def read(self, vault: Vault, point: str, session: str) -> None:
        vault.announce(session, reads=[point])
        if vault.readable(point):
            self.promised[point].readers.add(session)

    def leave(self, vault: Vault, session: str) -> None:
        for told in self.promised.values():
            told.readers.discard(session)
        vault.withdraw(session)


Acts = list[tuple[str, str | int]]


def some_acts(rng: random.Random) -> Acts:
    """What one actor does, in this order: a few things, most of them to the same point as everybody else."""
    acts: Acts = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        name = rng.choice(["delete", "delete", "undelete", "pin", "unpin", "sweep", "sweep", "sweep", "read", "leave"])
        acts.append((name, rng.choice([2, 5, 30, 30]) if name == "sweep" else rng.choice("pppq")))
    return acts


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    vault = new_vault(folder)
    vault.commit(point_of("p", []))
    vault.commit(point_of("q", []).model_copy(update={"locked_until": LOCKED}))
    vault.close()
    return folder


def act(race: Race, vault: Vault, session: str, acts: Acts) -> None:
    reading = 0
    for name, of in acts:
        if name == "read":
            reading += 1
            race.read(vault, str(of), f"{session}{reading}")
        elif name == "leave":
            for number in range(1, reading + 1):
                race.leave(vault, f"{session}{number}")
        else:
            getattr(race, name)(vault, of)


def run_race(race: Race, rng: random.Random) -> None:
    """Some actors to their ends, in any order of their calls."""
    if rng.random() < 0.7:
        race.delete(race.vault, "p")
    plans = [some_acts(rng) for _ in range(rng.randint(2, 4))]
    actors = [Actor(f"a{number}") for number in range(len(plans))]
    for actor, acts in zip(actors, plans, strict=True):
        dies = rng.randrange(30) if rng.random() < 0.3 else None
        actor.start(partial(act, race, race.seen_by(actor, dies), actor.name, acts))
    restless = rng.choice([0.05, 0.2, 0.5, 1.0])
    mover = rng.choice(actors)
    while waiting := [actor for actor in actors if not actor.done]:
        if mover.done or rng.random() < restless:
            mover = rng.choice(waiting)
        mover.step()


@pytest.mark.parametrize("block", range(ROUNDS))
def test_no_promise_is_broken(pristine: Path, block: int) -> None:
    for seed in range(block * 100, block * 100 + 100):
        with tempfile.TemporaryDirectory(dir=MEMORY) as name:
            shutil.copytree(pristine / "vault", Path(name, "vault"))
            race = Race(Path(name))
            try:
                run_race(race, random.Random(seed))
                check_end(race)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}: {error}") from error
            finally:
                race.vault.close()


MOVES: dict[str, Acts] = {
    "delete": [("delete", "p")],
    "undelete": [("undelete", "p")],
    "pin": [("pin", "p")],
    "unpin": [("unpin", "p")],
    "read": [("read", "p")],
    "sweep": [("sweep", 30)],
}


@pytest.mark.parametrize("deleted", [False, True])
@pytest.mark.parametrize("other", MOVES)
@pytest.mark.parametrize("one", MOVES)
def test_one_between_any_two_calls_of_another(pristine: Path, one: str, other: str, deleted: bool) -> None:
    for calls in range(100):
        with tempfile.TemporaryDirectory(dir=MEMORY) as name:
            shutil.copytree(pristine / "vault", Path(name, "vault"))
            race = Race(Path(name))
            if deleted:
                race.delete(race.vault, "p")
            actor = Actor("one")
            actor.start(partial(act, race, race.seen_by(actor, None), "one", MOVES[one]))
            for _ in range(calls):
                if not actor.done:
                    actor.step()
            over = actor.done
            act(race, race.vault, "other", MOVES[other])
            while not actor.done:
                actor.step()
            assert not trash.pinned(race.vault.store).keys() & trash.standing(race.vault.store).keys()
            check_end(race)
            race.vault.close()
        if over:
            return


def check_end(race: Race) -> None:
    """Whatever was cut off, the next sweep goes on with it, and what was promised is there."""
    for info in list(race.vault.store.list("sessions/")):
        race.leave(race.vault, info.name.removeprefix("sessions/"))
    stand = trash.standing(race.vault.store)
    pins = trash.pinned(race.vault.store)
    race.sweep(race.vault, 40)
    assert trash.standing(race.vault.store) == {}
    for point, told in race.promised.items():
        assert race.there(point) or not (told.pinned or told.restored)
        assert race.there(point) == race.vault.readable(point)
        assert not race.there(point) or point not in stand or point in pins
        if not race.there(point):
            assert not list(race.vault.store.list(f"trash/{point}."))
