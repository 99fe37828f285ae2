"""Several hosts delete, restore, pin and read the same points at once, sweeps finish deletions beside them, and any of
them may be killed between two calls of the store; against a model that knows only what its callers were promised."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

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


OnPoint = st.tuples(st.sampled_from(["delete", "undelete", "pin", "unpin"]), st.sampled_from(POINTS))
Sweep = st.tuples(st.just("sweep"), st.sampled_from([2, 5, 30]))
Read = st.tuples(st.just("read"), st.sampled_from(POINTS))
Act = st.one_of(OnPoint, OnPoint, Sweep, Sweep, Read, st.tuples(st.just("leave"), st.just("")))
Acts = st.lists(Act, min_size=1, max_size=4)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    vault = new_vault(folder)
    vault.commit(point_of("p", []))
    vault.commit(point_of("q", []).model_copy(update={"locked_until": LOCKED}))
    vault.close()
    return folder


def act(race: Race, vault: Vault, session: str, acts: list[tuple[str, str | int]]) -> None:
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


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    plans=st.lists(st.tuples(Acts, st.none() | st.integers(0, 60)), min_size=2, max_size=4),
    turns=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12)), max_size=60),
)
def test_no_promise_is_broken(
    pristine: Path,
    plans: list[tuple[list[tuple[str, str | int]], int | None]],
    turns: list[tuple[int, int]],
) -> None:
    """`turns`: which actor moves next, and by how many calls; then each by itself to its end."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        shutil.copytree(pristine / "vault", Path(name, "vault"))
        race = Race(Path(name))
        actors = [Actor(f"a{number}") for number in range(len(plans))]
        for actor, (acts, dies) in zip(actors, plans, strict=True):
            actor.start(partial(act, race, race.seen_by(actor, dies), actor.name, acts))
        for who, steps in [*turns, *((number, 10_000) for number in range(len(actors)))]:
            actor = actors[who % len(actors)]
            for _ in range(steps):
                if actor.done:
                    break
                actor.step()
        note(f"in the end: {sorted(info.name for info in race.vault.store.list('trash/'))}")
        check_end(race)
        race.vault.close()


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
