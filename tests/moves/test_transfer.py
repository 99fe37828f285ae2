"""Disks drawn as pictures, carried into a real vault and back."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from workers.contract.errors import Cancelled, DiskError
from workers.contract.extents import Extent, Kind
from workers.disks.memory import MemoryDisk, drawn, picture
from workers.transfer import Settings, Tally, Transferred, transfer_disk
from workers.vault import BlockMap, Vault
from workers.vault.stores import DirectoryStore

BLOCK = 64 << 10


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    store = DirectoryStore(tmp_path / "vault", create=True)
    return Vault.create(store, key=bytes(32), cache_dir=tmp_path / "cache")[0]


def quiet(_tally: Tally) -> None:
    """A watch that lets everything pass."""


def carry(vault: Vault, disk: MemoryDisk, base: Transferred | None = None, base_size: int | None = None) -> Transferred:
    base_map = None
    if base is not None:
        base_map = BlockMap(vault.reader(), base.root, base_size if base_size is not None else disk.size, BLOCK)
    # Enough draws that each of a handful of blocks is in the sample.
    return transfer_disk(disk, vault, Settings(BLOCK, audit_blocks=64), base=base_map, watch=quiet)


def stored(vault: Vault, root: bytes, size: int) -> bytes:
    """The disk as the vault has it."""
    reader = vault.reader()
    content = bytearray(size)
    for first, count, id in BlockMap(reader, root, size, BLOCK).runs():
        for index in range(first, first + count):
            if id is not None:
                block = reader.get(id)
                content[index * BLOCK : index * BLOCK + len(block)] = block
    return bytes(content)


def seen(vault: Vault, done: Transferred, disk: MemoryDisk, piece: int = BLOCK) -> str:
    return picture(stored(vault, done.root, disk.size), piece)


def test_a_full_backup_keeps_what_is_there(vault: Vault) -> None:
    disk = drawn("AB0-CCD", BLOCK)
    done = carry(vault, disk)
    assert seen(vault, done, disk) == "AB--CCD"
    assert done.figures.new_bytes == 4 * BLOCK, "A, B, C once, D"
    assert done.figures.stored_bytes < done.figures.new_bytes


def test_an_incremental_reads_only_what_changed(vault: Vault) -> None:
    base = carry(vault, drawn("ABCD", BLOCK))
    disk = drawn("aXcd", BLOCK)
    done = carry(vault, disk, base)
    assert seen(vault, done, disk) == "AXCD"
    assert (BLOCK, BLOCK) in disk.reads
    audited = [start // BLOCK for start, _ in disk.reads if start != BLOCK]
    assert sorted(audited) == [0, 2, 3], "the sample of unchanged blocks"
    assert done.figures.new_bytes == BLOCK


def test_what_changed_to_zeroes_is_zero_and_not_stale(vault: Vault) -> None:
    base = carry(vault, drawn("ABCD", BLOCK))
    disk = drawn("a00d", BLOCK)
    assert seen(vault, carry(vault, disk, base), disk) == "A--D"


def test_a_partly_changed_block_is_read_whole(vault: Vault) -> None:
    half = BLOCK // 2
    base = carry(vault, drawn("AABBCC", half))
    disk = drawn("aaXbcc", half)
    assert seen(vault, carry(vault, disk, base), disk, half) == "AAXBCC"


def test_a_grown_disk_stays_incremental(vault: Vault) -> None:
    half = BLOCK // 2
    base = carry(vault, drawn("AAB", half))
    disk = drawn("aabbC", half)  # nobody called the second B changed
    assert seen(vault, carry(vault, disk, base, 3 * half), disk, half) == "AABBC"


def test_change_tracking_that_lied_is_found_out_and_the_disk_is_read_in_full(vault: Vault) -> None:
    base = carry(vault, drawn("ABCD", BLOCK))
    disk = drawn("aXcd", BLOCK)
    disk.content[2 * BLOCK : 3 * BLOCK] = b"Y" * BLOCK  # and nobody was told
    done = carry(vault, disk, base)
    assert "unchanged, but they differ" in done.alert
    assert seen(vault, done, disk) == "AXYD"


def test_extents_with_a_hole_fail_the_disk(vault: Vault) -> None:
    disk = MemoryDisk(bytes(4 * BLOCK), [Extent(0, BLOCK, Kind.DATA), Extent(2 * BLOCK, 2 * BLOCK, Kind.DATA)])
    with pytest.raises(DiskError, match="do not tile"):
        carry(vault, disk)


def test_a_watch_that_raises_stops_every_thread(vault: Vault) -> None:
    def stop(_tally: Tally) -> None:
        raise Cancelled("cancelled")

    with pytest.raises(Cancelled):
        transfer_disk(drawn("ABCD", BLOCK), vault, Settings(BLOCK), base=None, watch=stop)
    assert not list(vault.store.staging().iterdir()), "nothing unfinished is left behind"


def test_random_generations_are_each_kept(vault: Vault) -> None:
    rng = random.Random(7)
    size = 37 * BLOCK + 4096
    content = bytearray(size)
    generations: list[tuple[Transferred, bytes]] = []
    for _ in range(12):
        changed = set()
        for _ in range(rng.randrange(1, 9)):
            start = rng.randrange(0, size, 4096)
            length = min(rng.choice([4096, BLOCK, 5 * BLOCK]), size - start)
            content[start : start + length] = rng.choice([bytes(length), rng.randbytes(length)])
            changed.update(range(start // 4096, -(-(start + length) // 4096)))
        disk = MemoryDisk(bytes(content), _extents(content, changed))
        last = generations[-1][0] if generations else None
        if last is None:
            disk = MemoryDisk(bytes(content))
        generations.append((carry(vault, disk, last), bytes(content)))
        assert not generations[-1][0].alert
    for done, expected in generations:
        assert stored(vault, done.root, size) == expected


def _extents(content: bytearray, changed: set[int]) -> list[Extent]:
    extents = []
    for piece in range(len(content) // 4096):
        data = content[piece * 4096 : (piece + 1) * 4096]
        kind = Kind.UNCHANGED if piece not in changed else Kind.DATA if any(data) else Kind.ZERO
        extents.append(Extent(piece * 4096, 4096, kind))
    return extents
