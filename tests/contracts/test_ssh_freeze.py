"""Freezing over SSH: real ext4 file systems that are really frozen, by the freezer in dash and in busybox, on this host
(see sshd.py), in a whole guest whose root is frozen, and in the small one."""

from __future__ import annotations

import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

import libvirt
import pytest

from orchestrator.demo.tiny_guest import TinyImage
from tests.contracts.sshd import UUID, OpenSsh, SshGuest, Wire, free_port, make_key, until, waits
from tests.guests.machines import Guest
from workers.contract.errors import GuestError, GuestTimeout
from workers.contract.guests import GuestOs
from workers.contract.seams import GuestChannel
from workers.guests.host_keys import PinnedKey
from workers.guests.ssh import SshChannel

pytest_plugins = ["tests.contracts.ssh_fixtures"]
MIB = 1 << 20


class TestFreeze:
    def test_all_are_frozen_and_thawed(self, ssh_guest: SshGuest, ssh: GuestChannel) -> None:
        assert not ssh.frozen()
        assert ssh.thaw() == 0
        assert ssh.freeze() == 2
        writers = [ssh_guest.popen(f"echo {disk} > /data/{disk}/written") for disk in ("vda", "vdb")]
        assert all(waits(writer) for writer in writers)
        assert ssh.frozen()
        assert ssh.ping()
        with pytest.raises(GuestError, match="already"):
            ssh.freeze()
        assert ssh.thaw() == 2
        assert [writer.wait(30) for writer in writers] == [0, 0]
        assert not ssh.frozen()
        assert ssh.thaw() == 0

    def test_some(self, ssh_guest: SshGuest, ssh: GuestChannel) -> None:
        assert ssh.freeze(["/data/vdb", "/not/mounted"]) == 1
        assert not waits(ssh_guest.popen("echo x > /data/vda/written"))
        writer = ssh_guest.popen("echo x > /data/vdb/written")
        assert waits(writer)
        assert ssh.thaw() == 1
        assert writer.wait(30) == 0

    def test_only_what_is_not_mounted(self, ssh: GuestChannel) -> None:
        assert ssh.freeze(["/not/mounted"]) == 0
        assert ssh.thaw() == 0

    def test_names_bind_mounts_read_only_ones_and_loops_upon_loops(
        self, ssh_guest: SshGuest, ssh: GuestChannel
    ) -> None:
        """A file system upon a frozen one's file cannot be frozen: the wrong order waits for ever."""
        odd = "/data/two  words 7\\040and\\134\na line\n"
        ssh_guest.out(
            """cd /data; odd='two  words 7\\040and\\134\na line\n'; mkdir -p "$odd" again readonly
            for name in one two; do truncate -s 8M vda/$name; mkfs.ext4 -q vda/$name; done
            mount -o loop vda/one "$odd"; mount --bind vda again; mount -o loop,ro vda/two readonly
            mkdir "$odd/1inner"; truncate -s 4M "$odd/file"; mkfs.ext4 -q "$odd/file"
            mount -o loop "$odd/file" "$odd/1inner" """
        )
        try:
            for number in range(2):
                ssh_guest.out(f'cd /data; for place in vda two* two*/1inner; do echo {number} > "$place/dirty"; done')
                assert ssh.freeze() == 4
                assert ssh.thaw() == 4
            assert ssh.freeze([odd]) == 1
            writer = ssh_guest.popen("echo x > /data/again/written; cd /data/two*; echo x > written")
            assert waits(writer)
            assert ssh.thaw() == 1
            assert writer.wait(30) == 0
            assert ssh.freeze([f"{odd}/1inner", odd]) == 2
            assert ssh.thaw() == 2
        finally:
            ssh_guest.thaw()
            ssh_guest.out("cd /data; umount two*/1inner two* again readonly; rm vda/one vda/two; rmdir two* again")

    @pytest.fixture
    def hanging(self, ssh_guest: SshGuest) -> Iterator[str]:
        """A mount point whose freeze hangs: a loop device upon a file system that somebody else has frozen."""
        ssh_guest.out(
            """cd /data; mkdir -p inner; truncate -s 4M vda/three; mkfs.ext4 -q vda/three; mount -o loop vda/three inner
            fsfreeze --freeze /data/vda; echo dirty > inner/dirty"""
        )
        try:
            yield "/data/inner"
        finally:
            ssh_guest.thaw()
            ssh_guest.out("cd /data; umount inner; rm vda/three; rmdir inner")

    def test_a_freeze_that_hangs_is_ended_by_a_thaw(self, ssh_guest: SshGuest, ssh: GuestChannel, hanging: str) -> None:
        """From another thread, as the governor's timer does it."""
        with ThreadPoolExecutor(1) as thread:
            freezing = thread.submit(ssh.freeze, [hanging])
            with pytest.raises(TimeoutError):
                freezing.result(1)
            started = time.monotonic()
            assert ssh.thaw() in (1, 2)
            with pytest.raises(GuestError):
                freezing.result(30)
            assert time.monotonic() - started < 15
        until(lambda: not ssh.frozen())
        assert not waits(ssh_guest.popen(f"echo x > /data/vda/written; echo x > {hanging}/written"))

    def test_a_freeze_that_comes_too_late_ends_by_itself(
        self, ssh_guest: SshGuest, open_ssh: OpenSsh, hanging: str
    ) -> None:
        with pytest.raises(GuestTimeout, match="may still happen"):
            open_ssh(freeze_seconds=1.0).freeze([hanging])
        ssh_guest.out("fsfreeze --unfreeze /data/vda")
        until(lambda: not list(ssh_guest.path("/run/stillframe").glob("frozen.*")))
        assert not waits(ssh_guest.popen(f"echo x > {hanging}/written"))

    def test_a_freeze_that_fails_half_way_is_undone(self, ssh_guest: SshGuest, ssh: GuestChannel) -> None:
        ssh_guest.out("fsfreeze --freeze /data/vda")
        try:
            with pytest.raises(GuestError, match="/data/vda"):
                ssh.freeze()
            assert not waits(ssh_guest.popen("echo x > /data/vdb/written"))
            assert ssh.thaw() == 1
            assert not waits(ssh_guest.popen("echo x > /data/vda/written"))
        finally:
            ssh_guest.thaw()

    def test_the_freezer_itself_undoes_it(self, ssh_guest: SshGuest) -> None:
        """Not only the end of its input."""
        script = shlex.quote(files("extensions").joinpath("linux/freezer").read_text())
        said = ssh_guest.out(f"fsfreeze --freeze /data/vda; printf 'freeze\\nstatus\\nthaw\\n' | /bin/sh -c {script}")
        failed, *others = said.splitlines()
        assert failed.startswith("error /data/vda: ")
        assert others == ["noted 0", "thawed 1"]

    def test_another_connection_sees_it_and_may_thaw(
        self, ssh_guest: SshGuest, ssh: GuestChannel, open_ssh: OpenSsh
    ) -> None:
        second = open_ssh()
        assert ssh.freeze(["/data/vda"]) == 1
        assert second.frozen()
        with pytest.raises(GuestError, match="/data/vda"):
            second.freeze()
        assert second.frozen()
        assert not waits(ssh_guest.popen("echo x > /data/vdb/written"))
        assert second.thaw() == 1
        assert not second.frozen()
        assert not waits(ssh_guest.popen("echo x > /data/vda/written"))
        assert ssh.thaw() == 0, "it was not frozen until then, and must not pass for it"

    def test_thawed_behind_our_back_is_not_counted(self, ssh_guest: SshGuest, ssh: GuestChannel) -> None:
        assert ssh.freeze() == 2
        ssh_guest.out("fsfreeze --unfreeze /data/vda; fsfreeze --unfreeze /data/vdb")
        assert ssh.thaw() == 0

    def test_a_killed_freezer(self, ssh_guest: SshGuest, ssh: GuestChannel, open_ssh: OpenSsh) -> None:
        assert ssh.freeze() == 2
        for note in ssh_guest.path("/run/stillframe").glob("frozen.*"):
            ssh_guest.out(f"kill -9 {note.suffix[1:]}")
        writer = ssh_guest.popen("echo x > /data/vda/written")
        assert waits(writer)
        assert open_ssh().frozen()
        assert ssh.thaw() == 2
        assert writer.wait(30) == 0
        assert ssh.freeze() == 2
        assert ssh.thaw() == 2

    def test_notes_are_private(self, ssh_guest: SshGuest, ssh: GuestChannel) -> None:
        assert ssh.freeze() == 2
        folder = ssh_guest.path("/run/stillframe")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert [note.read_text().split() for note in folder.iterdir()] == [["/data/vda", "/data/vdb"]]
        assert ssh.thaw() == 2
        assert list(folder.iterdir()) == []

    def test_what_the_kernel_cannot_freeze_is_said_in_these_words(self, ssh_guest: SshGuest) -> None:
        """The freezer skips such file systems, and knows them by their error's text."""
        assert "not supported" in ssh_guest.out("fsfreeze --freeze /run || true")


def _kill_session(ssh_guest: SshGuest, _wire: Wire, _channel: SshChannel) -> None:
    for pid in ssh_guest.sessions():
        os.kill(pid, signal.SIGKILL)


def _cut(_guest: SshGuest, wire: Wire, _channel: SshChannel) -> None:
    wire.cut()


def _close(_guest: SshGuest, _wire: Wire, ssh: SshChannel) -> None:
    ssh.close()


def _signals(ssh_guest: SshGuest, wire: Wire, _channel: SshChannel) -> None:
    """What the end of a login session may send to all its processes, before the connection ends."""
    pid = next(ssh_guest.path("/run/stillframe").glob("frozen.*")).suffix[1:]
    ssh_guest.out(f"kill -HUP {pid}; kill -TERM {pid}; kill -INT {pid}")
    wire.cut()


class TestTheHostIsGone:
    @pytest.mark.parametrize("end", [_kill_session, _cut, _close, _signals])
    def test_the_guest_thaws_by_itself(
        self,
        ssh_guest: SshGuest,
        open_ssh: OpenSsh,
        wire: Wire,
        end: Callable[[SshGuest, Wire, SshChannel], None],
    ) -> None:
        channel = open_ssh(port=wire.port)
        assert channel.freeze() == 2
        writers = [ssh_guest.popen(f"echo x > /data/{disk}/written") for disk in ("vda", "vdb")]
        assert all(waits(writer) for writer in writers)
        end(ssh_guest, wire, channel)
        started = time.monotonic()
        assert [writer.wait(60) for writer in writers] == [0, 0]
        assert time.monotonic() - started < 5
        until(lambda: not channel.frozen())
        assert channel.thaw() == 0, "the freeze was broken, and must not pass for one that held"

    def test_a_process_that_is_killed(self, ssh_guest: SshGuest, pins: Path) -> None:
        script = f"""
from pathlib import Path
from workers.guests.host_keys import PinnedKey
from workers.guests.ssh import SshChannel
pins = PinnedKey(Path({str(pins)!r}), "x")
channel = SshChannel(address="127.0.0.1", port={ssh_guest.port}, key=Path({str(ssh_guest.key)!r}), host_key=pins)
print(channel.freeze(), flush=True)
input()
"""
        argv = [sys.executable, "-c", script]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "2\n"
            writer = ssh_guest.popen("echo x > /data/vda/written")
            assert waits(writer)
            process.kill()
        started = time.monotonic()
        assert writer.wait(60) == 0
        assert time.monotonic() - started < 5

    def test_a_dead_wire_and_another_way_in(self, ssh_guest: SshGuest, open_ssh: OpenSsh, wire: Wire) -> None:
        channel = open_ssh(port=wire.port)
        assert channel.freeze() == 2
        wire.hold()
        rescue = open_ssh()
        assert rescue.frozen()
        assert rescue.thaw() == 2
        assert not waits(ssh_guest.popen("echo x > /data/vda/written"))


@pytest.fixture(scope="module")
def whole_guest(
    libvirt_host: libvirt.virConnect,
    tiny_guest_image: TinyImage,
    guest_cache: Path,
    guest_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Guest, int, Path]]:
    """A full guest, the port of its sshd, and a key that it knows."""
    from orchestrator.demo.host import remove_machine
    from tests.guests.full_guest import make_full_guest

    port, key = free_port(), make_key(tmp_path_factory.mktemp("key") / "key")
    guest = make_full_guest(libvirt_host, tiny_guest_image, guest_cache, guest_folder, label="ssh", ssh_port=port)
    try:
        guest.start()
        # On a busy host its own mount comes late, or gives up.
        guest.out("for i in $(seq 60); do mountpoint -q /data/vdb && exit; sleep 0.5; done; mount /data/vdb")
        guest.out(f"echo '{key.with_suffix('.pub').read_text().strip()}' >> /root/.ssh/authorized_keys")
        yield guest, port, key
    finally:
        remove_machine(guest.domain)


@pytest.mark.guest
@pytest.mark.timeout(900)
class TestInAWholeGuest:
    """Its root can be frozen: what touches a frozen disk waits here, and nowhere else."""

    @pytest.fixture
    def ways(self, whole_guest: tuple[Guest, int, Path], tmp_path: Path) -> Iterator[list[SshChannel]]:
        """Two connections."""
        _, port, key = whole_guest
        pin = PinnedKey(tmp_path / "pins", UUID)
        made = [SshChannel(address="127.0.0.1", port=port, key=key, host_key=pin) for _ in range(2)]
        until(made[0].ping, 240)
        assert made[1].ping()
        yield made
        for channel in made:
            channel.close()

    def test_files_and_programs(self, ways: list[SshChannel]) -> None:
        info = ways[0].info()
        assert info.can_freeze
        assert info.os is GuestOs.LINUX
        data = os.urandom(3 * MIB + 7)
        ways[0].put_file("/root/file", data)
        assert ways[0].get_file("/root/file", limit=8 * MIB) == data

    def test_the_root_is_frozen_and_thawed(self, whole_guest: tuple[Guest, int, Path], ways: list[SshChannel]) -> None:
        guest, _, _ = whole_guest
        for _ in range(2):
            assert ways[0].freeze() == 2
            assert ways[1].frozen()
            # A second freezer neither waits nor freezes later: twice frozen is a refusal.
            with pytest.raises(GuestError, match="busy"):
                ways[1].freeze()
            assert ways[0].run(["cat", "/etc/hostname"], timeout=60).out == b"full-guest\n"
            with pytest.raises(GuestTimeout):
                ways[0].run(["touch", "/root/held"], timeout=2)
            assert ways[0].thaw() == 2
            assert not ways[1].frozen()
        until(lambda: guest.run("test -e /root/held")[0] == 0)

    def test_the_other_connection_thaws(self, ways: list[SshChannel]) -> None:
        assert ways[0].freeze() == 2
        assert ways[1].thaw() == 2
        assert ways[0].thaw() == 0

    def test_the_host_is_gone(self, whole_guest: tuple[Guest, int, Path], ways: list[SshChannel]) -> None:
        guest, _, _ = whole_guest
        assert ways[0].freeze() == 2
        ways[0].close()
        guest.out("touch /root/after /data/vdb/after; ! ls /run/stillframe/frozen.* 2>/dev/null")
        assert ways[1].thaw() == 0


@pytest.mark.guest
def test_the_freezer_in_the_small_guest(booted_guest: Guest) -> None:
    """busybox alone, and a root in memory."""
    script = shlex.quote(files("extensions").joinpath("linux/freezer").read_text())
    said = booted_guest.out(f"printf 'freeze\\nstatus\\nthaw\\nstatus\\nthaw\\n' | sh -c {script}")
    assert said.splitlines() == ["frozen 2", "noted 2", "thawed 2", "noted 0", "thawed 0"]
    said = booted_guest.out(f"printf 'mount /data/vdb\\nfreeze\\n' | sh -c {script}; touch /data/vdb/after")
    assert said == "frozen 1\n"
