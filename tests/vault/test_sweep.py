"""Sweeps step by step: what goes, what stays, and why; kills at every step; what stops one."""

from __future__ import annotations

import random
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.vault.faulty import Died, FaultyStore, Plan
from tests.vault.pictures import BLOCK, KEY, PACK, backup, image, new_vault, point_of, read_disk, reopened, store_disk
from workers.contract.errors import StillframeError, VaultError
from workers.contract.points import Point
from workers.vault import MapWriter, Vault, open_store
from workers.vault.blockmap import FANOUT
from workers.vault.condemned import condemn, read_condemned
from workers.vault.immutable import set_immutable
from workers.vault.locks import lengthen
from workers.vault.rebuild import rebuild_index
from workers.vault.sweep import Settings, SweepReport, sweep
from workers.vault.verify import Level, verify

NOW = datetime.now(UTC)
FEW = Settings(empty=True, pack_size=PACK)
CAREFUL = Settings()
ALL = Settings(empty=True)
WHOLE = Settings(empty=True, pack_size=PACK, compact=False)


def packs(vault: Vault) -> set[str]:
    return {info.name for info in vault.store.list("packs/")}


def content_of(vault: Vault) -> dict[str, bytes]:
    return {point.id: read_disk(vault, point.disks[0]) for point in vault.points()}


def drop(vault: Vault, point: str) -> None:
    vault.store.delete(f"points/{point}")


def names(vault: Vault, prefix: str) -> list[str]:
    return [info.name for info in vault.store.list(prefix)]


def settled(vault: Vault) -> None:
    """Nothing of a sweep is left, and everything that is there is whole."""
    assert names(vault, "condemned/") == names(vault, "verdicts/") == []
    assert verify(vault, Level.FULL).findings == []


def test_an_empty_vault_and_one_without_garbage(vault: Vault) -> None:
    assert sweep(vault, now=NOW, settings=ALL) == SweepReport(dry_run=False)
    backup(vault, "p1", {"vda": "ABC"})
    before = packs(vault)
    report = sweep(vault, now=NOW, settings=ALL)
    assert (report.condemned, report.removed, report.packs) == (0, 0, 1)
    assert report.live_bytes > 3 * BLOCK
    assert packs(vault) == before


def test_what_only_a_deleted_point_needed_goes(vault: Vault) -> None:
    first = backup(vault, "p1", {"vda": "ABCDEFGH"})
    backup(vault, "p2", {"vda": "A0------"}, first)
    backup(vault, "p3", {"vda": "PQRSTU"})
    drop(vault, "p3")
    before = vault.stats().total_bytes
    report = sweep(vault, now=NOW, settings=WHOLE)
    assert (report.condemned, report.removed, report.rescued) == (2, 2, 0)
    assert vault.stats().total_bytes < before - 6 * BLOCK
    assert content_of(vault) == {"p1": image("ABCDEFGH"), "p2": image("A0CDEFGH")}
    settled(vault)
    assert len(names(vault, "index/")) == 2
    drop(vault, "p1")
    drop(vault, "p2")
    sweep(vault, now=NOW, settings=ALL)
    assert packs(vault) == set()
    assert names(vault, "index/") == []
    settled(vault)


def test_a_vault_whose_points_were_lost_is_not_swept_away(tmp_path: Path) -> None:
    vault = new_vault(tmp_path)
    backup(vault, "p1", {"vda": "ABC"})
    backup(vault, "p2", {"vda": "XYZ"})
    drop(vault, "p2")
    vault.announce("old", "p3")
    sweep(vault, now=NOW, settings=CAREFUL)
    vault.withdraw("old")
    before = packs(vault)
    (tmp_path / "vault/points").rename(tmp_path / "away")
    report = sweep(vault, now=NOW, settings=CAREFUL)
    assert (report.no_points, report.condemned, report.removed) == (True, 0, 0)
    assert packs(vault) == before
    (tmp_path / "away").rename(tmp_path / "vault/points")
    assert sweep(vault, now=NOW, settings=CAREFUL).removed == 1
    assert content_of(vault) == {"p1": image("ABC")}
    drop(vault, "p1")
    assert sweep(vault, now=NOW, settings=CAREFUL).no_points
    assert sweep(vault, now=NOW, settings=WHOLE).removed == 1
    assert packs(vault) == set()


def test_a_dry_run_changes_nothing_and_tells_the_same(vault: Vault) -> None:
    backup(vault, "p1", {"vda": "ABCDEFGH"})
    backup(vault, "p2", {"vda": "ABCXYZ"})
    drop(vault, "p1")
    before = {info.name for info in vault.store.list("")}
    told = sweep(vault, now=NOW, settings=FEW, dry_run=True)
    assert {info.name for info in vault.store.list("")} == before
    done = sweep(vault, now=NOW, settings=FEW)
    assert told.dry_run
    assert told.condemned == done.condemned > 0
    assert told.removed == 0


def test_a_pack_that_is_mostly_dead_is_compacted(vault: Vault) -> None:
    backup(vault, "p1", {"vda": "ABCDEF"})
    backup(vault, "p2", {"vda": "AB0000"})
    drop(vault, "p1")
    report = sweep(vault, now=NOW, settings=FEW)
    assert report.compacted == 1
    assert 2 * BLOCK < report.copied_bytes < 3 * BLOCK
    assert content_of(vault) == {"p2": image("AB0000")}
    assert sum(info.size for info in vault.store.list("packs/")) < 4 * BLOCK
    settled(vault)
    assert sweep(vault, now=NOW, settings=FEW).condemned == 0, "a second sweep finds nothing"


def test_nothing_is_compacted_under_a_lock(vault: Vault) -> None:
    backup(vault, "p1", {"vda": "ABCDEF"})
    backup(vault, "p2", {"vda": "AB0000"})
    drop(vault, "p1")
    lengthen(vault, 1, by="anna")
    report = sweep(vault, now=NOW, settings=FEW)
    assert (report.compacted, report.condemned) == (0, 1)  # the one that holds nothing but the map of p1
    assert content_of(vault) == {"p2": image("AB0000")}


def test_small_packs_are_joined_once_they_fill_one(vault: Vault) -> None:
    for number, letter in enumerate("ABCDEFGHIJ"):
        backup(vault, f"p{number}", {"vda": letter})
    settings = Settings(empty=True, pack_size=8 * BLOCK)
    before = content_of(vault)
    assert sweep(vault, now=NOW, settings=settings).compacted == 10
    assert len(packs(vault)) == 2
    assert content_of(vault) == before
    settled(vault)
    assert sweep(vault, now=NOW, settings=settings).compacted == 0


def test_a_pack_that_is_full_of_tiny_blocks_is_not_small(vault: Vault) -> None:
    """Else each sweep would copy it again: seven of them together have the bytes of a full one."""
    count, rng = 7 * 16_500, random.Random(1)
    for start in range(0, count, 16_500):
        with vault.writer() as writer:
            for _ in range(start, start + 16_500):
                writer.put(rng.randbytes(64))
            writer.finish()
    with vault.writer() as writer:
        again = MapWriter(writer, vault.reader(), count * BLOCK, BLOCK, None)
        rng = random.Random(1)
        for index in range(count):
            again.set(index, writer.put(rng.randbytes(64)))
        root = again.finish()
        writer.finish()
    [disk] = backup(vault, "p1", {"vda": "A"}).disks
    vault.commit(point_of("p2", [disk.model_copy(update={"capacity": count * BLOCK, "root": root.hex()})]))
    drop(vault, "p1")
    sizes = [info.size for info in vault.store.list("packs/")]
    assert sum(2_000_000 < size < 8_500_000 // 4 for size in sizes) == 7
    assert sweep(vault, now=NOW, settings=Settings(pack_size=8_500_000)).compacted == 0


def test_a_block_that_is_stored_twice_is_kept_once(tmp_path: Path) -> None:
    one = new_vault(tmp_path)
    other = reopened(tmp_path, cache="other")
    with one.writer() as first, other.writer() as second:  # neither knows of the other's
        for writer in (first, second):
            writer.put(image("A"))
            writer.finish()
    backup(one, "p1", {"vda": "AB"})
    assert sum(name.startswith("packs/") for name in names(one, "")) == 3
    sweep(one, now=NOW, settings=WHOLE)
    assert len(packs(one)) == 2
    assert content_of(reopened(tmp_path, cache="third")) == {"p1": image("AB")}
    settled(one)


def test_a_session_that_began_before_is_waited_for(vault: Vault) -> None:
    [disk] = backup(vault, "p1", {"vda": "ABC"}).disks
    drop(vault, "p1")
    vault.announce("job", "p2")
    with vault.writer() as writer:  # relies on ABC
        blocks = MapWriter(writer, vault.reader(), 3 * BLOCK, BLOCK, None)
        for index, letter in enumerate("ABC"):
            blocks.set(index, writer.put(image(letter)))
        root = blocks.finish()
        report = sweep(vault, now=NOW, settings=ALL)
        assert (report.condemned, report.removed) == (1, 0)
        assert [(one.packs, one.sessions[0].session) for one in report.waiting] == [(1, "job")]
        writer.finish()
        assert writer.stored_bytes == 0
    vault.commit(point_of("p2", [disk.model_copy(update={"root": root.hex()})]))
    vault.withdraw("job")
    report = sweep(vault, now=NOW, settings=ALL)
    assert (report.removed, report.rescued, report.waiting) == (0, 1, [])
    assert content_of(vault) == {"p2": image("ABC")}
    settled(vault)


def _point(vault: Vault, id: str, picture: str) -> Point:
    return point_of(id, [store_disk(vault, "vda", picture, None)])


def test_a_session_that_begins_later_stores_condemned_blocks_again(vault: Vault) -> None:
    backup(vault, "p1", {"vda": "ABC"})
    drop(vault, "p1")
    vault.announce("old", "p2")
    sweep(vault, now=NOW, settings=ALL)
    vault.announce("new", "p3")
    vault.commit(_point(vault, "p3", "ABC"))
    vault.withdraw("old")
    report = sweep(vault, now=NOW, settings=ALL)  # beside "new", which knows of the condemnation
    assert (report.removed, report.waiting) == (1, [])
    assert content_of(vault) == {"p3": image("ABC")}
    vault.withdraw("new")
    settled(vault)


def test_a_dead_session_is_fenced_after_a_while(vault: Vault) -> None:
    backup(vault, "p1", {"vda": "ABC"})
    drop(vault, "p1")
    vault.announce("dead", "p2")
    vault.announce("reader", reads=["p1"])
    assert sweep(vault, now=NOW, settings=ALL).fenced == []
    report = sweep(vault, now=NOW + timedelta(days=8), settings=ALL)
    assert (sorted(report.fenced), report.removed) == (["dead", "reader"], 1)
    with pytest.raises(VaultError, match="given up"):
        vault.commit(_point(vault, "p2", "ABC"))


def test_packs_that_no_segment_names(tmp_path: Path) -> None:
    """Of a writer that died before its segment they go; where segments were lost they are judged by their footers."""
    vault = new_vault(tmp_path)
    backup(vault, "p1", {"vda": "ABC"})
    with vault.writer() as writer:
        writer.put(image("Z"))
        writer.finish()
    newest = max((tmp_path / "vault/index").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    newest.unlink()
    report = sweep(vault, now=NOW, settings=ALL)
    assert (report.condemned, report.removed) == (1, 1)
    assert content_of(vault) == {"p1": image("ABC")}
    # All the index is gone: nothing can be read, so nothing is removed.
    for path in (tmp_path / "vault/index").iterdir():
        path.unlink()
    before = packs(vault)
    with pytest.raises(VaultError, match="nobody knows what it needs"):
        sweep(vault, now=NOW, settings=ALL)
    assert packs(vault) == before
    # Condemned by mistake, and named nowhere: the footer says that it is needed.
    [digest] = [bytes.fromhex(name.removeprefix("packs/")) for name in before]
    condemn(vault.store, vault.keys, [digest])
    rebuild_index(vault)
    for path in (tmp_path / "vault/index").iterdir():
        kept = path.read_bytes()
        path.unlink()
    vault.index.refresh()
    (tmp_path / "vault/index" / path.name).write_bytes(kept)
    report = sweep(vault, now=NOW, settings=ALL)
    assert (report.rescued, report.removed) == (1, 0)
    assert content_of(vault) == {"p1": image("ABC")}


def test_an_unreadable_point_or_page_stops_it(tmp_path: Path) -> None:
    vault = new_vault(tmp_path)
    backup(vault, "p1", {"vda": "ABC"})
    backup(vault, "p2", {"vda": "XYZ"})
    drop(vault, "p2")
    before = packs(vault)
    manifest = tmp_path / "vault/points/p1"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:-1])
    with pytest.raises(VaultError, match="p1 cannot be read") as caught:
        sweep(vault, now=NOW, settings=ALL)
    assert "point delete p1" in caught.value.hint
    manifest.write_bytes(whole)
    [page] = [one.pack for one in vault.index.find(bytes.fromhex(vault.point("p1").disks[0].root))]
    (tmp_path / "vault" / page).write_bytes(b"")
    vault = reopened(tmp_path)
    with pytest.raises(VaultError, match="cannot be read whole"):
        sweep(vault, now=NOW, settings=ALL)
    assert packs(vault) == before
    assert names(vault, "condemned/") == []


def test_a_damaged_copy_does_not_count(tmp_path: Path) -> None:
    """Two copies, one of them damaged: the good one stays, whichever is condemned."""
    vault, other = new_vault(tmp_path), reopened(tmp_path, cache="other")
    with vault.writer() as first, other.writer() as second:
        for writer in (first, second):
            writer.put(image("A"))
            writer.finish()
    backup(vault, "p1", {"vda": "A"})
    id = vault.reader().block_id(image("A"))
    bad, good = vault.index.find(id)
    vault.index.distrust(id, bad.pack)
    sweep(vault, now=NOW, settings=WHOLE)
    assert good.pack in packs(vault)
    assert bad.pack not in packs(vault)
    condemn(vault.store, vault.keys, [bytes.fromhex(good.pack.removeprefix("packs/"))])
    assert sweep(vault, now=NOW, settings=WHOLE).rescued == 1
    assert good.pack in packs(vault)


def test_a_damaged_pack_whose_blocks_were_healed_is_copied_and_goes(tmp_path: Path) -> None:
    vault = new_vault(tmp_path)
    backup(vault, "p1", {"vda": "ABCDEF"})
    id = vault.reader().block_id(image("A"))
    [bad] = vault.index.find(id)
    data = bytearray((tmp_path / "vault" / bad.pack).read_bytes())
    data[bad.entry.offset + 9] ^= 1
    (tmp_path / "vault" / bad.pack).write_bytes(data)
    assert verify(vault, Level.FULL).findings
    report = sweep(vault, now=NOW, settings=FEW)
    assert (report.compacted, report.removed) == (0, 0), "the only copy, bad as it is"
    backup(vault, "p2", {"vda": "ABCDEF"})
    report = sweep(vault, now=NOW, settings=FEW)
    assert (report.compacted, report.skipped, report.removed) == (1, 0, 1)
    assert names(vault, "damage/") == []
    assert content_of(reopened(tmp_path, cache="other")) == {"p1": image("ABCDEF"), "p2": image("ABCDEF")}
    assert verify(vault, Level.FULL).findings == []


def test_a_retained_pack_goes_later_and_counts_for_nothing_until_then(tmp_path: Path) -> None:
    """Two copies of a block, both condemned, both retained: one is dead, so the other one must stay."""
    vault, other = new_vault(tmp_path), reopened(tmp_path, cache="other")
    with vault.writer() as first, other.writer() as second:
        for writer in (first, second):
            writer.put(image("A"))
            writer.finish()
    backup(vault, "p1", {"vda": "AB"})
    copies = [one.pack for one in vault.index.find(vault.reader().block_id(image("A")))]
    for name in copies:
        vault.store.retain(name, datetime.now(UTC) + timedelta(days=1))
        condemn(vault.store, vault.keys, [bytes.fromhex(name.removeprefix("packs/"))])
    report = sweep(vault, now=NOW, settings=WHOLE)
    assert (report.retained, report.rescued, report.removed) == (1, 1, 0)
    assert {*copies} <= packs(vault)
    for name in copies:
        set_immutable(tmp_path / "vault" / name, False)
        (tmp_path / "vault" / name).chmod(0o600)
    assert sweep(vault, now=NOW, settings=WHOLE).removed == 1
    assert content_of(vault) == {"p1": image("AB")}
    settled(vault)


def test_a_page_is_read_once_however_many_points_share_it(tmp_path: Path) -> None:
    """30 points of a disk of three leaf pages, the last of which differs in one block: the cost is what differs."""
    vault, count = new_vault(tmp_path), 2 * FANOUT + 5
    size, roots = count * BLOCK, []
    for changed in (0, 1):
        with vault.writer() as writer:
            blocks = MapWriter(writer, vault.reader(), size, BLOCK, None)
            for index in range(count):
                blocks.set(index, writer.put((index + 1 + (changed if index == 7 else 0)).to_bytes(8, "big") * 8))
            roots.append(blocks.finish().hex())
            writer.finish()
    disk = store_disk(vault, "vda", "A", None)
    for number in range(30):
        root = roots[number == 29]
        vault.commit(point_of(f"p{number}", [disk.model_copy(update={"capacity": size, "root": root})]))
    plan = Plan()
    store = FaultyStore(open_store(f"file://{tmp_path}/vault"), plan)
    sweep(Vault.open(store, key=KEY, cache_dir=tmp_path / "other"), now=NOW, settings=WHOLE, dry_run=True)
    read = [name for call, name in plan.calls if call == "get" and name.startswith("packs/")]
    headers = len(packs(vault)) - 1  # of packs that hold pages
    assert len(read) - headers == 4 + 2


# --- kills ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def littered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dead packs, half dead ones, small ones, and an unfinished condemnation."""
    folder = tmp_path_factory.mktemp("littered")
    vault = new_vault(folder)
    first = backup(vault, "p1", {"vda": "ABCDEFGHIJ"})
    backup(vault, "p2", {"vda": "--XY------"}, first)
    backup(vault, "p3", {"vda": "PQRSTUVWab"})
    backup(vault, "p4", {"vda": "PQ"})
    backup(vault, "p5", {"vda": "LMNO"})
    drop(vault, "p3")
    vault.announce("old", "p9")
    drop(vault, "p5")
    sweep(vault, now=NOW, settings=WHOLE)
    vault.withdraw("old")
    drop(vault, "p1")
    vault.close()
    return folder


def test_killed_at_every_step_it_is_finished_by_the_next(littered: Path, tmp_path: Path) -> None:
    before = content_of(reopened(littered, cache="look"))
    at, died = 0, True
    while died:
        folder = tmp_path / str(at)
        shutil.copytree(littered / "vault", folder / "vault")
        store = FaultyStore(open_store(f"file://{folder}/vault"), Plan(die_before=at))
        try:
            sweep(Vault.open(store, key=KEY, cache_dir=folder / "c"), now=NOW, settings=FEW)
            died = False
        except Died:
            at += 1
        assert content_of(reopened(folder, cache="d")) == before
        vault = reopened(folder, cache="c")
        sweep(vault, now=NOW, settings=FEW)
        sweep(vault, now=NOW, settings=FEW)
        assert content_of(vault) == before
        settled(vault)
        vault.close()
        shutil.rmtree(folder)
    assert at > 30


def test_an_error_of_the_store_at_any_step_loses_nothing(littered: Path, tmp_path: Path) -> None:
    before = content_of(reopened(littered, cache="look"))
    at, failed = 0, True
    while failed:
        folder = tmp_path / str(at)
        shutil.copytree(littered / "vault", folder / "vault")
        store = FaultyStore(open_store(f"file://{folder}/vault"), Plan(fail_at=at))
        try:
            sweep(Vault.open(store, key=KEY, cache_dir=folder / "c"), now=NOW, settings=FEW)
            failed = False
        except StillframeError:
            pass
        vault = reopened(folder, cache="c")
        assert content_of(vault) == before
        vault.close()
        shutil.rmtree(folder)
        at += 1
    assert at > 30


def test_writers_refuse_where_a_condemnation_cannot_be_read(tmp_path: Path) -> None:
    vault = new_vault(tmp_path)
    backup(vault, "p1", {"vda": "A"})
    name = condemn(vault.store, vault.keys, [bytes(32)])
    assert read_condemned(vault.store, vault.keys) == {bytes(32)}
    (tmp_path / "vault" / name).write_bytes(b"x")
    with pytest.raises(VaultError, match="condemned/"):
        vault.writer()
    assert content_of(vault) == {"p1": image("A")}
