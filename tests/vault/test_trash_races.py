"""Several hosts delete, restore, pin and read the same points at once, sweeps finish deletions beside them, and any of
them may be killed between two calls of the store; against a model that knows only what its callers were promised."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.vault.pictures import KEY, point_of
from tests.vault.stepped import Actor, MemoryStore
from workers.contract.errors import Locked, NotFound
from workers.contract.seams import Store
from workers.vault import Vault, trash

DAY = timedelta(days=1)
START = datetime(2024, 11, 22, 2, 0, tzinfo=UTC)
"""Long ago: what removes a manifest also looks at the real clock."""
LOCKED = START + 20 * DAY
"""Until then point `q` is locked."""
POINTS = ("p", "q")
ROUNDS = 20
"""Of a hundred races each."""


Acts = list[tuple[str, str | int]]


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


class WatchedStore(MemoryStore):
    """Tells which manifest is about to go."""

    def __init__(self, objects: dict[str, bytes], watch: Callable[[str], None]) -> None:
        super().__init__(Path("unused"))
        self.objects = dict(objects)
        self._watch = watch

    def delete(self, name: str) -> None:
        if name.startswith("points/") and name in self.objects:
            self._watch(name.removeprefix("points/"))
        super().delete(name)


class Race:
    """One vault, its actors, and what they were promised."""

    def __init__(self, pristine: Vault) -> None:
        assert isinstance(pristine.store, MemoryStore)
        self._keys = pristine.keys
        self.vault = self.vault_at(WatchedStore(pristine.store.objects, self.watch))
        self.promised = {point: Promised() for point in POINTS}
        self.latest = START
        """The latest time that a sweep went by."""

    def vault_at(self, store: Store) -> Vault:
        return Vault(store, b"", self._keys, Path("unused"))

    def actor(self, name: str, acts: Acts) -> Actor:
        return Actor(name, self.vault.store, lambda store: act(self, self.vault_at(store), name, acts))

    def watch(self, point: str) -> None:
        """A manifest goes: nobody may have been told that it stays."""
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
        assert self.there(point), f"{point} is said to be restored, and is gone"
        self.promised[point].restored |= undisturbed()

    def pin(self, vault: Vault, point: str) -> None:
        told = self.promised[point]
        undisturbed, unpinned = told.clean("delete"), told.clean("unpin")
        try:
            trash.pin(vault, point, now=START, by="us", reason="a test")
        except NotFound:
            return
        assert self.there(point), f"{point} is said to be pinned, and is gone"
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
        self.finalise(vault, day)
        self.remove(vault, "")

    def finalise(self, vault: Vault, day: int) -> None:
        self.latest = max(self.latest, START + day * DAY)
        trash.finalise(vault, START + day * DAY)

    def remove(self, vault: Vault, _: str) -> None:
        trash.remove_finals(vault)

    def read(self, vault: Vault, point: str, session: str) -> None:
        vault.announce(session, reads=[point])
        if vault.readable(point):
            assert self.there(point), f"{point} is said to be readable, and is gone"
            self.promised[point].readers.add(session)

    def leave(self, vault: Vault, session: str) -> None:
        for told in self.promised.values():
            told.readers.discard(session)
        vault.withdraw(session)


def some_acts(rng: random.Random) -> Acts:
    """What one actor does, in this order: a few things, most of them to the same point as everybody else."""
    acts: Acts = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        name = rng.choice(["delete", "delete", "undelete", "pin", "unpin", "sweep", "sweep", "sweep", "read", "leave"])
        acts.append((name, rng.choice([2, 5, 30, 30]) if name == "sweep" else rng.choice("pppq")))
    return acts


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Vault:
    store = MemoryStore(tmp_path_factory.mktemp("staging"))
    vault, _ = Vault.create(store, key=KEY, cache_dir=tmp_path_factory.mktemp("cache"))
    vault.commit(point_of("p", []).model_copy(update={"time": START}))
    vault.commit(point_of("q", []).model_copy(update={"time": START, "locked_until": LOCKED}))
    return vault


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
    actors = [race.actor(f"a{number}", some_acts(rng)) for number in range(rng.randint(2, 4))]
    dies = {actor.name: rng.randrange(30) for actor in actors if rng.random() < 0.3}
    restless = rng.choice([0.05, 0.2, 0.5, 1.0])
    mover = rng.choice(actors)
    while waiting := [actor for actor in actors if not actor.ended]:
        if mover.ended or rng.random() < restless:
            mover = rng.choice(waiting)
        if len(mover.calls) == dies.get(mover.name):
            mover.kill()
        else:
            step(mover)


def step(actor: Actor) -> None:
    actor.step()
    if actor.error is not None:
        raise actor.error


@pytest.mark.parametrize("block", range(ROUNDS))
def test_no_promise_is_broken(pristine: Vault, block: int) -> None:
    for seed in range(block * 100, block * 100 + 100):
        race = Race(pristine)
        try:
            run_race(race, random.Random(seed))
            check_end(race)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


MOVES: dict[str, Acts] = {
    "delete": [("delete", "p")],
    "undelete": [("undelete", "p")],
    "pin": [("pin", "p")],
    "unpin": [("unpin", "p")],
    "read": [("read", "p")],
    "sweep": [("sweep", 30)],
}
TURNS: dict[str, Acts] = MOVES | {
    "remove": [("remove", "")],
    "read, final": [("read", "p"), ("finalise", 30)],
}


@pytest.mark.parametrize("deleted", [False, True])
@pytest.mark.parametrize("other", MOVES)
@pytest.mark.parametrize("one", MOVES)
def test_one_between_any_two_calls_of_another(pristine: Vault, one: str, other: str, deleted: bool) -> None:
    for calls in range(100):
        race = Race(pristine)
        if deleted:
            race.delete(race.vault, "p")
        actor = race.actor("one", MOVES[one])
        for _ in range(calls):
            step(actor)
        over = actor.ended
        act(race, race.vault, "other", MOVES[other])
        while not actor.ended:
            step(actor)
        assert not trash.pinned(race.vault.store).keys() & trash.standing(race.vault.store).keys()
        check_end(race)
        if over:
            return


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("read", "remove"),
        ("remove", "read"),
        ("remove", "read, final"),
        ("remove", "undelete"),
        ("remove", "pin"),
        ("undelete", "sweep"),
        ("pin", "sweep"),
        ("delete", "sweep"),
        ("delete", "pin"),
    ],
)
def test_two_that_are_both_held_up(pristine: Vault, one: str, other: str, final: bool) -> None:
    """`one` makes some calls, `other` some, `one` the rest, `other` the rest: a look, and what it led to, far apart."""
    most = {name: calls_of(pristine, TURNS[name], final) for name in (one, other)}
    for first in range(most[one] + 1):
        for second in range(most[other] + 1):
            race = begun(pristine, final)
            actors = [race.actor(name, TURNS[name]) for name in (one, other)]
            for actor, calls in zip(actors, (first, second), strict=True):
                for _ in range(calls):
                    step(actor)
            for actor in actors:
                while not actor.ended:
                    step(actor)
            check_end(race)


def begun(pristine: Vault, final: bool) -> Race:
    """Point p is deleted, and that is final or not."""
    race = Race(pristine)
    race.delete(race.vault, "p")
    if final:
        race.finalise(race.vault, 5)
    return race


def calls_of(pristine: Vault, acts: Acts, final: bool) -> int:
    """How many calls they make when nobody else is there."""
    race = begun(pristine, final)
    actor = race.actor("alone", acts)
    while not actor.ended:
        step(actor)
    return len(actor.calls)


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
    assert trash.finals(race.vault.store) == []
