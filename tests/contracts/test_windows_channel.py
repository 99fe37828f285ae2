"""The stand-in for a Windows guest's agent: it must keep every rule of a channel, say on the wire what the real agent
says, and have the ways of VSS that the backup of a Windows guest must live with.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.contracts.guest_channel_suite import PATIENCE, FreezeSuite, GuestChannelSuite, Subject, Words
from tests.guests.agent_socket import HostAgent, SocketCommand
from tests.guests.fake_windows import FakeWindowsAgent
from tests.guests.fake_windows_shell import ARGUMENTS
from tests.guests.fake_windows_system import DISABLED, PROVIDER_ID_KEY, PROVIDER_KEY, VSS_KEY
from workers.contract.errors import GuestError
from workers.contract.guests import GuestOs
from workers.contract.seams import GuestChannel
from workers.guests.agent import AgentChannel
from workers.guests.windows import POWERSHELL, encoded


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


POWERSHELL_WORDS = Words(
    say=lambda out, err, code: encoded(
        f"[Console]::Out.Write({quoted(out)}); [Console]::Error.Write({quoted(err)}); exit {code}"
    ),
    echo=encoded("[Console]::OpenStandardInput().CopyTo([Console]::OpenStandardOutput())"),
    arguments=lambda words: [*POWERSHELL, "-File", "C:\\Temp\\arguments.ps1", *words],
    zeros=lambda count: encoded(f"[Console]::OpenStandardOutput().Write((New-Object byte[] {count}), 0, {count})"),
    sleep=lambda seconds: encoded(f"Start-Sleep -Seconds {seconds}"),
)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeWindowsAgent]:
    with FakeWindowsAgent(tmp_path / "ga.sock") as agent:
        yield agent


@pytest.fixture
def command(agent: FakeWindowsAgent, tmp_path: Path) -> SocketCommand:  # noqa: ARG001 - it listens there
    return SocketCommand(tmp_path / "ga.sock", longest=5.0)


@pytest.fixture
def channel(command: SocketCommand) -> AgentChannel:
    return AgentChannel(command)


class TestAsAChannel(GuestChannelSuite, FreezeSuite):
    @pytest.fixture
    def subject(self, agent: FakeWindowsAgent, tmp_path: Path) -> Subject:
        agent.windows.disk.write("C:\\Temp\\arguments.ps1", ARGUMENTS.decode())
        channel: GuestChannel = AgentChannel(SocketCommand(tmp_path / "ga.sock"))
        return Subject(
            channel, POWERSHELL_WORDS, GuestOs.WINDOWS, "C:\\Temp\\", "C:\\Windows\\a?b", mounts=("C:\\", "D:\\")
        )

    def test_a_program_that_is_not_there(self, subject: Subject) -> None:
        """On Windows the agent's own words do not name it."""
        with pytest.raises(GuestError, match="No such file"):
            subject.channel.run(["no-such-program"], timeout=PATIENCE)


WIRE = [
    *(b'{"execute":"guest-sync","arguments":{"id":5}}\n', b'{"execute":"guest-sync-delimited","arguments":{"id":6}}\n'),
    b'\xff{"execute":"guest-sync-delimited","arguments":{"id":7}}\n',
    *(b'{"execute":"guest-s', b'ync","arguments":{"id":8}}'),
    b'{"execute":"guest-ping"}\n{"execute":"guest-ping"}\n',
    b'{"execute":"guest-sync","arguments":{}}\n',
    b'{"execute":"guest-sync","arguments":{"id":"x"}}\n',
    *(b"garbage\n", b"[1]\n", b'{"execute":"nope"}\n'),
    b'{"execute":"guest-exec-status","arguments":{"pid":1}}\n',
    b'{"execute":"guest-file-close","arguments":{"handle":99}}\n',
]


def said(path: Path, requests: list[bytes]) -> bytes:
    """All that an agent sends back to `requests` on one connection."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(20)
        link.connect(str(path))
        for request in requests:
            link.sendall(request)
        link.sendall(b'{"execute":"guest-sync","arguments":{"id":424242}}\n')
        found = b""
        while not found.endswith(b'{"return": 424242}\n'):
            piece = link.recv(65536)
            assert piece, found
            found += piece
    return found


def test_on_the_wire_it_is_the_real_agent(agent: FakeWindowsAgent, tmp_path: Path) -> None:
    real = HostAgent(tmp_path / "real")
    try:
        wanted = said(real.command.path, WIRE)
    finally:
        real.close()
    assert wanted.count(b"\xff") == 2
    assert said(tmp_path / "ga.sock", WIRE).splitlines() == wanted.splitlines()
    assert agent.seen[-1] == "guest-sync"


def test_half_a_command_is_forgotten_at_ff(agent: FakeWindowsAgent, tmp_path: Path) -> None:
    """How libvirt finds its way back into the stream after a time-out."""
    found = said(tmp_path / "ga.sock", [b'{"execute":"guest-fsfreeze-fr', b'\xff{"execute":"guest-ping"}\n'])
    assert found.endswith(b'{"return": {}}\n{"return": 424242}\n')
    assert agent.seen == ["guest-ping", "guest-sync"]


class TestPrograms:
    def test_what_windows_does_not_have_is_refused(self, channel: AgentChannel) -> None:
        for program in ("/bin/sh", "sh", "C:\\no\\such.exe"):
            with pytest.raises(GuestError, match="No such file"):
                channel.run([program, "-c", "true"], timeout=PATIENCE)

    def test_powershell_that_is_not_understood_fails(self, channel: AgentChannel) -> None:
        assert channel.run(encoded("Get-ChildItem"), timeout=PATIENCE).code == 1
        assert channel.run([*POWERSHELL, "-File", "C:\\Temp\\absent.ps1"], timeout=PATIENCE).code != 0
        channel.put_file("C:\\Temp\\other.ps1", b"whatever")
        assert channel.run([*POWERSHELL, "-File", "C:\\Temp\\other.ps1", "status"], timeout=PATIENCE).code == 1

    def test_an_end_is_told_once(self, command: SocketCommand) -> None:
        def ask(name: str, **arguments: object) -> dict[str, object]:
            found = json.loads(command(json.dumps({"execute": name, "arguments": arguments}), 5.0))
            return dict(found if "error" in found else found["return"])

        program, *words = POWERSHELL_WORDS.say("x", "", 3)
        pid = ask("guest-exec", path=program, arg=words)["pid"]
        assert ask("guest-exec-status", pid=pid) == {"exited": True, "exitcode": 3}
        assert "error" in ask("guest-exec-status", pid=pid)

    def test_a_crash_is_told_as_a_signal(self, channel: AgentChannel) -> None:
        ran = channel.run(encoded("[Environment]::FailFast('crash')"), timeout=PATIENCE)
        assert ran.code > 128


class TestVss:
    def test_windows_lets_go_by_itself_and_only_the_thaw_tells(
        self, agent: FakeWindowsAgent, channel: AgentChannel
    ) -> None:
        agent.windows.vss.hold_seconds = 0.2
        assert channel.freeze() == 2
        deadline = time.monotonic() + 20
        while agent.windows.vss.holding:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert channel.frozen(), "the agent does not notice"
        with pytest.raises(GuestError, match="limited up to 10 seconds"):
            channel.thaw()
        assert not channel.frozen()
        assert channel.thaw() == 0
        assert "[7] Failed" in agent.windows.vss.list_writers()

    @pytest.mark.parametrize(
        ("key", "start", "words"),
        [(VSS_KEY, DISABLED, "disabled"), (PROVIDER_ID_KEY, None, "snapshot set"), (PROVIDER_KEY, None, "VSS failed")],
    )
    def test_a_freeze_that_is_not_possible(
        self, agent: FakeWindowsAgent, channel: AgentChannel, key: str, start: int | None, words: str
    ) -> None:
        if start is None:
            del agent.windows.registry[key]
        else:
            agent.windows.registry[key]["Start"] = start
        with pytest.raises(GuestError, match=words):
            channel.freeze()
        assert not channel.frozen()

    def test_an_administrator_may_forbid_commands(self, tmp_path: Path) -> None:
        blocked = {"guest-exec", "guest-file-open", "guest-fsfreeze-freeze-list"}
        with FakeWindowsAgent(tmp_path / "b.sock", blocked=blocked):
            info = AgentChannel(SocketCommand(tmp_path / "b.sock")).info()
        assert (info.os, info.can_run, info.can_copy) == (GuestOs.WINDOWS, False, False)
        assert (info.can_freeze, info.can_freeze_some) == (True, False)

    def test_a_lost_reply_leaves_the_guest_frozen(self, agent: FakeWindowsAgent, tmp_path: Path) -> None:
        channel = AgentChannel(SocketCommand(tmp_path / "ga.sock", longest=0.5))
        agent.trouble.lost_replies.append("guest-fsfreeze-freeze")
        with pytest.raises(GuestError, match="no answer"):
            channel.freeze()
        assert channel.frozen()
        assert channel.thaw() == 2

    def test_a_lost_command_does_not(self, agent: FakeWindowsAgent, tmp_path: Path) -> None:
        channel = AgentChannel(SocketCommand(tmp_path / "ga.sock", longest=0.5))
        agent.trouble.lost_commands.append("guest-fsfreeze-freeze")
        with pytest.raises(GuestError, match="no answer"):
            channel.freeze()
        assert not channel.frozen()

    def test_a_restart_in_the_middle_of_a_freeze(self, agent: FakeWindowsAgent, tmp_path: Path) -> None:
        channel = AgentChannel(SocketCommand(tmp_path / "ga.sock", longest=2.0))
        agent.windows.vss.freeze_seconds = 60.0
        with ThreadPoolExecutor(1) as thread:
            freeze = thread.submit(channel.freeze)
            deadline = time.monotonic() + 20
            while "guest-fsfreeze-freeze" not in agent.seen:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            agent.restart()
            with pytest.raises(GuestError, match="no answer"):
                freeze.result(30)
        assert not channel.frozen()
        assert channel.thaw() == 0
