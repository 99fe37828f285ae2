"""No space: found before the guest is frozen where that is possible, and never at the guest's expense."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import libvirt
import pytest

from tests.faults import world
from tests.faults.paused import Paused, paused_machine
from tests.faults.place import Place
from tests.guests.machines import MIB, GuestFactory

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]


def floor(place: Place, guest_folder: Path, *, below_free: int) -> None:
    """Let scratch lie on the disk, and ask that all but `below_free` bytes of what is free now stay free.

    A small file system would be nearer to life, but a libvirtd that has mounts of its own does not see ours."""
    place.scratch = guest_folder / f"scratch-{place.folder.name}"
    stat = os.statvfs(guest_folder)
    place.backup = f"scratch_floor = {stat.f_bavail * stat.f_frsize - below_free}"
    place.configure()


@contextmanager
def small(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes at `folder`."""
    folder.mkdir(mode=0o755, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0755", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Use up the space at `folder` but for `leave` bytes."""
    ballast = folder / "ballast"
    stat = os.statvfs(folder)
    ballast.write_bytes(bytes(stat.f_bavail * stat.f_frsize - leave))
    return ballast


def noise(machine: Paused, target: str, size: int) -> None:
    """Data that neither compresses nor repeats, on a disk of a machine that is off."""
    data = os.urandom(size)
    piece = machine.guest.folder / "noise"
    piece.write_bytes(data)
    command = ["qemu-io", "-f", "qcow2", "-c", f"write -s {piece} 0 {size}", str(machine.guest.disk(target))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    machine.content[target][:size] = data


def test_no_space_for_scratch_is_found_before_the_guest_is_frozen(
    place: Place, guest_folder: Path, tiny_guest: GuestFactory
) -> None:
    guest = tiny_guest({"vda": 64 * MIB}, label="space")
    floor(place, guest_folder, below_free=-(1 << 40))
    record = place.folder / "steps"
    ran = place.run("backup", "run", guest.name, count=record)
    error = ran.line("backup")["error"]
    assert (ran.code, error["code"]) == (1, "NoSpace")
    assert str(place.scratch) in error["message"]
    assert "[paths]" in error["hint"]
    assert "agent fsfreeze-freeze" not in record.read_text()
    assert "virDomainBackupBegin" not in record.read_text()
    assert world.strays(place, guest) == []
    floor(place, guest_folder, below_free=8 << 30)
    assert place.backed_up(guest.name)["consistency"] == "filesystem"
    assert world.strays(place, guest) == []


def test_scratch_that_fills_up_ends_the_backup_and_not_the_guest(
    place: Place, guest_folder: Path, tiny_guest: GuestFactory
) -> None:
    guest = tiny_guest({"vda": 64 * MIB}, label="space")
    floor(place, guest_folder, below_free=3 << 30)
    held = place.hold("before mkdir _connection", 1, "backup", "run", guest.name)
    with (guest_folder / "ballast").open("wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, 6 << 30)
    guest.out("dd if=/dev/urandom of=/data/vda/more bs=64k count=16 2>/dev/null && sync")
    ran = held.finish()
    (guest_folder / "ballast").unlink()
    assert (ran.code, ran.line("backup")["error"]["code"]) == (1, "NoSpace"), ran
    assert guest.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
    guest.out("echo alive > /data/vda/alive && sync")
    assert world.points(place) == {}
    assert world.strays(place, guest) == []
    place.backed_up(guest.name)
    assert world.strays(place, guest) == []


def test_a_full_vault_loses_nothing_and_goes_on_when_there_is_space(place: Place, tiny_guest: GuestFactory) -> None:
    machine = paused_machine(tiny_guest, start=False)
    with small(place.folder / "mnt", 2 * MIB) as folder:
        place.vault = folder / "vault"
        place.configure()
        (place.folder / "main.key").unlink()
        place.good("init")
        machine.start()
        place.backed_up(machine.name)
        machine.stop()
        noise(machine, "vda", 4 * MIB)
        machine.start()
        for _ in range(2):
            ran = place.run("backup", "run", machine.name)
            error = ran.line("backup")["error"]
            assert (ran.code, error["code"]) == (1, "NoSpace"), ran
            assert "space" in error["message"]
            assert world.strays(place, machine.guest) == []
            assert list((place.vault / ".staging").glob("*/*")) == []
        place.good("vault", "verify", "--full")
        subprocess.run(["mount", "-o", "remount,size=32m", folder], check=True)
        assert place.backed_up(machine.name)["disks"][0]["mode"] == "incremental"
        target = place.folder / "out.raw"
        place.good("restore", "disk", f"{machine.name}@latest", "vda", "--to", target)
        assert target.read_bytes() == machine.content["vda"]
        place.good("vault", "verify", "--full")
        assert world.strays(place, machine.guest) == []


def test_no_space_for_a_restore_is_found_before_anything_is_written(place: Place, tiny_guest: GuestFactory) -> None:
    machine = paused_machine(tiny_guest, start=False)
    noise(machine, "vda", 4 * MIB)
    place.backed_up(machine.name)
    with small(place.folder / "target", 3 * MIB) as folder:
        ran = place.run("restore", "disk", f"{machine.name}@latest", "vda", "--to", folder / "out.raw")
        assert (ran.code, ran.line("restore")["error"]["code"]) == (1, "NoSpace")
        ran = place.run("restore", "vm", f"{machine.name}@latest", "--name", machine.name + "-r", "--dir", folder)
        assert (ran.code, ran.line("restore")["error"]["code"]) == (1, "NoSpace")
        assert list(folder.iterdir()) == []
    assert world.strays(place, machine.guest) == []


@pytest.mark.parametrize("suffix", ["raw", "qcow2"])
def test_a_target_that_fills_up_meanwhile_leaves_no_file(place: Place, tiny_guest: GuestFactory, suffix: str) -> None:
    machine = paused_machine(tiny_guest, start=False)
    noise(machine, "vda", 6 * MIB)
    place.backed_up(machine.name)
    with small(place.folder / "target", 96 * MIB) as folder:
        held = place.hold(
            "before mkdir make_folder", 1,
            "restore", "disk", f"{machine.name}@latest", "vda", "--to", folder / f"out.{suffix}",
        )  # fmt: skip
        ballast = fill(folder, 2 * MIB)
        ran = held.finish()
        error = ran.line("restore")["error"]
        assert (ran.code, error["code"]) == (1, "NoSpace"), ran
        assert [path for path in folder.iterdir() if path != ballast] == []
    assert world.strays(place, machine.guest) == []
