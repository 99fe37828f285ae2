"""A vault that rots: what the disk still has comes back with the next incremental, although nothing changed on it, and
makes older points whole; of the rest it is known which points need it, and never is a wrong byte returned."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.model.test_mistrust import flip, packs
from tests.model.world import World
from tests.vault.faulty import FaultyStore, Plan
from tests.vault.pictures import (
    BLOCK,
    KEY,
    OPAQUE,
    backup,
    content,
    damage_block,
    image,
    map_of,
    new_vault,
    point_of,
    read_disk,
    reopened,
    store_disk,
)
from workers.contract.errors import Corrupt, NoSpace, ObjectMissing, VaultError
from workers.contract.extents import Extent, Kind
from workers.contract.points import DiskPoint, Mode, Point
from workers.contract.seams import Store
from workers.disks.memory import MemoryDisk
from workers.transfer import Settings, Transferred, transfer_disk
from workers.vault import BlockMap, Vault, open_store
from workers.vault.damage import PREFIX
from workers.vault.verify import Level, verify


def unchanged(vault: Vault, disk: DiskPoint, data: bytes) -> tuple[Transferred, MemoryDisk]:
    """An incremental of a disk of which nothing is said to have changed."""
    source = MemoryDisk(data, [Extent(0, len(data), Kind.UNCHANGED)])
    settings = Settings(BLOCK, audit_blocks=0)
    return transfer_disk(source, vault, settings, base=map_of(vault, disk), watch=lambda _tally: None), source


def committed(vault: Vault, id: str, disk: DiskPoint, done: Transferred) -> Point:
    point = point_of(id, [disk.model_copy(update={"root": done.root.hex()})])
    vault.commit(point)
    return point


def spoil(path: Path, rng: random.Random) -> None:
    """A bit flips, the end is cut off, or the file is gone."""
    match rng.choice(["flip", "cut", "remove"]):
        case "flip":
            flip(path, rng.randrange(path.stat().st_size))
        case "cut":
            path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
        case _:
            path.unlink()


def history(vault: Vault, rng: random.Random) -> dict[str, str]:
    """Points of one disk, each an incremental of the one before: id → what the disk held."""
    held: dict[str, str] = {}
    last: Point | None = None
    picture = "".join(rng.choice(OPAQUE[:12] + "0") for _ in range(rng.randrange(4, 24)))
    for number in range(1, 4):
        drawn = picture
        if last is not None:
            drawn = "".join(rng.choice("---" + rng.choice(OPAQUE)) for _ in picture)
            picture = "".join(old if new == "-" else new for old, new in zip(picture, drawn, strict=True))
        last = backup(vault, f"p{number}", {"vda": drawn}, last)
        held[f"p{number}"] = picture
    return held


@pytest.mark.parametrize("seed", range(60))
def test_an_incremental_of_an_unchanged_disk_heals_what_it_can(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    vault = new_vault(tmp_path)
    held = history(vault, rng)
    now = held["p3"]
    there = packs(tmp_path)
    for path in rng.sample(there, min(len(there), rng.randrange(1, 4))):
        spoil(path, rng)
    verify(reopened(tmp_path), Level.FULL)
    pages_left = {point.id for point in vault.points() if readable_page(vault, point.disks[0])}

    vault = reopened(tmp_path, cache="another host")
    disk = vault.point("p3").disks[0]
    done, _ = unchanged(vault, disk, image(now))
    committed(vault, "p4", disk, done)
    held["p4"] = now

    vault = reopened(tmp_path, cache="a third host")
    affected = {hit.point for finding in verify(vault, Level.FULL).findings for hit in finding.affected}
    for id, picture in held.items():
        disk = vault.point(id).disks[0]
        try:
            assert read_disk(vault, disk) == image(picture)
            assert id not in affected
        except VaultError:
            assert id in affected
            assert id != "p4"
            assert id not in pages_left or set(picture) - set(now), f"{id} could have been healed"


def readable_page(vault: Vault, disk: DiskPoint) -> bool:
    try:
        list(map_of(vault, disk).pages())
    except (Corrupt, ObjectMissing):
        return False
    return True


def test_only_what_is_lost_is_read(tmp_path: Path) -> None:
    vault = new_vault(tmp_path)
    (disk,) = backup(vault, "p1", {"vda": "ABCDEF0A"}).disks
    damage_block(tmp_path, vault, "B")
    damage_block(tmp_path, vault, "C")
    done, source = unchanged(reopened(tmp_path), disk, image("ABCDEF0A"))
    assert done.healed == 0, "nobody has noticed"
    assert verify(vault, Level.FULL).findings
    done, source = unchanged(reopened(tmp_path, cache="another"), disk, image("ABCDEF0A"))
    assert done.healed == 2
    assert (done.alert, done.root.hex()) == ("", disk.root)
    assert source.reads[0] == (BLOCK, 2 * BLOCK), "neighbours are read together"
    assert read_disk(reopened(tmp_path, cache="a third"), disk) == image("ABCDEF0A")
    done, source = unchanged(reopened(tmp_path, cache="another"), disk, image("ABCDEF0A"))
    assert done.healed == 0, "the damage is known still, but there are good copies"


def test_pages_that_nobody_touches_are_looked_at_too(tmp_path: Path) -> None:
    """Three leaf pages; the change is in the first, the damage in the second, which would be inherited unseen."""
    vault = new_vault(tmp_path)
    picture = "A" * 1030 + "B" * 1000 + "C" * 300
    (disk,) = backup(vault, "p1", {"vda": picture}).disks
    damage_block(tmp_path, vault, "B")
    verify(vault, Level.FULL)
    vault = reopened(tmp_path, cache="another")
    data = image("X" + picture[1:])
    extents = [Extent(0, BLOCK, Kind.DATA), Extent(BLOCK, len(data) - BLOCK, Kind.UNCHANGED)]
    base = map_of(vault, disk)
    done = transfer_disk(
        MemoryDisk(data, extents), vault, Settings(BLOCK, audit_blocks=0), base=base, watch=lambda _tally: None
    )
    assert done.healed == 1000
    point = committed(vault, "p2", disk, done)
    vault = reopened(tmp_path, cache="a third")
    assert read_disk(vault, point.disks[0]) == data
    assert read_disk(vault, disk) == image(picture)


def test_a_pack_whose_index_is_lost_is_known_as_lost(tmp_path: Path) -> None:
    vault = new_vault(tmp_path)
    backup(vault, "p0", {"vda": "ABC"})
    (disk,) = backup(vault, "p1", {"vda": "ABCDE"}).disks
    (segment,) = {vault_segment(tmp_path, "p0", vault)}
    flip(segment, 100)
    vault = reopened(tmp_path, cache="another")
    done, _ = unchanged(vault, disk, image("ABCDE"))
    assert done.healed == 3
    assert read_disk(vault, disk) == image("ABCDE")


def vault_segment(folder: Path, point: str, vault: Vault) -> Path:
    """The segment that names the blocks of a point's first disk."""
    from workers.vault.index import read_segment

    root = bytes.fromhex(vault.point(point).disks[0].root)
    for info in vault.store.list("index/"):
        entries = [entry for some in read_segment(vault.store, vault.keys, info.name).values() for entry in some]
        if root in [entry.id for entry in entries]:
            return folder / "vault" / info.name
    raise AssertionError(point)


def test_a_bitmap_that_lied_about_a_lost_block_is_found_out(tmp_path: Path) -> None:
    vault = new_vault(tmp_path)
    (disk,) = backup(vault, "p1", {"vda": "ABCD"}).disks
    damage_block(tmp_path, vault, "B")
    verify(vault, Level.FULL)
    done, _ = unchanged(vault, disk, image("AXYD"))
    assert "unchanged, but they differ" in done.alert
    assert read_disk(vault, disk.model_copy(update={"root": done.root.hex()})) == image("AXYD")


def test_damage_that_a_restore_meets_is_told_to_every_host(tmp_path: Path) -> None:
    vault = new_vault(tmp_path)
    (disk,) = backup(vault, "p1", {"vda": "AB"}).disks
    damage_block(tmp_path, vault, "B")
    with pytest.raises(Corrupt):
        read_disk(vault, disk)
    vault.tell_damage()
    vault.tell_damage()
    assert len(list(vault.store.list(PREFIX))) == 1
    other = reopened(tmp_path, cache="another")
    store_disk(other, "vdb", "B", None)
    assert read_disk(reopened(tmp_path, cache="a third"), disk) == image("AB")


def test_damage_is_struck_off_when_the_pack_is_whole_again_or_gone(tmp_path: Path) -> None:
    vault = new_vault(tmp_path)
    (disk,) = backup(vault, "p1", {"vda": "ABCDEFGHIJ"}).disks
    good = {path: path.read_bytes() for path in packs(tmp_path)}
    damage_block(tmp_path, vault, "B")
    damage_block(tmp_path, vault, "J")
    assert len(verify(vault, Level.PACKS).findings) == 2
    assert len(vault.index.damage()) == 2
    spoilt = [path for path, data in good.items() if path.read_bytes() != data]
    spoilt[0].write_bytes(good[spoilt[0]])
    report = verify(reopened(tmp_path, cache="another"), Level.PACKS)
    assert (report.repaired, len(report.findings)) == (1, 1)
    vault.index.refresh()
    assert {copy.pack.hex() for copy in vault.index.damage()} == {spoilt[1].name}
    spoilt[1].write_bytes(good[spoilt[1]])
    assert verify(vault, Level.PACKS).ok
    assert list(vault.store.list(PREFIX)) == []
    assert read_disk(vault, disk) == image("ABCDEFGHIJ")


def test_a_store_that_is_full_keeps_the_damage_known_here(tmp_path: Path) -> None:
    vault = new_vault(tmp_path)
    backup(vault, "p1", {"vda": "AB"})
    damage_block(tmp_path, vault, "B")
    plan = Plan(full_at=0)
    full = Vault.open(faulty(tmp_path, plan), key=KEY, cache_dir=tmp_path / "cache")
    assert verify(full, Level.FULL).findings
    assert list(vault.store.list(PREFIX)) == []
    with pytest.raises(NoSpace):
        full.store.put("points/x", b"")
    plan.full_at = None
    with full.writer() as writer:
        assert writer.lost([vault.reader().block_id(content("B"))])
    assert len(list(vault.store.list(PREFIX))) == 1


def faulty(folder: Path, plan: Plan) -> Store:
    return FaultyStore(open_store(f"file://{folder}/vault"), plan)


def test_a_whole_backup_heals_and_says_so(tmp_path: Path) -> None:
    world = World(tmp_path, {"vda": BLOCK})
    disk = world.add("vda", 40 * BLOCK)
    for number in range(40):
        disk.put(number * BLOCK, image(OPAQUE[number]))
    world.backup()
    disk.put(0, image("z"))
    world.backup()
    (pack, entry), *_ = world.vault.index.find(world.vault.reader().block_id(image(OPAQUE[20])))
    flip(tmp_path / "vault" / pack, entry.offset)
    assert verify(world.vault, Level.FULL).findings
    job = world.backup()
    assert job.committed
    assert job.committed.alerts == job.warnings == ["vda: 1 damaged block of the vault read again"]
    assert job.committed.disks[0].mode is Mode.INCREMENTAL
    world.check()
    assert not world.backup().warnings, "it is healed"


def test_nothing_is_looked_for_where_no_damage_is_known(tmp_path: Path) -> None:
    vault = new_vault(tmp_path)
    (disk,) = backup(vault, "p1", {"vda": "ABCD"}).disks
    plan = Plan()
    watched = Vault.open(faulty(tmp_path, plan), key=KEY, cache_dir=tmp_path / "cache")
    base = BlockMap(watched.reader(), bytes.fromhex(disk.root), disk.capacity, BLOCK)
    data = image("ABCD")
    plan.calls.clear()
    source = MemoryDisk(data, [Extent(0, len(data), Kind.UNCHANGED)])
    transfer_disk(source, watched, Settings(BLOCK), base=base, watch=lambda _tally: None)
    lists = [name for call, name in plan.calls if call == "list"]
    assert set(lists) == {"packs/", "index/", "condemned/", "locks/", PREFIX}
    assert lists.count(PREFIX) == lists.count("index/") == 2, "one for the writer, one for the reader"
    assert sum(call == "get" and name.startswith("packs/") for call, name in plan.calls) <= 2, "one page"
