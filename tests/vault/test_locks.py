"""Nothing that is locked goes, by whatever way; and one person alone cannot change that."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.vault.faulty import Died, FaultyStore, Plan
from tests.vault.pictures import KEY, backup, image, new_vault, point_of, read_disk, reopened, store_disk
from tests.vault.second_reader import SecondReader, Wrong
from workers.contract.errors import Corrupt, Locked, UsageError, VaultError
from workers.contract.points import Point
from workers.vault import Vault, open_store, trash
from workers.vault.approval import Approval, Request, approve, parse_approval, parse_request
from workers.vault.checkup import damaged_objects
from workers.vault.immutable import set_immutable
from workers.vault.keys import Opened, opened_slots
from workers.vault.locks import AHEAD, change, check_request, extend, lengthen, read_chain, read_lock, request
from workers.vault.rebuild import rebuild_index
from workers.vault.repair import repair
from workers.vault.sealing import encode_plain
from workers.vault.stores import DirectoryStore
from workers.vault.sweep import sweep
from workers.vault.verify import Level, verify

SECOND = b"\7" * 32
"""Another holder's key."""
ADDED = b"\x09" * 32
"""One that was added after the lock was set."""


def two_holders(folder: Path) -> Vault:
    vault = new_vault(folder)
    vault.slots.add(key=SECOND)
    return vault


def opened(vault: Vault, key: bytes) -> list[Opened]:
    return opened_slots(vault.store, vault.id, key=key, passphrase=None)


def ids(vault: Vault, key: bytes = KEY) -> list[str]:
    return [one.slot.id for one in opened(vault, key)]


def ask(vault: Vault, days: int) -> Request:
    return request(vault, days, ids(vault), by="ann")


def approved(vault: Vault, asked: Request, key: bytes = SECOND) -> Approval:
    return approve(asked, read_lock(vault.store, vault.id).approvers, opened(vault, key))


def now_point(id: str, point: Point) -> Point:
    return point.model_copy(update={"id": id, "time": datetime.now(UTC)})


def retained_until(vault: Vault, name: str) -> datetime | None:
    assert isinstance(vault.store, DirectoryStore)
    found = (vault.store.root / name).stat()
    return datetime.fromtimestamp(found.st_mtime, UTC) if found.st_mode & 0o777 == 0o400 else None


def names(vault: Vault, *kinds: str) -> list[str]:
    return [info.name for kind in kinds for info in vault.store.list(f"{kind}/")]


def packs(vault: Vault) -> set[bytes]:
    return {bytes.fromhex(name.removeprefix("packs/")) for name in names(vault, "packs")}


# --- what a lock does ----------------------------------------------------------------------------------------------


def test_without_a_lock_nothing_is_retained(vault: Vault) -> None:
    point = backup(vault, "p1", {"vda": "AB"})
    assert vault.point("p1").locked_until is None
    assert [retained_until(vault, name) for name in names(vault, "packs", "index", "points")] == [None] * 3
    assert extend(vault, packs(vault)).until is None
    vault.delete_point(point.id)


def test_a_point_of_a_locked_vault_cannot_be_deleted_nor_anything_that_it_needs(vault: Vault) -> None:
    lock = lengthen(vault, 30, by="ann")
    point = backup(vault, "p1", {"vda": "AB"})
    locked = vault.point("p1").locked_until
    assert locked == max(point.time, lock.time) + timedelta(days=30)
    assert retained_until(vault, "points/p1") == locked
    for name in names(vault, "packs"):
        until = retained_until(vault, name)
        assert until is not None
        assert locked + AHEAD - timedelta(days=1) <= until <= locked + 2 * AHEAD
    for name in names(vault, "packs", "points"):
        with pytest.raises(Locked):
            vault.store.delete(name)
    with pytest.raises(Locked, match="locked until"):
        vault.delete_point("p1")
    assert read_disk(vault, point.disks[0]) == image("AB")
    assert verify(vault, Level.FULL).ok


def test_a_damaged_manifest_that_is_locked_stays(vault: Vault, tmp_path: Path) -> None:
    lengthen(vault, 30, by="ann")
    backup(vault, "p1", {"vda": "AB"})
    path = tmp_path / "vault/points/p1"
    set_immutable(path, False)
    until = path.stat().st_mtime
    path.chmod(0o600)
    path.write_bytes(b"damaged")
    path.chmod(0o400)
    os.utime(path, (until, until))
    with pytest.raises(Locked):
        vault.delete_point("p1")


def test_commit_again_is_no_error_and_changes_no_date(vault: Vault) -> None:
    lengthen(vault, 30, by="ann")
    point = backup(vault, "p1", {"vda": "AB"})
    first = vault.point("p1")
    lengthen(vault, 60, by="ann")
    assert vault.commit(point) == first
    assert vault.commit(first) == first
    assert vault.point("p1") == first
    with pytest.raises(VaultError, match="another point"):
        vault.commit(point.model_copy(update={"job": "j2"}))


def test_a_commit_that_died_before_its_retention_is_made_good(tmp_path: Path) -> None:
    vault = new_vault(tmp_path)
    lengthen(vault, 30, by="ann")
    disk = store_disk(vault, "vda", "AB", None)
    point = now_point("p1", point_of("p1", [disk]))
    for step in range(20):
        plan = Plan(die_before=step)
        through = Vault.open(open_store(f"file://{tmp_path}/vault"), key=KEY, cache_dir=tmp_path / "c")
        faulty = Vault.open(FaultyStore(through.store), key=KEY, cache_dir=tmp_path / "c")
        assert isinstance(faulty.store, FaultyStore)
        faulty.store.plan = plan
        try:
            faulty.commit(point)
            break
        except Died:
            assert retained_until(vault, "points/p1") is None if names(vault, "points") else True
    else:
        pytest.fail("the walk did not reach the end of a commit")
    assert step > 1
    assert retained_until(vault, "points/p1") == vault.point("p1").locked_until


def test_what_is_retained_goes_when_its_time_has_passed(vault: Vault, tmp_path: Path) -> None:
    lengthen(vault, 30, by="ann")
    backup(vault, "p1", {"vda": "AB"})
    name = names(vault, "packs")[0]
    path = tmp_path / "vault" / name
    flagged = set_immutable(path, False)
    os.utime(path, (0, 1_700_000_000))
    set_immutable(path, flagged)
    vault.store.delete(name)
    assert not path.exists()


def test_the_file_system_refuses_too_where_it_can(vault: Vault, tmp_path: Path) -> None:
    assert isinstance(vault.store, DirectoryStore)
    lengthen(vault, 30, by="ann")
    backup(vault, "p1", {"vda": "AB"})
    path = tmp_path / "vault" / names(vault, "packs")[0]
    if vault.store.keeps_immutable():
        with pytest.raises(PermissionError):
            path.unlink()
    else:
        assert path.stat().st_mode & 0o777 == 0o400
    assert list(vault.store.staging().iterdir()) == []


def test_retain_is_never_shortened(vault: Vault) -> None:
    backup(vault, "p1", {"vda": "A"})
    [name] = names(vault, "packs")
    late, soon = (datetime(year, 1, 1, tzinfo=UTC) for year in (2090, 2080))
    vault.store.retain(name, late)
    vault.store.retain(name, soon)
    assert retained_until(vault, name) == late


def test_the_index_is_not_retained_and_can_be_made_again(vault: Vault) -> None:
    lengthen(vault, 30, by="ann")
    point = backup(vault, "p1", {"vda": "ABC"})
    for name in names(vault, "index"):
        vault.store.delete(name)
    rebuild_index(vault)
    assert read_disk(vault, point.disks[0]) == image("ABC")
    assert verify(vault, Level.FULL).ok


def test_a_sweep_leaves_what_is_locked_and_renews_its_retention(vault: Vault) -> None:
    first = backup(vault, "p1", {"vda": "ABCD"})
    lengthen(vault, 30, by="ann")
    disk = store_disk(vault, "vda", "--E-", first.disks[0])
    point = vault.commit(now_point("p2", point_of("p2", [disk])))
    later = datetime.now(UTC) + timedelta(days=1)
    with pytest.raises(Locked):
        trash.delete(vault, "p2", now=later, until=later, by="ann", reason="")
    trash.delete(vault, "p1", now=later, until=later, by="ann", reason="")
    for _ in range(3):
        report = sweep(vault, now=later)
    assert report.retention is not None
    assert [found.id for found in vault.points()] == ["p2"]
    assert read_disk(vault, point.disks[0]) == image("ABED")
    assert verify(vault, Level.FULL).ok
    for pack in needed(vault, point):
        assert retained_until(vault, pack) == report.retention


def test_a_pack_that_repair_puts_anew_is_retained_again(vault: Vault, tmp_path: Path) -> None:
    lengthen(vault, 30, by="ann")
    backup(vault, "p1", {"vda": "A"})
    [name] = names(vault, "packs")
    extend(vault, packs(vault))
    shutil.copytree(tmp_path / "vault", tmp_path / "replica")
    path = tmp_path / "vault" / name
    set_immutable(path, False)
    path.unlink()
    assert repair(vault, [open_store(f"file://{tmp_path}/replica")]).findings == []
    extend(vault, packs(vault))
    assert retained_until(vault, name) is not None


def test_a_sweep_goes_on_where_a_dead_pack_is_retained(vault: Vault, tmp_path: Path) -> None:
    lengthen(vault, 30, by="ann")
    with vault.writer() as writer:
        writer.put(b"nobody needs this" * 99)
        writer.finish()
    point = backup(vault, "p1", {"vda": "AB"})
    [dead] = set(names(vault, "packs")) - needed(vault, point)
    for _ in range(3):
        assert sweep(vault, now=datetime.now(UTC)).removed == 0
    assert dead in names(vault, "packs")
    path = tmp_path / "vault" / dead
    set_immutable(path, False)
    os.utime(path, (0, 1_700_000_000))
    sweep(vault, now=datetime.now(UTC))
    assert dead not in names(vault, "packs")
    assert verify(vault, Level.FULL).ok


# --- setting it ----------------------------------------------------------------------------------------------------


def test_one_person_sets_and_lengthens_a_lock_and_does_not_shorten_it(tmp_path: Path) -> None:
    vault = two_holders(tmp_path)
    assert read_lock(vault.store, vault.id).days == 0
    assert lengthen(vault, 30, by="ann").number == 1
    assert lengthen(vault, 60, by="ann").number == 2
    with pytest.raises(Locked):
        lengthen(vault, 59, by="ann")
    for days in (0, -1, 10**6):
        with pytest.raises((UsageError, Locked)):
            lengthen(vault, days, by="ann")
    assert read_lock(vault.store, vault.id).days == 60


def test_a_second_key_holder_approves(tmp_path: Path) -> None:
    vault = two_holders(tmp_path)
    lengthen(vault, 30, by="ann")
    before = backup(vault, "p1", {"vda": "A"})
    dated = vault.point("p1")
    asked = parse_request(ask(vault, 7).text())
    code = approved(vault, asked).text()
    change(vault, parse_approval(code), 7, ids(vault), by="ann")
    assert read_lock(vault.store, vault.id).days == 7
    assert vault.point("p1") == dated
    with pytest.raises(Locked):
        vault.delete_point(before.id)
    with pytest.raises(Locked, match="used already"):
        change(vault, parse_approval(code), 7, ids(vault), by="ann")
    lengthen(vault, 30, by="ann")
    with pytest.raises(Locked, match="used already"):
        change(vault, parse_approval(code), 7, ids(vault), by="ann")


def test_the_requester_cannot_approve(tmp_path: Path) -> None:
    vault = two_holders(tmp_path)
    lengthen(vault, 30, by="ann")
    asked = ask(vault, 7)
    with pytest.raises(Locked, match="the one that asks"):
        approved(vault, asked, KEY)
    hidden = asked.model_copy(update={"requesters": []})
    with pytest.raises(Locked, match="your own key"):
        change(vault, approved(vault, hidden, KEY), 7, ids(vault), by="ann")


def test_a_key_that_was_added_after_the_lock_cannot_approve_before_another_has_agreed(tmp_path: Path) -> None:
    vault = two_holders(tmp_path)
    lengthen(vault, 30, by="ann")
    vault.slots.add(key=ADDED)
    with pytest.raises(Locked, match="may not approve"):
        approved(vault, ask(vault, 7), ADDED)
    forged = approve(ask(vault, 7), {ids(vault, ADDED)[0]: opened(vault, ADDED)[0].slot.approver}, opened(vault, ADDED))
    with pytest.raises(Locked, match="by a key that may not"):
        change(vault, forged, 7, ids(vault), by="ann")
    change(vault, approved(vault, ask(vault, 30)), 30, ids(vault), by="ann")
    change(vault, approved(vault, ask(vault, 7), ADDED), 7, ids(vault), by="ann")
    assert read_lock(vault.store, vault.id).days == 7


@pytest.mark.parametrize(
    ("change_of", "why"),
    [
        ({"vault": "0" * 32}, "another vault"),
        ({"days": 3}, "for 3 days"),
        ({"days_before": 31}, "used already"),
        ({"number": 3}, "used already"),
        ({"by": "bob"}, "signature is wrong"),
        ({"approvers": {}}, "signature is wrong"),
        ({"requesters": []}, "signature is wrong"),
        ({"nonce": "0" * 32}, "signature is wrong"),
        ({"expires": datetime(2091, 1, 1, tzinfo=UTC)}, "signature is wrong"),
        ({"expires": datetime(2021, 1, 1, tzinfo=UTC)}, "good until"),
    ],
)
def test_an_approval_is_good_for_what_was_asked_only(tmp_path: Path, change_of: dict[str, object], why: str) -> None:
    vault = two_holders(tmp_path)
    lengthen(vault, 30, by="ann")
    given = approved(vault, ask(vault, 7))
    altered = given.model_copy(update={"request": given.request.model_copy(update=change_of)})
    with pytest.raises(Locked, match=why):
        change(vault, altered, 7, ids(vault), by="ann")
    assert read_lock(vault.store, vault.id).days == 30


def test_a_removed_key_does_not_approve(tmp_path: Path) -> None:
    vault = two_holders(tmp_path)
    lengthen(vault, 30, by="ann")
    given = approved(vault, ask(vault, 7))
    vault.slots.remove(given.slot)
    with pytest.raises(Locked, match="removed"):
        change(vault, given, 7, ids(vault), by="ann")


def test_nobody_to_approve_is_told(tmp_path: Path) -> None:
    vault = new_vault(tmp_path)
    for slot in vault.slots.all():
        if slot.kind == "recovery":
            vault.slots.remove(slot.id)
    lengthen(vault, 30, by="ann")
    vault.slots.add(key=SECOND)
    with pytest.raises(Locked, match="nobody can approve"):
        ask(vault, 7)


@pytest.mark.parametrize("text", ["", "x", "stillframe-request:", "stillframe-request:e30", "stillframe-request:ü"])
def test_what_is_no_request(text: str) -> None:
    for parse in (parse_request, parse_approval):
        with pytest.raises(UsageError):
            parse(text)


def test_a_lock_that_was_written_by_hand_does_not_count(tmp_path: Path) -> None:
    vault = two_holders(tmp_path)
    lock = lengthen(vault, 30, by="ann")
    forged = lock.model_dump(mode="json") | {"number": 2, "days": 0, "approval": ""}
    vault.store.put("locks/00000002", encode_plain(forged))
    found, wrong = read_chain(vault.store, vault.id)
    assert found.days == 30
    assert "without an approval" in wrong[0]
    with pytest.raises(Wrong):
        SecondReader(tmp_path / "vault", key=KEY).lock_periods()
    asked = ask(vault, 7)
    assert asked.number == 3
    change(vault, approved(vault, asked), 7, ids(vault), by="ann")
    assert read_lock(vault.store, vault.id).days == 7


def test_a_damaged_lock_does_not_pass_for_none(vault: Vault, tmp_path: Path) -> None:
    lengthen(vault, 30, by="ann")
    path = tmp_path / "vault/locks/00000001"
    set_immutable(path, False)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(Corrupt):
        backup(vault, "p1", {"vda": "A"})
    assert [name for name, _ in damaged_objects(vault)] == ["locks/00000001"]


def test_an_approved_lock_is_verified_by_a_second_implementation(tmp_path: Path) -> None:
    vault = two_holders(tmp_path)
    lengthen(vault, 30, by="ann")
    change(vault, approved(vault, ask(vault, 7)), 7, ids(vault), by="ann")
    lengthen(vault, 9, by="ann")
    assert SecondReader(tmp_path / "vault", key=KEY).lock_periods() == [30, 7, 9]


def test_a_clock_that_is_behind_the_vault_sets_no_lock(vault: Vault) -> None:
    point = backup(vault, "p1", {"vda": "A"})
    vault.commit(point.model_copy(update={"id": "p2", "time": datetime.now(UTC) + timedelta(days=365)}))
    with pytest.raises(VaultError, match="clock of this host is behind"):
        lengthen(vault, 30, by="ann")


def test_a_clock_that_was_set_back_makes_no_point_that_can_be_deleted_at_once(vault: Vault) -> None:
    lock = lengthen(vault, 30, by="ann")
    point = backup(vault, "p1", {"vda": "A"})
    year_ago = point.model_copy(update={"id": "p2", "time": datetime.now(UTC) - timedelta(days=365)})
    assert vault.commit(year_ago).locked_until == lock.time + timedelta(days=30)


# --- retention of what points share --------------------------------------------------------------------------------


def needed(vault: Vault, point: Point) -> set[str]:
    """Packs of the blocks of a point's first disk."""
    reader = vault.reader()
    found = {location.pack for location in vault.index.find(bytes.fromhex(point.disks[0].root))}
    picture = read_disk(vault, point.disks[0])
    for at in range(0, len(picture), point.disks[0].block_size):
        id = reader.block_id(picture[at : at + point.disks[0].block_size])
        found |= {location.pack for location in vault.index.find(id)}
    return found


def test_old_packs_are_covered_before_a_locked_point_needs_them(vault: Vault) -> None:
    base = backup(vault, "p1", {"vda": "ABCD"})
    lengthen(vault, 30, by="ann")
    first = extend(vault, packs(vault))
    assert first.until is not None
    assert first.objects == len(names(vault, "packs", "locks"))
    disk = store_disk(vault, "vda", "--E-", base.disks[0])
    point = vault.commit(now_point("p2", point_of("p2", [disk])))
    assert point.locked_until is not None
    late = point.locked_until + AHEAD - timedelta(hours=1)
    """The date of one that is committed when the next `extend` is due."""
    for pack in needed(vault, point):
        until = retained_until(vault, pack)
        assert until is not None
        assert until >= late
    again = extend(vault, packs(vault))
    assert again.objects == len(names(vault, "packs", "points", "locks")) - first.objects - 1  # p1: no lock


@pytest.mark.parametrize("kind", ["die_before", "die_after", "fail_at"])
def test_extend_goes_on_after_a_fault_at_any_step(tmp_path: Path, kind: str) -> None:
    vault = new_vault(tmp_path)
    backup(vault, "p1", {"vda": "ABCD"})
    lengthen(vault, 30, by="ann")
    backup(vault, "p2", {"vda": "EFGH"})
    faults: dict[str, Callable[[int], Plan]] = {
        "die_before": lambda number: Plan(die_before=number),
        "die_after": lambda number: Plan(die_after=number),
        "fail_at": lambda number: Plan(fail_at=number),
    }
    for number in range(40):
        faulty = FaultyStore(open_store(f"file://{tmp_path}/vault"))
        through = Vault.open(faulty, key=KEY, cache_dir=tmp_path / f"cache{number}")
        faulty.plan = faults[kind](number)
        try:
            extend(through, packs(vault))
            break
        except (Died, VaultError):
            continue
    else:
        pytest.fail("the walk did not reach the end")
    assert number > 5
    done = extend(reopened(tmp_path), packs(vault))
    assert done.until is not None
    for name in names(vault, "packs", "locks"):
        assert retained_until(vault, name) == done.until
    assert retained_until(vault, "points/p1") is None
    assert retained_until(vault, "points/p2") == vault.point("p2").locked_until


def test_what_was_swept_meanwhile_is_no_error(vault: Vault) -> None:
    backup(vault, "p1", {"vda": "AB"})
    lengthen(vault, 30, by="ann")
    assert extend(vault, {b"\1" * 32, *packs(vault)}).until is not None


def test_a_request_for_the_vault_as_it_was_is_refused(tmp_path: Path) -> None:
    vault = two_holders(tmp_path)
    lengthen(vault, 30, by="ann")
    asked = ask(vault, 7)
    assert check_request(vault.store, vault.id, asked).days == 30
    lengthen(vault, 31, by="bob")
    with pytest.raises(Locked, match="changed since"):
        check_request(vault.store, vault.id, asked)
