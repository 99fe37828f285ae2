"""The way in by SSH: a real sshd and real keys (sshd.py), held to the rules of every channel and to its own. What it
does about host keys is in test_ssh_host_keys.py, and about freezing in test_ssh_freeze.py."""

from __future__ import annotations

import socket
import stat
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.contracts.guest_channel_suite import POSIX, FreezeSuite, GuestChannelSuite, Subject
from tests.contracts.sshd import OpenSsh, SshGuest, Wire, make_key, until
from workers.contract.errors import GuestError, GuestTimeout
from workers.contract.guests import GuestOs
from workers.contract.seams import GuestChannel
from workers.guests.ssh import STREAM_LIMIT

pytest_plugins = ["tests.contracts.ssh_fixtures"]
MIB = 1 << 20


class TestAsEveryChannel(GuestChannelSuite, FreezeSuite):
    @pytest.fixture(params=["root", "operator"])
    def subject(self, request: pytest.FixtureRequest, ssh_guest: SshGuest, open_ssh: OpenSsh) -> Subject:
        """As root, and by sudo."""
        ssh_guest.out("mkdir -p /tmp/suite")
        return Subject(
            open_ssh(user=request.param),
            POSIX,
            GuestOs.LINUX,
            "/tmp/suite/",
            "/proc/none",
            whole_output=STREAM_LIMIT,
            mounts=("/data/vda", "/data/vdb"),
            runs_while_frozen=True,
        )


class TestRun:
    def test_a_signal_is_128_and_its_number(self, ssh: GuestChannel) -> None:
        ran = ssh.run(["sh", "-c", "kill -9 $$"], timeout=30)
        assert (ran.code, ran.err) == (137, b"")

    def test_no_shell_is_in_between(self, ssh: GuestChannel) -> None:
        """`exit` and `if` are the shell's own words, and no programs."""
        assert ssh.run(["exit", "0"], timeout=30).code == 127
        assert ssh.run(["if", "true"], timeout=30).code == 127
        assert b"no-such-program" in ssh.run(["no-such-program"], timeout=30).err

    def test_a_program_that_reads_nothing(self, ssh: GuestChannel) -> None:
        assert ssh.run(["true"], stdin=bytes(8 * MIB), timeout=60).code == 0

    def test_much_output_on_both_streams_is_cut_and_said_so(self, ssh: GuestChannel) -> None:
        script = "head -c 31457280 /dev/zero & head -c 31457280 /dev/zero >&2; wait; exit 3"
        ran = ssh.run(["sh", "-c", script], timeout=120)
        assert (len(ran.out), len(ran.err), ran.truncated, ran.code) == (STREAM_LIMIT, STREAM_LIMIT, True, 3)

    def test_exactly_as_much_as_fits_is_not_cut(self, ssh: GuestChannel) -> None:
        ran = ssh.run(["head", "-c", str(STREAM_LIMIT), "/dev/zero"], timeout=120)
        assert (len(ran.out), ran.truncated) == (STREAM_LIMIT, False)

    def test_a_daemon_that_keeps_the_output_counts_as_the_program(self, ssh_guest: SshGuest, ssh: GuestChannel) -> None:
        with pytest.raises(GuestTimeout):
            ssh.run(["sh", "-c", "sleep 601 & echo started"], timeout=1)
        ssh_guest.out("kill $(pidof -x sleep) || true")

    def test_one_that_does_not_keep_it_is_not_waited_for(self, ssh_guest: SshGuest, ssh: GuestChannel) -> None:
        ran = ssh.run(["sh", "-c", "sleep 602 >/dev/null 2>&1 </dev/null & echo started"], timeout=60)
        assert ran.out == b"started\n"
        ssh_guest.out("kill $(pidof -x sleep) || true")

    def test_what_cannot_be_a_command(self, ssh: GuestChannel) -> None:
        with pytest.raises(GuestError, match="zero byte"):
            ssh.run(["echo", "a\0b"], timeout=30)
        with pytest.raises(GuestError, match="too long"):
            ssh.run(["echo", "x" * 200_000], timeout=30)

    @pytest.mark.parametrize("script", ["echo half; sleep 600", "sleep 600 & echo half"])
    def test_a_connection_that_is_cut(self, ssh_guest: SshGuest, open_ssh: OpenSsh, wire: Wire, script: str) -> None:
        """Half of the output does not pass for all of it, also when the program's status has come already and only a
        child of it still writes."""
        begun = ssh_guest.path("/tmp/begun")
        begun.unlink(missing_ok=True)

        def cut() -> None:
            until(begun.exists)
            time.sleep(0.3)  # so that the status is here; without that the test proves less, and is no less right
            wire.cut()

        channel = open_ssh(port=wire.port)
        with ThreadPoolExecutor(1) as thread:
            cutting = thread.submit(cut)
            with pytest.raises(GuestError, match="lost"):
                channel.run(["sh", "-c", f"touch /tmp/begun; {script}"], timeout=60)
            cutting.result(60)
        assert channel.ping(), "it connects anew"

    def test_a_wire_that_goes_dead(self, open_ssh: OpenSsh, wire: Wire) -> None:
        channel = open_ssh(port=wire.port)
        assert channel.ping()
        wire.hold()
        started = time.monotonic()
        with pytest.raises(GuestError):
            channel.run(["true"], timeout=1)
        assert time.monotonic() - started < 20

    def test_information(self, ssh: GuestChannel) -> None:
        info = ssh.info()
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
    def test_nobody_else_can_read_it_even_if_the_one_before_was_open(
        self, ssh_guest: SshGuest, ssh: GuestChannel
    ) -> None:
        ssh_guest.out("umask 0; echo old > /tmp/open")
        ssh.put_file("/tmp/open", b"new")
        found = ssh_guest.path("/tmp/open").stat()
        assert (stat.S_IMODE(found.st_mode), found.st_size) == (0o600, 3)

    def test_a_full_disk(self, ssh_guest: SshGuest, ssh: GuestChannel) -> None:
        with pytest.raises(GuestError, match=r"[Nn]o space"):
            ssh.put_file("/data/vda/large", bytes(20 * MIB))
        ssh_guest.out("rm /data/vda/large")


class TestLogin:
    def test_a_wrong_key_says_which_line_is_missing(self, open_ssh: OpenSsh, tmp_path: Path) -> None:
        key = make_key(tmp_path / "wrong")
        channel = open_ssh(key=key)
        assert not channel.ping()
        with pytest.raises(GuestError, match="does not let root in") as caught:
            channel.info()
        assert " ".join(key.with_suffix(".pub").read_text().split()[:2]) in caught.value.hint

    def test_a_wrong_user(self, open_ssh: OpenSsh) -> None:
        with pytest.raises(GuestError, match="does not let nobody-here in"):
            open_ssh(user="nobody-here").info()

    def test_a_refused_port(self, open_ssh: OpenSsh) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # bound, and not listening
            channel = open_ssh(port=taken.getsockname()[1])
            assert not channel.ping()
            with pytest.raises(GuestError, match="refused"):
                channel.thaw()

    @pytest.mark.parametrize("words", [b"", b"HTTP/1.1 400 no\r\n\r\n"])
    def test_somebody_who_does_not_speak_ssh(self, open_ssh: OpenSsh, words: bytes) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            channel = open_ssh(port=server.getsockname()[1], seconds=1.0)
            talk = threading.Thread(target=lambda: link.append(server.accept()[0]) or link[0].sendall(words))
            link: list[socket.socket] = []
            talk.start()
            started = time.monotonic()
            with pytest.raises(GuestError):
                channel.info()
            assert time.monotonic() - started < 20
            talk.join()
            link[0].close()

    def test_keys_that_cannot_be_used(self, open_ssh: OpenSsh, ssh_guest: SshGuest, tmp_path: Path) -> None:
        exposed = tmp_path / "exposed"
        exposed.write_bytes(ssh_guest.key.read_bytes())
        exposed.chmod(0o644)
        with pytest.raises(GuestError, match="others can read"):
            open_ssh(key=exposed).info()
        with pytest.raises(GuestError, match="cannot be read"):
            open_ssh(key=tmp_path / "absent").info()
        with pytest.raises(GuestError, match="no private key"):
            open_ssh(key=b"ssh-ed25519 AAAA").info()
        locked = tmp_path / "locked"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(locked)], check=True)
        with pytest.raises(GuestError, match="passphrase"):
            open_ssh(key=locked).info()

    def test_a_key_that_was_never_a_file(self, open_ssh: OpenSsh, ssh_guest: SshGuest) -> None:
        from cryptography.hazmat.primitives import serialization as forms

        loaded = forms.load_ssh_private_key(ssh_guest.key.read_bytes(), None)
        pkcs8 = loaded.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
        assert open_ssh(key=pkcs8).ping()

    def test_another_user_with_sudo(self, open_ssh: OpenSsh, ssh_guest: SshGuest) -> None:
        channel = open_ssh(user="operator")
        assert channel.info().can_freeze
        assert channel.run(["id", "-u"], timeout=60).out == b"0\n"
        channel.put_file("/root/by-sudo", b"x")
        assert ssh_guest.path("/root/by-sudo").stat().st_uid == 0
        assert channel.freeze() == 2
        assert channel.thaw() == 2

    def test_another_user_without(self, open_ssh: OpenSsh) -> None:
        channel = open_ssh(user="stranger")
        with pytest.raises(GuestError, match="cannot become root") as caught:
            channel.info()
        assert "NOPASSWD" in caught.value.hint
        with pytest.raises(GuestError, match="sudo"):
            channel.freeze()
