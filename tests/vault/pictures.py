"""Disks drawn as pictures, and a vault rendered as text.

A picture is one character a block: `0` is the zero block, `-` a block inherited from the base, any other character a
block of its own content, the same wherever it is drawn.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from workers.contract.machines import MachineRef
from workers.contract.points import Consistency, DiskPoint, Mode, Point
from workers.vault import ZERO_ID, BlockMap, MapWriter, Vault, open_store

BLOCK = 4096
KEY = bytes(range(32))
PACK = 6 * BLOCK
"""A small pack, so that small disks fill several."""
OPAQUE = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def content(letter: str) -> bytes:
    """Capitals do not compress, small letters do."""
    if letter == "0":
        return bytes(BLOCK)
    return random.Random(letter).randbytes(BLOCK) if letter.isupper() else letter.encode() * BLOCK


def image(picture: str) -> bytes:
    return b"".join(map(content, picture))


def new_vault(folder: Path, *, cache: str = "cache") -> Vault:
    store = open_store(f"file://{folder}/vault", create=True)
    return Vault.create(store, key=KEY, cache_dir=folder / cache)[0]


def reopened(folder: Path, *, cache: str = "cache") -> Vault:
    return Vault.open(open_store(f"file://{folder}/vault"), key=KEY, cache_dir=folder / cache)


def map_of(vault: Vault, disk: DiskPoint) -> BlockMap:
    return BlockMap(vault.reader(), bytes.fromhex(disk.root), disk.capacity, disk.block_size)


def store_disk(vault: Vault, target: str, picture: str, base: DiskPoint | None) -> DiskPoint:
    """What a transfer does: blocks, map, packs, index."""
    size = len(picture) * BLOCK
    with vault.writer(pack_size=PACK) as writer:
        blocks = MapWriter(writer, vault.reader(), size, BLOCK, map_of(vault, base) if base else None)
        for index, letter in enumerate(picture):
            if letter == "-":
                blocks.inherit(index, 1)
            else:
                blocks.set(index, writer.put(memoryview(content(letter))))
        root = blocks.finish()
        writer.finish()
    return DiskPoint(
        target=target,
        source=f"/images/{target}",
        format="qcow2",
        identity="i",
        capacity=size,
        block_size=BLOCK,
        root=root.hex(),
        mode=Mode.FULL if base is None else Mode.INCREMENTAL,
        reason="a test",
        checkpoint=None,
    )


def point_of(id: str, disks: list[DiskPoint]) -> Point:
    return Point(
        id=id,
        job="j1",
        machine=MachineRef(hypervisor="lab", uuid="u", name="web"),
        time=datetime(2026, 11, 22, 2, 0, tzinfo=UTC),
        definition="<domain/>",
        nvram=b"\x00nvram\xff",
        disks=disks,
        consistency=Consistency.CRASH,
        consistency_goal=Consistency.APPLICATION,
        consistency_reason="no agent",
    )


def backup(vault: Vault, id: str, pictures: Mapping[str, str], base: Point | None = None) -> Point:
    """A whole backup: every disk, then the manifest."""
    bases = {disk.target: disk for disk in base.disks} if base else {}
    disks = [store_disk(vault, target, picture, bases.get(target)) for target, picture in pictures.items()]
    point = point_of(id, disks)
    vault.commit(point)
    return point


def read_disk(vault: Vault, disk: DiskPoint) -> bytes:
    """What a restore does."""
    reader = vault.reader()
    pieces = []
    for _, count, id in map_of(vault, disk).runs():
        pieces.append(bytes(count * disk.block_size) if id is None else reader.get(id) * count)
    return b"".join(pieces)[: disk.capacity]


def render(vault: Vault) -> str:
    """Points as pictures, and which pack owns which block: packs are numbered as the points come to need them."""
    names = {vault.reader().block_id(content(letter)): letter for letter in OPAQUE}
    numbers: dict[str, int] = {}
    lines = []

    def number(id: bytes) -> int:
        pack = vault.index.find(id)[0].pack
        return numbers.setdefault(pack, len(numbers) + 1)

    for point in sorted(vault.points(), key=lambda point: point.id):
        for disk in point.disks:
            blocks = map_of(vault, disk)
            ids = [blocks.id_at(index) for index in range(blocks.count)]
            picture = "".join("0" if id == ZERO_ID else names[id] for id in ids)
            packs = "".join("." if id == ZERO_ID else str(number(id)) for id in ids)
            root = "." if blocks.root == ZERO_ID else str(number(blocks.root))
            lines.append(f"{point.id} {disk.target} {picture} in {packs} map in {root}")
    for pack, at in numbers.items():
        letters = "".join(names.get(entry.id, "#") for entry in vault.index.entries(pack))
        lines.append(f"pack {at}: {letters}")
    return "\n".join(lines)


def damage_block(folder: Path, vault: Vault, letter: str) -> str:
    """Flip a bit inside the sealed block of a letter; the name of its pack."""
    (location,) = vault.index.find(vault.reader().block_id(image(letter)))
    damage_at(folder / "vault" / location.pack, location.entry.offset + 7)
    return location.pack


def damage_at(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)
