"""One vault on two stores: both have everything, either is enough to read, and what was deleted stays away.

The contract of a store is held in `test_store.py`; here is what only a mirror must do.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.vault.faulty import Died, FaultyStore, Plan
from tests.vault.pictures import KEY, backup, image, new_vault, read_disk
from workers.config import VaultConfig
from workers.contract.errors import ConfigError, NoSpace, StillframeError, StoreUnreachable, VaultMissing
from workers.contract.seams import Store
from workers.vault import Vault
from workers.vault.mirror import MirrorStore, extra
from workers.vault.mirror_sync import outdated, sync_store
from workers.vault.places import open_place
from workers.vault.stores import DirectoryStore
from workers.vault.verify import Level, verify

FIRST = {"vda": "ABCDEFGHIJ", "vdb": "0Kk0"}


def config(folder: Path) -> VaultConfig:
    return VaultConfig(url=f"file://{folder}/one", mirrors=[f"file://{folder}/two"])


def opened(store: Store, folder: Path, cache: str = "cache") -> Vault:
    return Vault.open(store, key=KEY, cache_dir=folder / cache)


def made(folder: Path) -> Vault:
    """A vault on two stores with one point."""
    vault, _ = Vault.create(open_place(config(folder), create=True), key=KEY, cache_dir=folder / "cache")
    backup(vault, "p1", FIRST)
    return vault


def files(folder: Path) -> dict[str, bytes]:
    """What a store holds, without its staging."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".staging" not in path.parts
    }


def faulty(folder: Path, *plans: Plan) -> MirrorStore:
    """The two stores, with those faults."""
    places: dict[str, Callable[[], Store]] = {}
    for place, plan in zip(("one", "two"), plans, strict=True):

        def opener(place: str = place, plan: Plan = plan) -> Store:
            return FaultyStore(DirectoryStore(folder / place), plan)

        places[place] = opener
    return MirrorStore(places)


def whole(vault: Vault, point: str = "p1") -> bool:
    found = vault.point(point)
    return {disk.target: read_disk(vault, disk) for disk in found.disks} == {
        target: image(picture) for target, picture in FIRST.items()
    }


# --- both have everything ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["one", "two"])
def test_either_store_is_enough(tmp_path: Path, lost: str) -> None:
    made(tmp_path)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    shutil.rmtree(tmp_path / lost)
    vault = opened(open_place(config(tmp_path)), tmp_path, "cold")
    assert whole(vault)
    assert verify(vault, Level.FULL).ok


def test_copies_are_files_of_their_own(tmp_path: Path) -> None:
    made(tmp_path)
    for path in (tmp_path / "one/packs").iterdir():
        assert not path.samefile(tmp_path / "two/packs" / path.name)
    assert list((tmp_path / "one/.staging").glob("*/*")) == list((tmp_path / "two/.staging").glob("*/*")) == []


@pytest.mark.parametrize("kind", ["die_before", "die_after", "fail_at", "full_at"])
@pytest.mark.parametrize("where", [0, 1])
def test_a_fault_at_every_call_of_a_backup(tmp_path: Path, kind: str, where: int) -> None:
    """Whatever was cut off: the next try completes both, and they agree."""
    outcomes = []
    for number in range(0, 55, 6):
        folder = tmp_path / str(number)
        made(folder).close()
        plans = [Plan(), Plan()]
        vault = opened(faulty(folder, *plans), folder)
        setattr(plans[where], kind, len(plans[where].calls) + number)
        try:
            vault.announce("job", "p2")
            backup(vault, "p2", {"vda": "AZ0LMN"})
            vault.withdraw("job")
            outcomes.append(True)
        except (Died, StillframeError):
            outcomes.append(False)
        vault.close()
        vault = opened(open_place(config(folder)), folder)
        point = vault.settle("p2")
        vault.withdraw("job")
        assert (point is not None) >= outcomes[-1]
        assert whole(vault)
        assert verify(vault, Level.FULL).ok
        for name in {**files(folder / "one"), **files(folder / "two")}:
            if name.startswith(("points", "sessions")):
                assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()
    assert outcomes[-1], "the walk did not reach the end of a backup"
    assert False in outcomes or kind == "fail_at"  # one look that fails in one of two stores is made good


def test_a_name_that_only_the_first_has_is_taken_and_given_to_the_other(tmp_path: Path) -> None:
    made(tmp_path)
    store = open_place(config(tmp_path))
    inner = DirectoryStore(tmp_path / "one")
    inner.put("points/p9", b"committed, and then the power went")
    assert not store.put("points/p9", b"aborted")
    assert DirectoryStore(tmp_path / "two").get("points/p9") == b"committed, and then the power went"


def test_a_name_that_is_taken_is_given_to_all_others(tmp_path: Path) -> None:
    names = ("one", "two", "three")
    store = MirrorStore({name: partial(DirectoryStore, tmp_path / name, create=True) for name in names}, create=True)
    store.put("vault.json", b"m")
    for name in names[:2]:
        (tmp_path / name / "sessions").mkdir()
        (tmp_path / name / "sessions/j").write_bytes(b"announced, and killed before the third")
    assert not store.put("sessions/j", b"announced")
    assert (tmp_path / "three/sessions/j").read_bytes() == b"announced, and killed before the third"


def test_a_point_that_the_first_has_lost_cannot_be_fenced(tmp_path: Path) -> None:
    vault = made(tmp_path)
    (tmp_path / "one/points/p1").unlink()
    assert [point.id for point in vault.points()] == ["p1"]
    assert vault.settle("p1") is not None
    assert files(tmp_path / "one") == files(tmp_path / "two")


# --- reads go on -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["packs", "index"])
@pytest.mark.parametrize("damage", ["lost", "short"])
def test_a_read_repairs_what_has_its_hash_for_a_name(tmp_path: Path, kind: str, damage: str) -> None:
    made(tmp_path)
    for path in (tmp_path / f"one/{kind}").iterdir():
        path.unlink() if damage == "lost" else path.write_bytes(path.read_bytes()[:10])
    vault = opened(open_place(config(tmp_path)), tmp_path, "cold")
    if (kind, damage) == ("index", "short"):
        assert vault.reader()
        return  # it is read whole, and so not found to be short: that is for whoever checks its hash
    assert whole(vault)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_damage_is_not_copied_by_a_repair(tmp_path: Path) -> None:
    made(tmp_path)
    name = next((tmp_path / "one/packs").iterdir()).name
    (tmp_path / "one/packs" / name).unlink()
    other = tmp_path / "two/packs" / name
    other.write_bytes(bytes(100) + other.read_bytes()[100:])
    store = open_place(config(tmp_path))
    store.get(f"packs/{name}")
    assert not (tmp_path / "one/packs" / name).exists()


def test_what_is_deleted_while_it_is_copied_does_not_come_back(tmp_path: Path) -> None:
    made(tmp_path)
    name = next((tmp_path / "one/packs").iterdir()).name
    (tmp_path / "one/packs" / name).unlink()

    def swept(read: str, data: bytes) -> bytes:
        if read == f"packs/{name}" and len(data) > 10:  # now it is read for the repair
            (tmp_path / "two" / read).unlink()
        return data

    store = faulty(tmp_path, Plan(), Plan(mangle=swept))
    store.get(f"packs/{name}", 0, 10)
    assert f"packs/{name}" not in [info.name for info in store.list("packs/")]


def test_missing_is_only_what_every_store_says_is_missing(tmp_path: Path) -> None:
    made(tmp_path)
    store = open_place(config(tmp_path))
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(VaultMissing):
        store.get("packs/none")


def test_a_store_that_is_down_refuses_writes_and_deletes_and_lets_reads_go_on(tmp_path: Path) -> None:
    made(tmp_path)
    before = files(tmp_path / "one")
    (tmp_path / "two").rename(tmp_path / "away")
    store = open_place(config(tmp_path))
    vault = opened(store, tmp_path)
    assert whole(vault)
    with pytest.raises(StoreUnreachable, match="two") as caught:
        vault.announce("job", "p2")
    assert "mirror-sync" in caught.value.hint
    with pytest.raises(StoreUnreachable):
        vault.delete_point("p1")
    with pytest.raises(StoreUnreachable):
        backup(vault, "p2", {"vda": "Z"})
    assert files(tmp_path / "one") == before
    assert isinstance(store, MirrorStore)
    assert "two" in store.problems()[0]
    (tmp_path / "away").rename(tmp_path / "two")
    assert store.problems() == []
    vault.announce("job", "p2")
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_full_store_fails_the_backup(tmp_path: Path) -> None:
    made(tmp_path).close()
    plan = Plan()
    vault = opened(faulty(tmp_path, Plan(), plan), tmp_path)
    plan.full_at = 0
    with pytest.raises(NoSpace):
        backup(vault, "p2", {"vda": "QRS"})
    assert [point.id for point in vault.points()] == ["p1"]


# --- what does not belong ----------------------------------------------------------------------------------------


def test_a_new_mirror_is_filled_by_a_sync_and_refuses_writes_until_then(tmp_path: Path) -> None:
    made(tmp_path).close()
    shutil.rmtree(tmp_path / "two")
    with pytest.raises(StoreUnreachable):
        opened(open_place(config(tmp_path)), tmp_path).announce("job", "p2")
    source, target = DirectoryStore(tmp_path / "one"), DirectoryStore(tmp_path / "two", create=True)
    assert outdated(source, target) == []
    report = sync_store(source, target, [])
    assert report.objects == len(files(tmp_path / "one")) - 1
    assert files(tmp_path / "one") == files(tmp_path / "two")
    opened(open_place(config(tmp_path)), tmp_path).announce("job", "p2")


def test_a_sync_that_is_killed_anywhere_is_run_again(tmp_path: Path) -> None:
    made(tmp_path).close()
    for kind in ("die_before", "die_after"):
        for number in range(0, 60, 2):
            shutil.rmtree(tmp_path / "two", ignore_errors=True)
            source, target = DirectoryStore(tmp_path / "one"), DirectoryStore(tmp_path / "two", create=True)
            plan = Plan(die_before=number) if kind == "die_before" else Plan(die_after=number)
            with suppress(Died):
                sync_store(source, FaultyStore(target, plan), [])
            sync_store(source, DirectoryStore(tmp_path / "two", create=True), [])
            assert files(tmp_path / "one") == files(tmp_path / "two"), (kind, number)


def test_a_mirror_that_missed_a_deletion_brings_nothing_back(tmp_path: Path) -> None:
    made(tmp_path).close()
    alone = opened(DirectoryStore(tmp_path / "one"), tmp_path)
    backup(alone, "p2", {"vda": "XYZ"})
    alone.delete_point("p1")
    store = open_place(config(tmp_path))
    vault = opened(store, tmp_path)
    assert [point.id for point in vault.points()] == ["p2"]
    assert isinstance(store, MirrorStore)
    assert "points/p1" in store.problems()[0]
    with pytest.raises(StoreUnreachable, match="points/p1"):
        vault.announce("job", "p3")
    source, target = DirectoryStore(tmp_path / "one"), DirectoryStore(tmp_path / "two")
    assert extra(source, target) == ["points/p1"]
    sync_store(source, target, outdated(source, target))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert store.problems() == []
    vault.announce("job", "p3")


def test_an_outdated_first_seen_late_throws_the_other_out(tmp_path: Path) -> None:
    """The first store is away when the mirror is opened, and the second one has what it has not."""
    made(tmp_path).close()
    (tmp_path / "one").rename(tmp_path / "away")
    store = open_place(config(tmp_path))
    (tmp_path / "away/points/p1").unlink()
    (tmp_path / "away").rename(tmp_path / "one")
    with pytest.raises(StoreUnreachable, match="points/p1"):
        store.put("sessions/j", b"x")


def test_two_vaults_are_no_mirror(tmp_path: Path) -> None:
    for place in ("one", "two"):
        new_vault(tmp_path / place)
    wanted = VaultConfig(url=f"file://{tmp_path}/one/vault", mirrors=[f"file://{tmp_path}/two/vault"])
    with pytest.raises(ConfigError, match="another vault"):
        open_place(wanted)


def test_no_store_at_all(tmp_path: Path) -> None:
    with pytest.raises(VaultMissing):
        open_place(config(tmp_path))


@pytest.mark.parametrize("kind", ["die_before", "die_after"])
@pytest.mark.parametrize("where", [0, 1])
def test_a_delete_that_is_cut_off_is_done_again(tmp_path: Path, kind: str, where: int) -> None:
    for number in range(3):
        folder = tmp_path / str(number)
        made(folder).close()
        plans = [Plan(), Plan()]
        store = faulty(folder, *plans)
        setattr(plans[where], kind, len(plans[where].calls) + number)
        with suppress(Died):
            store.delete("points/p1")
        again = open_place(config(folder))
        assert isinstance(again, MirrorStore)
        assert again.problems() == []
        again.delete("points/p1")
        assert list(again.list("points/")) == []


def test_of_many_that_create_a_name_one_wins_on_both_stores(tmp_path: Path) -> None:
    made(tmp_path).close()
    stores = [open_place(config(tmp_path)) for _ in range(4)]
    for turn in range(5):
        with ThreadPoolExecutor(4) as pool:
            tries = [pool.submit(store.put, f"points/x{turn}", b"%d" % at) for at, store in enumerate(stores)]
        won = [one.result() for one in tries]
        assert won.count(True) == 1
        for place in ("one", "two"):
            assert (tmp_path / place / f"points/x{turn}").read_bytes() == b"%d" % won.index(True)
