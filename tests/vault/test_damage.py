"""Bits flip, files are cut short, files go: it is noticed, it is said what is affected, and never is a wrong byte
returned."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.vault.pictures import (
    BLOCK,
    KEY,
    backup,
    content,
    damage_at,
    damage_block,
    image,
    new_vault,
    read_disk,
    reopened,
)
from workers.contract.errors import Corrupt, NewerFormat, ObjectMissing, StillframeError, VaultError
from workers.contract.points import Point
from workers.vault import BlockMap, Vault, open_store
from workers.vault.condemned import condemn, give_verdict
from workers.vault.damage import Copy, record_damage
from workers.vault.index import Location
from workers.vault.packs import PackBuilder, digest_of
from workers.vault.sealing import encode_plain
from workers.vault.sweep import sweep
from workers.vault.verify import Affected, Level, Progress, verify, verify_packs

MOMENT = "2026-11-22T02:00:00+00:00"
PICTURES = {"p1": {"vda": "AaB0CDEF", "vdb": "bG"}, "p2": {"vda": "--H--c--", "vdb": "--"}}
CONTENT = {"p1": {"vda": "AaB0CDEF", "vdb": "bG"}, "p2": {"vda": "AaH0CcEF", "vdb": "bG"}}
KINDS = ("vault.json", "keys/", "keyring/", "packs/", "index/", "points/", "sessions/")
NOTES = ("trash/", "pins/", "locks/", "condemned/", "verdicts/", "damage/")
"""What is said about packs and points; no restore needs it."""


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    vault = new_vault(folder)
    first = backup(vault, "p1", PICTURES["p1"])
    backup(vault, "p2", PICTURES["p2"], first)
    vault.announce("job", "p3")
    vault.close()
    return folder


@pytest.fixture
def noted(copy: Path) -> Path:
    """The same with notes of every kind, which concern nothing that any of its points needs."""
    vault = reopened(copy)
    store, nothing = vault.store, bytes(31) + b"x"
    condemnation = condemn(store, vault.keys, [nothing])
    assert give_verdict(store, vault.keys, condemnation, [nothing])
    record_damage(store, vault.keys, [Copy(nothing, nothing)])
    deletion = {"by": "anna", "number": 1, "point": "p0", "reason": "", "time": MOMENT, "until": MOMENT}
    for name, fields in {
        "trash/p0.1": deletion,
        "trash/p0.1.end": {"by": "anna", "outcome": "restored", "time": MOMENT},
        "pins/p0": {"by": "anna", "point": "p0", "reason": "", "time": MOMENT},
        "locks/00000001": {"approval": "", "by": "anna", "days": 1, "number": 1, "time": MOMENT},
    }.items():
        assert store.put(name, encode_plain(fields))
    return copy


@pytest.fixture
def copy(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine / "vault", tmp_path / "vault")
    return tmp_path


def objects(folder: Path, kind: str) -> list[Path]:
    root = folder / "vault"
    return sorted(path for path in root.rglob("*") if path.is_file() and str(path.relative_to(root)).startswith(kind))


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def grow(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 100)))


def empty(path: Path, _rng: random.Random) -> None:
    path.write_bytes(b"")


def refreshed(folder: Path) -> Vault:
    vault = reopened(folder)
    vault.index.refresh()
    return vault


def right_or_error(folder: Path, cache: str) -> int:
    """Read every disk of every point: each is right, or an error is raised. How many are right."""
    right = 0
    try:
        vault = reopened(folder, cache=cache)
        points = list(vault.points())
    except StillframeError:
        return 0
    for point in points:
        for disk in point.disks:
            try:
                assert read_disk(vault, disk) == image(CONTENT[point.id][disk.target])
                right += 1
            except VaultError:
                continue
    vault.close()
    return right


@pytest.mark.parametrize("damage", [flip, cut, grow])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_damage_is_noticed(copy: Path, kind: str, damage: object, seed: int) -> None:
    rng = random.Random(f"{kind} {seed}")
    path = rng.choice(objects(copy, kind))
    assert callable(damage)
    damage(path, rng)
    name = str(path.relative_to(copy / "vault"))
    right_or_error(copy, "cold")
    try:
        report = verify(reopened(copy, cache="cold"), Level.FULL)
    except (Corrupt, NewerFormat):
        assert kind in ("vault.json", "keys/", "keyring/")
        return
    assert name in [finding.object for finding in report.findings]


@pytest.mark.parametrize("damage", [flip, cut, grow, empty])
@pytest.mark.parametrize("kind", NOTES)
@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_note_is_noticed_and_stops_no_restore(
    noted: Path, kind: str, damage: Callable[[Path, random.Random], None], seed: int
) -> None:
    rng = random.Random(f"{kind} {seed}")
    path = rng.choice(objects(noted, kind))
    damage(path, rng)
    assert right_or_error(noted, "cold") == 4
    vault = reopened(noted, cache="cold")
    report = verify(vault, Level.IDS)
    (finding,) = report.findings
    assert finding.object == str(path.relative_to(noted / "vault"))
    assert finding.affected == []
    if kind in ("condemned/", "locks/"):
        with pytest.raises((Corrupt, NewerFormat)) as caught:
            vault.writer()
        assert caught.value.hint
    else:
        backup(vault, "p9", {"vda": "AZ"})
        assert read_disk(vault, vault.point("p9").disks[0]) == image("AZ")


@pytest.mark.parametrize("kind", NOTES)
def test_notes_that_are_gone_stop_nothing(noted: Path, kind: str) -> None:
    for path in objects(noted, kind):
        path.unlink()
    assert right_or_error(noted, "cold") == 4
    vault = reopened(noted, cache="cold")
    assert verify(vault, Level.FULL).ok
    backup(vault, "p9", {"vda": "AZ"})


def test_a_condemnation_that_cannot_be_read_keeps_sweeps_from_removing_anything(noted: Path) -> None:
    (path,) = objects(noted, "condemned/")
    cut(path, random.Random(1))
    before = objects(noted, "packs/")
    with pytest.raises(Corrupt):
        sweep(reopened(noted), now=datetime.now(UTC))
    assert objects(noted, "packs/") == before


@pytest.mark.parametrize("kind", ["packs/", "index/"])
@pytest.mark.parametrize("seed", range(8))
def test_damage_after_the_index_was_cached(copy: Path, kind: str, seed: int) -> None:
    assert right_or_error(copy, "warm") == 4
    rng = random.Random(seed)
    flip(rng.choice(objects(copy, kind)), rng)
    right_or_error(copy, "warm")
    vault = reopened(copy, cache="warm")
    assert not verify(vault, Level.PACKS).ok
    assert not verify_packs(vault.store).ok


@pytest.mark.parametrize("kind", ["vault.json", "keyring/", "packs/", "index/"])
def test_what_is_removed_is_missed(copy: Path, kind: str) -> None:
    for path in objects(copy, kind):
        data = path.read_bytes()
        path.unlink()
        assert right_or_error(copy, "cold") < 4
        try:
            report = verify(reopened(copy, cache="cold"), Level.IDS)
            assert not report.ok
            assert all(finding.affected for finding in report.findings)
        except VaultError:
            assert kind in ("vault.json", "keyring/")
        path.write_bytes(data)
    assert right_or_error(copy, "cold") == 4
    assert verify(reopened(copy, cache="cold"), Level.FULL).ok


def test_each_level_on_a_good_vault(copy: Path) -> None:
    vault = reopened(copy)
    seen: list[Progress] = []
    blocks = vault.stats().blocks
    packs = len(list(vault.store.list("packs/")))
    for level in Level:
        report = verify(vault, level, on_progress=seen.append)
        assert report.ok
        assert report.points == 2
        assert report.packs == (packs if level in (Level.PACKS, Level.FULL) else 0)
        if level is Level.FULL:
            assert report.blocks == blocks
        if level is Level.SAMPLE:
            assert 0 < report.blocks <= blocks * 2
    assert {progress.stage for progress in seen} == {"packs", "points"}
    assert verify_packs(vault.store).ok


def test_a_finding_says_which_disks_of_which_points_are_affected(copy: Path) -> None:
    vault = reopened(copy)
    pack = damage_block(copy, vault, "B")
    assert verify(vault, Level.IDS).ok
    for level in (Level.PACKS, Level.FULL, Level.SAMPLE, Level.IDS):  # the last looks at no pack, and knows
        (finding,) = verify(vault, level).findings
        assert finding.object == pack
        assert finding.affected == [Affected(point="p1", machine="web", target="vda")]
    (finding,) = verify(vault, Level.FULL, points=["p2"]).findings
    assert finding.affected == []  # the pack is damaged, but not in what p2 needs
    with pytest.raises(Corrupt, match=pack):
        read_disk(vault, vault.point("p1").disks[0])
    assert read_disk(vault, vault.point("p2").disks[0]) == image(CONTENT["p2"]["vda"])


def test_only_chosen_points(copy: Path) -> None:
    vault = reopened(copy)
    shared = damage_block(copy, vault, "A")
    (finding,) = verify(vault, Level.FULL, points=["p2"]).findings
    assert finding.object == shared
    assert [affected.point for affected in finding.affected] == ["p2"]
    with pytest.raises(StillframeError):
        verify(vault, Level.IDS, points=["none"])


def test_a_damaged_page_affects_its_points(copy: Path) -> None:
    vault = reopened(copy)
    vault.reader()
    (location,) = vault.index.find(bytes.fromhex(vault.point("p2").disks[0].root))
    damage_at(copy / "vault" / location.pack, location.entry.offset)
    for level in (Level.IDS, Level.SAMPLE, Level.FULL):
        (finding,) = verify(vault, level).findings
        assert finding.affected == [Affected(point="p2", machine="web", target="vda")]


def test_a_second_copy_stands_in(copy: Path) -> None:
    """A block that is in two packs is read from the good one; nobody is affected."""
    vault = reopened(copy)
    block = image("A")
    hidden = [(path, path.read_bytes()) for path in objects(copy, "index/")]
    for path, _ in hidden:
        path.unlink()
    with vault.writer() as writer:  # which does not know that block now
        id = writer.put(block)
        writer.finish()
    for path, data in hidden:
        path.write_bytes(data)
    assert right_or_error(copy, "cache") == 4
    copies = refreshed(copy).index.find(id)
    assert len(copies) == 2
    for pack, entry in copies:
        path = copy / "vault" / pack
        good = path.read_bytes()
        damage_at(path, entry.offset)
        assert right_or_error(copy, "cache") == 4
        (finding,) = verify(reopened(copy), Level.FULL).findings
        assert (finding.object, finding.affected) == (pack, [])
        path.write_bytes(good)


def test_a_reader_finds_what_was_moved_under_it(copy: Path) -> None:
    """Another host has put everything into other packs, and removed those that this one knows of."""
    here, there = reopened(copy, cache="here"), reopened(copy, cache="there")
    disks = [(disk, CONTENT[point.id][disk.target]) for point in here.points() for disk in point.disks]
    maps = [BlockMap(here.reader(), bytes.fromhex(disk.root), disk.capacity, BLOCK) for disk, _ in disks]
    old = [info.name for prefix in ("index/", "packs/") for info in there.store.list(prefix)]
    condemn(there.store, there.keys, [digest_of(name) for name in old if name.startswith("packs/")])
    with there.writer() as writer:  # which may not rely on them
        for _, picture in disks:
            for letter in picture:
                writer.put(memoryview(image(letter)))
        for entry in {entry for name in old for entry in there.index.entries(name) if entry.kind == 1}:
            writer.put_page(there.reader().get_page(entry.id))
        writer.finish()
    for name in old:
        there.store.delete(name)
    for blocks, (_, picture) in zip(maps, disks, strict=True):
        ids = [(letter, blocks.id_at(at)) for at, letter in enumerate(picture)]
        assert all(blocks.reader.get(id) == image(letter) for letter, id in ids if letter != "0")


def test_a_block_that_was_sealed_wrong_is_not_returned(vault: Vault, tmp_path: Path) -> None:
    """The seal is good, the content is not what the id says: a writer on a host with bad memory."""
    pack = PackBuilder(tmp_path, vault.keys)
    id = vault.reader().block_id(content("A"))
    location = Location("packs/" + "0" * 64, pack.append(0, id, BLOCK, 0, content("B")))
    pack.close()
    vault.store.put_file(location.pack, pack.path)
    with pytest.raises(Corrupt, match="content"):
        vault.reader().open(location, 0)


def test_objects_of_another_vault_are_refused(copy: Path, tmp_path: Path) -> None:
    """Whoever swaps in a pack, a segment or a manifest of a vault of his own gets an error, not a restore."""
    theirs = new_vault(tmp_path / "theirs")
    backup(theirs, "p1", {"vda": "XYZ"})
    shutil.rmtree(copy / "vault/points")
    shutil.copytree(tmp_path / "theirs/vault/points", copy / "vault/points")
    vault = reopened(copy)
    assert list(vault.points()) == []
    assert [name for name, _ in vault.damaged_points()] == ["p1"]
    shutil.rmtree(copy / "vault/keyring")
    shutil.copytree(tmp_path / "theirs/vault/keyring", copy / "vault/keyring")
    with pytest.raises(Corrupt):
        reopened(copy)


def test_an_index_that_lies_is_found(copy: Path) -> None:
    """An entry that points at another block's bytes: they are not returned."""
    vault = reopened(copy)
    first, second = (vault.index.find(vault.reader().block_id(image(letter)))[0] for letter in "AB")
    wrong = second._replace(entry=second.entry._replace(id=first.entry.id))
    with pytest.raises(Corrupt):
        vault.reader().open(wrong, first.entry.kind)
    with pytest.raises(ObjectMissing):
        vault.reader().open(second._replace(pack="packs/" + "0" * 64), 0)
    with pytest.raises(Corrupt):
        vault.reader().open(first, 1)


def test_points_are_all_there(copy: Path) -> None:
    points: list[Point] = list(reopened(copy).points())
    assert [point.id for point in points] == ["p1", "p2"]
    assert sum(disk.capacity for disk in points[0].disks) == 10 * BLOCK
    assert Vault.open(open_store(f"file://{copy}/vault"), key=KEY, cache_dir=copy).sessions()[0].point == "p3"
