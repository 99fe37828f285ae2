"""Which way into a guest is taken: real agents of several permissions and a real sshd, in one sandbox of this host.

The agents there are never told to freeze. What a frozen one does is tried in a real guest.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.contracts.sshd import SshGuest, make_key
from tests.guests.machines import Guest
from workers.config import GuestAccess
from workers.contract.errors import GuestError
from workers.guests.agent import AgentChannel
from workers.guests.host_keys import ConfiguredKey
from workers.guests.ssh import SshChannel
from workers.guests.ways import MARK, Ways, open_ways
from workers.hypervisors import open_hypervisor

RUN = "guest-exec,guest-exec-status,guest-file-open,guest-file-read,guest-file-write,guest-file-close"
FREEZE = "guest-fsfreeze-freeze,guest-fsfreeze-freeze-list,guest-fsfreeze-thaw,guest-fsfreeze-status"
KEYS = "guest-ssh-add-authorized-keys,guest-ssh-remove-authorized-keys"
THEIRS = "/root/.ssh/authorized_keys"


@dataclass
class World:
    """`connections`: the addresses that were tried; all lead to the one sshd, but those in `dead`."""

    guest: SshGuest
    connections: list[str] = field(default_factory=list)
    dead: set[str] = field(default_factory=set)
    user: str = "root"
    key: Path | None = None
    """Instead of the one that the guest knows."""
    channels: list[SshChannel] = field(default_factory=list)

    def connect(self, address: str, private: bytes | None) -> SshChannel:
        self.connections.append(address)
        if address in self.dead:
            raise GuestError(f"nobody is at {address}", hint="look for them")
        policy = ConfiguredKey(str(self.guest.host_key))
        key = private or self.key or self.guest.key
        self.channels.append(
            SshChannel(address="127.0.0.1", port=self.guest.port, key=key, host_key=policy, user=self.user)
        )
        return self.channels[-1]

    def authorised(self) -> list[str]:
        path = self.guest.path(THEIRS)
        return path.read_text().splitlines() if path.exists() else []

    @contextmanager
    def ways(self, agent: AgentChannel | None, *, job: str = "job-a", **access: object) -> Iterator[Ways]:
        wanted = GuestAccess.model_validate({"machines": "web", "user": self.user} | access)
        with open_ways(wanted, agent, self.connect, job=job) as found:
            yield found


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshGuest]:
    guest = SshGuest(tmp_path_factory.mktemp("sshd"))
    try:
        guest.out("sed -i 's|^AuthorizedKeysFile.*|& .ssh/authorized_keys|' /etc/test-sshd/config; rm -rf /root/.ssh")
        os.kill(guest.pid, signal.SIGHUP)
        wait_for(lambda: guest.log().count("Server listening") == 2)
        yield guest
    finally:
        guest.stop()


def over_socket(path: Path) -> Callable[[str, float], str]:
    """Commands to the agent that listens there."""

    def command(request: str, timeout: float) -> str:
        try:
            with socket.socket(socket.AF_UNIX) as link:
                link.settimeout(timeout)
                link.connect(str(path))
                link.sendall(request.encode() + b"\n")
                return link.makefile().readline()
        except OSError as error:
            raise GuestError(f"no answer: {error}") from None

    return command


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def running_agent(guest: SshGuest, name: str, blocked: str) -> Iterator[AgentChannel]:
    """An agent in the sandbox that forbids the commands in `blocked`."""
    path = guest.path(f"/run/{name}.sock")
    words = f"-p /run/{name}.sock -t /run -f /run/{name}.lock {f'-b {blocked}' if blocked else ''}"
    process = guest.popen(f"echo $$ >/run/{name}.pid; exec qemu-ga -m unix-listen {words}")
    try:
        wait_for(lambda: path.exists() or process.poll() is not None)
        yield AgentChannel(over_socket(path))
    finally:
        guest.out(f"kill $(cat /run/{name}.pid)")
        process.wait(20)


@pytest.fixture(scope="module")
def free(sandbox: SshGuest) -> Iterator[AgentChannel]:
    """An agent that allows everything."""
    with running_agent(sandbox, "free", "") as made:
        yield made


@pytest.fixture(scope="module")
def strict(sandbox: SshGuest) -> Iterator[AgentChannel]:
    """An agent as that of EL 9: it freezes, and lets keys in."""
    with running_agent(sandbox, "strict", RUN) as made:
        yield made


@pytest.fixture(scope="module")
def strictest(sandbox: SshGuest) -> Iterator[AgentChannel]:
    """An agent that freezes, and nothing else."""
    with running_agent(sandbox, "strictest", f"{RUN},{KEYS}") as made:
        yield made


@pytest.fixture
def world(sandbox: SshGuest) -> Iterator[World]:
    made = World(sandbox)
    yield made
    sandbox.out(f"rm -f {THEIRS}")


def altered(agent: AgentChannel, command: str, reply: Callable[[], str]) -> AgentChannel:
    """The same agent with another answer to one command."""
    ask = agent._command
    return AgentChannel(
        lambda request, timeout: reply() if json.loads(request)["execute"] == command else ask(request, timeout)
    )


def at(agent: AgentChannel, *addresses: str) -> AgentChannel:
    """The same agent in a guest with other addresses."""
    entries = [{"ip-address": address, "ip-address-type": "ipv4", "prefix": 24} for address in addresses]
    said = json.dumps({"return": [{"name": "eth0", "ip-addresses": entries}]})
    return altered(agent, "guest-network-get-interfaces", lambda: said)


def refused() -> str:
    raise GuestError("no answer")


def works(found: Ways) -> bool:
    assert found.commands is not None
    return found.commands.run(["echo", "here"], timeout=20).out == b"here\n"


class TestByTheAgent:
    @pytest.mark.parametrize("channel", ["auto", "agent"])
    def test_it_is_enough(self, world: World, free: AgentChannel, channel: str) -> None:
        with world.ways(free, channel=channel, key_file="/nowhere") as found:
            assert (found.commands, found.freezer, found.agent_freezes) == (free, free, True)
            assert (found.described, found.why_not) == ("guest agent", "")
            assert works(found)
        assert world.connections == []
        assert world.authorised() == []

    def test_it_may_not_freeze(self, world: World, sandbox: SshGuest) -> None:
        with running_agent(sandbox, "no-freeze", FREEZE) as agent, world.ways(agent) as found:
            assert (found.commands, found.freezer, found.agent_freezes) == (agent, None, False)
            assert "guest-fsfreeze" in found.why_not

    def test_it_may_only_freeze_and_is_the_only_way(self, world: World, strict: AgentChannel) -> None:
        with world.ways(strict, channel="agent", key_file="/nowhere", address="10.1.2.3") as found:
            assert (found.commands, found.freezer) == (None, strict)
            assert "allow guest-exec, guest-exec-status and guest-file-*" in found.why_not
        assert world.connections == []

    def test_nobody_answers(self, world: World, tmp_path: Path) -> None:
        silent = AgentChannel(over_socket(tmp_path / "nobody"))
        for agent in (silent, None):
            with world.ways(agent) as found:
                assert (found.commands, found.freezer, found.agent_freezes) == (None, None, False)
                assert "start qemu-guest-agent" in found.why_not
                assert 'set key_file and address under [guests."web"]' in found.why_not

    def test_what_it_may_is_not_known(self, world: World, free: AgentChannel) -> None:
        agent = altered(free, "guest-info", refused)
        with world.ways(agent, channel="agent") as found:
            assert (found.commands, found.freezer, found.agent_freezes) == (None, agent, True)
            assert "no answer" in found.why_not


class TestWithAKeyOfOneJob:
    def test_it_is_planted_used_and_removed(self, world: World, strict: AgentChannel) -> None:
        with world.ways(at(strict, "10.1.2.3"), job="0123abcd") as found:
            assert isinstance(found.commands, SshChannel)
            assert works(found)
            assert (found.described, found.why_not, found.agent_freezes) == ("ssh root@10.1.2.3", "", True)
            assert isinstance(found.freezer, AgentChannel)
            [line] = world.authorised()
            assert re.fullmatch(rf"ssh-ed25519 \S+ {MARK}-0123abcd", line)
        assert world.authorised() == []
        assert world.channels[0]._link is None, "the connection is left open"

    def test_each_visit_has_its_own(self, world: World, strict: AgentChannel) -> None:
        agent = at(strict, "10.1.2.3")
        with world.ways(agent) as first:
            with world.ways(agent) as second:
                assert len(set(world.authorised())) == 2
                assert works(second)
            assert works(first)
            assert len(world.authorised()) == 1

    def test_it_is_removed_whatever_happens(self, world: World, strict: AgentChannel) -> None:
        agent = at(strict, "10.1.2.3")
        with suppress(KeyboardInterrupt), world.ways(agent):
            assert world.authorised()
            raise KeyboardInterrupt
        assert world.authorised() == []
        world.dead = {"10.1.2.3"}
        with world.ways(agent) as found:
            assert found.commands is None
            assert "nobody is at 10.1.2.3 (look for them)" in found.why_not
            assert "allow guest-exec" in found.why_not
        assert world.authorised() == []

    def test_what_a_killed_process_left_is_removed(self, world: World, strict: AgentChannel, tmp_path: Path) -> None:
        public = make_key(tmp_path / "key").with_suffix(".pub").read_text().split()
        ours, theirs = f"{public[0]} {public[1]} {MARK}-dead", f"{public[0]} {public[1]} {MARK}ed somebody@else"
        strict.plant_key("root", ours)
        strict.plant_key("root", theirs)
        with world.ways(at(strict, "10.1.2.3")) as found:
            assert works(found)
            assert ours not in world.authorised()
        assert world.authorised() == [theirs]

    @pytest.mark.parametrize("job", ["a b", 'x" command="id', "a\nssh-ed25519 AAAA", "'"])
    def test_a_job_cannot_add_to_the_line(self, world: World, strict: AgentChannel, job: str) -> None:
        with world.ways(at(strict, "10.1.2.3"), job=job) as found:
            assert works(found)
            [line] = world.authorised()
            assert len(line.split()) == 3
        assert world.authorised() == []

    def test_a_user_that_is_not_there(self, world: World, strict: AgentChannel) -> None:
        with world.ways(at(strict, "10.1.2.3"), user="nosuchuser") as found:
            assert found.commands is None
            assert "nosuchuser" in found.why_not
        assert world.connections == []


class TestWithTheConfiguredKey:
    def test_the_agent_still_freezes(self, world: World, strictest: AgentChannel) -> None:
        with world.ways(strictest, key_file="/k", address="10.1.2.3") as found:
            assert isinstance(found.commands, SshChannel)
            assert works(found)
            assert (found.freezer, found.agent_freezes) == (strictest, True)
            assert world.authorised() == []

    def test_nothing_is_planted_beside_it(self, world: World, strict: AgentChannel) -> None:
        with world.ways(strict, key_file="/k", address="10.1.2.3") as found:
            assert works(found)
            assert world.authorised() == []

    def test_without_an_agent_it_freezes_too(self, world: World) -> None:
        with world.ways(None, key_file="/k", address="10.1.2.3") as found:
            assert found.freezer is not None
            assert found.freezer is found.commands
            assert not found.agent_freezes
            assert found.why_not == ""
            assert found.freezer.freeze(["/data/vda"]) == 1
        wait_for(lambda: not frozen(world.guest))  # the end of the visit is the end of the freeze

    def test_it_is_preferred(self, world: World, free: AgentChannel) -> None:
        with world.ways(free, channel="ssh", key_file="/k", address="10.1.2.3") as found:
            assert isinstance(found.commands, SshChannel)
            assert found.freezer is free

    def test_it_is_preferred_and_does_not_work(self, world: World, free: AgentChannel) -> None:
        world.dead = {"10.1.2.3"}
        with world.ways(free, channel="ssh", key_file="/k", address="10.1.2.3") as found:
            assert (found.commands, found.freezer, found.agent_freezes) == (None, free, True)
            assert found.why_not == "nobody is at 10.1.2.3 (look for them)"

    def test_a_user_that_cannot_become_root(self, world: World) -> None:
        world.user = "stranger"
        with world.ways(None, key_file="/k", address="10.1.2.3") as found:
            assert (found.commands, found.freezer) == (None, None)
            assert "root" in found.why_not
        assert world.channels[0]._link is None, "the connection is left open"

    def test_a_key_that_is_good_for_something_else_only(self, world: World, tmp_path: Path) -> None:
        world.key = make_key(tmp_path / "key")
        line = f'command="echo hello" {world.key.with_suffix(".pub").read_text()}'
        world.guest.out(f"mkdir -p /root/.ssh && echo '{line.strip()}' >{THEIRS}")
        with world.ways(None, key_file="/k", address="10.1.2.3") as found:
            assert (found.commands, found.freezer) == (None, None)
            assert "cannot run commands as root" in found.why_not

    def test_there_is_none(self, world: World, strictest: AgentChannel) -> None:
        with world.ways(strictest, channel="ssh", address="10.1.2.3") as found:
            assert (found.commands, found.freezer) == (None, strictest)
            assert found.why_not == 'for SSH, set key_file and address under [guests."web"]'
        assert world.connections == []


class TestAddresses:
    def test_the_configured_one_counts(self, world: World, strict: AgentChannel) -> None:
        with world.ways(at(strict, "10.1.2.3"), address="10.9.9.9") as found:
            assert found.described == "ssh root@10.9.9.9"
        assert world.connections == ["10.9.9.9"]

    def test_the_next_one_is_tried(self, world: World, strict: AgentChannel) -> None:
        world.dead = {"172.17.0.1"}
        with world.ways(at(strict, "172.17.0.1", "10.1.2.3", "10.1.2.4")) as found:
            assert found.described == "ssh root@10.1.2.3"
        assert world.connections == ["172.17.0.1", "10.1.2.3"]

    def test_but_not_for_ever(self, world: World, strict: AgentChannel) -> None:
        world.dead = {f"10.1.2.{number}" for number in range(1, 100)}
        with world.ways(at(strict, *world.dead)) as found:
            assert found.commands is None
        assert len(world.connections) == 4

    def test_none_is_known(self, world: World, strict: AgentChannel) -> None:
        for agent in (at(strict), altered(strict, "guest-network-get-interfaces", refused)):
            with world.ways(agent) as found:
                assert "no address for SSH is known" in found.why_not
        with world.ways(None, key_file="/k") as found:
            assert "no address for SSH is known" in found.why_not
        assert world.connections == []

    def test_a_key_of_ours_is_not_tried_on_this_host(self, world: World, strictest: AgentChannel) -> None:
        listed = subprocess.run(["ip", "-br", "address"], capture_output=True, text=True, check=True).stdout
        ours = re.findall(r"([0-9a-f.:]+)/", listed)
        agent = altered(strictest, "nothing", refused)
        # `addresses` leaves link-local ones out.
        ours = [address for address in ours if not address.startswith("fe80")]
        agent.addresses = lambda: [*ours, "203.0.113.9"]  # type: ignore[method-assign]
        with world.ways(agent, key_file="/k") as found:
            assert found.described == "ssh root@203.0.113.9"
        assert world.connections == ["203.0.113.9"]


def frozen(guest: SshGuest) -> bool:
    """Whether a write to it waits."""
    with guest.popen("timeout 1 sh -c ': >/data/vda/probe'") as process:
        return process.wait(20) != 0


@pytest.mark.guest
@pytest.mark.timeout(300)
def test_a_frozen_guest_is_thawed_first_of_all(booted_guest: Guest) -> None:
    def connect(address: str, _private: bytes | None) -> SshChannel:
        raise AssertionError(f"{address} was tried, and hangs")

    hypervisor = open_hypervisor("qemu:///system")
    agent = AgentChannel(hypervisor.agent_command(booted_guest.uuid))
    try:
        assert agent.freeze() == 2
        for channel in ("auto", "agent", "ssh"):
            access = GuestAccess.model_validate(
                {"machines": "*", "channel": channel, "key_file": "/k", "address": "10.1.2.3"}
            )
            with open_ways(access, agent, connect, job="job-a") as found:
                assert (found.commands, found.freezer, found.agent_freezes) == (None, agent, True)
                assert "frozen" in found.why_not
        assert agent.thaw() == 2
        with open_ways(GuestAccess(machines="*"), agent, connect, job="job-a") as found:
            assert (found.commands, found.freezer) == (agent, agent)
    finally:
        agent.thaw()
        hypervisor.close()
