"""The way in by SSH: a real sshd, real keys, real ext4 file systems that are really frozen (see sshd.py)."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

import libvirt
import pytest

from orchestrator.demo.tiny_guest import TinyImage
from tests.contracts.sshd import SshGuest, Wire, free_port, make_key
from tests.guests.machines import Guest
from workers.contract.errors import GuestError, GuestTimeout, HostKeyRefused
from workers.contract.guests import GuestOs
from workers.contract.seams import GuestChannel
from workers.guests.host_keys import ConfiguredKey, HostKey, HostKeyPolicy, PinnedKey, host_key_policy
from workers.guests.ssh import STREAM_LIMIT, SshChannel

MIB = 1 << 20
UUID = "6f0d6a0e-4b0a-4a8e-9a55-3f5ad3f0a001"
Opener = Callable[..., SshChannel]


@pytest.fixture(scope="module", params=["dash", "busybox"])
def guest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshGuest]:
    made = SshGuest(tmp_path_factory.mktemp("sshd"), request.param)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshGuest]:
    """Another server, with other keys."""
    made = SshGuest(tmp_path_factory.mktemp("other"), host_kind="rsa")
    yield made
    made.stop()


@pytest.fixture
def pins(tmp_path: Path) -> Path:
    return tmp_path / "state" / "guest_host_keys"


@pytest.fixture
def open_channel(guest: SshGuest, pins: Path) -> Iterator[Opener]:
    """`open_channel(guest, port=…, user=…, key=…, host_key=…)`; all are closed, and the guest thawed, afterwards."""
    opened: list[SshChannel] = []

    def make(
        to: SshGuest = guest,
        *,
        port: int | None = None,
        user: str = "root",
        key: Path | bytes | None = None,
        host_key: HostKeyPolicy | None = None,
        seconds: float = 30.0,
    ) -> SshChannel:
        policy = host_key if host_key is not None else PinnedKey(pins, UUID)
        channel = SshChannel(
            address="127.0.0.1",
            port=port or to.port,
            user=user,
            key=key or to.key,
            host_key=policy,
            connect_seconds=seconds,
        )
        opened.append(channel)
        return channel

    try:
        yield make
    finally:
        for channel in opened:
            channel.close()


@pytest.fixture
def channel(open_channel: Opener) -> SshChannel:
    return open_channel()


@pytest.fixture
def wire(guest: SshGuest) -> Iterator[Wire]:
    made = Wire(guest.port)
    yield made
    made.close()


def waits(process: subprocess.Popen[str]) -> bool:
    """Whether a quick program is held by something: it has not ended after a while."""
    try:
        process.wait(0.7)
    except subprocess.TimeoutExpired:
        return True
    return False


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


class TestRun:
    def test_status_output_and_input(self, channel: GuestChannel) -> None:
        ran = channel.run(["sh", "-c", "cat; echo wrong >&2; exit 7"], stdin=b"\0\xff\r\n", timeout=30)
        assert (ran.code, ran.out, ran.err, ran.truncated) == (7, b"\0\xff\r\n", b"wrong\n", False)

    def test_a_signal_is_128_and_its_number(self, channel: GuestChannel) -> None:
        ran = channel.run(["sh", "-c", "kill -9 $$"], timeout=30)
        assert (ran.code, ran.err) == (137, b"")

    def test_arguments_arrive_as_they_are(self, channel: GuestChannel) -> None:
        words = ["", " ", "a b", "$HOME `id` $(id)", "'\"\\", "new\nline\n", "*", "~", "!x", "schön", "-n", ";", "#"]
        ran = channel.run(["printf", "%s\\0", *words], timeout=30)
        assert ran.out.decode().split("\0")[:-1] == words

    def test_no_shell_is_in_between(self, channel: GuestChannel) -> None:
        """`exit` and `if` are the shell's own words, and no programs."""
        assert channel.run(["exit", "0"], timeout=30).code == 127
        assert channel.run(["if", "true"], timeout=30).code == 127
        assert b"no-such-program" in channel.run(["no-such-program"], timeout=30).err

    def test_a_program_that_reads_nothing(self, channel: GuestChannel) -> None:
        assert channel.run(["true"], stdin=bytes(8 * MIB), timeout=60).code == 0

    def test_much_output_on_both_streams_is_cut_and_said_so(self, channel: GuestChannel) -> None:
        script = "head -c 31457280 /dev/zero & head -c 31457280 /dev/zero >&2; wait; exit 3"
        ran = channel.run(["sh", "-c", script], timeout=120)
        assert (len(ran.out), len(ran.err), ran.truncated, ran.code) == (STREAM_LIMIT, STREAM_LIMIT, True, 3)

    def test_exactly_as_much_as_fits_is_not_cut(self, channel: GuestChannel) -> None:
        ran = channel.run(["head", "-c", str(STREAM_LIMIT), "/dev/zero"], timeout=120)
        assert (len(ran.out), ran.truncated) == (STREAM_LIMIT, False)

    def test_the_time_limit_closes_the_session(self, channel: GuestChannel) -> None:
        started = time.monotonic()
        with pytest.raises(GuestTimeout, match="1 s"):
            channel.run(["sleep", "600"], timeout=1)
        assert time.monotonic() - started < 20
        assert channel.ping()

    def test_a_daemon_that_keeps_the_output_counts_as_the_program(self, guest: SshGuest, channel: GuestChannel) -> None:
        with pytest.raises(GuestTimeout):
            channel.run(["sh", "-c", "sleep 601 & echo started"], timeout=1)
        guest.out("kill $(pidof -x sleep) || true")

    def test_one_that_does_not_keep_it_is_not_waited_for(self, guest: SshGuest, channel: GuestChannel) -> None:
        ran = channel.run(["sh", "-c", "sleep 602 >/dev/null 2>&1 </dev/null & echo started"], timeout=60)
        assert ran.out == b"started\n"
        guest.out("kill $(pidof -x sleep) || true")

    def test_several_at_once(self, channel: GuestChannel) -> None:
        with ThreadPoolExecutor(4) as threads:
            codes = threads.map(lambda code: channel.run(["sh", "-c", f"exit {code}"], timeout=60).code, range(8))
            assert list(codes) == list(range(8))

    def test_what_cannot_be_a_command(self, channel: GuestChannel) -> None:
        with pytest.raises(GuestError, match="zero byte"):
            channel.run(["echo", "a\0b"], timeout=30)
        with pytest.raises(GuestError, match="too long"):
            channel.run(["echo", "x" * 200_000], timeout=30)

    def test_a_connection_that_is_cut(self, channel: SshChannel, open_channel: Opener, wire: Wire) -> None:
        channel = open_channel(port=wire.port)
        assert channel.ping()
        threading.Timer(0.5, wire.cut).start()
        with pytest.raises(GuestError, match="lost"):
            channel.run(["sh", "-c", "echo half; sleep 600"], timeout=60)
        assert channel.ping(), "it connects anew"

    def test_half_of_the_output_does_not_pass_for_all(self, guest: SshGuest, open_channel: Opener, wire: Wire) -> None:
        """The status has come; what a child of the program still writes has not."""
        channel = open_channel(port=wire.port)
        assert channel.ping()
        threading.Timer(0.5, wire.cut).start()
        with pytest.raises(GuestError, match="lost"):
            channel.run(["sh", "-c", "sleep 603 & echo half"], timeout=60)
        guest.out("kill $(pidof -x sleep) || true")

    def test_a_wire_that_goes_dead(self, open_channel: Opener, wire: Wire) -> None:
        channel = open_channel(port=wire.port)
        assert channel.ping()
        wire.hold()
        started = time.monotonic()
        with pytest.raises(GuestError):
            channel.run(["true"], timeout=1)
        assert time.monotonic() - started < 20

    def test_information(self, channel: GuestChannel) -> None:
        info = channel.info()
        assert info.os is GuestOs.LINUX
        assert info.can_run
        assert info.can_copy
        assert info.can_freeze
        assert info.can_freeze_some
        assert not info.can_plant_keys
        assert "OpenSSH" in info.agent
        assert info.release
        assert '"' not in info.release


class TestFiles:
    @pytest.mark.parametrize("size", [0, 1, 3 * MIB + 7])
    def test_there_and_back(self, channel: GuestChannel, size: int) -> None:
        data = os.urandom(size)
        channel.put_file("/tmp/a file", data)
        assert channel.get_file("/tmp/a file", limit=8 * MIB) == data
        assert channel.get_file("/tmp/a file", limit=100) == data[:100]

    def test_nobody_else_can_read_it_even_if_the_one_before_was_open(
        self, guest: SshGuest, channel: GuestChannel
    ) -> None:
        guest.out("umask 0; echo old > /tmp/open")
        channel.put_file("/tmp/open", b"new")
        found = guest.path("/tmp/open").stat()
        assert (stat.S_IMODE(found.st_mode), found.st_size) == (0o600, 3)

    def test_what_cannot_be_read_or_written(self, channel: GuestChannel) -> None:
        with pytest.raises(GuestError, match="/no/such"):
            channel.get_file("/no/such", limit=10)
        with pytest.raises(GuestError, match="/no/such/folder"):
            channel.put_file("/no/such/folder", b"x")

    def test_a_full_disk(self, guest: SshGuest, channel: GuestChannel) -> None:
        with pytest.raises(GuestError, match=r"[Nn]o space"):
            channel.put_file("/data/vda/large", bytes(20 * MIB))
        guest.out("rm /data/vda/large")


class TestLogin:
    def test_a_wrong_key_says_which_line_is_missing(self, open_channel: Opener, tmp_path: Path) -> None:
        key = make_key(tmp_path / "wrong")
        channel = open_channel(key=key)
        assert not channel.ping()
        with pytest.raises(GuestError, match="does not let root in") as caught:
            channel.info()
        assert " ".join(key.with_suffix(".pub").read_text().split()[:2]) in caught.value.hint

    def test_a_wrong_user(self, open_channel: Opener) -> None:
        with pytest.raises(GuestError, match="does not let nobody-here in"):
            open_channel(user="nobody-here").info()

    def test_a_refused_port(self, open_channel: Opener) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # bound, and not listening
            channel = open_channel(port=taken.getsockname()[1])
            assert not channel.ping()
            with pytest.raises(GuestError, match="refused"):
                channel.thaw()

    @pytest.mark.parametrize("words", [b"", b"HTTP/1.1 400 no\r\n\r\n"])
    def test_somebody_who_does_not_speak_ssh(self, open_channel: Opener, words: bytes) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            channel = open_channel(port=server.getsockname()[1], seconds=1.0)
            talk = threading.Thread(target=lambda: link.append(server.accept()[0]) or link[0].sendall(words))
            link: list[socket.socket] = []
            talk.start()
            started = time.monotonic()
            with pytest.raises(GuestError):
                channel.info()
            assert time.monotonic() - started < 20
            talk.join()
            link[0].close()

    def test_keys_that_cannot_be_used(self, open_channel: Opener, guest: SshGuest, tmp_path: Path) -> None:
        exposed = tmp_path / "exposed"
        exposed.write_bytes(guest.key.read_bytes())
        exposed.chmod(0o644)
        with pytest.raises(GuestError, match="others can read"):
            open_channel(key=exposed).info()
        with pytest.raises(GuestError, match="cannot be read"):
            open_channel(key=tmp_path / "absent").info()
        with pytest.raises(GuestError, match="no private key"):
            open_channel(key=b"ssh-ed25519 AAAA").info()
        locked = tmp_path / "locked"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(locked)], check=True)
        with pytest.raises(GuestError, match="passphrase"):
            open_channel(key=locked).info()

    def test_a_key_that_was_never_a_file(self, open_channel: Opener, guest: SshGuest) -> None:
        from cryptography.hazmat.primitives import serialization as forms

        loaded = forms.load_ssh_private_key(guest.key.read_bytes(), None)
        pkcs8 = loaded.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
        assert open_channel(key=pkcs8).ping()

    def test_another_user_with_sudo(self, open_channel: Opener, guest: SshGuest) -> None:
        channel = open_channel(user="operator")
        assert channel.info().can_freeze
        assert channel.run(["id", "-u"], timeout=60).out == b"0\n"
        channel.put_file("/root/by-sudo", b"x")
        assert guest.path("/root/by-sudo").stat().st_uid == 0
        assert channel.freeze() == 2
        assert channel.thaw() == 2

    def test_another_user_without(self, open_channel: Opener) -> None:
        channel = open_channel(user="stranger")
        with pytest.raises(GuestError, match="cannot become root") as caught:
            channel.info()
        assert "NOPASSWD" in caught.value.hint
        with pytest.raises(GuestError, match="sudo"):
            channel.freeze()


class TestHostKeys:
    def test_the_first_one_is_pinned_and_the_next_use_checks(
        self, open_channel: Opener, guest: SshGuest, other: SshGuest, pins: Path
    ) -> None:
        assert open_channel().ping()
        assert pins.read_text() == f"{UUID} {guest.host_key}\n"
        assert stat.S_IMODE(pins.stat().st_mode) == 0o600
        assert open_channel().ping()

        before = len(other.log())
        with pytest.raises(HostKeyRefused, match="nothing was sent") as caught:
            open_channel(other).info()
        assert guest.host_key.fingerprint in str(caught.value)
        said = other.log()[before:]
        assert "Connection from" in said
        assert "root" not in said, "the login had begun"
        assert not open_channel(other).ping()
        assert pins.read_text() == f"{UUID} {guest.host_key}\n"

    def test_another_key_of_the_same_kind(
        self, open_channel: Opener, guest: SshGuest, pins: Path, tmp_path: Path
    ) -> None:
        before = HostKey.parse(make_key(tmp_path / "before").with_suffix(".pub").read_text())
        PinnedKey(pins, UUID).accept(before)
        PinnedKey(pins, "another").accept(before)
        at = len(guest.log())
        with pytest.raises(HostKeyRefused, match="seen first") as caught:
            open_channel().info()
        assert before.fingerprint in str(caught.value)
        assert guest.host_key.fingerprint in str(caught.value)
        until(lambda: "Connection closed" in guest.log()[at:] or "disconnect" in guest.log()[at:].lower())
        assert "root" not in guest.log()[at:], "the login had begun"

        command = caught.value.hint.partition("type: ")[2].partition(";")[0]
        subprocess.run(command, shell=True, check=True)
        assert open_channel().ping()
        assert pins.read_text() == f"another {before}\n{UUID} {guest.host_key}\n"

    def test_an_address_that_refuses_us_is_not_pinned(self, open_channel: Opener, other: SshGuest, pins: Path) -> None:
        assert not open_channel(other, user="nobody-here").ping()
        assert not pins.exists()

    def test_one_from_the_configuration(self, open_channel: Opener, guest: SshGuest, pins: Path) -> None:
        right = host_key_policy(f"{guest.host_key} root@guest", pins, UUID)
        assert open_channel(host_key=right).ping()
        assert not pins.exists()

    def test_a_wrong_one_from_the_configuration(self, open_channel: Opener, guest: SshGuest, other: SshGuest) -> None:
        with pytest.raises(HostKeyRefused, match="no SSH host key of the kind ssh-rsa"):
            open_channel(host_key=ConfiguredKey(str(other.host_key))).info()
        assert open_channel(other, host_key=ConfiguredKey(str(other.host_key))).ping()
        changed = HostKey(guest.host_key.kind, guest.host_key.data[:-1] + b"\0")
        with pytest.raises(HostKeyRefused, match="the configuration says") as caught:
            open_channel(host_key=ConfiguredKey(str(changed))).info()
        assert "host_key" in caught.value.hint

    @pytest.mark.parametrize("text", ["", "AAAA", "ssh-ed25519 !", "ssh-ed25519 AAAA", "ssh-rsa {}"])
    def test_no_key_in_the_configuration(self, guest: SshGuest, text: str) -> None:
        with pytest.raises(HostKeyRefused, match="is not a key"):
            ConfiguredKey(text.format(str(guest.host_key).split()[1]))

    @pytest.mark.parametrize("line", ["rubbish", f"{UUID} ssh-ed25519", f"{UUID} {{0}}\n{UUID} {{0}}", "\udcff"])
    def test_a_file_that_cannot_be_understood_trusts_nobody(
        self, open_channel: Opener, guest: SshGuest, pins: Path, line: str
    ) -> None:
        pins.parent.mkdir()
        pins.write_text(f"# by hand\n\n{line.format(guest.host_key)}\n", errors="surrogateescape")
        kept = pins.read_bytes()
        with pytest.raises(HostKeyRefused, match="no host key is trusted"):
            open_channel().info()
        assert pins.read_bytes() == kept

    def test_a_file_that_others_can_write_trusts_nobody(self, open_channel: Opener, pins: Path) -> None:
        assert open_channel().ping()
        pins.chmod(0o620)
        with pytest.raises(HostKeyRefused, match="written by others"):
            open_channel().info()

    def test_many_that_pin_at_once_all_stay_pinned(self, guest: SshGuest, pins: Path) -> None:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda number: PinnedKey(pins, f"uuid-{number}").accept(guest.host_key), range(40)))
        assert len(pins.read_text().splitlines()) == 40

    def test_of_two_that_pin_at_once_one_wins(self, guest: SshGuest, other: SshGuest, pins: Path) -> None:
        slow = PinnedKey(pins, UUID)
        slow.check(other.host_key)
        PinnedKey(pins, UUID).accept(guest.host_key)
        with pytest.raises(HostKeyRefused):
            slow.accept(other.host_key)
        assert slow.expected() == guest.host_key


class TestFreeze:
    def test_all_are_frozen_and_thawed(self, guest: SshGuest, channel: GuestChannel) -> None:
        assert not channel.frozen()
        assert channel.thaw() == 0
        assert channel.freeze() == 2
        writers = [guest.popen(f"echo {disk} > /data/{disk}/written") for disk in ("vda", "vdb")]
        assert all(waits(writer) for writer in writers)
        assert channel.frozen()
        assert channel.ping()
        with pytest.raises(GuestError, match="already"):
            channel.freeze()
        assert channel.thaw() == 2
        assert [writer.wait(30) for writer in writers] == [0, 0]
        assert not channel.frozen()
        assert channel.thaw() == 0

    def test_some(self, guest: SshGuest, channel: GuestChannel) -> None:
        assert channel.freeze(["/data/vdb", "/not/mounted"]) == 1
        assert not waits(guest.popen("echo x > /data/vda/written"))
        writer = guest.popen("echo x > /data/vdb/written")
        assert waits(writer)
        assert channel.thaw() == 1
        assert writer.wait(30) == 0

    def test_only_what_is_not_mounted(self, channel: GuestChannel) -> None:
        assert channel.freeze(["/not/mounted"]) == 0
        assert channel.thaw() == 0

    def test_names_bind_mounts_read_only_ones_and_loops_upon_loops(
        self, guest: SshGuest, channel: GuestChannel
    ) -> None:
        """A file system upon a frozen one's file cannot be frozen: the wrong order waits for ever."""
        odd = "/data/two  words\\040and\\134\na line\n"
        guest.out(
            """cd /data; odd='two  words\\040and\\134\na line\n'; mkdir "$odd" again readonly
            for name in one two three; do truncate -s 8M vda/$name; mkfs.ext4 -q vda/$name; done
            mount -o loop vda/one "$odd"; mount --bind vda again; mount -o loop,ro vda/two readonly
            mkdir "$odd/1inner"; truncate -s 4M "$odd/file"; mkfs.ext4 -q "$odd/file"
            mount -o loop "$odd/file" "$odd/1inner" """
        )
        try:
            for _ in range(2):
                assert channel.freeze() == 4
                assert channel.thaw() == 4
            assert channel.freeze([odd]) == 1
            writer = guest.popen("echo x > /data/again/written; cd /data/two*; echo x > written")
            assert waits(writer)
            assert channel.thaw() == 1
            assert writer.wait(30) == 0
            assert channel.freeze([f"{odd}/1inner", odd]) == 2
            assert channel.thaw() == 2
        finally:
            guest.out(
                "cd /data; umount two*/1inner two* again readonly; rm vda/one vda/two vda/three; rmdir two* again"
            )

    def test_a_freeze_that_fails_half_way_is_undone(self, guest: SshGuest, channel: GuestChannel) -> None:
        guest.out("fsfreeze --freeze /data/vda")
        try:
            with pytest.raises(GuestError, match="/data/vda"):
                channel.freeze()
            assert not waits(guest.popen("echo x > /data/vdb/written"))
            assert channel.thaw() == 1
            assert not waits(guest.popen("echo x > /data/vda/written"))
        finally:
            guest.out("fsfreeze --unfreeze /data/vda || true")

    def test_another_connection_sees_it_and_may_thaw(
        self, guest: SshGuest, channel: GuestChannel, open_channel: Opener
    ) -> None:
        second = open_channel()
        assert channel.freeze(["/data/vda"]) == 1
        assert second.frozen()
        with pytest.raises(GuestError, match="/data/vda"):
            second.freeze()
        assert second.frozen()
        assert not waits(guest.popen("echo x > /data/vdb/written"))
        assert second.thaw() == 1
        assert not second.frozen()
        assert not waits(guest.popen("echo x > /data/vda/written"))
        assert channel.thaw() == 0, "it was not frozen until then, and must not pass for it"

    def test_thawed_behind_our_back_is_not_counted(self, guest: SshGuest, channel: GuestChannel) -> None:
        assert channel.freeze() == 2
        guest.out("fsfreeze --unfreeze /data/vda; fsfreeze --unfreeze /data/vdb")
        assert channel.thaw() == 0

    def test_a_killed_freezer(self, guest: SshGuest, channel: GuestChannel, open_channel: Opener) -> None:
        assert channel.freeze() == 2
        for note in guest.path("/run/stillframe").glob("frozen.*"):
            guest.out(f"kill -9 {note.suffix[1:]}")
        writer = guest.popen("echo x > /data/vda/written")
        assert waits(writer)
        assert open_channel().frozen()
        assert channel.thaw() == 2
        assert writer.wait(30) == 0
        assert channel.freeze() == 2
        assert channel.thaw() == 2

    def test_notes_are_private(self, guest: SshGuest, channel: GuestChannel) -> None:
        assert channel.freeze() == 2
        folder = guest.path("/run/stillframe")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert [note.read_text().split() for note in folder.iterdir()] == [["/data/vda", "/data/vdb"]]
        assert channel.thaw() == 2
        assert list(folder.iterdir()) == []

    def test_what_the_kernel_cannot_freeze_is_said_in_these_words(self, guest: SshGuest) -> None:
        """The freezer skips such file systems, and knows them by their error's text."""
        assert "not supported" in guest.out("fsfreeze --freeze /run || true")


def _kill_session(guest: SshGuest, _wire: Wire, _channel: SshChannel) -> None:
    for pid in guest.sessions():
        os.kill(pid, signal.SIGKILL)


def _cut(_guest: SshGuest, wire: Wire, _channel: SshChannel) -> None:
    wire.cut()


def _close(_guest: SshGuest, _wire: Wire, channel: SshChannel) -> None:
    channel.close()


def _signals(guest: SshGuest, wire: Wire, _channel: SshChannel) -> None:
    """What the end of a login session may send to all its processes, before the connection ends."""
    pid = next(guest.path("/run/stillframe").glob("frozen.*")).suffix[1:]
    guest.out(f"kill -HUP {pid}; kill -TERM {pid}; kill -INT {pid}")
    wire.cut()


class TestTheHostIsGone:
    @pytest.mark.parametrize("end", [_kill_session, _cut, _close, _signals])
    def test_the_guest_thaws_by_itself(
        self,
        guest: SshGuest,
        open_channel: Opener,
        wire: Wire,
        end: Callable[[SshGuest, Wire, SshChannel], None],
    ) -> None:
        channel = open_channel(port=wire.port)
        assert channel.freeze() == 2
        writers = [guest.popen(f"echo x > /data/{disk}/written") for disk in ("vda", "vdb")]
        assert all(waits(writer) for writer in writers)
        end(guest, wire, channel)
        started = time.monotonic()
        assert [writer.wait(60) for writer in writers] == [0, 0]
        assert time.monotonic() - started < 5
        until(lambda: not channel.frozen())
        assert channel.thaw() == 0, "the freeze was broken, and must not pass for one that held"

    def test_a_process_that_is_killed(self, guest: SshGuest, pins: Path) -> None:
        script = f"""
from pathlib import Path
from workers.guests.host_keys import PinnedKey
from workers.guests.ssh import SshChannel
pins = PinnedKey(Path({str(pins)!r}), "x")
channel = SshChannel(address="127.0.0.1", port={guest.port}, key=Path({str(guest.key)!r}), host_key=pins)
print(channel.freeze(), flush=True)
input()
"""
        argv = [sys.executable, "-c", script]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "2\n"
            writer = guest.popen("echo x > /data/vda/written")
            assert waits(writer)
            process.kill()
        started = time.monotonic()
        assert writer.wait(60) == 0
        assert time.monotonic() - started < 5

    def test_a_dead_wire_and_another_way_in(self, guest: SshGuest, open_channel: Opener, wire: Wire) -> None:
        channel = open_channel(port=wire.port)
        assert channel.freeze() == 2
        wire.hold()
        rescue = open_channel()
        assert rescue.frozen()
        assert rescue.thaw() == 2
        assert not waits(guest.popen("echo x > /data/vda/written"))


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
