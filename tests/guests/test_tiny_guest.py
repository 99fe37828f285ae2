"""The tiny guest is what the other tests believe: real agent, real file systems, discards that reach the image."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import libvirt
import pytest

from orchestrator.demo.disks import make_ext4_disk
from orchestrator.demo.host import machines, shut_down
from orchestrator.demo.in_guest import agent_command, guest_out
from orchestrator.demo.initramfs import pack
from orchestrator.demo.kernel import GuestBuildError
from orchestrator.demo.tiny_guest import TinyImage, build_tiny_image, require_traversable
from tests.guests.machines import MACHINE_PREFIX, MIB, Guest, GuestFactory, remove_leftovers
from workers.contract.errors import GuestError


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_the_guest_has_both_disks_mounted_and_runs_commands(booted_guest: Guest) -> None:
    mounts = booted_guest.out("grep /data /proc/mounts | cut -d' ' -f1-3")
    assert mounts.splitlines() == ["/dev/vda /data/vda ext4", "/dev/vdb /data/vdb ext4"]
    code, text = booted_guest.run("echo seen; echo why >&2; exit 3")
    assert (code, text) == (3, "seen\nwhy\n")
    with pytest.raises(GuestError, match="exit code 4"):
        booted_guest.out("exit 4")
    with pytest.raises(GuestError, match="too many"):
        guest_out(booted_guest.domain, "cat", stdin=bytes(1 << 20))


def test_files_are_hashed_from_inside(booted_guest: Guest) -> None:
    content = bytes(range(256)) * 200
    guest_out(booted_guest.domain, "cat > /data/vdb/hashed", stdin=content)
    try:
        assert booted_guest.hashes("/data/vdb")["/data/vdb/hashed"] == hashlib.sha256(content).hexdigest()
    finally:
        booted_guest.out("rm /data/vdb/hashed")


def test_freeze_stops_writes_on_every_file_system_until_thaw(booted_guest: Guest) -> None:
    frozen = agent_command(booted_guest.domain, "guest-fsfreeze-freeze")
    try:
        status = agent_command(booted_guest.domain, "guest-fsfreeze-status")
    finally:
        thawed = agent_command(booted_guest.domain, "guest-fsfreeze-thaw")
    assert (frozen, status, thawed) == (2, "frozen", 2)
    assert (
        booted_guest.out("echo written > /data/vda/after && cat /data/vda/after && rm /data/vda/after") == "written\n"
    )


def test_fstrim_in_the_guest_makes_holes_in_the_image(tiny_guest: GuestFactory) -> None:
    guest = tiny_guest({"vda": 128 * MIB})
    empty = allocated(guest.disk("vda"))
    guest.out("dd if=/dev/urandom of=/data/vda/big bs=1M count=32 && sync")
    assert allocated(guest.disk("vda")) > empty + 30 * MIB
    guest.out("rm /data/vda/big && sync && fstrim /data/vda")
    assert allocated(guest.disk("vda")) < empty + 4 * MIB


def test_an_orderly_shutdown_leaves_clean_file_systems(tiny_guest: GuestFactory) -> None:
    guest = tiny_guest({"vda": 64 * MIB}, formats={"vda": "raw"})
    guest.out("echo kept > /data/vda/file")
    shut_down(guest.domain)
    dumpe2fs = shutil.which("dumpe2fs", path="/usr/sbin:/sbin") or "dumpe2fs"
    done = subprocess.run([dumpe2fs, "-h", str(guest.disk("vda"))], capture_output=True, text=True, check=True)
    assert "Filesystem state:         clean" in done.stdout
    assert "needs_recovery" not in done.stdout
    guest.start()
    assert guest.out("cat /data/vda/file") == "kept\n"


def test_a_guest_without_agent_boots_and_says_so_on_its_console(tiny_guest: GuestFactory) -> None:
    guest = tiny_guest({"vda": 64 * MIB}, agent=False)
    with pytest.raises(libvirt.libvirtError, match="agent"):
        agent_command(guest.domain, "guest-ping")


def test_content_is_put_on_a_disk_without_mounting_it(tmp_path: Path, tiny_guest: GuestFactory) -> None:
    (tmp_path / "content" / "etc").mkdir(parents=True)
    (tmp_path / "content" / "etc" / "motd").write_text("hello\n")
    guest = tiny_guest({"vda": 64 * MIB}, start=False)
    guest.disk("vda").unlink()
    make_ext4_disk(guest.disk("vda"), 64 * MIB, content=tmp_path / "content")
    guest.start()
    assert guest.out("cat /data/vda/etc/motd") == "hello\n"


def test_the_same_parts_make_the_same_image(tiny_guest_image: TinyImage, guest_cache: Path, guest_folder: Path) -> None:
    assert build_tiny_image(guest_folder, guest_cache) == tiny_guest_image


def test_a_cpio_made_here_is_read_by_cpio(tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(
        pack({"a/b/c": (0o100644, b"12345"), "a/link": (0o120777, b"b/c"), "z": (0o100755, b"")})
    )
    subprocess.run("cpio -id --quiet < archive", shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "a/b/c").read_bytes() == b"12345"
    assert (tmp_path / "a/link").read_text() == "12345"
    assert (tmp_path / "z").stat().st_mode & 0o777 == 0o755


def test_a_folder_that_qemu_cannot_pass_through_is_refused(tmp_path: Path) -> None:
    private = tmp_path / "private"
    (private / "disks").mkdir(parents=True)
    private.chmod(0o700)
    with pytest.raises(GuestBuildError, match="cannot pass through"):
        require_traversable(private / "disks")


def test_machines_of_a_killed_run_are_removed_and_those_of_a_living_one_stay(
    libvirt_host: libvirt.virConnect, booted_guest: Guest
) -> None:
    dead = subprocess.Popen(["/bin/true"])
    dead.wait()
    name = f"{MACHINE_PREFIX}{dead.pid}-left-1"
    libvirt_host.defineXML(
        f"<domain type='qemu'><name>{name}</name><memory>65536</memory><os><type>hvm</type></os></domain>"
    )
    assert name in remove_leftovers(libvirt_host)
    names = {domain.name() for domain in machines(libvirt_host, MACHINE_PREFIX)}
    assert name not in names
    assert booted_guest.name in names
