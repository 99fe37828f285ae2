"""How small things are sealed, and the keys of a vault.

Every object has a key of its own, derived from a random salt in its header, so a fixed nonce is safe and writers on
different hosts need no counter in common. The header and the object's name are authenticated: an object that is put
under another name, or in another vault, does not open.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from workers.contract.errors import Corrupt, NewerFormat, VaultError

FORMAT = 1
TAG = 16
NONCE = bytes(12)
_HEADER = struct.Struct(">8sII16s32s")
HEADER_SIZE = _HEADER.size
PLAIN_LIMIT = 64 << 10
"""Bytes of the largest plain object."""
SEALED_LIMIT = 16 << 20
"""Bytes of the largest plaintext of a sealed object: what decoding it can cost stays below 256 MiB."""

KEYRING = b"SFKRING\0"
PACK = b"SFPACK\0\0"
INDEX = b"SFINDEX\0"
POINT = b"SFPOINT\0"
CONDEMNED = b"SFCONDM\0"
VERDICT = b"SFVERDT\0"
DAMAGE = b"SFDAMAG\0"
_INFO = {
    KEYRING: b"stillframe keyring",
    PACK: b"stillframe pack",
    INDEX: b"stillframe index",
    POINT: b"stillframe point",
    CONDEMNED: b"stillframe condemned",
    VERDICT: b"stillframe verdict",
    DAMAGE: b"stillframe damage",
}


class Header(NamedTuple):
    magic: bytes
    format: int
    key_version: int
    vault: bytes
    salt: bytes

    def encode(self) -> bytes:
        return _HEADER.pack(*self)


@dataclass(frozen=True)
class Keyring:
    """The keys of one vault. `data` maps key versions to data keys; the largest is used for writing."""

    vault: bytes
    data: Mapping[int, bytes] = field(repr=False)
    id_key: bytes = field(repr=False)
    data_id_key: bytes = field(init=False, repr=False)
    page_id_key: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "data_id_key", derive(self.id_key, self.vault, b"stillframe id data"))
        object.__setattr__(self, "page_id_key", derive(self.id_key, self.vault, b"stillframe id page"))

    @property
    def current(self) -> int:
        return max(self.data)


def derive(key: bytes, salt: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 (RFC 5869), 32 bytes."""
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=salt, info=info).derive(key)


def new_header(magic: bytes, key_version: int, vault: bytes) -> Header:
    return Header(magic, FORMAT, key_version, vault, secrets.token_bytes(32))


def parse_header(data: bytes, magic: bytes, vault: bytes, what: str) -> Header:
    """Raises Corrupt, or NewerFormat; `what` names the object in messages."""
    if len(data) < HEADER_SIZE:
        raise Corrupt(f"{what} is cut short: {len(data)} bytes")
    header = Header(*_HEADER.unpack_from(data))
    if header.magic != magic:
        raise Corrupt(f"{what} does not begin as it should")
    if header.format > FORMAT:
        raise NewerFormat(f"{what} is of format {header.format}, this Stillframe knows {FORMAT}", hint=UPGRADE)
    if header.format != FORMAT or header.vault != vault:
        raise Corrupt(f"{what} does not belong to this vault")
    return header


UPGRADE = "upgrade Stillframe on this host"


def object_cipher(header: Header, keys: Mapping[int, bytes], what: str) -> AESGCM:
    """The cipher of one object. Raises Corrupt if its key version is unknown."""
    key = keys.get(header.key_version)
    if key is None:
        raise Corrupt(f"{what} is sealed under key version {header.key_version}, which the vault does not have")
    return AESGCM(derive(key, header.salt, _INFO[header.magic]))


def seal_object(magic: bytes, keys: Mapping[int, bytes], vault: bytes, name: str, plain: bytes) -> bytes:
    """A sealed object under the newest of `keys`; `name` is authenticated (empty for index segments). Raises
    VaultError for more than readers accept."""
    if len(plain) > SEALED_LIMIT:
        what = name or "an object"
        raise VaultError(f"{what} would hold {len(plain)} bytes, and {SEALED_LIMIT} are the most that readers accept")
    header = new_header(magic, max(keys), vault)
    cipher = object_cipher(header, keys, name)
    raw = header.encode()
    return raw + cipher.encrypt(NONCE, zstandard.ZstdCompressor(level=1).compress(plain), raw + name.encode())


def open_object(
    magic: bytes, keys: Mapping[int, bytes], vault: bytes, name: str, data: bytes, *, what: str = ""
) -> bytes:
    """The plaintext of a sealed object. Raises Corrupt, or NewerFormat."""
    what = what or name
    header = parse_header(data, magic, vault, what)
    cipher = object_cipher(header, keys, what)
    try:
        packed = cipher.decrypt(NONCE, data[HEADER_SIZE:], data[:HEADER_SIZE] + name.encode())
        return decompressed(zstandard.ZstdDecompressor(), packed, SEALED_LIMIT)
    except (InvalidTag, ValueError, zstandard.ZstdError):
        raise Corrupt(f"{what} is not what was written") from None


def decompressed(decompressor: zstandard.ZstdDecompressor, packed: bytes, limit: int) -> bytes:
    """The content of one zstd frame, of at most `limit` bytes. Raises ValueError, ZstdError.

    What a frame says of its size is allocated before a byte of it is looked at, so it is looked at first."""
    size = zstandard.frame_content_size(packed)
    if not 0 <= size <= limit:
        raise ValueError(f"a frame of {size} bytes, where at most {limit} can be")
    return decompressor.decompress(packed, allow_extra_data=False)


def encode_plain(fields: Mapping[str, Any]) -> bytes:
    """A plain object: JSON with a check sum, so that damage is told from a wrong key."""
    return (json.dumps({**fields, "sum": _sum(fields)}, sort_keys=True, indent=1) + "\n").encode()


def decode_plain(data: bytes, what: str) -> dict[str, Any]:
    """Raises Corrupt."""
    fields, right = None, False
    # Nesting that can just be parsed may be too deep to be written again for the sum.
    with suppress(ValueError, RecursionError):
        fields = json.loads(data) if len(data) <= PLAIN_LIMIT else None
        right = isinstance(fields, dict) and fields.pop("sum", None) == _sum(fields)
    if not isinstance(fields, dict):
        raise Corrupt(f"{what} is not what was written")
    if not right:
        raise Corrupt(f"{what} is not what was written: its check sum is wrong")
    return fields


def _sum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
