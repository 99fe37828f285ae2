"""One deletion of a point after the other: what ends it and when, what prevents it, and what damage does to it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.vault.faulty import Died, FaultyStore, Plan
from tests.vault.pictures import backup, image, point_of, read_disk
from workers.contract.errors import Corrupt, Locked, NotFound, WrongClock
from workers.vault import Vault, trash
from workers.vault.checkup import damaged_objects
from workers.vault.immutable import set_immutable
from workers.vault.sealing import encode_plain

NOW = datetime(2026, 11, 23, tzinfo=UTC)
DAY = timedelta(days=1)


def delete(vault: Vault, point: str = "p1", *, days: int = 14, now: datetime = NOW) -> trash.Deletion:
    return trash.delete(vault, point, now=now, until=now + days * DAY, by="anna", reason="a test")


def sweep(vault: Vault, day: int) -> list[str]:
    """What is removed on that day."""
    trash.finalise(vault, NOW + day * DAY)
    return [removal.point for removal in trash.remove_finals(vault) if not removal.waits]


def objects(vault: Vault) -> set[str]:
    return {info.name for prefix in ("points/", "trash/", "pins/") for info in vault.store.list(prefix)}


def locked(vault: Vault, until: datetime) -> None:
    vault.commit(point_of("p1", []).model_copy(update={"locked_until": until}))


def test_a_deleted_point_is_whole_until_its_time_is_over(vault: Vault) -> None:
    first = backup(vault, "p1", {"vda": "AB"})
    second = backup(vault, "p2", {"vda": "-C"}, first)
    deletion = delete(vault)
    assert trash.standing(vault.store) == {"p1": deletion}
    assert sweep(vault, 13) == []
    assert vault.readable("p1")
    assert read_disk(vault, vault.point("p1").disks[0]) == image("AB")
    assert sweep(vault, 14) == ["p1"]
    assert objects(vault) == {"points/p2"}
    assert not vault.readable("p1")
    assert read_disk(vault, second.disks[0]) == image("AC")


def test_a_deletion_is_taken_back_and_begun_again(vault: Vault) -> None:
    backup(vault, "p1", {"vda": "A"})
    assert not trash.undelete(vault, "p1", now=NOW, by="ben")
    for number in range(1, 12):
        assert delete(vault).number == number
        assert delete(vault, days=1).until == NOW + 14 * DAY, "the one that stands counts"
        assert trash.undelete(vault, "p1", now=NOW, by="ben")
        assert not trash.undelete(vault, "p1", now=NOW, by="ben")
    assert sweep(vault, 100) == []
    delete(vault)
    assert sweep(vault, 100) == ["p1"]
    assert objects(vault) == set()


def test_what_is_gone_for_good_stays_so(vault: Vault) -> None:
    backup(vault, "p1", {"vda": "A"})
    delete(vault, days=0)
    trash.finalise(vault, NOW)
    acts = (
        lambda: trash.undelete(vault, "p1", now=NOW, by="ben"),
        lambda: trash.pin(vault, "p1", now=NOW, by="ben", reason=""),
        lambda: delete(vault),
    )
    for _ in range(2):
        for act in acts:
            with pytest.raises(NotFound):
                act()
        assert trash.pinned(vault.store) == {}
        trash.remove_finals(vault)
    assert objects(vault) == set()


@pytest.mark.parametrize("id", ["none", "../keys/x", "", "A", "a/b"])
def test_unknown_points(vault: Vault, id: str) -> None:
    for act in (
        lambda: trash.undelete(vault, id, now=NOW, by="ben"),
        lambda: trash.pin(vault, id, now=NOW, by="ben", reason=""),
        lambda: delete(vault, id),
    ):
        with pytest.raises(NotFound):
            act()
    assert objects(vault) == set()


def test_a_fence_cannot_be_deleted(vault: Vault) -> None:
    vault.settle("p1")
    with pytest.raises(NotFound):
        delete(vault)
    assert objects(vault) == {"points/p1"}


def test_a_pinned_point_is_not_deleted(vault: Vault) -> None:
    backup(vault, "p1", {"vda": "A"})
    trash.pin(vault, "p1", now=NOW, by="ben", reason="audit")
    trash.pin(vault, "p1", now=NOW, by="ben", reason="another")
    assert trash.pinned(vault.store) == {"p1": "audit"}
    with pytest.raises(Locked, match="pinned: audit"):
        delete(vault)
    assert trash.unpin(vault.store, "p1")
    assert not trash.unpin(vault.store, "p1")
    delete(vault)
    trash.pin(vault, "p1", now=NOW, by="ben", reason="")
    assert trash.standing(vault.store) == {}


def test_a_pin_whose_maker_was_killed_counts(vault: Vault) -> None:
    """It had no time to end the deletion."""
    backup(vault, "p1", {"vda": "A"})
    delete(vault)
    vault.store.put("pins/p1", encode_plain({"by": "ben", "point": "p1", "reason": "", "time": NOW.isoformat()}))
    assert sweep(vault, 30) == []
    assert trash.standing(vault.store) == {}
    trash.unpin(vault.store, "p1")
    assert sweep(vault, 30) == []


def test_a_lock_holds_a_deletion_open(vault: Vault) -> None:
    locked(vault, NOW + 20 * DAY)
    with pytest.raises(Locked, match="locked until 2026-12-13"):
        delete(vault, days=0)
    assert trash.standing(vault.store) == {}
    assert delete(vault).until == NOW + 20 * DAY
    assert trash.undelete(vault, "p1", now=NOW, by="ben")
    # By a writer that does not look at locks.
    careless = trash.Deletion(by="x", number=2, point="p1", reason="", time=NOW, until=NOW)
    vault.store.put("trash/p1.2", encode_plain(careless.model_dump(mode="json")))
    assert trash.finalise(vault, NOW + 19 * DAY) == []
    assert [one.point for one in trash.finalise(vault, NOW + 20 * DAY)] == ["p1"]


def test_a_damaged_manifest_is_deleted_no_earlier_than_its_lock_may_end(vault: Vault, tmp_path: Path) -> None:
    locked(vault, NOW + 20 * DAY)
    fields = {"approval": "", "by": "x", "number": 1, "time": NOW.isoformat()}
    vault.store.put("locks/00000001", encode_plain({**fields, "days": 30}))
    vault.store.put("locks/00000002", encode_plain({**fields, "days": 3}))
    path = tmp_path / "vault/points/p1"
    set_immutable(path, False)
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1])
    delete(vault)
    assert sweep(vault, 29) == []
    assert sweep(vault, 30) == ["p1"]
    assert vault.damaged_points() == []


def test_a_session_keeps_the_manifest_that_it_reads(vault: Vault) -> None:
    backup(vault, "p1", {"vda": "A"})
    vault.announce("job", reads=["p1"])
    assert vault.readable("p1")
    delete(vault)
    assert sweep(vault, 14) == []
    [removal] = trash.remove_finals(vault)
    assert removal.waits.startswith("session job of ")
    assert vault.point("p1")
    vault.withdraw("job")
    vault.announce("late", reads=["p1"])
    assert not vault.readable("p1")
    vault.withdraw("late")
    assert sweep(vault, 14) == ["p1"]


def test_who_may_create_the_point_again_keeps_its_manifest(vault: Vault) -> None:
    """A command to commit that comes twice must find the point, or a removed one comes back without its blocks."""
    vault.announce("job", "p1")
    point = backup(vault, "p1", {"vda": "A"})
    delete(vault)
    assert sweep(vault, 14) == []
    vault.commit(point)
    vault.withdraw("job")
    assert sweep(vault, 14) == ["p1"]


def test_only_the_named_points_are_finished(vault: Vault) -> None:
    for id in ("p1", "p2"):
        backup(vault, id, {"vda": "A"})
        delete(vault, id, days=0)
    assert [one.point for one in trash.finalise(vault, NOW, points=["p2"])] == ["p2"]
    assert [one.point for one in trash.remove_finals(vault, points=["p1"])] == []
    assert [one.point for one in trash.remove_finals(vault, points=["p2"])] == ["p2"]
    assert trash.standing(vault.store).keys() == {"p1"}


def test_a_kill_at_any_call_is_gone_on_from(vault: Vault) -> None:
    for number in range(100):
        point = f"p{number}"
        backup(vault, point, {"vda": "A"})
        for _ in range(2):
            delete(vault, point)
            trash.undelete(vault, point, now=NOW, by="ben")
        delete(vault, point)
        plan = Plan(die_before=number)
        killed = Vault(FaultyStore(vault.store, plan), b"", vault.keys, Path("unused"))
        try:
            sweep(killed, 14)
        except Died:
            stands = point in trash.standing(vault.store)
            assert not stands or vault.readable(point), "taken back, it would not be there"
            assert sweep(vault, 14) in ([point], [])
            assert objects(vault) == set()
        else:
            assert objects(vault) == set()
            return


# --- clocks --------------------------------------------------------------------------------------------------------


def test_a_clock_set_back_makes_nothing_final(vault: Vault) -> None:
    backup(vault, "p1", {"vda": "A"})  # made 2026-11-22
    backup(vault, "p2", {"vda": "A"})
    delete(vault, days=-400)
    with pytest.raises(WrongClock, match=r"the clock of this host says 2025-11-22 .* but the deletion of point p1"):
        trash.finalise(vault, NOW - 366 * DAY)
    assert trash.undelete(vault, "p1", now=NOW, by="ben")
    with pytest.raises(WrongClock, match=r"but point p2 was made 2026-11-22 02:00 UTC: .* nothing was deleted"):
        delete(vault, "p2", now=NOW - 366 * DAY)
    assert trash.standing(vault.store) == {}


def test_what_a_clock_that_was_ahead_has_made_stops_the_next_one(vault: Vault) -> None:
    """Until a person says that the clock is right."""
    vault.commit(point_of("p2", []).model_copy(update={"time": NOW + 365 * DAY}))
    backup(vault, "p1", {"vda": "A"})
    delete(vault)
    with pytest.raises(WrongClock, match="but point p2 was made 2027-11-23"):
        trash.finalise(vault, NOW + 14 * DAY)
    assert trash.standing(vault.store).keys() == {"p1"}
    assert [one.point for one in trash.finalise(vault, NOW + 14 * DAY, trust_clock=True)] == ["p1"]


def test_clocks_that_differ_a_little_are_no_matter(vault: Vault) -> None:
    backup(vault, "p1", {"vda": "A"})
    delete(vault, days=-1)
    assert trash.finalise(vault, NOW - timedelta(minutes=9))


# --- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [False, True])
def test_a_deletion_that_cannot_be_read_stands(vault: Vault, tmp_path: Path, other: bool) -> None:
    backup(vault, "p1", {"vda": "A"})
    deletion = delete(vault)
    path = tmp_path / "vault/trash/p1.1"
    path.chmod(0o600)
    lying = encode_plain(deletion.model_copy(update={"point": "p2"}).model_dump(mode="json"))
    path.write_bytes(lying if other else b"{}")
    assert trash.standing(vault.store)["p1"].reason == "(what is written of it cannot be read)"
    assert sweep(vault, 10_000) == []
    assert [name for name, _ in damaged_objects(vault)] == ([] if other else ["trash/p1.1"])
    assert trash.undelete(vault, "p1", now=NOW, by="ben")
    assert trash.standing(vault.store) == {}


def test_a_pin_that_cannot_be_read_is_one(vault: Vault, tmp_path: Path) -> None:
    backup(vault, "p1", {"vda": "A"})
    trash.pin(vault, "p1", now=NOW, by="ben", reason="audit")
    (tmp_path / "vault/pins/p1").write_bytes(b"")
    with pytest.raises(Locked, match="cannot be read"):
        delete(vault)
    assert trash.unpin(vault.store, "p1")


def test_an_end_that_cannot_be_read_is_believed_neither_way(vault: Vault, tmp_path: Path) -> None:
    backup(vault, "p1", {"vda": "A"})
    delete(vault, days=0)
    trash.finalise(vault, NOW)
    (tmp_path / "vault/trash/p1.1.end").write_bytes(b"{}")
    assert trash.remove_finals(vault) == []
    for act in (
        lambda: vault.readable("p1"),
        lambda: trash.undelete(vault, "p1", now=NOW, by="ben"),
        lambda: delete(vault),
    ):
        with pytest.raises(Corrupt):
            act()


def test_what_is_no_deletion_is_left_alone(vault: Vault, tmp_path: Path) -> None:
    backup(vault, "p1", {"vda": "A"})
    delete(vault, days=0)
    for name in ("p1.x", "p1.01", "p1.1.end.old", "readme"):
        (tmp_path / "vault/trash" / name).write_text("x")
    assert sweep(vault, 1) == ["p1"]
    assert len(objects(vault)) == 4
