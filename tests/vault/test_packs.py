"""Packs and segments: what goes in comes out, and what was changed does not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.vault.pictures import KEY, new_vault
from workers.contract.errors import Corrupt, VaultError
from workers.vault import ZERO_ID, Vault, open_store
from workers.vault.index import decode_segment, encode_segment, read_segment, write_segment, write_segments
from workers.vault.packs import MOST_ENTRIES, TARGET, Entry, PackBuilder, decode_entries, encode_entries, read_footer
from workers.vault.writer import is_zero

BLOCKS = st.lists(
    st.binary(min_size=1, max_size=300)
    | st.builds(lambda byte, n: bytes([byte]) * n, st.integers(0, 255), st.integers(1, 9000)),
    max_size=20,
)
ENTRIES = st.lists(
    st.builds(
        Entry,
        st.binary(min_size=32, max_size=32),
        *[st.integers(0, (1 << 32) - 1)] * 3,
        st.integers(0, 255),
        st.integers(0, 255),
    ),
    max_size=5,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Vault:
    return new_vault(tmp_path_factory.mktemp("packs"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(BLOCKS, st.integers(1, 2000))
def test_what_is_put_is_got(shared: Vault, blocks: list[bytes], pack_size: int) -> None:
    with shared.writer(pack_size=pack_size) as writer:
        ids = [writer.put(memoryview(block)) for block in blocks]
        pages = [writer.put_page(block) for block in blocks]
        writer.finish()
    reader = shared.reader()
    for block, id, page in zip(blocks, ids, pages, strict=True):
        assert reader.get_page(page) == block
        assert page != id
        if id == ZERO_ID:
            assert block == bytes(len(block))
        else:
            assert reader.get(id) == block
            assert reader.block_id(block) == id
    for info in shared.store.list("packs/"):
        footer = read_footer(shared.store, info.name, info.size, shared.keys)
        assert footer == shared.index.entries(info.name)
        assert all(shared.index.find(entry.id) for entry in footer)


@given(st.dictionaries(st.binary(min_size=32, max_size=32), ENTRIES, max_size=4))
def test_segments_round_trip(packs: dict[bytes, list[Entry]]) -> None:
    assert decode_segment(encode_segment(packs), "s") == packs


@given(ENTRIES)
def test_entries_round_trip(entries: list[Entry]) -> None:
    assert decode_entries(encode_entries(entries)) == entries


@given(st.binary(max_size=400))
def test_decoders_refuse_noise(data: bytes) -> None:
    """Any bytes are either whole records or Corrupt; nothing else is raised."""
    for decode in (decode_entries, lambda noise: decode_segment(noise, "s")):
        try:
            decode(data)
        except Corrupt:
            continue


@given(st.integers(0, 5 << 20), st.data())
@settings(max_examples=50, deadline=None)
def test_zero_is_zero(size: int, data: st.DataObject) -> None:
    block = bytearray(size)
    assert is_zero(memoryview(block))
    if size:
        block[data.draw(st.integers(0, size - 1))] = 1
        assert not is_zero(memoryview(block))
        assert not is_zero(bytes(block))


def test_blocks_that_do_not_compress_are_stored_as_they_are(shared: Vault) -> None:
    with shared.writer() as writer:
        raw = writer.put(random.Random(5).randbytes(4000))
        packed = writer.put(b"x" * 4001)
        writer.finish()
    assert shared.index.find(raw)[0].entry[2:] == (4016, 4000, 0, 0)
    assert shared.index.find(packed)[0].entry[3:] == (4001, 0, 1)
    assert shared.index.find(packed)[0].entry.stored < 100


def test_a_pack_of_another_vault_does_not_open(shared: Vault, tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/other", create=True)
    other, _ = Vault.create(store, key=KEY, cache_dir=tmp_path)
    with shared.writer() as writer:
        writer.put(b"to be copied")
        writer.finish()
    for info in shared.store.list("packs/"):
        other.store.put(info.name, shared.store.get(info.name))
        with pytest.raises(Corrupt, match="belong"):
            read_footer(other.store, info.name, info.size, other.keys)


def test_many_small_blocks_close_a_pack_and_fill_several_segments(vault: Vault, tmp_path: Path) -> None:
    """What is read whole has a largest size: footers and segments, whatever is written."""
    builder = PackBuilder(tmp_path, vault.keys)
    entry = Entry(b"i" * 32, 64, 20, 4, 0, 0)
    builder.entries += [entry] * (MOST_ENTRIES - 1)
    assert not builder.full(TARGET)
    builder.entries.append(entry)
    assert builder.full(TARGET)
    builder.abandon()
    packs = {bytes([number]) * 32: [entry] * 30_000 for number in range(20)}
    parts = list(write_segments(vault.store, vault.keys, packs))
    assert [len(part) for _, part in parts] == [3, 3, 3, 3, 3, 3, 2]
    assert {digest for name, _ in parts for digest in read_segment(vault.store, vault.keys, name)} == packs.keys()
    with pytest.raises(VaultError, match="the most that readers accept"):
        write_segment(vault.store, vault.keys, packs | {b"x" * 32: [entry] * 30_000})
