"""Key slots, key files and the recovery phrase: the ways to a vault's master key.

A slot wraps the master key under a secret of its holder, so that secrets can be added, changed and removed without
touching a byte of data. Only a passphrase is stretched (Argon2id): a key file has 256 random bits and a recovery
phrase 200, which nobody guesses however fast the function is.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from workers.contract.errors import Corrupt, ObjectMissing, TargetExists, VaultError, WrongKey
from workers.contract.machines import Value
from workers.contract.seams import Store
from workers.vault.sealing import NONCE, decode_plain, derive, encode_plain

Kind = Literal["keyfile", "passphrase", "recovery"]
KEY_SIZE = 32
_PHRASE_SIZE = 25
_DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_CHECKS = _DIGITS + "*~$=U"
_ARGON2ID = {"iterations": 3, "lanes": 4, "memory_kib": 64 << 10}
_ARGON2ID_LIMITS = {"iterations": 64, "lanes": 64, "memory_kib": 128 << 10}
"""Beyond these a slot is refused: whoever can write to the store could otherwise have us fill our memory."""


class SlotInfo(Value):
    """A key slot, without its secret."""

    id: str
    kind: Kind
    created: datetime
    approver: str = ""
    """Public key by which its holder approves (`approval.py`), 64 hex digits; empty: made before there were any."""


class Opened(NamedTuple):
    """A slot that a secret opens, and with it the master key."""

    slot: SlotInfo
    master: bytes
    approver: Ed25519PrivateKey


# --- key files -----------------------------------------------------------------------------------------------------


def write_key_file(path: Path) -> bytes:
    """Create a key file (0600), exclusively, and return its key. Raises TargetExists, VaultError."""
    key = secrets.token_bytes(KEY_SIZE)
    write_secret(path, key_text(key))
    return key


def key_text(key: bytes) -> bytes:
    """What a key file holds."""
    return key.hex().encode() + b"\n"


def write_secret(path: Path, text: bytes) -> None:
    """Create a file (0600), exclusively and durably. Raises TargetExists, VaultError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise TargetExists(f"key file {path} exists already", hint="it may open another vault: move it away") from None
    except OSError as error:
        raise VaultError(f"cannot write key file {path}: {error.strerror}") from error
    with os.fdopen(fd, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_key_file(path: Path) -> bytes:
    """The key in a key file. Raises WrongKey if it is absent, readable by others, or not a key."""
    return parse_key(read_secret(path, "key file", "key_file"), str(path))


def read_passphrase_file(path: Path) -> bytes:
    """The first line of a passphrase file. Raises WrongKey if it is absent or readable by others."""
    return read_secret(path, "passphrase file", "passphrase_file").split(b"\n", 1)[0]


def read_secret(path: Path, what: str, setting: str) -> bytes:
    """What a file that only its owner can read begins with. Raises WrongKey."""
    try:
        mode = path.stat().st_mode
        text = path.read_bytes()[:4096]
    except OSError as error:
        raise WrongKey(f"cannot read {what} {path}: {error.strerror}", hint=f"check {setting} of the vault") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise WrongKey(f"{what} {path} is world-readable or open to its group", hint=f"chmod 600 {path}")
    return text


def parse_key(text: bytes, where: str) -> bytes:
    """The key in the text of a key file; `where` it is from. Raises WrongKey, which does not tell the text."""
    digits = text.strip()
    try:
        key = bytes.fromhex(digits.decode("ascii"))
    except ValueError:
        key = b""
    if len(digits) != 2 * KEY_SIZE or len(key) != KEY_SIZE:
        raise WrongKey(f"{where} is not a key file: it should hold {2 * KEY_SIZE} hex digits")
    return key


# --- the recovery phrase -------------------------------------------------------------------------------------------


def format_phrase(secret: bytes) -> str:
    """`secret` (25 bytes) as people write it down: groups of Crockford base 32 and a check digit."""
    number = int.from_bytes(secret, "big")
    digits = "".join(_DIGITS[(number >> shift) & 31] for shift in range(8 * _PHRASE_SIZE - 5, -1, -5))
    groups = [digits[i : i + 5] for i in range(0, len(digits), 5)]
    return "-".join([*groups, _CHECKS[number % 37]])


def looks_like_phrase(text: bytes) -> bool:
    """Whether `text` has the length of a recovery phrase and is written in groups, right or not."""
    return len(_plain_phrase(text)) == 8 * _PHRASE_SIZE // 5 + 1 and b"-" in text


def _plain_phrase(text: bytes) -> str:
    """Without what only helps the eye; empty if it is not ASCII."""
    try:
        clean = text.decode("ascii").upper()
    except UnicodeDecodeError:
        return ""
    return "".join(clean.replace("-", "").split()).translate(str.maketrans("OIL", "011"))


def parse_phrase(text: bytes) -> bytes | None:
    """The secret of a recovery phrase, or None if `text` is not one (a mistyped digit fails the check digit)."""
    clean = _plain_phrase(text)
    body, check = clean[:-1], clean[-1:]
    if len(body) != 8 * _PHRASE_SIZE // 5 or any(digit not in _DIGITS for digit in body):
        return None
    number = 0
    for digit in body:
        number = number << 5 | _DIGITS.index(digit)
    return number.to_bytes(_PHRASE_SIZE, "big") if _CHECKS[number % 37] == check else None


# --- slots ---------------------------------------------------------------------------------------------------------


def make_slot(store: Store, vault_id: str, master: bytes, kind: Kind, secret: bytes) -> SlotInfo:
    """Wrap `master` under `secret` in a new slot."""
    slot = secrets.token_hex(8)
    kdf: dict[str, Any] = {"name": "hkdf-sha256", "salt": secrets.token_hex(32)}
    if kind == "passphrase":
        kdf |= {"name": "argon2id", **_ARGON2ID}
    created = datetime.now(UTC)
    kek = _kek(kdf, secret, slot)
    wrapped = AESGCM(kek).encrypt(NONCE, master, _aad(vault_id, slot, kind))
    approver = _approver(kek, vault_id).public_key().public_bytes_raw().hex()
    fields = {"id": slot, "kind": kind, "created": created.isoformat(), "kdf": kdf, "wrapped": wrapped.hex()}
    if not store.put(f"keys/{slot}", encode_plain({**fields, "approver": approver})):
        raise VaultError(f"key slot {slot} exists already")
    return SlotInfo(id=slot, kind=kind, created=created, approver=approver)


def read_slots(store: Store) -> Iterator[tuple[SlotInfo, dict[str, Any]]]:
    """Every slot with its fields. Raises Corrupt at a damaged one."""
    for info in store.list("keys/"):
        fields = decode_plain(store.get(info.name), info.name)
        yield _slot_info(info.name, fields), fields


def _slot_info(name: str, fields: dict[str, Any]) -> SlotInfo:
    try:
        slot = SlotInfo.model_validate({key: fields[key] for key in SlotInfo.model_fields if key in fields})
    except ValueError:
        raise Corrupt(f"{name} is not a key slot") from None
    if name != f"keys/{slot.id}":
        raise Corrupt(f"{name} holds another slot")
    return slot


def unwrap(
    store: Store, vault_id: str, *, key: bytes | None, passphrase: bytes | None, without: str | None = None
) -> bytes:
    """The master key, by any slot but `without`. Raises WrongKey if none opens, Corrupt if that may be because one is
    damaged."""
    secrets = _secrets(key, passphrase)
    damaged: Corrupt | None = None
    count = 0
    for info in list(store.list("keys/")):
        if info.name == f"keys/{without}":
            continue
        count += 1
        try:
            opened = _try_slot(store, info.name, vault_id, secrets)
        except Corrupt as error:
            damaged = error
            continue
        if opened is not None:
            return opened.master
    if damaged is not None:
        raise damaged
    mistyped = passphrase is not None and looks_like_phrase(passphrase) and "recovery" not in secrets
    raise WrongKey(
        f"the key does not open the vault: none of its {count} key slots fits",
        hint="that looks like a recovery phrase with a mistyped character: compare it with what was written down"
        if mistyped
        else "use the key file, a passphrase or the recovery phrase that belongs to this vault",
    )


def opened_slots(store: Store, vault_id: str, *, key: bytes | None, passphrase: bytes | None) -> list[Opened]:
    """Every slot that the secret opens; damaged ones are passed over. Raises WrongKey if no secret was given."""
    secrets = _secrets(key, passphrase)
    found = []
    for info in list(store.list("keys/")):
        with suppress(Corrupt, ObjectMissing):
            opened = _try_slot(store, info.name, vault_id, secrets)
            if opened is not None:
                found.append(opened)
    return found


def _secrets(key: bytes | None, passphrase: bytes | None) -> dict[str, bytes]:
    """Kind of slot → the secret that may open it."""
    found: dict[str, bytes] = {}
    if key is not None:
        found["keyfile"] = key
    if passphrase is not None:
        found["passphrase"] = passphrase
        if (phrase := parse_phrase(passphrase)) is not None:
            found["recovery"] = phrase
    if not found:
        raise WrongKey("no key was given for the vault", hint="set key_file, passphrase_file or key_command for it")
    return found


def _try_slot(store: Store, name: str, vault_id: str, secrets: dict[str, bytes]) -> Opened | None:
    fields = decode_plain(store.get(name), name)
    try:
        kind, slot, wrapped = fields["kind"], fields["id"], bytes.fromhex(fields["wrapped"])
        if kind not in secrets:
            return None
        kek = _kek(fields["kdf"], secrets[kind], slot)
        master = AESGCM(kek).decrypt(NONCE, wrapped, _aad(vault_id, slot, kind))
    except (KeyError, ValueError, TypeError):
        raise Corrupt(f"{name} is not a key slot") from None
    except InvalidTag:
        return None
    return Opened(_slot_info(name, fields), master, _approver(kek, vault_id))


def _approver(kek: bytes, vault_id: str) -> Ed25519PrivateKey:
    """What the holder of a slot signs approvals with: nobody else can derive it, the holder of another slot neither."""
    return Ed25519PrivateKey.from_private_bytes(derive(kek, bytes.fromhex(vault_id), b"stillframe approver"))


def _aad(vault_id: str, slot: str, kind: str) -> bytes:
    return f"stillframe slot {vault_id} {slot} {kind}".encode()


def _kek(kdf: dict[str, Any], secret: bytes, slot: str) -> bytes:
    salt = bytes.fromhex(kdf["salt"])
    if kdf["name"] == "hkdf-sha256":
        return derive(secret, salt, b"stillframe slot")
    if kdf["name"] != "argon2id":
        raise Corrupt(f"key slot {slot} uses {kdf['name']!r}, which this Stillframe does not know")
    cost = {name: kdf[name] for name in _ARGON2ID}
    if any(type(value) is not int or not 0 < value <= _ARGON2ID_LIMITS[name] for name, value in cost.items()):
        raise Corrupt(f"key slot {slot} asks for more work than any slot of ours")
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id  # needs cryptography 44

    return Argon2id(
        salt=salt, length=KEY_SIZE, iterations=cost["iterations"], lanes=cost["lanes"], memory_cost=cost["memory_kib"]
    ).derive(secret)
