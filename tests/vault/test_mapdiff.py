"""What differs between two maps, against a comparison block by block; and that only pages that differ are read."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vault.pictures import BLOCK, backup, map_of, new_vault
from tests.vault.test_blockmap import COUNTS, TAILS, write
from workers.contract.errors import Corrupt, UsageError
from workers.contract.seams import Store
from workers.vault import ZERO_ID, BlockMap, BlockReader, Vault
from workers.vault.blockmap import FANOUT
from workers.vault.mapdiff import Change, Difference, differences

MARKS = {Change.REWRITTEN: "x", Change.FILLED: "+", Change.ZEROED: "0"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Vault:
    return new_vault(tmp_path_factory.mktemp("maps"))


def drawn(found: list[Difference], blocks: int) -> str:
    """Differences as a picture: `.` is unchanged."""
    picture = ["."] * blocks
    for start, length, change in found:
        assert start % BLOCK == length % BLOCK == 0
        for index in range(start // BLOCK, (start + length) // BLOCK):
            assert picture[index] == "."
            picture[index] = MARKS[change]
    return "".join(picture)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("ABCD", "ABCD", "...."),
        ("ABCD", "AXCD", ".x.."),
        ("AB0D", "0BCD", "0.+."),
        ("0000", "0000", "...."),
        ("0000", "00AB", "..++"),
        ("AB", "AB0CD", "...++"),
        ("ABCD", "A", ".000"),
        ("AB00", "AB", "...."),
        ("AAAA", "ABAB", ".x.x"),
        ("", "AB", "++"),
    ],
)
def test_pictures(vault: Vault, before: str, after: str, expected: str) -> None:
    first = backup(vault, "p1", {"vda": before})
    second = backup(vault, "p2", {"vda": after})
    maps = map_of(vault, first.disks[0]), map_of(vault, second.disks[0])
    assert drawn(list(differences(*maps)), len(expected)) == expected
    mirrored = expected.translate(str.maketrans("+0", "0+"))
    assert drawn(list(differences(maps[1], maps[0])), len(expected)) == mirrored


def test_a_range_ends_with_the_disk(shared: Vault) -> None:
    """A short last block counts whole where it is not zero, and not beyond the larger disk."""
    size = 3 * BLOCK - 100
    old = shared_map(shared, size, [("7", 0, 3)])
    new = shared_map(shared, size + 60, [("7", 0, 2), ("9", 2, 1)])
    assert list(differences(old, new)) == [Difference(2 * BLOCK, BLOCK - 40, Change.REWRITTEN)]
    zero = shared_map(shared, size + 60, [("zero", 0, 3)])
    assert list(differences(zero, new)) == [Difference(0, size + 60, Change.FILLED)]


def shared_map(vault: Vault, size: int, steps: list[tuple[str, int, int]]) -> BlockMap:
    root, _ = write(vault, size, steps, None)
    return BlockMap(vault.reader(), root, size, BLOCK)


@st.composite
def tilings(draw: st.DrawFn) -> tuple[int, list[tuple[str, int, int]]]:
    """A disk in runs; ids come from few numbers, so that two disks have much in common."""
    size = max(0, draw(COUNTS) * BLOCK - draw(TAILS))
    count = -(-size // BLOCK)
    cuts = sorted({0, count, *draw(st.lists(st.integers(0, count), max_size=6))})
    steps = []
    for first, end in itertools.pairwise(cuts):
        kind = draw(st.sampled_from(["zero", "0", "0", "1000"])) if end - first < 3000 else "zero"
        steps.append((kind, first, end - first))
    return size, steps


def as_model(blocks: BlockMap) -> dict[int, bytes]:
    return {index: id for first, count, id in blocks.runs() if id is not None for index in range(first, first + count)}


@settings(max_examples=60, deadline=None)
@given(tilings(), tilings())
def test_against_a_naive_comparison(
    shared: Vault, one: tuple[int, list[tuple[str, int, int]]], other: tuple[int, list[tuple[str, int, int]]]
) -> None:
    before, after = shared_map(shared, *one), shared_map(shared, *other)
    old, new = as_model(before), as_model(after)
    expected = {
        index: Change.FILLED if index not in old else Change.ZEROED if index not in new else Change.REWRITTEN
        for index in old.keys() | new.keys()
        if old.get(index) != new.get(index)
    }
    found: dict[int, Change] = {}
    position, last = 0, None
    for start, length, change in differences(before, after):
        assert start > position or (start == position and change is not last) or last is None
        position, last = start + length, change
        assert position <= max(one[0], other[0])
        found |= dict.fromkeys(range(start // BLOCK, -(-position // BLOCK)), change)
    assert found == expected


class Counting(BlockReader):
    """Remembers which pages were read."""

    def __init__(self, vault: Vault, store: Store) -> None:
        super().__init__(store, vault.keys, vault.index)
        self.read: list[bytes] = []

    def get_page(self, id: bytes) -> bytes:
        self.read.append(id)
        return super().get_page(id)

    def get(self, id: bytes) -> bytes:
        raise AssertionError(f"data block {id.hex()} was read")


def test_only_pages_that_differ_are_read(shared: Vault) -> None:
    """A disk of 40 leaf pages: one changed block costs two pages of each tree, and no change costs none."""
    count = 40 * FANOUT
    steps = [("5", 0, count)]
    old, _ = write(shared, count * BLOCK, steps, None)
    base = BlockMap(shared.reader(), old, count * BLOCK, BLOCK)
    new, _ = write(
        shared, count * BLOCK, [("inherit", 0, 5000), ("77", 5000, 1), ("inherit", 5001, count - 5001)], base
    )
    reader = Counting(shared, shared.store)

    def compared(left: bytes, right: bytes) -> list[Difference]:
        reader.read.clear()
        maps = [BlockMap(reader, root, count * BLOCK, BLOCK) for root in (left, right)]
        return list(differences(*maps))

    assert compared(old, old) == []
    assert reader.read == []
    assert compared(old, new) == [Difference(5000 * BLOCK, BLOCK, Change.REWRITTEN)]
    assert len(reader.read) == 4
    assert compared(ZERO_ID, new) == [Difference(0, count * BLOCK, Change.FILLED)]
    assert len(reader.read) == 41


def test_another_block_size_is_refused(shared: Vault) -> None:
    one = BlockMap(shared.reader(), ZERO_ID, 8 * BLOCK, BLOCK)
    other = BlockMap(shared.reader(), ZERO_ID, 8 * BLOCK, 2 * BLOCK)
    with pytest.raises(UsageError, match="blocks of 4096 bytes in one point and of 8192"):
        list(differences(one, other))


def test_a_page_of_another_map_is_noticed(shared: Vault) -> None:
    two, _ = write(shared, 2 * BLOCK, [("5", 0, 2)], None)
    wrong = BlockMap(shared.reader(), two, 3 * BLOCK, BLOCK)
    empty = BlockMap(shared.reader(), ZERO_ID, 3 * BLOCK, BLOCK)
    with pytest.raises(Corrupt):
        list(differences(empty, wrong))
