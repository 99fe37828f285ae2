"""The full guest: a whole distribution, whose own agent answers and whose own services run."""

from __future__ import annotations

import pytest

from orchestrator.demo.in_guest import agent_command
from tests.guests.machines import Guest

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]


def test_a_full_guest_boots_with_agent_sshd_and_its_data_disk(full_guest: Guest) -> None:
    assert full_guest.out("systemctl is-active qemu-guest-agent") == "active\n"
    # sshd makes its keys' first use slow under emulation; the agent is up before it.
    full_guest.out("for i in $(seq 200); do systemctl -q is-active ssh && exit 0; sleep 0.3; done; exit 1")
    assert "/dev/vdb /data/vdb ext4" in full_guest.out("cat /proc/mounts")
    assert agent_command(full_guest.domain, "guest-get-osinfo")["id"] in ("debian", "ubuntu")


def test_all_its_file_systems_freeze(full_guest: Guest) -> None:
    frozen = agent_command(full_guest.domain, "guest-fsfreeze-freeze")
    thawed = agent_command(full_guest.domain, "guest-fsfreeze-thaw")
    assert frozen == thawed == 2
