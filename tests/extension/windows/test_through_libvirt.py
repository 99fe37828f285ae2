"""Real libvirt speaks with the stand-in: its own way into the agent's stream, and all that a backup asks of a guest."""

from __future__ import annotations

import os
import time

import pytest

from tests.extension.windows.conftest import package
from tests.guests.windows_relay import MakeFakeWindows
from workers.contract.errors import GuestError
from workers.contract.guests import GuestOs
from workers.contract.points import Consistency
from workers.contract.seams import QuiesceRequest
from workers.guests import vss
from workers.guests.agent import AgentChannel
from workers.guests.windows import WindowsExtension
from workers.hypervisors.libvirt_host import LibvirtHypervisor
from workers.quiesce import decoded

MIB = 1 << 20


@pytest.mark.guest
def test_a_whole_visit(fake_windows_guest: MakeFakeWindows, hypervisor: LibvirtHypervisor) -> None:
    guest = fake_windows_guest(disks={"vda": 32 * MIB})
    channel = AgentChannel(hypervisor.agent_command(guest.uuid))
    assert hypervisor.inventory(guest.uuid).agent
    assert channel.ping()
    assert channel.info().os is GuestOs.WINDOWS
    assert "guest-sync-delimited" in guest.agent.seen or "guest-sync" in guest.agent.seen

    data = os.urandom(300_000)
    channel.put_file("C:\\Temp\\big", data)
    assert channel.get_file("C:\\Temp\\big", limit=MIB) == data

    extension = WindowsExtension(channel)
    assert extension.install(package(), guest.uuid).version == "0.1.0+11111111"
    quiesced = extension.quiesce(QuiesceRequest("job1", guest.uuid, Consistency.APPLICATION, 90, 120))
    assert quiesced.watchdog
    assert channel.freeze() == 2
    try:
        assert channel.frozen()
        with pytest.raises(GuestError, match="frozen"):
            extension.status(guest.uuid)
    finally:
        assert channel.thaw() == 2
    assert vss.failed_writers(decoded(extension.resume("job1").writers)) == []
    assert guest.agent.windows.vss.kinds == [5]


@pytest.mark.guest
def test_libvirt_finds_its_way_back_after_a_lost_reply(
    fake_windows_guest: MakeFakeWindows, hypervisor: LibvirtHypervisor
) -> None:
    guest = fake_windows_guest(disks={"vda": 32 * MIB})
    command = hypervisor.agent_command(guest.uuid)
    guest.agent.trouble.lost_replies.append("guest-fsfreeze-freeze")
    with pytest.raises(GuestError, match="may still happen"):
        command('{"execute": "guest-fsfreeze-freeze"}', 2.0)
    channel = AgentChannel(command)
    deadline = time.monotonic() + 60
    while not channel.ping():
        assert time.monotonic() < deadline
    assert channel.frozen()
    assert channel.thaw() == 2
