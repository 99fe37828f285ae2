"""The vault is what FORMAT.md says: the second reader gets every byte, with each kind of secret, with and without the
index."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.vault import second_reader
from tests.vault.pictures import BLOCK, KEY, backup, image, point_of
from tests.vault.second_reader import SecondReader
from workers.contract.points import DiskPoint, Mode
from workers.vault import MapWriter, Vault, open_store, write_key_file
from workers.vault.condemned import condemn, give_verdict
from workers.vault.sealing import DAMAGE, encode_plain, seal_object
from workers.vault.trash import delete, finalise, pin, undelete

NOW = datetime(2026, 11, 24, tzinfo=UTC)


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


def test_deletions_pins_and_locks(tmp_path: Path, made: tuple[Vault, str]) -> None:
    vault = made[0]
    backup(vault, "p4", {"vda": "A"})
    backup(vault, "p5", {"vda": "B"})
    for id in ("p1", "p4", "p5"):
        delete(vault, id, now=NOW, until=NOW + timedelta(days=14), by="me", reason="")
    undelete(vault, "p4", now=NOW, by="me")
    pin(vault, "p2", now=NOW, by="me", reason="for ever")
    vault.store.put("locks/00000001", encode_plain({"days": 30, "number": 1}))
    vault.store.put("locks/00000002", encode_plain({"days": 90, "number": 2}))
    reader = SecondReader(tmp_path / "vault", key=KEY)
    assert reader.deletions() == {"p1": "", "p4": "restored", "p5": ""}
    assert sorted(reader.points()) == ["p1", "p2", "p4", "p5"], "what can be taken back is complete"
    assert reader.pins() == {"p2": "for ever"}
    assert reader.lock_days() == 90
    finalise(vault, NOW + timedelta(days=30), points=["p1"])
    assert reader.deletions()["p1"] == "final"
    assert sorted(reader.points()) == ["p2", "p4", "p5"]


def test_condemned_packs_and_verdicts(tmp_path: Path, made: tuple[Vault, str]) -> None:
    vault = made[0]
    packs = sorted(bytes.fromhex(info.name.removeprefix("packs/")) for info in vault.store.list("packs/"))
    name = condemn(vault.store, vault.keys, packs[:2])
    reader = SecondReader(tmp_path / "vault", key=KEY)
    short = name.removeprefix("condemned/")
    assert reader.condemned() == {short: ({packs[0].hex(), packs[1].hex()}, None)}
    give_verdict(vault.store, vault.keys, name, frozenset(packs[:1]))
    assert reader.condemned()[short][1] == {packs[0].hex()}
    reader.load_segments()
    assert reader.disk(reader.points()["p1"], "vda") == image("AaB0bC"), "until they are gone they are read"


def test_a_damaged_copy_is_avoided(tmp_path: Path, made: tuple[Vault, str]) -> None:
    """A copy that is named as damaged is not looked at; where nobody has named it, the other one serves."""
    vault = made[0]
    id = vault.reader().block_id(image("A"))
    [first] = vault.index.find(id)
    vault.index.distrust(id, first.pack)
    with vault.writer() as writer:
        writer.put(image("A"))
        writer.finish()
    assert len(vault.index.find(id)) == 2
    for info in list(vault.store.list("damage/")):  # the writer has told what we said of the first
        vault.store.delete(info.name)
    whole = SecondReader(tmp_path / "vault", key=KEY)
    whole.load_segments()
    victim, other = (f"packs/{pack}" for pack, _ in whole.index[id])
    [entry] = [copy.entry for copy in vault.index.find(id) if copy.pack == victim]
    path = tmp_path / "vault" / victim
    data = bytearray(path.read_bytes())
    data[entry.offset] ^= 1
    path.write_bytes(data)
    assert whole.disk(whole.points()["p1"], "vda") == image("AaB0bC")

    def note_damage(block: bytes, pack: str) -> SecondReader:
        plain = bytes.fromhex(pack.removeprefix("packs/")) + block
        sealed = seal_object(DAMAGE, vault.keys.data, vault.keys.vault, "", plain)
        vault.store.put(f"damage/{hashlib.sha256(sealed).hexdigest()}", sealed)
        reader = SecondReader(tmp_path / "vault", key=KEY)
        reader.load_segments()
        return reader

    reader = note_damage(id, victim)
    assert reader.disk(reader.points()["p1"], "vda") == image("AaB0bC")
    reader = note_damage(bytes(32), other)
    with pytest.raises(second_reader.Wrong, match="damaged"):
        reader.disk(reader.points()["p1"], "vda")
