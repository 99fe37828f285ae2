"""Points, sessions, deduplication, and the vault rendered as text."""

from __future__ import annotations

import shutil
from pathlib import Path
from textwrap import dedent

import pytest

from tests.vault.pictures import BLOCK, backup, content, image, new_vault, point_of, read_disk, render, reopened
from workers.contract.errors import NewerFormat, NotFound, ObjectMissing, VaultError, VaultMissing
from workers.vault import ZERO_ID, SessionInfo, Vault
from workers.vault.packs import read_footer
from workers.vault.rebuild import rebuild_index
from workers.vault.verify import Level, verify


def test_the_vault_as_a_picture(vault: Vault) -> None:
    """Known blocks and equal blocks are stored once; an incremental stores what changed and one page (`#`) a disk; a
    pack is closed when it is full; an all-zero disk has neither blocks nor map."""
    first = backup(vault, "p1", {"vda": "AA0B", "vdb": "0000"})
    second = backup(vault, "p2", {"vda": "--CA", "vdb": "0B0-"}, first)
    backup(vault, "p3", {"vda": "DEFGHIJKAB"}, second)
    assert render(vault) == dedent(
        """\
        p1 vda AA0B in 11.1 map in 1
        p1 vdb 0000 in .... map in .
        p2 vda AACA in 1121 map in 2
        p2 vdb 0B00 in .1.. map in 3
        p3 vda DEFGHIJKAB in 4444445511 map in 5
        pack 1: AB#
        pack 2: C#
        pack 3: #
        pack 4: DEFGHI
        pack 5: JK#"""
    )


def test_an_unchanged_disk_stores_nothing(vault: Vault) -> None:
    first = backup(vault, "p1", {"vda": "AB0C"})
    before = {info.name for info in vault.store.list("")}
    second = backup(vault, "p2", {"vda": "----"}, first)
    assert {info.name for info in vault.store.list("")} - before == {"points/p2"}
    assert second.disks[0].root == first.disks[0].root


def test_figures_of_a_writer(vault: Vault) -> None:
    with vault.writer() as writer:
        ids = [writer.put(content(letter)) for letter in "AAa0"]
        assert writer.new_bytes == 2 * BLOCK
        assert writer.metadata_bytes == 0
        assert BLOCK < writer.stored_bytes < BLOCK + 200  # A as it is, a compressed
        writer.put_page(b"page")
        assert writer.metadata_bytes == 4 + 16
        assert writer.cpu_seconds > 0 < writer.write_seconds
        writer.finish()
    assert ids[0] == ids[1]
    assert ids[3] == ZERO_ID
    reader = vault.reader()
    assert reader.get(ids[0]) == content("A")
    assert reader.block_id(content("a")) == ids[2]
    assert reader.block_id(content("0")) == ZERO_ID
    with pytest.raises(ValueError, match="zero"):
        reader.get(ZERO_ID)
    with pytest.raises(ObjectMissing):
        reader.get(bytes(31) + b"x")
    with pytest.raises(ObjectMissing):
        reader.get_page(ids[0][::-1])


def test_blocks_of_a_writer_that_did_not_finish_are_not_known(vault: Vault) -> None:
    with vault.writer() as writer:
        writer.put(content("A"))
    assert list(vault.store.list("packs/")) == []
    assert list(vault.store.staging().iterdir()) == []
    with pytest.raises(VaultError):
        writer.put(content("B"))
    with pytest.raises(VaultError):
        writer.finish()
    with vault.writer() as writer:
        writer.put(content("A"))
        writer.finish()
        assert writer.new_bytes == BLOCK


def test_durable_packs_of_a_writer_that_was_given_up_are_known(vault: Vault) -> None:
    with vault.writer(pack_size=2 * BLOCK) as writer:
        for letter in "ABC":
            writer.put(content(letter))
    with vault.writer() as writer:
        for letter in "ABC":
            writer.put(content(letter))
        assert writer.new_bytes == BLOCK


def test_commit_is_exclusive_and_repeatable(vault: Vault) -> None:
    point = backup(vault, "p1", {"vda": "AB"})
    vault.commit(point)
    assert vault.point("p1") == point
    with pytest.raises(VaultError, match="another point"):
        vault.commit(point.model_copy(update={"job": "j2"}))
    assert vault.settle("p1") == point


def test_a_settled_point_can_never_be_committed(vault: Vault) -> None:
    assert vault.settle("p2") is None
    assert vault.settle("p2") is None
    with pytest.raises(VaultError, match="given up"):
        vault.commit(point_of("p2", []))
    assert list(vault.points()) == []
    for act in (vault.point, vault.delete_point):
        with pytest.raises(NotFound):
            act("p2")
    with pytest.raises(VaultError):
        vault.commit(point_of("p2", []))


@pytest.mark.parametrize("id", ["none", "../keys/x", "", "A", "a/b"])
def test_unknown_points(vault: Vault, id: str) -> None:
    for act in (vault.point, vault.delete_point):
        with pytest.raises(NotFound) as caught:
            act(id)
        assert caught.value.exit_code == 2


def test_a_deleted_point_is_gone_and_the_others_stay(vault: Vault) -> None:
    first = backup(vault, "p1", {"vda": "AB"})
    second = backup(vault, "p2", {"vda": "-C"}, first)
    vault.delete_point("p1")
    assert list(vault.points()) == [second]
    assert read_disk(vault, second.disks[0]) == image("AC")


def test_a_damaged_manifest_does_not_hide_the_others(vault: Vault, tmp_path: Path) -> None:
    backup(vault, "p1", {"vda": "A"})
    second = backup(vault, "p2", {"vda": "A"})
    path = tmp_path / "vault/points/p1"
    path.write_bytes(path.read_bytes()[:-1])
    assert list(vault.points()) == [second]
    assert [name for name, _ in vault.damaged_points()] == ["p1"]
    vault.delete_point("p1")
    assert vault.damaged_points() == []


def test_a_manifest_under_another_name_is_refused(vault: Vault, tmp_path: Path) -> None:
    backup(vault, "p1", {"vda": "A"})
    shutil.copy(tmp_path / "vault/points/p1", tmp_path / "vault/points/p2")
    assert [name for name, _ in vault.damaged_points()] == ["p2"]


def test_a_manifest_of_a_newer_stillframe(vault: Vault) -> None:
    vault.commit(point_of("p1", []).model_copy(update={"schema_version": 3}))
    with pytest.raises(NewerFormat):
        vault.point("p1")
    assert [name for name, _ in vault.damaged_points()] == ["p1"]


def test_sessions(vault: Vault) -> None:
    vault.announce("j1", "p1")
    vault.announce("j1", "p1")
    assert [(info.session, info.point) for info in vault.sessions()] == [("j1", "p1")]
    with pytest.raises(VaultError, match="announced already"):
        vault.announce("j1", "p2")
    with pytest.raises(VaultError, match="announced already"):
        vault.announce("j1", "p1", reads=["p0"])
    assert [(info.session, info.point) for info in vault.sessions()] == [("j1", "p1")]
    assert all(isinstance(info, SessionInfo) for info in vault.sessions())
    vault.withdraw("j1")
    vault.withdraw("j1")
    assert vault.sessions() == []


def test_stats(vault: Vault) -> None:
    empty = vault.stats()
    assert (empty.points, empty.blocks, empty.dedup_ratio) == (0, 0, 0.0)
    first = backup(vault, "p1", {"vda": "AA0B"})
    backup(vault, "p2", {"vda": "----"}, first)
    stats = vault.stats()
    assert stats.points == 2
    assert stats.blocks == 3
    assert stats.block_bytes == 2 * BLOCK + 8 + 4 * 32
    assert stats.logical_bytes == 8 * BLOCK
    assert stats.bytes["packs"] == sum(info.size for info in vault.store.list("packs/"))
    assert stats.total_bytes == sum(stats.bytes.values())
    assert stats.objects == len(list(vault.store.list(""))) - 1
    assert 3 < stats.dedup_ratio < 4


def test_the_cache_is_made_again(vault: Vault, tmp_path: Path) -> None:
    point = backup(vault, "p1", {"vda": "AB"})
    vault.close()
    shutil.rmtree(tmp_path / "cache")
    assert read_disk(vault, point.disks[0]) == image("AB")


@pytest.mark.parametrize("where", [0, 30, 5000])
def test_a_damaged_cache_is_made_again(vault: Vault, tmp_path: Path, where: int) -> None:
    point = backup(vault, "p1", {"vda": "ABCDEFGH"})
    vault.close()
    (path,) = (tmp_path / "cache").glob("*/index.sqlite")
    data = bytearray(path.read_bytes())
    data[where : where + 4000] = b"\xa5" * 4000
    path.write_bytes(data)
    again = reopened(tmp_path)
    assert read_disk(again, point.disks[0]) == image("ABCDEFGH")
    assert verify(again, Level.FULL).ok


def test_segments_that_vanished_leave_the_cache(vault: Vault) -> None:
    point = backup(vault, "p1", {"vda": "AB"})
    backup(vault, "p2", {"vda": "CD"})
    segments = [info.name for info in vault.store.list("index/")]
    for name in segments:
        vault.store.delete(name)
    with pytest.raises(ObjectMissing):
        read_disk(vault, point.disks[0])
    with vault.writer() as writer:
        writer.put(content("A"))
        assert writer.new_bytes == BLOCK
    assert rebuild_index(vault).entries == 6
    assert read_disk(vault, point.disks[0]) == image("AB")


def test_a_rebuilt_index_is_the_same_index(vault: Vault, tmp_path: Path) -> None:
    backup(vault, "p1", {"vda": "ABCDEFGHIJ"})
    backup(vault, "p2", {"vda": "KLMAB"})
    before = render(vault)
    shutil.rmtree(tmp_path / "vault/index")
    entries = sum(
        len(read_footer(vault.store, info.name, info.size, vault.keys)) for info in vault.store.list("packs/")
    )
    assert rebuild_index(vault).entries == entries
    assert rebuild_index(vault).entries == entries
    assert len(list(vault.store.list("index/"))) == 1
    assert render(reopened(tmp_path, cache="other")) == before == render(vault)
    assert verify(vault, Level.FULL).ok


def test_a_vault_that_is_gone(vault: Vault, tmp_path: Path) -> None:
    (tmp_path / "vault").rename(tmp_path / "moved")
    with pytest.raises(VaultMissing):
        vault.commit(point_of("p1", []))
    with pytest.raises(VaultMissing):
        vault.announce("j", "p")
    with pytest.raises(VaultMissing), vault.writer() as writer:
        writer.put(content("A"))
    with pytest.raises(VaultMissing):
        reopened(tmp_path)
    assert not (tmp_path / "vault").exists()


def test_two_vaults_share_nothing(tmp_path: Path) -> None:
    """The same block has another id elsewhere: no vault tells what another one holds."""
    one, two = new_vault(tmp_path / "one"), new_vault(tmp_path / "two")
    assert one.reader().block_id(content("A")) != two.reader().block_id(content("A"))
