"""A replica has what the original has, whatever goes wrong on the way; deletions follow later, never by accident."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from tests.vault.faulty import Died, FaultyStore, Plan
from tests.vault.pictures import KEY, PACK, backup, content, image, new_vault, read_disk, reopened
from tests.vault.stepped import MemoryStore
from tests.vault.test_mirror import files
from workers.contract.errors import Busy, NoSpace, VaultError, VaultMissing
from workers.contract.seams import Store
from workers.vault import Vault
from workers.vault.copying import Pace
from workers.vault.gone import GONE, note_gone, read_gone, strike_off
from workers.vault.mirror import MirrorStore
from workers.vault.packs import PAGE
from workers.vault.rebuild import rebuild_index
from workers.vault.replicate import ReplicaReport, replicate
from workers.vault.stores import DirectoryStore
from workers.vault.sweep import Settings, sweep
from workers.vault.verify import Level, verify

PICTURES = {"p1": "ABCDEFGHIJ", "p2": "AB0Kk0"}
NOW = datetime(2026, 11, 22, 2, 0, tzinfo=UTC)
WEEK = timedelta(days=7)


def source(folder: Path) -> DirectoryStore:
    return DirectoryStore(folder / "vault")


def target(folder: Path) -> DirectoryStore:
    return DirectoryStore(folder / "second", create=True)


def run(folder: Path, *, days: float = 0, into: Store | None = None, **options: bool | int) -> ReplicaReport:
    """One replication, so many days after the first; one transfer at a time, so that calls have an order."""
    there = into or target(folder)
    return replicate(source(folder), there, delay=WEEK, now=NOW + timedelta(days=days), threads=1, **options)


def original(folder: Path) -> Vault:
    vault = new_vault(folder)
    for point, picture in PICTURES.items():
        backup(vault, point, {"vda": picture})
    return vault


def replica(folder: Path) -> Vault:
    return Vault.open(DirectoryStore(folder / "second"), key=KEY, cache_dir=folder / "cache2")


def points(vault: Vault) -> dict[str, bytes]:
    """Point → content of its first disk."""
    return {point.id: read_disk(vault, point.disks[0]) for point in vault.points()}


def same(folder: Path) -> bool:
    here, there = files(folder / "vault"), files(folder / "second")
    return {name: data for name, data in here.items() if not name.startswith("sessions/")} == there


EXPECTED = {point: image(picture) for point, picture in PICTURES.items()}


# --- copying -----------------------------------------------------------------------------------------------------


def test_a_replica_is_a_vault(tmp_path: Path) -> None:
    """The same key opens it, with the original gone."""
    vault = original(tmp_path)
    vault.announce("job", "p3")
    report = run(tmp_path)
    assert (report.created, report.points, report.not_copied) == (True, 2, [])
    assert same(tmp_path)
    shutil.rmtree(tmp_path / "vault")
    assert points(replica(tmp_path)) == EXPECTED
    assert verify(replica(tmp_path), Level.FULL).ok


def test_only_what_is_missing_is_copied(tmp_path: Path) -> None:
    vault = original(tmp_path)
    first = run(tmp_path)
    assert run(tmp_path).objects == 0
    backup(vault, "p3", {"vda": "ABCDz"})
    again = run(tmp_path)
    assert not again.created
    assert again.points == 1
    assert again.bytes < first.bytes / 4
    assert same(tmp_path)


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    vault = original(tmp_path)
    run(tmp_path)
    backup(vault, "p3", {"vda": "XY"})
    vault.delete_point("p1")
    before = files(tmp_path / "second")
    report = run(tmp_path, dry_run=True)
    assert (report.points, report.noted) == (1, 1)
    assert report.bytes > 0
    assert files(tmp_path / "second") == before


def test_keys_and_pins_come_along(tmp_path: Path) -> None:
    vault = original(tmp_path)
    vault.slots.add(passphrase=b"second way")
    vault.store.put("pins/p1", b"pinned")
    run(tmp_path)
    Vault.open(DirectoryStore(tmp_path / "second"), passphrase=b"second way", cache_dir=tmp_path / "c3")
    assert (tmp_path / "second/pins/p1").read_bytes() == b"pinned"


def test_what_belongs_to_the_original_alone_stays_there(tmp_path: Path) -> None:
    vault = original(tmp_path)
    for kind in ("sessions", "trash", "condemned", "verdicts", "damage"):
        vault.store.put(f"{kind}/x", b"x")
    run(tmp_path)
    assert {path.name for path in (tmp_path / "second").iterdir()} == {
        ".staging", "packs", "index", "points", "keys", "keyring", "vault.json",
    }  # fmt: skip


@pytest.mark.parametrize("cut_off", [False, True])
def test_another_vault_is_not_written_to(tmp_path: Path, cut_off: bool) -> None:
    original(tmp_path)
    other = new_vault(tmp_path / "other")
    backup(other, "p9", {"vda": "Q"})
    if cut_off:
        (tmp_path / "other/vault/vault.json").unlink()
    before = files(tmp_path / "other/vault")
    with pytest.raises(VaultError, match="another vault"):
        run(tmp_path, into=DirectoryStore(tmp_path / "other/vault", create=True))
    assert files(tmp_path / "other/vault") == before


def test_packs_without_a_keyring_are_of_another_vault(tmp_path: Path) -> None:
    original(tmp_path)
    target(tmp_path).put("packs/aa", b"x")
    with pytest.raises(VaultError, match="another vault"):
        run(tmp_path)


def test_no_source(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "vault", create=True)
    with pytest.raises(VaultMissing):
        replicate(store, target(tmp_path), delay=WEEK)
    assert files(tmp_path / "second") == {}


def test_bandwidth_is_held(tmp_path: Path) -> None:
    original(tmp_path)
    size = sum(map(len, files(tmp_path / "vault").values()))
    began = time.monotonic()
    replicate(source(tmp_path), target(tmp_path), delay=WEEK, rate=2 * size)
    assert time.monotonic() - began > 0.3
    assert same(tmp_path)


def test_pace_asks_for_less_at_a_time_where_little_flows() -> None:
    assert Pace(None).piece > Pace(4 << 20).piece == 1 << 20
    assert Pace(1000).piece == 64 << 10


# --- damage and faults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["packs", "index"])
def test_damage_is_told_and_not_copied(tmp_path: Path, kind: str) -> None:
    original(tmp_path)
    path = sorted((tmp_path / "vault" / kind).iterdir())[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:50] + bytes([whole[50] ^ 4]) + whole[51:])
    report = run(tmp_path)
    assert [one.object for one in report.not_copied] == [f"{kind}/{path.name}"]
    assert not (tmp_path / "second" / kind / path.name).exists()
    assert report.points == 2
    path.write_bytes(whole)
    assert run(tmp_path).not_copied == []
    assert same(tmp_path)
    assert points(replica(tmp_path)) == EXPECTED


@pytest.mark.parametrize("kind", ["die_before", "die_after", "fail_at"])
@pytest.mark.parametrize("side", ["source", "target"])
def test_a_kill_at_every_call(tmp_path: Path, kind: str, side: str) -> None:
    """Whatever is there after it is restorable, if it is a vault at all; and the next run makes it equal."""
    original(tmp_path)
    number = 0
    while True:
        shutil.rmtree(tmp_path / "second", ignore_errors=True)
        plan = Plan()
        setattr(plan, kind, number)
        here: Store = FaultyStore(source(tmp_path), plan) if side == "source" else source(tmp_path)
        there: Store = FaultyStore(target(tmp_path), plan) if side == "target" else target(tmp_path)
        with suppress(Died, VaultError):
            replicate(here, there, delay=WEEK, now=NOW, threads=1)
        if number >= len(plan.calls):
            break
        if (tmp_path / "second/points").exists():
            for name in (tmp_path / "second/points").iterdir():
                assert same_blocks(tmp_path), name
        run(tmp_path)
        assert same(tmp_path), number
        number += 1
    assert number > 15


def same_blocks(folder: Path) -> bool:
    """Packs and segments are all there."""
    here, there = files(folder / "vault"), files(folder / "second")
    return all(there.get(name) == data for name, data in here.items() if name.startswith(("packs", "index")))


def test_a_full_replica(tmp_path: Path) -> None:
    original(tmp_path)
    with pytest.raises(NoSpace):
        run(tmp_path, into=FaultyStore(target(tmp_path), Plan(full_at=8)))
    assert not (tmp_path / "second/points").exists()
    run(tmp_path)
    assert same(tmp_path)


def test_the_original_vanishes_in_the_middle(tmp_path: Path) -> None:
    original(tmp_path)

    def unmounted(name: str, data: bytes) -> bytes:
        if name.startswith("index/"):
            (tmp_path / "vault").rename(tmp_path / "away")
        return data

    with pytest.raises(VaultMissing):
        replicate(FaultyStore(source(tmp_path), Plan(mangle=unmounted)), target(tmp_path), delay=WEEK, threads=1)
    (tmp_path / "away").rename(tmp_path / "vault")
    run(tmp_path)
    assert same(tmp_path)


class Meanwhile(FaultyStore):
    """A source in which something is done once, just before the first piece of a pack is read, or packs are listed."""

    def __init__(self, inner: Store, act: Callable[[], object], call: str = "get") -> None:
        super().__init__(inner)
        self._acts = [act]
        self._call = call

    def _enter(self, call: str, name: str) -> int:
        while call == self._call and name.startswith("packs/") and self._acts:
            self._acts.pop()()
        return super()._enter(call, name)


def test_a_point_that_is_made_meanwhile_waits_for_the_next_run_and_brings_no_half_point(tmp_path: Path) -> None:
    vault = original(tmp_path)
    here = Meanwhile(source(tmp_path), lambda: backup(vault, "p3", {"vda": "XYZ"}))
    report = replicate(here, target(tmp_path), delay=WEEK, now=NOW, threads=1)
    assert report.points == 2
    assert points(replica(tmp_path)) == EXPECTED
    run(tmp_path)
    assert points(replica(tmp_path)) == EXPECTED | {"p3": image("XYZ")}


def compacted(vault: Vault) -> None:
    """What a compaction leaves: all blocks in new packs, the old ones and their segments gone, every point alive."""
    reader = vault.reader()
    old = [info.name for prefix in ("index/", "packs/") for info in vault.store.list(prefix)]
    ids = {entry.id for pack in vault.index.packs() for entry in vault.index.entries(pack)}
    kinds = {entry.id: entry.kind for pack in vault.index.packs() for entry in vault.index.entries(pack)}
    plain = {id: reader.get_page(id) if kinds[id] == PAGE else reader.get(id) for id in ids}
    for name in old:
        vault.store.delete(name)
    with vault.writer() as writer:
        for id, data in plain.items():
            _ = writer.put_page(data) if kinds[id] == PAGE else writer.put(data)
        writer.finish()


def test_a_compaction_meanwhile_leaves_no_point_without_its_blocks(tmp_path: Path) -> None:
    vault = original(tmp_path)
    here = Meanwhile(source(tmp_path), lambda: compacted(reopened(tmp_path, cache="sweeper")))
    report = replicate(here, target(tmp_path), delay=WEEK, now=NOW, threads=1)
    assert report.points == 2
    assert points(replica(tmp_path)) == EXPECTED
    assert vault.readable("p1")


def test_a_compaction_between_two_lists(tmp_path: Path) -> None:
    """The packs of the list are new, the segments old: nothing that the old ones name may go."""
    vault = original(tmp_path)
    run(tmp_path)
    here = Meanwhile(source(tmp_path), lambda: compacted(reopened(tmp_path, cache="sweeper")), "list")
    replicate(here, target(tmp_path), delay=timedelta(0), now=NOW, threads=1)
    assert points(replica(tmp_path)) == EXPECTED
    assert same(tmp_path)
    assert vault.readable("p1")


def test_a_mirror_gives_the_copy_that_is_good(tmp_path: Path) -> None:
    original(tmp_path)
    shutil.copytree(tmp_path / "vault", tmp_path / "mirror")
    path = sorted((tmp_path / "vault/packs").iterdir())[0]
    path.write_bytes(bytes(64) + path.read_bytes()[64:])
    mirror = MirrorStore({place: partial(DirectoryStore, tmp_path / place) for place in ("vault", "mirror")})
    assert replicate(mirror, target(tmp_path), delay=WEEK).not_copied == []
    assert points(replica(tmp_path)) == EXPECTED


def test_a_point_that_is_deleted_meanwhile(tmp_path: Path) -> None:
    vault = original(tmp_path)
    here = Meanwhile(source(tmp_path), lambda: vault.delete_point("p1"))
    replicate(here, target(tmp_path), delay=WEEK, now=NOW, threads=1)
    assert list(points(replica(tmp_path))) == ["p2"]


def test_a_source_that_never_stands_still(tmp_path: Path) -> None:
    vault = original(tmp_path)

    def always(name: str, data: bytes) -> bytes:
        if name.startswith(("packs/", "index/")):
            rebuild_index(vault)
        return data

    with pytest.raises(Busy):
        replicate(FaultyStore(source(tmp_path), Plan(mangle=always)), target(tmp_path), delay=WEEK, threads=1)


# --- deletions follow --------------------------------------------------------------------------------------------


def names(folder: Path, kind: str) -> set[str]:
    return {info.name for info in DirectoryStore(folder / "second").list(f"{kind}/")}


def swept(folder: Path, vault: Vault) -> None:
    """Point p1 is deleted, and a sweep has taken what only it needs: crude, and in the right order."""
    only = {vault.reader().block_id(content(letter)) for letter in "CDEFGHIJ"}
    only.add(bytes.fromhex(vault.point("p1").disks[0].root))
    vault.delete_point("p1")
    doomed = [pack for pack in vault.index.packs() if {e.id for e in vault.index.entries(pack)} <= only]
    assert doomed
    for pack in doomed:
        (folder / "vault" / pack).unlink()
    rebuild_index(reopened(folder, cache="sweeper"))


def test_deletions_follow_after_their_delay(tmp_path: Path) -> None:
    vault = original(tmp_path)
    run(tmp_path)
    swept(tmp_path, vault)
    report = run(tmp_path, days=1)
    assert report.noted > 2
    assert report.removed == 0
    assert points(replica(tmp_path)) == EXPECTED
    assert run(tmp_path, days=7.9).removed == 0
    assert points(replica(tmp_path)) == EXPECTED
    last = run(tmp_path, days=8)
    assert last.removed == report.noted
    assert last.removed_points == 1
    assert same(tmp_path)
    assert verify(replica(tmp_path), Level.FULL).ok


def test_what_comes_back_is_struck_off(tmp_path: Path) -> None:
    original(tmp_path)
    run(tmp_path)
    (tmp_path / "vault/points/p1").rename(tmp_path / "p1")
    assert run(tmp_path, days=1).noted == 1
    (tmp_path / "p1").rename(tmp_path / "vault/points/p1")
    run(tmp_path, days=2)
    assert names(tmp_path, "gone") == set()
    (tmp_path / "vault/points/p1").unlink()
    run(tmp_path, days=9)
    assert run(tmp_path, days=10).removed == 0
    assert "p1" in points(replica(tmp_path))


def test_a_kill_at_every_call_while_deletions_follow(tmp_path: Path) -> None:
    """Points of the replica are whole at every moment, and the next run ends the work."""
    for kind in ("die_before", "die_after"):
        for number in range(0, 200, 2):
            folder = tmp_path / f"{kind}{number}"
            vault = original(folder)
            run(folder)
            swept(folder, vault)
            run(folder, days=1)
            plan = Plan()
            setattr(plan, kind, number)
            try:
                run(folder, days=9, into=FaultyStore(target(folder), plan))
            except Died:
                if number % 4 == 0:
                    assert "p2" in points(replica(folder))
                    assert verify(replica(folder), Level.IDS).ok, number
                run(folder, days=9)
                assert same(folder), number
                assert verify(replica(folder), Level.FULL).ok
                shutil.rmtree(folder)
            else:
                break
        else:
            raise AssertionError("the walk did not reach the end")


def test_not_half_of_the_points_at_once(tmp_path: Path) -> None:
    vault = original(tmp_path)
    backup(vault, "p3", {"vda": "Z"})
    run(tmp_path)
    for point in ("p1", "p2"):
        vault.delete_point(point)
    run(tmp_path, days=1)
    held = run(tmp_path, days=9)
    assert held.removed == 0
    assert "2 of 3 points" in held.held_back
    assert sorted(points(replica(tmp_path))) == ["p1", "p2", "p3"]
    assert run(tmp_path, days=9, force=True).removed_points == 2
    assert sorted(points(replica(tmp_path))) == ["p3"]


def test_an_original_that_holds_nothing_deletes_nothing(tmp_path: Path) -> None:
    original(tmp_path)
    run(tmp_path)
    for kind in ("points", "packs", "index"):
        shutil.rmtree(tmp_path / "vault" / kind)
    for day in (1, 20, 40):
        report = run(tmp_path, days=day)
        assert report.held_back
        assert report.noted == 0
    assert points(replica(tmp_path)) == EXPECTED


def test_packs_that_the_original_has_lost_are_kept(tmp_path: Path) -> None:
    """A sweep would have removed segments too."""
    original(tmp_path)
    run(tmp_path)
    sorted((tmp_path / "vault/packs").iterdir())[0].unlink()
    for day in (1, 20):
        report = run(tmp_path, days=day)
        assert (report.kept, report.noted, report.removed) == (1, 0, 0)
    assert points(replica(tmp_path)) == EXPECTED


def test_nothing_goes_while_somebody_restores(tmp_path: Path) -> None:
    vault = original(tmp_path)
    backup(vault, "p3", {"vda": "Z"})
    run(tmp_path)
    vault.delete_point("p1")
    run(tmp_path, days=1)
    reader = replica(tmp_path)
    reader.announce("restore", reads=["p1"])
    assert "restores" in run(tmp_path, days=9).held_back
    assert "p1" in points(replica(tmp_path))
    reader.withdraw("restore")
    assert run(tmp_path, days=9).removed_points == 1


def test_notes(tmp_path: Path) -> None:
    store = target(tmp_path)
    many = {f"packs/{number:064x}" for number in range(1201)}
    note_gone(store, many, NOW)
    note_gone(store, ["points/p"], NOW + WEEK)
    assert [len(note.names) for note in read_gone(store)] == [500, 500, 201, 1]
    assert max(info.size for info in store.list(GONE)) < 64 << 10
    strike_off(store, many - {f"packs/{7:064x}"})
    assert sorted((note.names[0][-1], note.time) for note in read_gone(store)) == [("7", NOW), ("p", NOW + WEEK)]
    (tmp_path / "second/gone/00000004").write_bytes(b"{}")
    assert [note.names[0][-1] for note in read_gone(store)] == ["7"]


# --- beside writers and sweeps -----------------------------------------------------------------------------------


class Lively(FaultyStore):
    """A store to whose vault something happens now and then, between two calls of somebody else."""

    def __init__(self, inner: Store, rng: random.Random, act: Callable[[], None]) -> None:
        super().__init__(inner)
        self._rng = rng
        self._act = act

    def _enter(self, call: str, name: str) -> int:
        if self._rng.random() < 0.12:
            self._act()
        return super()._enter(call, name)


@pytest.mark.parametrize("seed", range(12))
def test_beside_backups_deletions_and_sweeps(tmp_path: Path, seed: int) -> None:
    """At the end of every run each point of the replica is whole, with no delay at all."""
    rng = random.Random(seed)
    store, there = MemoryStore(tmp_path), MemoryStore(tmp_path)
    vault, _ = Vault.create(store, key=KEY, cache_dir=tmp_path / "writer")
    alive: dict[str, str] = {}
    made: dict[str, str] = {}

    def act() -> None:
        choice = rng.random()
        if choice < 0.4 or len(alive) < 2:
            point = f"p{len(made)}"
            made[point] = alive[point] = "".join(rng.choices("ABCDEFGHIJKLMNOP", k=8))
            backup(vault, point, {"vda": alive[point]})
        elif choice < 0.65:
            point = rng.choice(sorted(alive))
            del alive[point]
            vault.delete_point(point)
        else:
            sweep(vault, now=NOW, settings=Settings(empty=True, pack_size=PACK))

    for _ in range(4):
        act()
    here = Lively(store, rng, act)
    for _ in range(6):
        replicate(here, there, delay=timedelta(0), now=NOW, threads=1, force=True)
        second = Vault.open(there, key=KEY, cache_dir=tmp_path / "second")
        assert points(second) == {point: image(made[point]) for point in points(second)}
        assert verify(second, Level.IDS).ok
    replicate(store, there, delay=timedelta(0), now=NOW, force=True)
    assert sorted(points(Vault.open(there, key=KEY, cache_dir=tmp_path / "second"))) == sorted(alive)
