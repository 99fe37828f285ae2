"""Who gets in, and who does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vault.pictures import KEY, backup, image, new_vault, read_disk, reopened
from workers.contract.errors import (
    Corrupt,
    NewerFormat,
    NotFound,
    TargetExists,
    VaultError,
    VaultMissing,
    WrongKey,
)
from workers.vault import Vault, open_store, read_key_file, write_key_file
from workers.vault.keys import format_phrase, parse_phrase
from workers.vault.sealing import encode_plain


def test_key_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "keys/main.key"
    key = write_key_file(path)
    assert read_key_file(path) == key
    assert path.read_text().strip() == key.hex()
    with pytest.raises(TargetExists):
        write_key_file(path)
    assert read_key_file(path) == key


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o602])
def test_exposed_key_file_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "main.key"
    write_key_file(path)
    path.chmod(mode)
    with pytest.raises(WrongKey, match="world-readable") as caught:
        read_key_file(path)
    assert caught.value.hint == f"chmod 600 {path}"
    assert caught.value.exit_code == 12


@pytest.mark.parametrize("content", [b"", b"zz" * 32, b"ab" * 31, b"ab" * 33, b"\xff" * 64, b"a b" + b"ab" * 31])
def test_what_is_not_a_key_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "main.key"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(WrongKey):
        read_key_file(path)


def test_absent_key_file(tmp_path: Path) -> None:
    with pytest.raises(WrongKey):
        read_key_file(tmp_path / "none")


@given(st.binary(min_size=25, max_size=25))
def test_phrase_round_trip(secret: bytes) -> None:
    phrase = format_phrase(secret)
    assert parse_phrase(phrase.encode()) == secret
    assert parse_phrase(phrase.lower().replace("-", " ").replace("0", "o").replace("1", "l").encode()) == secret


@given(st.binary(min_size=25, max_size=25), st.integers(0, 39), st.sampled_from("0123456789ABCDEFGHJKMNPQRSTVWXYZ"))
def test_one_mistyped_digit_is_noticed(secret: bytes, at: int, digit: str) -> None:
    phrase = format_phrase(secret).replace("-", "")
    mistyped = phrase[:at] + digit + phrase[at + 1 :]
    assert parse_phrase(mistyped.encode()) == (secret if mistyped == phrase else None)


def test_key_passphrase_and_recovery_phrase_open_the_same_vault(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/vault", create=True)
    vault, phrase = Vault.create(store, key=KEY, passphrase=b"correct horse", cache_dir=tmp_path)
    point = backup(vault, "p1", {"vda": "AB0"})
    for key, passphrase in ((KEY, None), (None, b"correct horse"), (None, phrase.encode())):
        again = Vault.open(store, key=key, passphrase=passphrase, cache_dir=tmp_path / "other")
        assert again.id == vault.id
        assert read_disk(again, again.point("p1").disks[0]) == image("AB0")
    assert point == vault.point("p1")


@pytest.mark.parametrize(("key", "passphrase"), [(bytes(32), None), (None, b"wrong"), (None, None), (None, KEY)])
def test_wrong_key(tmp_path: Path, key: bytes | None, passphrase: bytes | None) -> None:
    vault = new_vault(tmp_path)
    vault.slots.add(passphrase=b"right")
    with pytest.raises(WrongKey) as caught:
        Vault.open(vault.store, key=key, passphrase=passphrase, cache_dir=tmp_path)
    assert caught.value.exit_code == 12


def test_a_mistyped_recovery_phrase_is_told_from_a_wrong_one(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/vault", create=True)
    _, phrase = Vault.create(store, key=KEY, cache_dir=tmp_path)
    swapped = phrase[1] + phrase[0] + phrase[2:] if phrase[0] != phrase[1] else "0" + phrase[1:]
    for typed, mistyped in ((swapped, True), (format_phrase(bytes(25)), False), ("correct horse", False)):
        with pytest.raises(WrongKey) as caught:
            Vault.open(store, passphrase=typed.encode(), cache_dir=tmp_path)
        assert ("mistyped" in caught.value.hint) is mistyped


def test_slots_come_and_go(tmp_path: Path) -> None:
    vault = new_vault(tmp_path)
    assert sorted(slot.kind for slot in vault.slots.all()) == ["keyfile", "recovery"]
    other = vault.slots.add(key=b"\7" * 32)
    _, phrase = vault.slots.add_recovery()
    assert Vault.open(vault.store, key=b"\7" * 32, cache_dir=tmp_path).id == vault.id
    assert Vault.open(vault.store, passphrase=phrase.encode(), cache_dir=tmp_path).id == vault.id
    vault.slots.remove(other.id)
    with pytest.raises(WrongKey):
        Vault.open(vault.store, key=b"\7" * 32, cache_dir=tmp_path)
    with pytest.raises(NotFound):
        vault.slots.remove(other.id)
    slots = vault.slots.all()
    for slot in slots[:-1]:
        vault.slots.remove(slot.id)
    with pytest.raises(VaultError, match="last"):
        vault.slots.remove(slots[-1].id)


def test_a_rotated_data_key_is_used_and_the_old_one_still_reads(tmp_path: Path) -> None:
    vault = new_vault(tmp_path)
    first = backup(vault, "p1", {"vda": "AB0"})
    assert vault.rotate_data_key() == 2
    second = backup(vault, "p2", {"vda": "ABC"})
    assert vault.stats().blocks == 3 + 2  # A and B are known still, the two maps differ
    again = reopened(tmp_path, cache="other")
    assert read_disk(again, first.disks[0]) == image("AB0")
    assert read_disk(again, second.disks[0]) == image("ABC")
    versions = {vault.store.get(info.name, 12, 4) for info in vault.store.list("packs/")}
    assert versions == {b"\0\0\0\1", b"\0\0\0\2"}


def test_no_second_vault_in_the_same_place(tmp_path: Path) -> None:
    vault = new_vault(tmp_path)
    with pytest.raises(VaultError, match="already"):
        Vault.create(vault.store, key=KEY, cache_dir=tmp_path)
    backup(vault, "p1", {"vda": "A"})
    (tmp_path / "vault/vault.json").unlink()
    with pytest.raises(VaultError, match="missing"):
        Vault.create(open_store(f"file://{tmp_path}/vault", create=True), key=KEY, cache_dir=tmp_path)


def test_a_creation_that_was_cut_off_can_be_repeated(tmp_path: Path) -> None:
    new_vault(tmp_path)
    (tmp_path / "vault/vault.json").unlink()
    with pytest.raises(VaultMissing):
        open_store(f"file://{tmp_path}/vault")
    again = new_vault(tmp_path)
    assert len(again.slots.all()) == 2


def test_a_vault_needs_a_key(tmp_path: Path) -> None:
    with pytest.raises(WrongKey):
        Vault.create(open_store(f"file://{tmp_path}/v", create=True), cache_dir=tmp_path)


def test_newer_format(tmp_path: Path) -> None:
    new_vault(tmp_path)
    path = tmp_path / "vault/vault.json"
    path.write_text(json.dumps({"format": 2, "anything": "else"}))
    with pytest.raises(NewerFormat, match="format 2"):
        reopened(tmp_path)


@pytest.mark.parametrize(
    "kdf",
    [
        {"name": "argon2id", "salt": "00" * 32, "iterations": 3, "lanes": 4, "memory_kib": 1 << 40},
        {"name": "argon2id", "salt": "00" * 32, "iterations": 1 << 40, "lanes": 4, "memory_kib": 1024},
        {"name": "argon2id", "salt": "00" * 32},
        {"name": "rot13", "salt": "00" * 32},
        {"name": "hkdf-sha256", "salt": "xy"},
        {},
        None,
    ],
)
def test_a_hostile_slot_is_refused(tmp_path: Path, kdf: object) -> None:
    vault = new_vault(tmp_path)
    slots = vault.slots.all()
    fields = {"id": "0", "kind": "passphrase", "created": slots[0].created.isoformat(), "kdf": kdf, "wrapped": "00"}
    vault.store.put("keys/0", encode_plain(fields))
    with pytest.raises(Corrupt):
        Vault.open(vault.store, passphrase=b"x", cache_dir=tmp_path)
    assert Vault.open(vault.store, key=KEY, cache_dir=tmp_path).id == vault.id
