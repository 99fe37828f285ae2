"""What every GuestChannel must do: the real agent, in a real guest through libvirt, and on this host over a socket.

This host's agent is never told to freeze: it would stop the test and everything else.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.contracts.conftest import BlankFactory
from tests.guests.machines import Guest
from workers.contract.errors import GuestError, NotFound
from workers.contract.seams import GuestChannel
from workers.guests.agent import AgentChannel
from workers.hypervisors.libvirt_host import LibvirtHypervisor

CHANNEL = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"


class SocketCommand:
    """Commands to an agent over a unix socket; one connection each, as libvirt would after a time-out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, request: str, timeout: float) -> str:
        try:
            with socket.socket(socket.AF_UNIX) as link:
                link.settimeout(min(timeout, 2.0))
                link.connect(str(self.path))
                link.sendall(request.encode() + b"\n")
                return link.makefile().readline()
        except OSError as error:
            raise GuestError(f"no answer: {error}") from None


@pytest.fixture
def host_agent(tmp_path: Path) -> Iterator[tuple[AgentChannel, subprocess.Popen[bytes]]]:
    """The agent of this host, with its freeze commands blocked."""
    path = tmp_path / "ga.sock"
    blocked = "guest-fsfreeze-status,guest-fsfreeze-freeze,guest-fsfreeze-freeze-list,guest-fsfreeze-thaw"
    argv = ["qemu-ga", "-m", "unix-listen", "-p", str(path), "-t", str(tmp_path), "-f", str(tmp_path / "pid")]
    agent = subprocess.Popen([*argv, "-b", blocked], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < deadline
            assert agent.poll() is None, "qemu-ga ended"
            time.sleep(0.02)
        yield AgentChannel(SocketCommand(path)), agent
    finally:
        agent.send_signal(signal.SIGCONT)
        agent.terminate()
        agent.wait(20)


class TestOverASocket:
    def test_it_answers(self, host_agent: tuple[AgentChannel, subprocess.Popen[bytes]]) -> None:
        contract: GuestChannel = host_agent[0]
        assert contract.ping()

    def test_a_blocked_command_is_said_so_with_the_mend(
        self, host_agent: tuple[AgentChannel, subprocess.Popen[bytes]]
    ) -> None:
        with pytest.raises(GuestError, match="disabled") as caught:
            host_agent[0].frozen()
        assert "qemu-ga" in caught.value.hint

    def test_a_silent_agent(self, host_agent: tuple[AgentChannel, subprocess.Popen[bytes]]) -> None:
        os.kill(host_agent[1].pid, signal.SIGSTOP)
        assert not host_agent[0].ping()
        with pytest.raises(GuestError, match="no answer"):
            host_agent[0].frozen()


@pytest.mark.parametrize("reply", ["", "[]", "{}", '{"error": "x"}', '{"return": "many"}', '{"return": null}', "\x00"])
def test_a_reply_that_makes_no_sense(reply: str) -> None:
    channel = AgentChannel(lambda _request, _timeout: reply)
    assert not channel.ping()
    with pytest.raises(GuestError):
        channel.thaw()
    with pytest.raises(GuestError):
        channel.freeze()


def test_an_old_reply_is_not_taken_for_a_new_one() -> None:
    assert not AgentChannel(lambda _request, _timeout: '{"return": 1}').ping()

    def echo(request: str, _timeout: float) -> str:
        return json.dumps({"return": json.loads(request)["arguments"]["id"]})

    assert AgentChannel(echo).ping()


@pytest.fixture
def channel_of(hypervisor: LibvirtHypervisor) -> Callable[[str], AgentChannel]:
    return lambda uuid: AgentChannel(hypervisor.agent_command(uuid))


class TestThroughLibvirtWithoutAgent:
    def test_no_channel(self, blank: BlankFactory, channel_of: Callable[[str], AgentChannel]) -> None:
        machine = blank({"vda": "qcow2"})
        channel = channel_of(machine.uuid)
        with pytest.raises(GuestError, match="not running"):
            channel.freeze()  # it is paused
        machine.domain.resume()
        assert not channel.ping()
        with pytest.raises(GuestError, match="no guest agent channel") as caught:
            channel.freeze()
        assert "org.qemu.guest_agent.0" in caught.value.hint

    def test_nobody_at_the_other_end(self, blank: BlankFactory, channel_of: Callable[[str], AgentChannel]) -> None:
        machine = blank({"vda": "qcow2"}, extra=CHANNEL)
        machine.domain.resume()
        channel = channel_of(machine.uuid)
        assert not channel.ping()
        with pytest.raises(GuestError, match="not connected"):
            channel.thaw()

    def test_off(self, blank: BlankFactory, channel_of: Callable[[str], AgentChannel]) -> None:
        channel = channel_of(blank({"vda": "qcow2"}, extra=CHANNEL, start=False).uuid)
        with pytest.raises(GuestError, match="not running"):
            channel.frozen()

    def test_an_unknown_machine(self, channel_of: Callable[[str], AgentChannel]) -> None:
        with pytest.raises(NotFound):
            channel_of("00000000-0000-0000-0000-000000000001").frozen()


@pytest.mark.guest
class TestInAGuest:
    def test_freeze_and_thaw_are_counted(
        self, booted_guest: Guest, hypervisor: LibvirtHypervisor, channel_of: Callable[[str], AgentChannel]
    ) -> None:
        channel = channel_of(booted_guest.uuid)
        assert hypervisor.inventory(booted_guest.uuid).agent
        assert channel.ping()
        assert not channel.frozen()
        try:
            assert channel.freeze() == 2
            assert channel.frozen()
            assert channel.ping()
            with pytest.raises(GuestError):
                channel.freeze()
        finally:
            assert channel.thaw() == 2
        assert not channel.frozen()
        assert channel.thaw() == 0

    def test_a_silent_agent_does_not_hold_us(
        self, booted_guest: Guest, channel_of: Callable[[str], AgentChannel]
    ) -> None:
        channel = channel_of(booted_guest.uuid)
        booted_guest.run(
            "agent=$(pidof qemu-ga); (sleep 1; kill -STOP $agent; sleep 25; kill -CONT $agent) >/dev/null 2>&1 &"
        )
        deadline = time.monotonic() + 20
        while channel.ping():
            assert time.monotonic() < deadline
        started = time.monotonic()
        with pytest.raises(GuestError, match="may still happen"):
            channel.freeze()
        assert time.monotonic() - started < 40
        deadline = time.monotonic() + 60
        while not channel.ping():
            assert time.monotonic() < deadline
        channel.thaw()
        assert not channel.frozen()
