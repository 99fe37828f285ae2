"""Block maps against a plain dictionary: any tiling, in any order, over any base, gives the map of what it says."""

from __future__ import annotations

import itertools
import random
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vault.pictures import BLOCK, backup, image, map_of, new_vault, read_disk
from workers.contract.errors import Corrupt, DiskError
from workers.vault import ZERO_ID, BlockMap, MapWriter, Vault
from workers.vault.blockmap import FANOUT, Shape

Model = dict[int, bytes]
"""Index → id; what is absent is zero."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Vault:
    return new_vault(tmp_path_factory.mktemp("maps"))


def some_id(seed: int) -> bytes:
    return random.Random(seed).randbytes(32)


def write(vault: Vault, size: int, steps: list[tuple[str, int, int]], base: BlockMap | None) -> tuple[bytes, int]:
    """The root, and bytes of pages stored. A step is `(kind, first, count)`; the ids of `set` are numbers."""
    with vault.writer() as writer:
        blocks = MapWriter(writer, vault.reader(), size, BLOCK, base)
        for kind, first, count in steps:
            match kind:
                case "zero":
                    blocks.zero(first, count)
                case "inherit":
                    blocks.inherit(first, count)
                case _:
                    for index in range(first, first + count):
                        blocks.set(index, some_id(int(kind) + index))
        root = blocks.finish()
        writer.finish()
        return root, writer.metadata_bytes


def as_model(blocks: BlockMap) -> Model:
    found: Model = {}
    position = 0
    for first, count, id in blocks.runs():
        assert first == position
        assert count > 0
        position += count
        if id is not None:
            found |= dict.fromkeys(range(first, first + count), id)
    assert position == blocks.count
    return found


COUNTS = st.sampled_from(
    [0, 1, 2, 5, 1023, 1024, 1025, 1500, 2047, 2048, 5000, FANOUT**2 - 1, FANOUT**2, FANOUT**2 + 1, 3 * FANOUT**2 + 7]
)
TAILS = st.sampled_from([0, 0, 0, 100])
"""Bytes that the last block falls short."""


@st.composite
def generations(draw: st.DrawFn) -> list[tuple[int, list[tuple[str, int, int]]]]:
    """`(size, steps)` per generation: steps tile the disk and come in any order."""
    made = []
    size = 0
    for number in range(draw(st.integers(1, 4))):
        before = size
        if number == 0 or draw(st.booleans()):
            size = max(0, draw(COUNTS) * BLOCK - draw(TAILS))
        count = -(-size // BLOCK)
        inheritable = count if size == before else min(size, before) // BLOCK
        edges = st.sampled_from([1, 2, 1000, 1023, 1024, 1025, 2048, 2049, FANOUT**2 - 1, FANOUT**2, FANOUT**2 + 1])
        places = draw(st.lists(st.integers(0, max(0, count - 1)) | edges, max_size=8))
        cuts = sorted(
            {0, count, *(at for at in places if at < count)} | ({inheritable} if inheritable <= count else set())
        )
        steps = []
        for first, end in itertools.pairwise(cuts):
            kinds = ["zero"]
            if number and end <= inheritable:
                kinds += ["inherit", "inherit"]
            if end - first <= 1500:
                kinds += ["1000", "2000"]
            steps.append((draw(st.sampled_from(kinds)), first, end - first))
        made.append((size, draw(st.permutations(steps))))
    return made


@settings(max_examples=150, deadline=None)
@given(generations())
def test_any_generations_give_what_they_say(shared: Vault, made: list[tuple[int, list[tuple[str, int, int]]]]) -> None:
    base: BlockMap | None = None
    model: Model = {}
    for size, steps in made:
        new: Model = {}
        for kind, first, count in steps:
            if kind == "inherit":
                new |= {index: id for index, id in model.items() if first <= index < first + count}
            elif kind != "zero":
                new |= {index: some_id(int(kind) + index) for index in range(first, first + count)}
        root, _ = write(shared, size, steps, base)
        base, model = BlockMap(shared.reader(), root, size, BLOCK), new
        assert as_model(base) == model
        for index in [*list(model)[:3], 0, base.count - 1]:
            if 0 <= index < base.count:
                assert base.id_at(index) == model.get(index, ZERO_ID)
        assert root == fresh_root(shared, size, model)


def fresh_root(vault: Vault, size: int, model: Model) -> bytes:
    """The root of the same content, written without a base: it must be the same (canonical)."""
    with vault.writer() as writer:
        blocks = MapWriter(writer, vault.reader(), size, BLOCK, None)
        position = 0
        for index in sorted(model):
            if index > position:
                blocks.zero(position, index - position)
            blocks.set(index, model[index])
            position = index + 1
        if position < blocks.count:
            blocks.zero(position, blocks.count - position)
        writer.finish()
        return blocks.finish()


@pytest.mark.parametrize(
    ("pictures", "result"),
    [
        (["AA0-".replace("-", "B"), "-C--"], "ACAB".replace("CAB", "C0B")),
        (["ABCD", "0-0-"], "0B0D"),
        (["AB", "--CD"], "ABCD"),
        (["ABCD", "--"], "AB"),
        (["0000", "----", "-A--", "0000"], "0000"),
        (["AAAA", "----", "----"], "AAAA"),
    ],
)
def test_pictures(vault: Vault, pictures: list[str], result: str) -> None:
    point = None
    for number, picture in enumerate(pictures):
        point = backup(vault, f"p{number}", {"vda": picture}, point)
    assert point is not None
    assert read_disk(vault, point.disks[0]) == image(result)


def test_levels() -> None:
    assert Shape.of(1, BLOCK).widths == (1, 1)
    assert Shape.of(1024 * BLOCK, BLOCK).widths == (1024, 1)
    assert Shape.of(1024 * BLOCK + 1, BLOCK).widths == (1025, 2, 1)
    assert Shape.of(8 << 40, 1 << 20).widths == (8 << 20, 8192, 8, 1)
    assert Shape.of(0, BLOCK).widths == (0, 1)


def test_a_sparse_giant_costs_what_changed(shared: Vault) -> None:
    size = 8 << 40
    count = size // BLOCK
    root, stored = write(shared, size, [("zero", 0, count)], None)
    assert (root, stored) == (ZERO_ID, 0)
    base = BlockMap(shared.reader(), root, size, BLOCK)
    chosen = sorted(random.Random(1).sample(range(count), 100))
    steps: list[tuple[str, int, int]] = []
    position = 0
    for index in chosen:
        steps += [("inherit", position, index - position)] if index > position else []
        steps.append(("1", index, 1))
        position = index + 1
    steps.append(("inherit", position, count - position))
    root, stored = write(shared, size, steps, base)
    assert 0 < stored <= 300 << 10
    second = BlockMap(shared.reader(), root, size, BLOCK)
    assert as_model(second) == {index: some_id(1 + index) for index in chosen}
    assert write(shared, size, [("inherit", 0, count)], second) == (root, 0)


@pytest.mark.parametrize(
    "steps",
    [
        [("1", 0, 3000), ("2", 17, 1)],
        [("zero", 0, 3000), ("zero", 1024, 1024)],
        [("zero", 0, 1024), ("1", 5, 1)],
        [("1", 5, 1), ("zero", 0, 1024)],
        [("inherit", 0, 2000), ("zero", 1999, 2)],
        [("inherit", 0, 3000), ("inherit", 2999, 1)],
        [("zero", 2999, 2)],
        [("1", 3000, 1)],
        [("zero", -1, 2)],
        [("zero", 5, 0)],
    ],
)
def test_overlaps_and_what_is_past_the_end_are_errors(shared: Vault, steps: list[tuple[str, int, int]]) -> None:
    size = 3000 * BLOCK
    base = BlockMap(shared.reader(), write(shared, size, [("1", 0, 3000)], None)[0], size, BLOCK)
    with pytest.raises(DiskError, match=r"settled twice|not within"):
        write(shared, size, steps, base)


@pytest.mark.parametrize(
    ("steps", "missing"),
    [
        ([], 0),
        ([("zero", 0, 2999)], 2999),
        ([("zero", 1024, 1976)], 0),
        ([("1", 0, 1023), ("1", 1024, 1976)], 1023),
        ([("1", 0, 1024), ("inherit", 2048, 952)], 1024),
    ],
)
def test_a_block_that_was_forgotten_is_an_error(shared: Vault, steps: list[tuple[str, int, int]], missing: int) -> None:
    size = 3000 * BLOCK
    base = BlockMap(shared.reader(), write(shared, size, [("1", 0, 3000)], None)[0], size, BLOCK)
    with pytest.raises(DiskError, match=f"block {missing} "):
        write(shared, size, steps, base)


def test_a_short_last_block_is_not_inherited_by_a_disk_that_grew(shared: Vault) -> None:
    base = BlockMap(shared.reader(), write(shared, 5 * BLOCK - 1, [("1", 0, 5)], None)[0], 5 * BLOCK - 1, BLOCK)
    with shared.writer() as writer:
        grown = MapWriter(writer, shared.reader(), 6 * BLOCK, BLOCK, base)
        assert grown.inheritable == 4
        with pytest.raises(DiskError):
            grown.inherit(0, 5)
        with pytest.raises(DiskError):
            MapWriter(writer, shared.reader(), 6 * BLOCK, 2 * BLOCK, base)


def test_inherit_without_a_base_is_an_error(shared: Vault) -> None:
    with pytest.raises(DiskError):
        write(shared, BLOCK, [("inherit", 0, 1)], None)


def test_threads_in_any_order(shared: Vault) -> None:
    count = 5000
    with shared.writer() as writer:
        blocks = MapWriter(writer, shared.reader(), count * BLOCK, BLOCK, None)
        order = list(range(count))
        random.Random(2).shuffle(order)

        def work(mine: list[int]) -> None:
            for index in mine:
                blocks.set(index, some_id(index))

        threads = [threading.Thread(target=work, args=(order[at::4],)) for at in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        root = blocks.finish()
        writer.finish()
    assert root == fresh_root(shared, count * BLOCK, {index: some_id(index) for index in range(count)})


def test_sample_finds_blocks_that_are_not_zero(shared: Vault) -> None:
    size = (FANOUT**2 + 5) * BLOCK
    steps = [("1", 7, 3), ("zero", 0, 7), ("zero", 10, FANOUT**2 - 10), ("2", FANOUT**2, 5)]
    blocks = BlockMap(shared.reader(), write(shared, size, steps, None)[0], size, BLOCK)
    there = {7, 8, 9, *range(FANOUT**2, FANOUT**2 + 5)}
    assert set(blocks.sample(random.Random(3), 100)) == there
    few = blocks.sample(random.Random(3), 2)
    assert len(few) == 2
    assert set(few) <= there
    assert BlockMap(shared.reader(), ZERO_ID, size, BLOCK).sample(random.Random(3), 5) == []


def test_a_page_of_another_place_is_refused(shared: Vault, tmp_path: Path) -> None:
    size = 3000 * BLOCK
    root, _ = write(shared, size, [("1", 0, 3000)], None)
    wrong = BlockMap(shared.reader(), root, 2000 * BLOCK, BLOCK)
    with pytest.raises(Corrupt):
        wrong.id_at(0)
    with pytest.raises(IndexError):
        BlockMap(shared.reader(), root, size, BLOCK).id_at(3000)
    other = new_vault(tmp_path)
    disk = backup(other, "p", {"vda": "AB"}).disks[0]
    assert map_of(other, disk).id_at(1) != map_of(other, disk).id_at(0)
