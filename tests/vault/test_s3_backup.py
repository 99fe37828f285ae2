"""Whole backups and restores in buckets, whatever becomes of the requests; and how few they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.vault.buckets import QUICK, Server
from tests.vault.faulty import FaultyStore, Plan
from tests.vault.pictures import KEY, backup, content, image, map_of, new_vault, read_disk, render
from tests.vault.s3_proxy import Fault, Proxy, every_other
from tests.vault.s3_proxy import Plan as Faults
from workers.contract.errors import Corrupt
from workers.contract.messages import RestoreDisk
from workers.contract.points import DiskPoint
from workers.contract.seams import Store
from workers.restore import restore_disk
from workers.vault import Vault, open_store
from workers.vault.verify import Level, verify

FIRST = {"vda": "ABCDEFGHIJ", "vdb": "0Kk0"}
SECOND = {"vda": "-0-LMNOP--", "vdb": "Qq--"}
AFTER = {"vda": "A0CLMNOPIJ", "vdb": "Qqk0"}


def two_generations(vault: Vault) -> None:
    vault.announce("job", "p1")
    first = backup(vault, "p1", FIRST)
    vault.withdraw("job")
    vault.announce("job", "p2", reads=["p1"])
    backup(vault, "p2", SECOND, first)
    vault.withdraw("job")


def restored(vault: Vault, point: str, target: str, folder: Path) -> bytes:
    path = folder / f"{point}-{target}"
    restore_disk(
        vault,
        RestoreDisk(job="j", vault="v", point=point, target=target, path=str(path), format="raw", standalone=True),
        2,
        lambda _: None,
    )
    return path.read_bytes()


def judge(store: Store, folder: Path) -> None:
    """What a host that has never seen the vault finds."""
    vault = Vault.open(store, key=KEY, cache_dir=folder / "other-cache")
    for point, pictures in (("p1", FIRST), ("p2", AFTER)):
        for target, picture in pictures.items():
            assert restored(vault, point, target, folder) == image(picture)
    assert verify(vault, Level.FULL).findings == []
    there = new_vault(folder / "there")
    two_generations(there)
    assert render(vault) == render(there)
    there.close()
    vault.close()


@pytest.mark.parametrize("server", ["moto", "localbucket"])
def test_backups_in_a_bucket(request: pytest.FixtureRequest, server: str, tmp_path: Path) -> None:
    found: Server = request.getfixturevalue(server)
    url = found.url()
    vault, _ = Vault.create(found.store(url, create=True), key=KEY, cache_dir=tmp_path / "cache")
    two_generations(vault)
    vault.close()
    judge(found.store(url), tmp_path)
    assert list(found.made[-1].list("sessions/")) == []


def by_turns(number: int, _method: str, _path: str) -> Fault | None:
    """Two of three requests go wrong, each time in another way."""
    faults = [fault for fault in Fault if fault not in (Fault.SILENT, Fault.LESS)]
    return None if number % 3 == 0 else faults[number % len(faults)]


def now_and_then_silent(number: int, _method: str, _path: str) -> Fault | None:
    return None if number % 20 else Fault.SILENT


FAULTS: dict[str, Faults] = {
    **{fault.name: every_other(fault) for fault in Fault if fault not in (Fault.LESS, Fault.SILENT)},
    "by turns": by_turns,
    "silent": now_and_then_silent,
}


@pytest.mark.parametrize("plan", FAULTS.values(), ids=FAULTS)
def test_backups_through_a_bad_wire(proxied: Server, proxy: Proxy, plan: Faults, tmp_path: Path) -> None:
    url = proxied.url()
    patience = replace(QUICK, attempts=30, read_timeout=1.0)
    proxy.plan = plan
    vault, _ = Vault.create(proxied.store(url, create=True, patience=patience), key=KEY, cache_dir=tmp_path / "cache")
    two_generations(vault)
    vault.close()
    judge(proxied.store(url, patience=patience), tmp_path)


def test_abandoned_point_stays_abandoned_over_a_bad_wire(proxied: Server, proxy: Proxy, tmp_path: Path) -> None:
    """Who settles and who commits never both succeed, though neither ever gets its first answer."""
    proxy.plan = every_other(Fault.CUT_AFTER)
    vault, _ = Vault.create(proxied.store(proxied.url(), create=True), key=KEY, cache_dir=tmp_path / "cache")
    assert vault.settle("p1") is None
    assert vault.settle("p1") is None
    with pytest.raises(Exception, match="given up"):
        backup(vault, "p1", FIRST)
    backup(vault, "p2", FIRST)
    assert vault.settle("p2") is not None
    vault.close()


# --- reading by spans --------------------------------------------------------------------------------------------


@pytest.fixture
def counted(tmp_path: Path) -> Iterator[tuple[Vault, Plan, DiskPoint]]:
    """A vault with one disk, and the calls to its store."""
    made = new_vault(tmp_path)
    point = backup(made, "p1", {"vda": "ABCDEFGHIJKLMNOPQRSTUVWX"})
    made.close()
    plan = Plan()
    store = FaultyStore(open_store(f"file://{tmp_path}/vault"), plan)
    vault = Vault.open(store, key=KEY, cache_dir=tmp_path / "cache")
    yield vault, plan, point.disks[0]
    vault.close()


def all_blocks(vault: Vault, disk: DiskPoint) -> list[tuple[int, bytes]]:
    reader = vault.reader()
    wanted = ((index, id) for index, _, id in map_of(vault, disk).runs() if id is not None)
    return [found for span in reader.spans(wanted) for found in reader.read(span)]


def test_neighbours_come_with_one_read(counted: tuple[Vault, Plan, DiskPoint]) -> None:
    vault, plan, disk = counted
    packs = len(list(vault.store.list("packs/")))
    before = len(plan.calls)
    found = all_blocks(vault, disk)
    assert sorted(found) == [(index, content(letter)) for index, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWX")]
    reads = [name for call, name in plan.calls[before:] if call == "get" and name.startswith("packs/")]
    # Of each pack the header, which has its key, and the blocks; of one the page of the map besides.
    assert packs >= 4
    assert len(reads) <= 2 * packs + 2


def test_damage_in_a_span_is_found_and_costs_only_its_block(
    counted: tuple[Vault, Plan, DiskPoint], tmp_path: Path
) -> None:
    vault, _, disk = counted
    reader = vault.reader()
    bad = reader.block_id(content("C"))
    [location] = vault.index.find(bad)
    path = tmp_path / "vault" / location.pack
    data = bytearray(path.read_bytes())
    data[location.entry.offset + 5] ^= 1
    path.write_bytes(data)
    wanted = ((index, id) for index, _, id in map_of(vault, disk).runs() if id is not None and id != bad)
    spans = list(reader.spans(wanted))
    assert len([found for span in spans for found in reader.read(span)]) == 23
    with pytest.raises(Corrupt, match="not what was written"):
        all_blocks(vault, disk)


def test_another_copy_is_read_where_one_is_damaged(tmp_path: Path) -> None:
    vault = new_vault(tmp_path)
    backup(vault, "p1", {"vda": "ABC"})
    reader = vault.reader()
    id = reader.block_id(content("B"))
    [location] = vault.index.find(id)
    vault.index.distrust(id, location.pack)
    point = backup(vault, "p2", {"vda": "ABC"})
    location, _ = vault.index.find(id)  # the one that is tried first
    path = tmp_path / "vault" / location.pack
    data = path.read_bytes()
    end = location.entry.offset + location.entry.stored
    path.write_bytes(data[: location.entry.offset] + bytes(location.entry.stored) + data[end:])
    assert dict(all_blocks(vault, point.disks[0])) == dict(enumerate(map(content, "ABC")))
    assert read_disk(vault, point.disks[0]) == image("ABC")
