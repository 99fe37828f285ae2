"""Bad input: a clear error with its exit code, and nothing is changed or left behind."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from tests.cli.conftest import UNREACHABLE
from tests.faults import world
from tests.faults.conftest import NewPlace
from tests.faults.paused import Paused
from tests.faults.place import Place

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]


def unchanged(place: Place) -> dict[str, bytes]:
    """Every file of the vault."""
    return {str(path): path.read_bytes() for path in place.vault.rglob("*") if path.is_file()}


def test_a_machine_that_nobody_knows(place: Place, machine: Paused) -> None:
    ran = place.run("backup", "run", machine.name + "x")
    assert ran.code == 2
    assert f"{machine.name}x" in ran.err
    assert machine.name in ran.err.splitlines()[-1]  # the suggestion


def test_a_point_and_a_disk_that_nobody_knows(place: Place, machine: Paused) -> None:
    place.backed_up(machine.name)
    ran = place.run("restore", "disk", f"{machine.name}@latest", "vdz", "--to", place.folder / "out.raw")
    assert (ran.code, ran.line("error")["code"]) == (2, "NotFound")
    assert "vda" in ran.line("error")["hint"]
    ran = place.run("restore", "disk", "ffffffff", "vda", "--to", place.folder / "out.raw")
    assert (ran.code, ran.line("error")["code"]) == (2, "NotFound")
    assert not (place.folder / "out.raw").exists()


def test_a_key_that_is_missing_open_to_all_or_another_vaults(
    place: Place, machine: Paused, new_place: NewPlace
) -> None:
    before = place.backed_up(machine.name)
    vault, key = unchanged(place), place.folder / "main.key"
    good, other = key.read_bytes(), (new_place().folder / "main.key").read_bytes()

    def refused(words: str) -> None:
        ran = place.run("backup", "run", machine.name)
        error = ran.line("backup")["error"]
        assert (ran.code, error["code"]) == (12, "WrongKey"), ran
        assert words in error["message"] + error["hint"]
        assert "Traceback" not in ran.err
        assert unchanged(place) == vault

    key.unlink()
    refused("No such file")
    key.write_bytes(good)
    key.chmod(0o644)
    refused("chmod 600")
    key.chmod(0o600)
    key.write_bytes(other)
    refused("does not open")
    key.write_bytes(good)
    assert place.backed_up(machine.name)["disks"][0]["mode"] == "incremental"
    assert before["id"] in world.points(place)
    assert world.strays(place, machine.guest) == []


def test_a_hypervisor_that_cannot_be_reached(new_place: NewPlace, machine: Paused) -> None:
    place = new_place(uri=UNREACHABLE)
    ran = place.run("backup", "run", machine.name)
    assert (ran.code, ran.line("error")["code"]) == (1, "HypervisorUnreachable")
    assert place.query("select count(*) from job") == [(0,)]


def test_a_vault_that_is_not_mounted(place: Place, machine: Paused) -> None:
    place.backed_up(machine.name)
    away = place.vault.with_name("away")
    place.vault.rename(away)
    place.vault.mkdir()
    ran = place.run("backup", "run", machine.name)
    assert (ran.code, ran.line("backup")["error"]["code"]) == (10, "VaultMissing")
    assert "mounted" in ran.line("backup")["error"]["hint"]
    assert list(place.vault.iterdir()) == []
    place.vault.rmdir()
    away.rename(place.vault)
    assert place.backed_up(machine.name)["disks"][0]["mode"] == "incremental"
    assert world.strays(place, machine.guest) == []


def test_a_vault_of_a_newer_format(place: Place, machine: Paused) -> None:
    place.backed_up(machine.name)
    marker = place.vault / "vault.json"
    old = marker.read_bytes()
    fields = json.loads(old)
    del fields["sum"]
    fields["format"] += 1
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    marker.write_text(json.dumps({**fields, "sum": hashlib.sha256(canonical.encode()).hexdigest()}))
    before = unchanged(place)
    ran = place.run("backup", "run", machine.name)
    assert (ran.code, ran.line("backup")["error"]["code"]) == (1, "NewerFormat")
    ran = place.run("restore", "disk", f"{machine.name}@latest", "vda", "--to", place.folder / "out.raw")
    assert (ran.code, ran.line("restore")["error"]["code"]) == (1, "NewerFormat")
    assert unchanged(place) == before
    marker.write_bytes(old)
    place.backed_up(machine.name)


def test_a_restore_overwrites_nothing(place: Place, machine: Paused) -> None:
    place.backed_up(machine.name)
    target = place.folder / "mine.raw"
    target.write_text("precious")
    ran = place.run("restore", "disk", f"{machine.name}@latest", "vda", "--to", target)
    assert (ran.code, ran.line("restore")["error"]["code"]) == (2, "TargetExists")
    assert target.read_text() == "precious"
    ran = place.run(
        "restore", "vm", f"{machine.name}@latest", "--name", machine.name, "--dir", place.folder / "restored"
    )
    assert (ran.code, ran.line("restore")["error"]["code"]) == (2, "TargetExists")
    assert not (place.folder / "restored").exists()
    link = place.folder / "link.raw"
    link.symlink_to(place.folder / "nowhere")
    assert place.run("restore", "disk", f"{machine.name}@latest", "vda", "--to", link).code == 2
    assert not (place.folder / "nowhere").exists()
    assert world.strays(place, machine.guest) == []


def test_a_replacement_is_not_made_without_somebody_to_ask(place: Place, machine: Paused) -> None:
    place.backed_up(machine.name)
    ran = place.run("restore", "vm", f"{machine.name}@latest", "--replace")
    assert (ran.code, ran.line("error")["code"]) == (2, "UsageError")
    assert machine.domain.isActive()


def test_two_backups_of_one_machine_at_once(place: Place, machine: Paused) -> None:
    held = place.hold("before mkdir _connection", 1, "backup", "run", machine.name)
    ran = place.run("backup", "run", machine.name)
    first = held.finish()
    assert (ran.code, ran.line("error")["code"]) == (11, "Busy")
    assert "stillframe job watch" in ran.line("error")["hint"]
    assert first.code == 0, first
    assert world.strays(place, machine.guest) == []


def test_two_catalogs_that_back_up_one_machine_at_once(place: Place, machine: Paused, new_place: NewPlace) -> None:
    """Ours too, but of another catalog: it is somebody else's all the same."""
    other = new_place()
    held = place.hold("before mkdir _connection", 1, "backup", "run", machine.name)
    ran = other.run("backup", "run", machine.name)
    first = held.finish()
    assert (ran.code, ran.line("backup")["error"]["code"]) == (11, "Busy")
    assert first.code == 0, first
    assert world.strays(place, machine.guest) == []


def test_a_disk_that_is_cut_short_is_never_published(place: Place, machine: Paused) -> None:
    machine.write("vda", 0, 1 << 20, 7)
    place.backed_up(machine.name)
    pack = max((place.vault / "packs").iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(pack, pack.stat().st_size // 2)
    target = place.folder / "cut.raw"
    ran = place.run("restore", "disk", f"{machine.name}@latest", "vda", "--to", target)
    assert (ran.code, ran.line("restore")["error"]["code"]) == (1, "Corrupt")
    assert [path for path in place.folder.iterdir() if path.name.startswith("cut")] == []
