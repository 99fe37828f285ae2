"""Small objects that claim, or become, very much. Each must be refused; how large this process has become until then is
printed, in MiB, after each: `python -m tests.fuzz.bombs`."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import zstandard
from blake3 import blake3

from tests.fuzz.decoders import KEYS, PACK, POINT_ID, VAULT, _reader
from tests.fuzz.memory_store import MemoryStore
from workers.contract.errors import StillframeError
from workers.vault.index import Location
from workers.vault.keys import unwrap
from workers.vault.packs import DATA, ZSTD, Entry, aad, nonce, read_footer
from workers.vault.sealing import (
    INDEX,
    NONCE,
    POINT,
    encode_plain,
    new_header,
    object_cipher,
    open_object,
)
from workers.vault.sealing import (
    PACK as PACK_MAGIC,
)

GIB = 1 << 30


def zeroes(size: int, *, told: bool) -> bytes:
    """A frame of `size` zero bytes, a few 10 KiB; `told`: with its size in the header."""
    packer = zstandard.ZstdCompressor(level=1, write_content_size=told).compressobj(size=size if told else -1)
    piece = bytes(1 << 20)
    return b"".join([packer.compress(piece) for _ in range(size >> 20)] + [packer.flush()])


def sealed(magic: bytes, name: str, packed: bytes) -> bytes:
    header = new_header(magic, 1, VAULT)
    raw = header.encode()
    return raw + object_cipher(header, KEYS.data, name).encrypt(NONCE, packed, raw + name.encode())


def block(payload: bytes, plain: int, stored: int | None = None) -> None:
    """A block of a pack that is sealed as it should be."""
    header = new_header(PACK_MAGIC, 1, VAULT)
    cipher = object_cipher(header, KEYS.data, PACK)
    id = blake3(b"x").digest()
    body = cipher.encrypt(nonce(64), payload, aad(VAULT, DATA, ZSTD, id, plain))
    entry = Entry(id, 64, stored or len(body), plain, DATA, ZSTD)
    _reader(header.encode() + body).open(Location(PACK, entry), DATA)


def footer(count: int) -> None:
    """A pack of 3 GiB, as its trailer says, whose footer is nearly all of it."""
    header = new_header(PACK_MAGIC, 1, VAULT)
    trailer = struct.pack(">QII8s", 64, count * 46 + 16, count, b"SFPKTAIL")

    class Vast(MemoryStore):
        def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
            assert name == PACK
            if offset == 0:
                return header.encode()
            return trailer if length == len(trailer) else bytes(length or 0)

    read_footer(Vast(), PACK, 64 + count * 46 + 16 + 24, KEYS)


def slot(**cost: int) -> None:
    kdf = {"name": "argon2id", "salt": "00" * 32, "iterations": 1, "lanes": 4, "memory_kib": 65536, **cost}
    fields = {"id": "0" * 16, "kind": "passphrase", "created": "2026-11-22T02:00:00Z", "kdf": kdf, "wrapped": "00" * 48}
    unwrap(MemoryStore({"keys/" + "0" * 16: encode_plain(fields)}), VAULT.hex(), key=None, passphrase=b"p")


def opened(magic: bytes, name: str, packed: bytes) -> None:
    open_object(magic, KEYS.data, VAULT, name, sealed(magic, name, packed))


def bombs() -> Iterator[tuple[str, partial[None]]]:
    claims = bytes.fromhex("28b52ffd") + b"\xe0" + struct.pack("<Q", 3 * GIB) + b"\1\0\0"
    yield "a segment that becomes 1 GiB", partial(opened, INDEX, "", zeroes(GIB, told=True))
    yield "a segment that does not say how much", partial(opened, INDEX, "", zeroes(GIB, told=False))
    yield "a point that claims 3 GiB", partial(opened, POINT, f"points/{POINT_ID}", claims)
    yield "a block that becomes 1 GiB", partial(block, zeroes(GIB, told=True), 4096)
    yield "a block that becomes 1 GiB, as its entry says", partial(block, zeroes(GIB, told=True), GIB)
    yield "a block that claims 3 GiB", partial(block, claims, 3 * GIB)
    yield "a block that takes 3 GiB", partial(block, b"x", 4096, 3 * GIB)
    yield "a footer of 60 million blocks", partial(footer, 60_000_000)
    yield "a slot that wants 4 GiB", partial(slot, memory_kib=4 << 20)
    yield "a slot that wants 200 MiB", partial(slot, memory_kib=200 << 10)


def largest() -> int:
    """The largest size of this process so far, MiB. Not `getrusage`: that counts what our parent had when it forked."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) >> 10


def main() -> None:
    for name, explode in bombs():
        try:
            explode()
        except StillframeError:
            print(f"{name}: {largest()}", flush=True)
        else:
            raise AssertionError(f"{name} was accepted")


if __name__ == "__main__":
    main()
