"""Whom an SSH channel trusts: only the one with the pinned or configured host key; before that nothing is sent."""

from __future__ import annotations

import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.contracts.sshd import UUID, OpenSsh, SshGuest, make_key, until
from workers.contract.errors import HostKeyRefused
from workers.guests.host_keys import ConfiguredKey, HostKey, PinnedKey, host_key_policy

pytest_plugins = ["tests.contracts.ssh_fixtures"]


class TestHostKeys:
    def test_the_first_one_is_pinned_and_the_next_use_checks(
        self, open_ssh: OpenSsh, ssh_guest: SshGuest, other_guest: SshGuest, pins: Path
    ) -> None:
        assert open_ssh().ping()
        assert pins.read_text() == f"{UUID} {ssh_guest.host_key}\n"
        assert stat.S_IMODE(pins.stat().st_mode) == 0o600
        assert open_ssh().ping()

        before = len(other_guest.log())
        with pytest.raises(HostKeyRefused, match="nothing was sent") as caught:
            open_ssh(other_guest).info()
        assert ssh_guest.host_key.fingerprint in str(caught.value)
        said = other_guest.log()[before:]
        assert "Connection from" in said
        assert "root" not in said, "the login had begun"
        assert not open_ssh(other_guest).ping()
        assert pins.read_text() == f"{UUID} {ssh_guest.host_key}\n"

    def test_another_key_of_the_same_kind(
        self, open_ssh: OpenSsh, ssh_guest: SshGuest, pins: Path, tmp_path: Path
    ) -> None:
        before = HostKey.parse(make_key(tmp_path / "before").with_suffix(".pub").read_text())
        PinnedKey(pins, UUID).accept(before)
        PinnedKey(pins, "another").accept(before)
        at = len(ssh_guest.log())
        with pytest.raises(HostKeyRefused, match="seen first") as caught:
            open_ssh().info()
        assert before.fingerprint in str(caught.value)
        assert ssh_guest.host_key.fingerprint in str(caught.value)
        until(lambda: "[preauth]" in ssh_guest.log()[at:])
        assert "root" not in ssh_guest.log()[at:], "the login had begun"

        command = caught.value.hint.partition("type: ")[2].partition(";")[0]
        subprocess.run(command, shell=True, check=True)
        assert open_ssh().ping()
        assert pins.read_text() == f"another {before}\n{UUID} {ssh_guest.host_key}\n"

    def test_an_address_that_refuses_us_is_not_pinned(
        self, open_ssh: OpenSsh, other_guest: SshGuest, pins: Path
    ) -> None:
        assert not open_ssh(other_guest, user="nobody-here").ping()
        assert not pins.exists()

    def test_one_from_the_configuration(self, open_ssh: OpenSsh, ssh_guest: SshGuest, pins: Path) -> None:
        right = host_key_policy(f"{ssh_guest.host_key} root@guest", pins, UUID)
        assert open_ssh(host_key=right).ping()
        assert not pins.exists()

    def test_a_wrong_one_from_the_configuration(
        self, open_ssh: OpenSsh, ssh_guest: SshGuest, other_guest: SshGuest
    ) -> None:
        with pytest.raises(HostKeyRefused, match="no SSH host key of the kind ssh-rsa"):
            open_ssh(host_key=ConfiguredKey(str(other_guest.host_key))).info()
        assert open_ssh(other_guest, host_key=ConfiguredKey(str(other_guest.host_key))).ping()
        changed = HostKey(ssh_guest.host_key.kind, ssh_guest.host_key.data[:-1] + b"\0")
        with pytest.raises(HostKeyRefused, match="the configuration says") as caught:
            open_ssh(host_key=ConfiguredKey(str(changed))).info()
        assert "host_key" in caught.value.hint

    @pytest.mark.parametrize("text", ["", "AAAA", "ssh-ed25519 !", "ssh-ed25519 AAAA", "ssh-rsa {}"])
    def test_no_key_in_the_configuration(self, ssh_guest: SshGuest, text: str) -> None:
        with pytest.raises(HostKeyRefused, match="is not a key"):
            ConfiguredKey(text.format(str(ssh_guest.host_key).split()[1]))

    @pytest.mark.parametrize("line", ["rubbish", f"{UUID} ssh-ed25519", f"{UUID} {{0}}\n{UUID} {{0}}", "\udcff"])
    def test_a_file_that_cannot_be_understood_trusts_nobody(
        self, open_ssh: OpenSsh, ssh_guest: SshGuest, pins: Path, line: str
    ) -> None:
        pins.parent.mkdir()
        pins.write_text(f"# by hand\n\n{line.format(ssh_guest.host_key)}\n", errors="surrogateescape")
        kept = pins.read_bytes()
        with pytest.raises(HostKeyRefused, match="no host key is trusted"):
            open_ssh().info()
        assert pins.read_bytes() == kept

    def test_a_file_that_others_can_write_trusts_nobody(self, open_ssh: OpenSsh, pins: Path) -> None:
        assert open_ssh().ping()
        pins.chmod(0o620)
        with pytest.raises(HostKeyRefused, match="written by others"):
            open_ssh().info()

    def test_many_that_pin_at_once_all_stay_pinned(self, ssh_guest: SshGuest, pins: Path) -> None:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda number: PinnedKey(pins, f"uuid-{number}").accept(ssh_guest.host_key), range(40)))
        assert len(pins.read_text().splitlines()) == 40

    def test_of_two_that_pin_at_once_one_wins(self, ssh_guest: SshGuest, other_guest: SshGuest, pins: Path) -> None:
        slow = PinnedKey(pins, UUID)
        slow.check(other_guest.host_key)
        PinnedKey(pins, UUID).accept(ssh_guest.host_key)
        with pytest.raises(HostKeyRefused):
            slow.accept(other_guest.host_key)
        assert slow.expected() == ssh_guest.host_key
