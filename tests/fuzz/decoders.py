"""Every decoder of the vault as a function of bytes, with objects that it accepts. Used by Hypothesis
(`tests/vault/test_fuzz.py`) and by atheris (`python -m tests.fuzz`).

What must hold for any bytes: an answer, or an error of ours. And where bytes are authenticated or have a sum, whatever
is accepted says the same as an object that we wrote.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path

from blake3 import blake3

from tests.fuzz.memory_store import MemoryStore
from workers.contract.errors import StillframeError
from workers.contract.points import Point
from workers.vault import BlockMap, BlockReader, Vault
from workers.vault.blockmap import FANOUT, encode_page
from workers.vault.condemned import condemn, read_condemnation, read_verdict, verdict_name
from workers.vault.gone import note_gone, read_gone, since, strike_off
from workers.vault.identity import add_keyring, read_keyring, read_marker, write_marker
from workers.vault.index import Index, Location, decode_segment, encode_segment
from workers.vault.keys import make_slot, parse_phrase, read_slots, unwrap
from workers.vault.manifest import decode_manifest
from workers.vault.packs import DATA, PAGE, RAW, ZSTD, Entry, PackBuilder, decode_entries, encode_entries, read_footer
from workers.vault.sealing import (
    CONDEMNED,
    DAMAGE,
    INDEX,
    KEYRING,
    POINT,
    VERDICT,
    Keyring,
    decode_plain,
    encode_plain,
    open_object,
    seal_object,
)
from workers.vault.sessions import announce, read_session
from workers.vault.trash import check_clock, final, finals, pinned, standing

MASTER, VAULT, POINT_ID = bytes(range(32)), bytes(range(16)), "ab" * 16
KEYS = Keyring(VAULT, {1: b"k" * 32}, b"i" * 32)
NOW = datetime(2026, 11, 24, tzinfo=UTC)
PACK = "packs/" + "ab" * 32
BLOCKS = [b"a" * 5000, bytes(range(256)) * 16, b"page" * 100]


@dataclass(frozen=True)
class Decoder:
    """`decode` raises nothing but StillframeError. `genuine`: everything that it may ever return (None: anything)."""

    decode: Callable[[bytes], object]
    seeds: list[bytes]
    genuine: list[object] | None = field(default=None)

    def check(self, data: bytes) -> None:
        try:
            found = self.decode(data)
        except StillframeError:
            return
        assert self.genuine is None or found in self.genuine, f"accepted: {found!r}"


# --- sealed, and what is in them ------------------------------------------------------------------------------------


def _sealed(magic: bytes, name: str, plain: bytes) -> Decoder:
    keys = {0: MASTER} if magic == KEYRING else KEYS.data
    return Decoder(
        partial(open_object, magic, keys, VAULT, name), [seal_object(magic, keys, VAULT, name, plain)], [plain]
    )


def _condemnation(plain: bytes) -> object:
    """A plaintext that somebody with the key has sealed."""
    store = MemoryStore()
    name = condemn(store, KEYS, [plain])
    return read_condemnation(store, KEYS, name)


def _verdict(plain: bytes) -> object:
    name = verdict_name("condemned/" + "cd" * 32)
    store = MemoryStore({name: seal_object(VERDICT, KEYS.data, VAULT, name, plain)})
    return read_verdict(store, KEYS, "condemned/" + "cd" * 32)


def _keyring(plain: bytes) -> object:
    name = "keyring/00000001"
    sealed = seal_object(KEYRING, {0: MASTER}, VAULT, name, plain)
    return read_keyring(MemoryStore({name: sealed}), MASTER, VAULT)


def _keyring_plain() -> bytes:
    store = MemoryStore()
    add_keyring(store, MASTER, VAULT, 1, b"i" * 32)
    return open_object(KEYRING, {0: MASTER}, VAULT, "keyring/00000001", store.get("keyring/00000001"))


def manifest() -> dict[str, object]:
    disk = {
        "target": "vda", "source": "/a", "format": "raw", "identity": "i", "capacity": 1 << 20, "block_size": 65536,
        "root": "0" * 64, "mode": "full", "reason": "", "checkpoint": None,
    }  # fmt: skip
    point = {
        "schema_version": 2, "id": POINT_ID, "job": "j", "machine": {"hypervisor": "h", "uuid": "u", "name": "n"},
        "time": "2026-11-22T02:00:00Z", "definition": "<domain/>", "nvram": "AAA=", "disks": [disk],
        "consistency": "crash", "consistency_goal": "crash", "consistency_reason": "",
    }  # fmt: skip
    return {"point": point}


def _manifest(plain: bytes) -> object:
    point = decode_manifest(plain, POINT_ID, "a point")
    for disk in point.disks if point else []:
        BlockMap(_Page(b""), bytes.fromhex(disk.root), disk.capacity, disk.block_size)
    return point


# --- packs, pages ---------------------------------------------------------------------------------------------------


class _Page(BlockReader):
    """Every page is `data`."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def get_page(self, id: bytes) -> bytes:  # noqa: ARG002
        return self._data


def _page(data: bytes) -> object:
    """A page as the only one of a map of 5 blocks, or as the top of one with two leaf pages."""
    single = BlockMap(_Page(data), b"r" * 32, 5 * 4096, 4096)
    if data[5:6] == b"\0":
        return list(single.runs())
    return BlockMap(_Page(data), b"r" * 32, (FANOUT + 5) * 4096, 4096).load(b"r" * 32, 1, 0)


@cache
def _pack() -> tuple[bytes, tuple[Entry, ...]]:
    with tempfile.TemporaryDirectory() as folder:
        builder = PackBuilder(Path(folder), KEYS)
        for kind, codec, plain in ((DATA, RAW, BLOCKS[0]), (DATA, RAW, BLOCKS[1]), (PAGE, RAW, BLOCKS[2])):
            key = KEYS.data_id_key if kind == DATA else KEYS.page_id_key
            builder.append(kind, blake3(plain, key=key).digest(), len(plain), codec, plain)
        builder.close()
        return builder.path.read_bytes(), tuple(builder.entries)


@cache
def _reader_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def _reader(data: bytes) -> BlockReader:
    store = MemoryStore({PACK: data})
    return BlockReader(store, KEYS, Index(store, KEYS, Path(_reader_folder().name)))


def _blocks(data: bytes, entries: list[Entry]) -> list[bytes]:
    reader = _reader(data)
    found = []
    for entry in entries:
        try:
            found.append(reader.open(Location(PACK, entry), entry.kind))
        except StillframeError:
            continue
    reader._index.close()
    assert all(block in BLOCKS for block in found)
    return found


def _whole_pack(data: bytes) -> object:
    entries = read_footer(MemoryStore({PACK: data}), PACK, len(data), KEYS)
    _blocks(data, entries)
    return entries


def _lying_index(data: bytes) -> object:
    """The pack is as it was, and the index says of its blocks whatever it likes."""
    return _blocks(_pack()[0], decode_entries(data)[:8])


# --- plain ----------------------------------------------------------------------------------------------------------


def _summed(decode: Callable[[bytes], object], data: bytes) -> object:
    """JSON whose sum is right, whatever it says: sums need no key."""
    try:
        fields = json.loads(data)
        text = encode_plain({name: fields[name] for name in fields if name != "sum"})
    except (ValueError, TypeError, KeyError, RecursionError):
        text = data
    return decode(text)


def _marker(data: bytes) -> object:
    return read_marker(MemoryStore({"vault.json": data}))


def _slot(data: bytes, *, of: str = "slot") -> object:
    name = "keys/" + json.loads(_plain_seeds()[of])["id"]
    store = MemoryStore({name: data})
    list(read_slots(store))
    return unwrap(store, VAULT.hex(), key=b"s" * 32, passphrase=b"p")


def _stretched() -> bytes:
    """A passphrase's slot, as cheap as can be, for a passphrase that nobody has."""
    kdf = {"name": "argon2id", "salt": "00" * 16, "iterations": 1, "lanes": 1, "memory_kib": 8}
    fields = {"id": "0" * 16, "kind": "passphrase", "created": "2026-11-22T02:00:00Z", "kdf": kdf, "wrapped": "00" * 48}
    return encode_plain(fields)


def _session(data: bytes) -> object:
    return read_session(MemoryStore({"sessions/job": data}), "sessions/job")


def _trash(data: bytes) -> object:
    store = MemoryStore({f"trash/{POINT_ID}.1": data, f"trash/{POINT_ID}.1.end": data})
    return final(store, POINT_ID), finals(store)


def _deletion(data: bytes) -> object:
    """Whatever it says: it can be taken back, and never ends by itself before its time."""
    found = standing(MemoryStore({f"trash/{POINT_ID}.1": data}))
    check_clock(_Empty(), found.values(), NOW)
    return found[POINT_ID].until > NOW


class _Empty(Vault):
    """Without points."""

    def __init__(self) -> None:
        self.store = MemoryStore()

    def points(self) -> Iterator[Point]:
        return iter(())


def _pin(data: bytes) -> object:
    return POINT_ID in pinned(MemoryStore({f"pins/{POINT_ID}": data}))


def _gone(data: bytes) -> object:
    store = MemoryStore({"gone/00000001": data})
    notes = read_gone(store)
    strike_off(store, ["packs/a"])
    return [since(notes)]


@cache
def _plain_seeds() -> dict[str, bytes]:
    store = MemoryStore()
    write_marker(store, VAULT.hex())
    slot = make_slot(store, VAULT.hex(), MASTER, "keyfile", b"s" * 32)
    announce(store, "job", point="p1", reads=["p0"])
    note_gone(store, ["packs/a", "packs/b"], NOW)
    deletion = {"by": "me", "number": 1, "point": POINT_ID, "reason": "", "time": "2026-11-22T02:00:00+00:00"}
    return {
        "deletion": encode_plain({**deletion, "until": "2026-12-06T02:00:00+00:00"}),
        "pin": encode_plain({"by": "me", "point": POINT_ID, "reason": "why", "time": "2026-11-22T02:00:00+00:00"}),
        "gone": store.get("gone/00000001"),
        "marker": store.get("vault.json"),
        "slot": store.get(f"keys/{slot.id}"),
        "stretched slot": _stretched(),
        "session": store.get("sessions/job"),
        "trash": encode_plain({"by": "me", "outcome": "final", "time": "2026-11-22T02:00:00+00:00"}),
    }


_PLAIN: dict[str, Callable[[bytes], object]] = {
    "marker": _marker,
    "slot": _slot,
    "session": _session,
    "trash": _trash,
    "deletion": _deletion,
    "pin": _pin,
    "gone": _gone,
}


_REFUSED: dict[str, list[object]] = {"gone": [[{}]]}
"""What else a damaged object may be taken for: nothing noted."""


def _phrase(data: bytes) -> object:
    return parse_phrase(data)


def decoders() -> dict[str, Decoder]:
    """All of them, by name."""
    entries = list(_pack()[1])
    seeds = _plain_seeds()
    segment = encode_segment({b"d" * 32: entries, b"e" * 32: entries[:1]})
    plain_manifest = json.dumps(manifest()).encode()
    found = {
        "sealed keyring": _sealed(KEYRING, "keyring/00000001", _keyring_plain()),
        "sealed index": _sealed(INDEX, "", segment),
        "sealed point": _sealed(POINT, f"points/{POINT_ID}", plain_manifest),
        "sealed condemnation": _sealed(CONDEMNED, "", b"d" * 64),
        "sealed verdict": _sealed(VERDICT, "verdicts/" + "cd" * 32, b"d" * 32),
        "sealed damage": _sealed(DAMAGE, "", b"d" * 64),
        "segment": Decoder(lambda data: decode_segment(data, "a segment"), [segment]),
        "condemnation": Decoder(_condemnation, [b"d" * 64, b""]),
        "verdict": Decoder(_verdict, [b"d" * 64, b""]),
        "keyring": Decoder(_keyring, [_keyring_plain()]),
        "manifest": Decoder(_manifest, [plain_manifest, json.dumps({"aborted": POINT_ID}).encode()]),
        "page": Decoder(_page, [encode_page(0, b"x" * 32 * 5), encode_page(1, b"y" * 64), encode_page(0, bytes(160))]),
        "entries": Decoder(decode_entries, [encode_entries(entries)]),
        "pack": Decoder(_whole_pack, [_pack()[0]], [entries]),
        "lying index": Decoder(_lying_index, [encode_entries(entries), _lie(entries)]),
        "phrase": Decoder(_phrase, [b"00000-" * 8 + b"0"]),
    }
    for name, decode in _PLAIN.items():
        found[f"{name} as found"] = Decoder(decode, [seeds[name]], [decode(seeds[name]), *_REFUSED.get(name, [])])
        found[name] = Decoder(partial(_summed, decode), [seeds[name]])
    found["stretched slot"] = Decoder(partial(_summed, partial(_slot, of="stretched slot")), [seeds["stretched slot"]])
    found["plain"] = Decoder(lambda data: decode_plain(data, "an object"), list(seeds.values()))
    return found


def _lie(entries: list[Entry]) -> bytes:
    first = entries[0]
    return encode_entries(
        [first._replace(codec=ZSTD), first._replace(plain=1 << 31, stored=1 << 31), first._replace(kind=PAGE)]
    )
