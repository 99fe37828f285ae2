"""Extents become runs of blocks: drawn, and for any extents at all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.contract.errors import DiskError
from workers.contract.extents import Extent, Kind
from workers.disks.blocks import block_count, block_runs
from workers.disks.memory import drawn, picture

SIGN = {Kind.DATA: "R", Kind.ZERO: "0", Kind.UNCHANGED: "="}


def runs_of(image: str, pieces_per_block: int, *, inheritable: int | None = None) -> str:
    disk = drawn(image, 1)
    base = disk.size if inheritable is None else inheritable
    runs = block_runs(disk.extents(), disk.size, pieces_per_block, inheritable=base)
    return "".join(SIGN[run.kind] * run.count for run in runs)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("AAAA", "R"),
        ("aaaa", "="),
        ("----", "="),
        ("0000", "0"),
        ("aaaAaaaa", "R="),  # partly dirty: read whole
        ("00aa0000", "R0"),  # zero beside unchanged: read whole, never patched together
        ("0A000000", "R0"),
        ("aaaa0000BBBB--bb", "=0R="),
        ("aaaaaa", "=="),  # the short last block
        ("aaaa0a", "=R"),
        ("aaaa00", "=0"),
        ("", ""),
    ],
)
def test_blocks_of_four_pieces(image: str, expected: str) -> None:
    assert runs_of(image, 4) == expected


@pytest.mark.parametrize(
    ("image", "base_size", "expected"),
    [
        ("aaaabbbb", 4, "=R"),  # grown by a block that nobody called changed
        ("aaaabbbb", 6, "=R"),  # the base's short last block has become longer
        ("aaaabb", 8, "=R"),  # shrunk into a block
        ("aaaa0000", 4, "=0"),  # grown, and known to be zero
        ("aaaa", 0, "R"),
    ],
)
def test_what_the_base_does_not_have_is_not_inherited(image: str, base_size: int, expected: str) -> None:
    assert runs_of(image, 4, inheritable=base_size) == expected


def test_without_a_base_nothing_is_inherited() -> None:
    disk = drawn("aabb", 1)
    assert [run.kind for run in block_runs(disk.extents(), 4, 2)] == [Kind.DATA]


@pytest.mark.parametrize(
    "extents",
    [
        [],
        [Extent(0, 4, Kind.DATA)],
        [Extent(0, 4, Kind.DATA), Extent(5, 3, Kind.DATA)],
        [Extent(0, 5, Kind.DATA), Extent(4, 4, Kind.DATA)],
        [Extent(0, 9, Kind.DATA)],
        [Extent(0, 4, Kind.DATA), Extent(4, 0, Kind.ZERO), Extent(4, 4, Kind.DATA)],
    ],
    ids=["none", "short", "gap", "overlap", "beyond", "empty extent"],
)
def test_extents_that_do_not_tile_the_disk_are_refused(extents: list[Extent]) -> None:
    with pytest.raises(DiskError, match="extent"):
        list(block_runs(extents, 8, 4))


@given(
    st.lists(st.tuples(st.integers(1, 20), st.sampled_from(list(Kind))), max_size=30),
    st.integers(1, 9),
    st.integers(0, 300),
)
def test_every_block_gets_the_kind_that_its_bytes_allow(
    parts: list[tuple[int, Kind]], block_size: int, base: int
) -> None:
    extents, kinds = [], []
    for length, kind in parts:
        extents.append(Extent(len(kinds), length, kind))
        kinds += [kind] * length
    size = len(kinds)
    got = [run.kind for run in block_runs(extents, size, block_size, inheritable=base) for _ in range(run.count)]
    assert len(got) == block_count(size, block_size)
    for index, kind in enumerate(got):
        inside = set(kinds[index * block_size : (index + 1) * block_size])
        end = min((index + 1) * block_size, size)
        same_in_base = end <= base and (end % block_size == 0 or base == size)
        if inside == {Kind.ZERO}:
            assert kind is Kind.ZERO
        elif inside == {Kind.UNCHANGED} and same_in_base:
            assert kind is Kind.UNCHANGED
        else:
            assert kind is Kind.DATA


def test_pictures_are_read_back() -> None:
    assert picture(bytes(drawn("AbC0-d", 512).content), 512) == "ABC--D"
