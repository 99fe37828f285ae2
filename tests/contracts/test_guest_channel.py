"""The guest agent as a GuestChannel: the real one in a real guest through libvirt, and the real one of this host over a
socket. The rules that every channel must keep are in guest_channel_suite.py; here is what is an agent's own. Agents
that cannot be had here are in test_agent_replies.py.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.contracts.conftest import BlankFactory
from tests.contracts.guest_channel_suite import MIB, PATIENCE, POSIX, FreezeSuite, GuestChannelSuite, Subject
from tests.guests.agent_socket import HostAgent
from tests.guests.machines import Guest
from workers.contract.errors import GuestError, GuestTimeout, NotFound
from workers.contract.guests import GuestOs
from workers.contract.seams import GuestChannel
from workers.guests.agent import PIECE, AgentChannel
from workers.hypervisors.libvirt_host import LibvirtHypervisor

CHANNEL = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
EXEC = ("guest-exec", "guest-exec-status")
FILES = ("guest-file-open", "guest-file-read", "guest-file-write", "guest-file-close")
KEYS = ("guest-ssh-add-authorized-keys", "guest-ssh-remove-authorized-keys")
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl one@job"
ChannelOf = Callable[[str], AgentChannel]
StartAgent = Callable[..., HostAgent]


@pytest.fixture
def kind() -> str:
    return "libvirt"


@pytest.fixture
def start_agent(tmp_path: Path) -> Iterator[StartAgent]:
    """`start_agent(blocked=(…), longest=…)`"""
    started: list[HostAgent] = []

    def start(**wanted: Any) -> HostAgent:
        started.append(HostAgent(tmp_path / f"agent{len(started)}", **wanted))
        return started[-1]

    try:
        yield start
    finally:
        for agent in started:
            agent.close()


@pytest.fixture(scope="module")
def host_agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostAgent]:
    agent = HostAgent(tmp_path_factory.mktemp("ga"))
    yield agent
    agent.close()


@pytest.fixture
def channel_of(hypervisor: LibvirtHypervisor) -> ChannelOf:
    return lambda uuid: AgentChannel(hypervisor.agent_command(uuid))


class TestOfThisHost(GuestChannelSuite):
    @pytest.fixture
    def subject(self, host_agent: HostAgent, tmp_path: Path) -> Subject:
        channel: GuestChannel = AgentChannel(host_agent.command)
        return Subject(channel, POSIX, GuestOs.LINUX, f"{tmp_path}/", "/proc/none")


@pytest.mark.guest
class TestInAGuest(GuestChannelSuite, FreezeSuite):
    @pytest.fixture
    def subject(self, booted_guest: Guest, channel_of: ChannelOf) -> Subject:
        booted_guest.out("mkdir -p /tmp/suite")
        return Subject(
            channel_of(booted_guest.uuid),
            POSIX,
            GuestOs.LINUX,
            "/tmp/suite/",
            "/proc/none",
            whole_output=2 * MIB,
            too_much_output=4 * MIB,
            cuts=False,
            mounts=("/data/vda", "/data/vdb"),
        )


class TestItsOwn:
    """What only an agent has, with the one of this host."""

    @pytest.mark.parametrize(("signal", "code"), [("TERM", 143), ("KILL", 137)])
    def test_a_signal_is_128_and_its_number(self, host_agent: HostAgent, signal: str, code: int) -> None:
        argv = ["/bin/sh", "-c", f"echo half; kill -{signal} $$"]
        ran = AgentChannel(host_agent.command).run(argv, timeout=PATIENCE)
        assert (ran.code, ran.out) == (code, b"half\n")

    def test_too_long_an_input_is_refused_before_anything_is_started(self, host_agent: HostAgent) -> None:
        channel = AgentChannel(host_agent.command)
        assert channel.run(["cat"], stdin=bytes(PIECE), timeout=PATIENCE).out == bytes(PIECE)
        with pytest.raises(GuestError, match="put a file"):
            channel.run(["cat"], stdin=bytes(PIECE + 1), timeout=PATIENCE)

    def test_a_child_that_keeps_the_output_counts_as_the_program(self, host_agent: HostAgent) -> None:
        with pytest.raises(GuestTimeout, match="may still run"):
            AgentChannel(host_agent.command).run(["/bin/sh", "-c", "sleep 5 & echo on"], timeout=0.5)

    def test_files_are_for_everybody_so_the_folder_must_not_be(self, host_agent: HostAgent, tmp_path: Path) -> None:
        """Why the extension is staged in a folder of mode 0700."""
        AgentChannel(host_agent.command).put_file(f"{tmp_path}/x", b"")
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666

    def test_a_full_disk(self, host_agent: HostAgent) -> None:
        """A small file stays in the agent's buffer: it fails only when it is closed."""
        channel = AgentChannel(host_agent.command)
        for size in (100, 3 * MIB):
            with pytest.raises(GuestError, match="No space left"):
                channel.put_file("/dev/full", bytes(size))

    def test_no_handle_stays_open(self, host_agent: HostAgent, tmp_path: Path) -> None:
        channel = AgentChannel(host_agent.command)
        before = host_agent.open_files()
        channel.put_file(f"{tmp_path}/x", bytes(1000))
        channel.get_file(f"{tmp_path}/x", limit=10)
        for fails in (lambda: channel.get_file(f"{tmp_path}", limit=10), lambda: channel.put_file("/dev/full", b"x")):
            with pytest.raises(GuestError):
                fails()
        assert host_agent.open_files() == before

    def test_keys(self, start_agent: StartAgent) -> None:
        channel = AgentChannel(start_agent().command)
        channel.plant_key("root", KEY)
        assert channel.keys("root") == [KEY]
        channel.remove_key("root", KEY)
        channel.remove_key("root", KEY)
        assert channel.keys("root") == []
        with pytest.raises(GuestError, match="nobody-here"):
            channel.plant_key("nobody-here", KEY)

    def test_addresses_are_real_ones(self, host_agent: HostAgent) -> None:
        said = AgentChannel(host_agent.command).addresses()
        assert not {"127.0.0.1", "::1"} & set(said)
        assert all("." in address or ":" in address for address in said)

    def test_a_silent_agent(self, start_agent: StartAgent) -> None:
        agent = start_agent(longest=1.0)
        channel = AgentChannel(agent.command)
        agent.stand_still()
        assert not channel.ping()
        for call in (channel.frozen, channel.info, lambda: channel.run(["true"], timeout=5)):
            with pytest.raises(GuestError, match="no answer"):
                call()

    def test_an_agent_that_is_gone(self, start_agent: StartAgent) -> None:
        agent = start_agent()
        agent.close()
        channel = AgentChannel(agent.command)
        assert not channel.ping()
        with pytest.raises(GuestError, match="no answer"):
            channel.thaw()


class TestWhatItAllows:
    @pytest.mark.parametrize(
        ("blocked", "run", "copy", "keys"),
        [
            ((), True, True, True),
            (EXEC[:1], False, True, True),
            (EXEC[1:], False, True, True),
            *(((one,), True, False, True) for one in FILES),
            *(((one,), True, True, False) for one in KEYS),
            ((*EXEC, *FILES), False, False, True),
        ],
    )
    def test_is_what_it_says(
        self, start_agent: StartAgent, blocked: tuple[str, ...], run: bool, copy: bool, keys: bool
    ) -> None:
        info = AgentChannel(start_agent(blocked=blocked).command).info()
        assert (info.can_run, info.can_copy, info.can_plant_keys) == (run, copy, keys)
        assert (info.can_freeze, info.can_freeze_some) == (False, False)
        assert info.os is GuestOs.LINUX

    def test_what_is_blocked_is_said_so_with_the_mend(self, start_agent: StartAgent, tmp_path: Path) -> None:
        channel = AgentChannel(start_agent(blocked=(*EXEC, *FILES, *KEYS)).command)
        calls: dict[str, Callable[[], object]] = {
            "guest-exec*": lambda: channel.run(["true"], timeout=PATIENCE),
            "guest-file-*": lambda: channel.put_file(f"{tmp_path}/x", b""),
            "guest-ssh-*": lambda: channel.plant_key("root", KEY),
            "guest-fsfreeze-*": channel.frozen,
        }
        for group, call in calls.items():
            with pytest.raises(GuestError, match="disabled") as caught:
                call()
            assert f"allow {group} " in caught.value.hint
            assert "qemu-ga" in caught.value.hint

    def test_linux_is_known_without_its_word(self, start_agent: StartAgent) -> None:
        info = AgentChannel(start_agent(blocked=("guest-get-osinfo",)).command).info()
        assert (info.os, info.release) == (GuestOs.LINUX, "")


class TestThroughLibvirtWithoutAgent:
    def test_no_channel(self, blank: BlankFactory, channel_of: ChannelOf) -> None:
        machine = blank({"vda": "qcow2"})
        channel = channel_of(machine.uuid)
        with pytest.raises(GuestError, match="not running"):
            channel.freeze()  # it is paused
        machine.domain.resume()
        assert not channel.ping()
        with pytest.raises(GuestError, match="no guest agent channel") as caught:
            channel.freeze()
        assert "org.qemu.guest_agent.0" in caught.value.hint

    def test_nobody_at_the_other_end(self, blank: BlankFactory, channel_of: ChannelOf) -> None:
        machine = blank({"vda": "qcow2"}, extra=CHANNEL)
        machine.domain.resume()
        channel = channel_of(machine.uuid)
        assert not channel.ping()
        for call in (channel.thaw, channel.info, lambda: channel.get_file("/x", limit=1)):
            with pytest.raises(GuestError, match="not connected"):
                call()

    def test_off(self, blank: BlankFactory, channel_of: ChannelOf) -> None:
        channel = channel_of(blank({"vda": "qcow2"}, extra=CHANNEL, start=False).uuid)
        for call in (channel.frozen, lambda: channel.run(["true"], timeout=5)):
            with pytest.raises(GuestError, match="not running"):
                call()

    def test_an_unknown_machine(self, channel_of: ChannelOf) -> None:
        with pytest.raises(NotFound):
            channel_of("00000000-0000-0000-0000-000000000001").frozen()


# $1: a mount point, $2: where the times of its writes are noted (memory). Ends with the file /tmp/beating.
BEAT = 'while [ -e /tmp/beating ]; do echo x >"$1/beat"; cut -d" " -f1 /proc/uptime >>"$2"; usleep 50000; done'


def wait_for_beats(guest: Guest, disk: str, more_than: int) -> int:
    deadline = time.monotonic() + 60
    while (count := int(guest.out(f"cat /tmp/beats.{disk} | wc -l"))) <= more_than:
        assert time.monotonic() < deadline, f"nobody writes to {disk}"
    return count


def longest_pause(times: str) -> float:
    moments = [float(line) for line in times.split()]
    return max(later - sooner for sooner, later in pairwise(moments))


@pytest.mark.guest
class TestFrozenGuest:
    def test_only_what_is_frozen_stands_still(self, booted_guest: Guest, channel_of: ChannelOf) -> None:
        """The times of writes as the guest notes them: while one disk is frozen, the other goes on."""
        channel, hold = channel_of(booted_guest.uuid), 4.0
        start = "touch /tmp/beating; rm -f /tmp/beats.*; touch /tmp/beats.vda /tmp/beats.vdb"
        for disk in ("vda", "vdb"):
            start += f"; sh -c '{BEAT}' sh /data/{disk} /tmp/beats.{disk} >/dev/null 2>&1 </dev/null &"
        booted_guest.out(start.replace("&;", "&"))
        try:
            counts = {disk: wait_for_beats(booted_guest, disk, 2) for disk in ("vda", "vdb")}
            assert channel.freeze(["/data/vda"]) == 1
            time.sleep(hold)  # how long it is held: no wait for anything
            assert channel.thaw() == 1
            for disk, count in counts.items():
                wait_for_beats(booted_guest, disk, count + 2)
        finally:
            channel.thaw()
            booted_guest.out("rm -f /tmp/beating")
        pauses = {disk: longest_pause(booted_guest.out(f"cat /tmp/beats.{disk}")) for disk in ("vda", "vdb")}
        assert pauses["vda"] >= hold
        assert pauses["vdb"] < hold

    def test_info_while_frozen(self, booted_guest: Guest, channel_of: ChannelOf) -> None:
        channel = channel_of(booted_guest.uuid)
        try:
            channel.freeze()
            info = channel.info()
        finally:
            channel.thaw()
        assert (info.can_run, info.can_copy, info.can_freeze) == (False, False, False)
        assert channel.info().can_run

    def test_what_is_not_mounted_is_not_frozen(self, booted_guest: Guest, channel_of: ChannelOf) -> None:
        channel = channel_of(booted_guest.uuid)
        try:
            assert channel.freeze(["/not/mounted"]) == 0
            assert not channel.frozen()
        finally:
            assert channel.thaw() == 0

    def test_the_inventory_sees_the_agent(self, booted_guest: Guest, hypervisor: LibvirtHypervisor) -> None:
        assert hypervisor.inventory(booted_guest.uuid).agent

    def test_a_silent_agent_does_not_hold_us(self, booted_guest: Guest, hypervisor: LibvirtHypervisor) -> None:
        channel = AgentChannel(hypervisor.agent_command(booted_guest.uuid), freeze_seconds=3)
        booted_guest.run(
            "agent=$(pidof qemu-ga); (sleep 1; kill -STOP $agent; sleep 20; kill -CONT $agent) >/dev/null 2>&1 &"
        )
        deadline = time.monotonic() + 20
        while channel.ping():
            assert time.monotonic() < deadline
        started = time.monotonic()
        with pytest.raises(GuestError, match="may still happen"):
            channel.freeze()
        assert time.monotonic() - started < 15
        deadline = time.monotonic() + 60
        while not channel.ping():
            assert time.monotonic() < deadline
        channel.thaw()
        assert not channel.frozen()
