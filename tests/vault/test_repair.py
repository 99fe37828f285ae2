"""A damaged vault is made whole from mirrors and replicas: never less than before, and what no copy holds is told."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.model.test_mistrust import flip, packs
from tests.vault.faulty import Died, FaultyStore, Plan
from tests.vault.pictures import BLOCK, KEY, backup, damage_block, image, new_vault, read_disk, reopened
from workers.contract.errors import Corrupt
from workers.contract.points import Point
from workers.contract.seams import ObjectInfo, Store
from workers.vault import DirectoryStore, Vault, open_store
from workers.vault.copying import copy_object
from workers.vault.damage import PREFIX, Copy
from workers.vault.index import write_segment
from workers.vault.mirror import MirrorStore
from workers.vault.packs import PackBuilder
from workers.vault.repair import repair
from workers.vault.verify import Level, verify

CONTENT = {"p1": "AaB0CDEF", "p2": "AaH0CcEF"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A vault, and a replica of it beside."""
    vault = new_vault(tmp_path)
    first = backup(vault, "p1", {"vda": CONTENT["p1"]})
    backup(vault, "p2", {"vda": "--H--c--"}, first)
    vault.close()
    shutil.copytree(tmp_path / "vault", tmp_path / "replica")
    return tmp_path


def replica(folder: Path) -> Store:
    return open_store(f"file://{folder}/replica")


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def require_whole(folder: Path, cache: str = "later") -> None:
    vault = reopened(folder, cache=cache)
    assert verify(vault, Level.FULL).ok
    for id, picture in CONTENT.items():
        assert read_disk(vault, vault.point(id).disks[0]) == image(picture)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("spoil", [lambda path: flip(path, 90), cut, Path.unlink])
@pytest.mark.parametrize("kind", ["packs", "index", "points"])
def test_everything_comes_back_from_a_replica(folder: Path, kind: str, spoil: Callable[[Path], None]) -> None:
    if kind == "points" and spoil is Path.unlink:
        return  # a manifest that is gone is a point that was deleted, as far as anybody can tell
    before = tree(folder / "vault")
    for path in sorted((folder / "vault" / kind).iterdir()):
        spoil(path)
    vault = reopened(folder)
    verify(vault, Level.FULL)
    planned = repair(vault, [replica(folder)], dry_run=True)
    assert planned.repaired
    assert tree(folder / "vault").keys() - before.keys() <= {name for name in tree(folder / "vault") if PREFIX in name}
    report = repair(vault, [replica(folder)])
    assert [one.object for one in report.repaired] == [one.object for one in planned.repaired]
    assert not report.failed
    assert not report.findings
    require_whole(folder)
    if kind != "index" or spoil is not Path.unlink:  # which segments there were nobody knows, only what they said
        assert tree(folder / "vault") == before, "records of damage are gone, too"


def test_what_no_copy_holds_is_told_with_the_points_that_need_it(folder: Path) -> None:
    vault = reopened(folder)
    damage_block(folder, vault, "B")
    verify(vault, Level.FULL)
    report = repair(vault)
    assert report.repaired == []
    (finding,) = report.findings
    assert [hit.point for hit in finding.affected] == ["p1"]


def test_a_replica_that_is_damaged_too_is_not_taken(folder: Path) -> None:
    vault = reopened(folder)
    name = damage_block(folder, vault, "B")
    flip(folder / "replica" / name, 100)
    verify(vault, Level.FULL)
    before = tree(folder / "vault")
    assert repair(vault, [replica(folder)]).repaired == []
    assert tree(folder / "vault") == before


def test_segments_of_which_no_copy_is_left_are_made_from_the_packs(folder: Path) -> None:
    for path in (folder / "vault/index").iterdir():
        flip(path, 80)
    vault = reopened(folder)
    report = repair(vault)
    assert {one.source for one in report.repaired} == {""}
    assert not report.findings
    require_whole(folder)


@pytest.mark.parametrize("step", range(40))
def test_killed_at_any_step_the_next_one_goes_on(folder: Path, step: int) -> None:
    vault = reopened(folder)
    for letter in "BH":
        damage_block(folder, vault, letter)
    packs(folder)[0].unlink()
    verify(vault, Level.FULL)
    plan = Plan()
    dying = Vault.open(FaultyStore(DirectoryStore(folder / "vault"), plan), key=KEY, cache_dir=folder / "cache")
    plan.die_after = len(plan.calls) + step * 3
    with suppress(Died):
        repair(dying, [replica(folder)])
    report = repair(reopened(folder, cache="next"), [replica(folder)])
    assert not report.findings
    require_whole(folder)


def test_the_bad_one_stays_until_the_right_bytes_are_at_hand(folder: Path) -> None:
    path = packs(folder)[0]
    name = f"packs/{path.name}"
    flip(path, 70)
    flip(folder / "replica" / name, 71)
    bad = path.read_bytes()
    source, target = replica(folder), open_store(f"file://{folder}/vault")
    with pytest.raises(Corrupt):
        copy_object(source, target, ObjectInfo(name, len(bad)), replace=True)
    assert path.read_bytes() == bad


def test_what_was_sealed_wrong_stays_distrusted_though_its_pack_has_the_right_sum(folder: Path) -> None:
    """A host with bad memory: no SHA-256 tells, so neither a check of sums nor a repair makes it trusted again."""
    vault = reopened(folder)
    pack = PackBuilder(folder, vault.keys)
    id = vault.reader().block_id(image("Q"))
    pack.append(0, id, BLOCK, 0, image("R"))
    digest = pack.close()
    vault.store.put_file(f"packs/{digest.hex()}", pack.path)
    write_segment(vault.store, vault.keys, {digest: pack.entries})
    assert not verify(vault, Level.FULL).ok
    assert verify(vault, Level.PACKS).repaired == 0
    assert not verify(vault, Level.PACKS).ok
    assert repair(vault, [replica(folder)]).findings
    assert vault.index.damage() == {Copy(digest, id)}


# --- mirrors -------------------------------------------------------------------------------------------------------


@pytest.fixture
def mirrored(folder: Path) -> Vault:
    """The vault on two stores."""
    return Vault.open(mirror(folder), key=KEY, cache_dir=folder / "mirror-cache")


def mirror(folder: Path) -> MirrorStore:
    return MirrorStore({name: lambda name=name: open_store(f"file://{folder}/{name}") for name in ("vault", "replica")})  # type: ignore[misc]


def points(vault: Vault) -> list[Point]:
    return sorted(vault.points(), key=lambda point: point.id)


@pytest.mark.parametrize("which", ["vault", "replica"])
def test_a_mirror_that_has_rotted_is_found_read_past_and_mended(folder: Path, mirrored: Vault, which: str) -> None:
    before = tree(folder / "vault")
    rng = random.Random(which)
    for path in sorted((folder / which / "packs").iterdir()):
        flip(path, rng.randrange(64, path.stat().st_size))
    for point in points(mirrored):
        assert read_disk(mirrored, point.disks[0]) == image(CONTENT[point.id])
    found = verify(mirrored, Level.FULL)
    assert {finding.object for finding in found.findings} == {name for name in before if name.startswith("packs/")}
    assert all(f"{folder}/{which}" in finding.problem for finding in found.findings)
    report = repair(mirrored)
    assert {one.place for one in report.repaired} == {f"{folder}/{which}"}
    assert not report.findings
    assert tree(folder / "vault") == tree(folder / "replica") == before
    assert verify(mirrored, Level.FULL).ok


def test_half_of_it_here_half_of_it_there(folder: Path, mirrored: Vault) -> None:
    """Each store has lost another part: together they are whole."""
    before = tree(folder / "vault")
    names = sorted(name for name in before if name.startswith("packs/"))
    for at, name in enumerate(names):
        flip(folder / ("vault" if at % 2 else "replica") / name, 200)
    verify(mirrored, Level.FULL)
    assert not repair(mirrored).findings
    assert tree(folder / "vault") == tree(folder / "replica") == before


def test_the_same_block_lost_in_both_is_lost(folder: Path, mirrored: Vault) -> None:
    name = damage_block(folder, mirrored, "B")
    shutil.copyfile(folder / "vault" / name, folder / "replica" / name)
    with pytest.raises(Corrupt):
        read_disk(mirrored, points(mirrored)[0].disks[0])
    verify(mirrored, Level.FULL)
    (finding,) = repair(mirrored).findings
    assert [hit.point for hit in finding.affected] == ["p1"]
