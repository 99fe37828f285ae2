"""The vault is what FORMAT.md says: the second reader gets every byte, with each kind of secret, with and without the
index."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vault import second_reader
from tests.vault.pictures import BLOCK, KEY, backup, image, point_of
from tests.vault.second_reader import SecondReader
from workers.contract.points import DiskPoint, Mode
from workers.vault import MapWriter, Vault, open_store, write_key_file


@pytest.fixture
def made(tmp_path: Path) -> tuple[Vault, str]:
    store = open_store(f"file://{tmp_path}/vault", create=True)
    vault, phrase = Vault.create(store, key=KEY, passphrase=b"pass", cache_dir=tmp_path)
    first = backup(vault, "p1", {"vda": "AaB0bC", "vdb": "0000"})
    vault.rotate_data_key()
    backup(vault, "p2", {"vda": "---DdD"}, first)
    vault.settle("p3")
    return vault, phrase


@pytest.mark.parametrize("source", ["segments", "footers"])
@pytest.mark.parametrize("secret", ["key", "phrase", "passphrase"])
def test_it_reads_every_byte(tmp_path: Path, made: tuple[Vault, str], source: str, secret: str) -> None:
    match secret:
        case "key":
            reader = SecondReader(tmp_path / "vault", key=KEY)
        case "phrase":
            reader = SecondReader(tmp_path / "vault", phrase=made[1])
        case _:
            reader = SecondReader(tmp_path / "vault", passphrase=b"pass")
    if source == "segments":
        reader.load_segments()
    else:
        reader.load_footers()
    points = reader.points()
    assert sorted(points) == ["p1", "p2"]
    assert reader.disk(points["p1"], "vda") == image("AaB0bC")
    assert reader.disk(points["p1"], "vdb") == image("0000")
    assert reader.disk(points["p2"], "vda") == image("AaBDdD")


def test_a_disk_of_three_levels_and_a_short_last_block(tmp_path: Path, made: tuple[Vault, str]) -> None:
    vault, block = made[0], 512
    count = 1024**2 + 3
    size = count * block - 100
    written = {0: 512, 5000: 512, count - 2: 512, count - 1: 412}
    content = {index: random.Random(index).randbytes(length) for index, length in written.items()}
    with vault.writer() as writer:
        blocks = MapWriter(writer, vault.reader(), size, block, None)
        position = 0
        for index, data in content.items():
            if index > position:
                blocks.zero(position, index - position)
            blocks.set(index, writer.put(data))
            position = index + 1
        root = blocks.finish().hex()
        writer.finish()
    disk = DiskPoint(
        target="vdz", source="", format="raw", identity="", capacity=size, block_size=block, root=root,
        mode=Mode.FULL, reason="", checkpoint=None,
    )  # fmt: skip
    vault.commit(point_of("p9", [disk]))
    reader = SecondReader(tmp_path / "vault", key=KEY)
    reader.load_footers()
    expected = bytearray(size)
    for index, data in content.items():
        expected[index * block : index * block + len(data)] = data
    assert reader.disk(reader.points()["p9"], "vdz") == expected


def test_as_a_program(tmp_path: Path) -> None:
    key = write_key_file(tmp_path / "key")
    vault, _ = Vault.create(open_store(f"file://{tmp_path}/v", create=True), key=key, cache_dir=tmp_path)
    backup(vault, "p1", {"vda": "AB0"})
    program = [sys.executable, second_reader.__file__, str(tmp_path / "v"), str(tmp_path / "key")]
    assert subprocess.run(program, capture_output=True, check=True).stdout == b"p1\n"
    disk = subprocess.run([*program, "p1", "vda"], capture_output=True, check=True).stdout
    assert disk == image("AB0")
    assert len(disk) == 3 * BLOCK


def test_it_shares_no_code_with_the_vault() -> None:
    text = Path(second_reader.__file__).read_text()
    assert "from workers" not in text
    assert "import workers" not in text
