"""A rotation of a secret that is cut off at any step leaves a file that opens the vault, and can be done again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.vault.faulty import Died, FaultyStore, Plan
from tests.vault.pictures import KEY, backup, image, read_disk
from workers.contract.errors import VaultError, WrongKey
from workers.vault import Vault, open_store
from workers.vault.keys import key_text, parse_phrase, read_key_file, read_passphrase_file
from workers.vault.rotation import Secret, rotate

NEW = b"\7" * 32
WORDS = b"correct horse"
STEPS = 40


class Place:
    """A vault, and the file that holds its key or passphrase."""

    def __init__(self, folder: Path, kind: Secret) -> None:
        folder.mkdir()
        self.folder, self.kind = folder, kind
        self.file = folder / "secret"
        self.file.touch(mode=0o600)
        self.file.write_bytes(key_text(KEY) if kind == "keyfile" else WORDS + b"\n")
        self.new = key_text(NEW) if kind == "keyfile" else b"battery staple\n"
        store = open_store(f"file://{folder}/vault", create=True)
        vault, self.phrase = Vault.create(store, **self.secret(), cache_dir=folder / "cache")
        self.point = backup(vault, "p1", {"vda": "AB0"})
        vault.close()

    def secret(self) -> dict[str, bytes | None]:
        if self.kind == "keyfile":
            return {"key": read_key_file(self.file), "passphrase": None}
        return {"key": None, "passphrase": read_passphrase_file(self.file)}

    def open(self, **secret: bytes | None) -> Vault:
        """With the secret in the file unless another is given."""
        store = open_store(f"file://{self.folder}/vault")
        return Vault.open(store, **(secret or self.secret()), cache_dir=self.folder / "cache")

    def store(self, plan: Plan | None = None) -> FaultyStore:
        return FaultyStore(open_store(f"file://{self.folder}/vault"), plan)

    def rotate(self, store: FaultyStore | None = None) -> None:
        rotate(store or self.store(), self.file, self.kind, self.new)

    def kinds(self) -> list[str]:
        return sorted(slot.kind for slot in self.open().slots.all())

    def left(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} - {"secret", "vault", "cache"}


@pytest.fixture(params=["keyfile", "passphrase"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(tmp_path / "place", request.param)


def test_the_new_secret_opens_the_vault_and_the_old_one_does_not(place: Place) -> None:
    old = place.secret()
    place.rotate()
    assert place.file.read_bytes() == place.new
    assert place.file.stat().st_mode & 0o777 == 0o600
    vault = place.open()
    assert read_disk(vault, place.point.disks[0]) == image("AB0")
    with pytest.raises(WrongKey):
        place.open(**old)
    assert place.open(passphrase=place.phrase.encode()).id == vault.id
    assert place.kinds() == sorted([place.kind, "recovery"])
    assert place.left() == set()


def test_both_open_it_where_the_old_one_is_kept(place: Place) -> None:
    old = place.secret()
    done = rotate(open_store(f"file://{place.folder}/vault"), place.file, place.kind, place.new, keep_old=True)
    assert done.removed == []
    assert place.open(**old).id == place.open().id
    place.open().slots.remove(done.kept[0])
    with pytest.raises(WrongKey):
        place.open(**old)
    assert place.left() == set()


def survives(place: Place, store: FaultyStore) -> bool:
    """A rotation with the faults of `store`, and another one after it; whether the first one came through."""
    old = place.secret()
    try:
        place.rotate(store)
        came_through = True
    except (Died, VaultError):
        came_through = False
    vault = place.open()  # whatever the file holds now
    assert read_disk(vault, place.point.disks[0]) == image("AB0")
    if place.secret() != old:
        place.new = key_text(b"\x0a" * 32) if place.kind == "keyfile" else b"third\n"
    place.rotate()
    assert place.kinds() == sorted([place.kind, "recovery"])
    assert place.left() == set()
    with pytest.raises(WrongKey):
        place.open(**old)
    return came_through


@pytest.mark.parametrize("when", ["die_before", "die_after", "fail_at"])
def test_a_fault_at_every_step(tmp_path: Path, when: str) -> None:
    for number in range(STEPS):
        place = Place(tmp_path / str(number), "keyfile")
        if survives(place, place.store(Plan(**{when: number}))):
            break
    else:
        pytest.fail("the walk did not reach the end of a rotation")
    assert number > 5


class DiesAt(FaultyStore):
    """Dies at the first such call, before or after it."""

    def __init__(self, place: Place, call: str, when: str) -> None:
        super().__init__(open_store(f"file://{place.folder}/vault"))
        self.call, self.when = call, when

    def _enter(self, call: str, name: str) -> int:
        if call == self.call:
            setattr(self.plan, self.when, len(self.plan.calls))
        return super()._enter(call, name)


@pytest.mark.parametrize("when", ["die_before", "die_after"])
@pytest.mark.parametrize("call", ["put", "delete"])
def test_a_death_at_every_change_that_a_new_passphrase_makes(tmp_path: Path, call: str, when: str) -> None:
    """At the changes only: stretching a passphrase takes its time."""
    place = Place(tmp_path / "place", "passphrase")
    assert not survives(place, DiesAt(place, call, when))


def test_what_was_left_by_a_death_between_the_file_steps_is_cleared_away(tmp_path: Path) -> None:
    place = Place(tmp_path / "place", "keyfile")
    half = place.folder / ".secret.rotating"
    half.write_bytes(b"0123")  # cut off while it was written
    half.chmod(0o600)
    os.link(place.file, place.folder / ".secret.rotated")  # died before the replacement
    place.rotate()
    assert place.left() == set()
    assert place.kinds() == ["keyfile", "recovery"]


def test_a_file_that_does_not_open_the_vault_is_left_alone(place: Place) -> None:
    other = key_text(bytes(32)) if place.kind == "keyfile" else b"wrong\n"
    place.file.write_bytes(other)
    with pytest.raises(WrongKey):
        place.rotate()
    assert place.file.read_bytes() == other
    assert place.left() == set()
    assert len(list(open_store(f"file://{place.folder}/vault").list("keys/"))) == 2


def test_the_same_secret_again_is_refused(place: Place) -> None:
    place.new = place.file.read_bytes()
    with pytest.raises(VaultError, match="already"):
        place.rotate()
    assert place.left() == set()
    assert place.open()


def test_a_recovery_phrase_in_a_passphrase_file_is_replaced_and_still_opens(tmp_path: Path) -> None:
    place = Place(tmp_path / "place", "passphrase")
    place.file.write_bytes(place.phrase.encode() + b"\n")
    place.rotate()
    assert place.kinds() == ["passphrase", "passphrase", "recovery"]
    assert parse_phrase(place.phrase.encode()) is not None
    assert place.open(passphrase=place.phrase.encode())


def test_a_link_to_the_file_stays_a_link(tmp_path: Path) -> None:
    place = Place(tmp_path / "place", "keyfile")
    link = tmp_path / "link"
    link.symlink_to(place.file)
    rotate(open_store(f"file://{place.folder}/vault"), link, "keyfile", place.new)
    assert link.is_symlink()
    assert place.file.read_bytes() == place.new


@pytest.mark.parametrize("when", ["die_before", "die_after"])
def test_a_rotation_of_the_data_key_that_dies_anywhere(tmp_path: Path, when: str) -> None:
    for number in range(STEPS):
        place = Place(tmp_path / str(number), "keyfile")
        faulty = FaultyStore(open_store(f"file://{place.folder}/vault"))
        vault = Vault.open(faulty, **place.secret(), cache_dir=place.folder / "cache")
        faulty.plan = Plan(**{when: number})
        try:
            vault.rotate_data_key()
            died = False
        except Died:
            died = True
        vault.close()
        again = place.open()
        assert read_disk(again, place.point.disks[0]) == image("AB0")
        second = backup(again, "p2", {"vda": "-C-"}, place.point)
        assert read_disk(again, second.disks[0]) == image("AC0")
        assert again.rotate_data_key() in (2, 3)
        if not died:
            break
    else:
        pytest.fail("the walk did not reach the end")
