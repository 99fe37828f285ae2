"""Guest agents that cannot be had here: old ones, those of other systems, hostile and broken ones.

Each is no more than the replies that it would give; a real one is in test_guest_channel.py.
"""

from __future__ import annotations

import base64
import json
import os

import pytest

from workers.contract.errors import GuestError, HypervisorUnreachable, StillframeError
from workers.contract.guests import GuestOs
from workers.guests.agent import AgentChannel


def scripted(**replies: object) -> AgentChannel:
    """An agent that returns `replies` (`guest_info` → its value; a list: one after the other; a string beginning with
    `!`: refused in these words), and refuses all else."""
    left = {
        name.replace("_", "-"): list(reply) if isinstance(reply, list) else reply for name, reply in replies.items()
    }

    def command(request: str, _timeout: float) -> str:
        name = json.loads(request)["execute"]
        reply = left.get(name, f"!The command {name} has not been found")
        if isinstance(reply, list):
            reply = reply.pop(0)
        if isinstance(reply, StillframeError):
            raise reply
        if isinstance(reply, str) and reply.startswith("!"):
            return json.dumps({"error": {"class": "GenericError", "desc": reply[1:]}})
        return json.dumps({"return": reply})

    return AgentChannel(command)


def allowing(*names: str) -> dict[str, object]:
    return {"version": "1.0", "supported_commands": [{"name": name, "enabled": True} for name in names]}


@pytest.mark.parametrize(
    ("said", "os", "release"),
    [
        (
            {"id": "mswindows", "name": "Microsoft Windows", "kernel-version": "10.0"},
            GuestOs.WINDOWS,
            "Microsoft Windows",
        ),
        ({"id": "debian", "pretty-name": "Debian 12", "kernel-version": "#1 SMP"}, GuestOs.LINUX, "Debian 12"),
        ({"kernel-version": "#1 SMP", "kernel-release": "6.1"}, GuestOs.LINUX, "6.1"),
        ({"id": "freebsd", "name": "FreeBSD", "kernel-version": "FreeBSD 14.1"}, GuestOs.OTHER, "FreeBSD"),
        ({}, GuestOs.OTHER, ""),
    ],
)
def test_systems(said: object, os: GuestOs, release: str) -> None:
    info = scripted(guest_info=allowing("guest-get-osinfo"), guest_get_osinfo=said).info()
    assert (info.os, info.release) == (os, release)


def test_an_old_agent_that_cannot_say_its_system() -> None:
    said = [{"name": "guest-ping"}, {"name": "guest-set-vcpus", "enabled": True}, {"enabled": True}, "guest-exec"]
    assert scripted(guest_info={"supported_commands": said}).info().os is GuestOs.LINUX
    said[1] = {"name": "guest-set-vcpus", "enabled": False}
    assert scripted(guest_info={"supported_commands": said}).info().os is GuestOs.OTHER
    info = scripted(guest_info={}).info()
    assert (info.agent, info.can_run, info.can_copy, info.can_freeze) == ("", False, False, False)


@pytest.mark.parametrize(
    ("freeze", "some"), [((), False), (("freeze-list",), True)], ids=["as a whole", "by mount points"]
)
def test_what_can_be_frozen(freeze: tuple[str, ...], some: bool) -> None:
    names = [f"guest-fsfreeze-{act}" for act in ("freeze", "thaw", "status", *freeze)]
    info = scripted(guest_info=allowing(*names)).info()
    assert (info.can_freeze, info.can_freeze_some) == (True, some)
    for missing in names[:3]:
        assert not scripted(guest_info=allowing(*(name for name in names if name != missing))).info().can_freeze


def test_a_freeze_gets_the_time_that_its_system_needs() -> None:
    limits: dict[str, float] = {}
    said: dict[str, object] = {"guest-info": allowing("guest-get-osinfo"), "guest-get-osinfo": {"id": "mswindows"}}

    def command(request: str, timeout: float) -> str:
        name = json.loads(request)["execute"]
        limits[name] = timeout
        return json.dumps({"return": said.get(name, 1)})

    channel = AgentChannel(command)
    channel.freeze()
    assert limits["guest-fsfreeze-freeze"] == 30
    channel.info()
    channel.freeze(["C:\\"])
    channel.thaw()
    assert (limits["guest-fsfreeze-freeze-list"], limits["guest-fsfreeze-thaw"]) == (75, 10)
    AgentChannel(command, freeze_seconds=3).freeze()
    assert limits["guest-fsfreeze-freeze"] == 3


@pytest.mark.parametrize(
    ("end", "code"),
    [({"signal": 9}, 137), ({"signal": 0xC0000005}, 0xC0000005), ({"signal": -0x3FFFFFFB}, 0xC0000005)],
    ids=["a signal", "a Windows status", "the same with a sign"],
)
def test_how_a_command_ended(end: dict[str, object], code: int) -> None:
    channel = scripted(guest_exec={"pid": 1}, guest_exec_status=[{"exited": False}, {"exited": True, **end}])
    assert channel.run(["x"], timeout=5).code == code


@pytest.mark.parametrize("stream", ["out", "err"])
def test_lost_output_of_either_stream(stream: str) -> None:
    end = {"exited": True, "exitcode": 0, f"{stream}-data": "YQ==", f"{stream}-truncated": True}
    ran = scripted(guest_exec={"pid": 1}, guest_exec_status=end).run(["x"], timeout=5)
    assert ran.truncated
    assert b"a" in (ran.out, ran.err)


LOST = [GuestError("it did not answer in time"), "!Invalid parameter 'pid'", HypervisorUnreachable("it was cut")]


@pytest.mark.parametrize("lost", LOST)
def test_an_end_that_was_lost(lost: object) -> None:
    channel = scripted(guest_exec={"pid": 1}, guest_exec_status=[{"exited": False}, lost])
    with pytest.raises(GuestError, match="was started in the guest, and how it ended is not known"):
        channel.run(["x"], timeout=5)


def test_an_old_agent_that_is_frozen() -> None:
    refusal = "!The command guest-exec has been disabled for this instance"
    with pytest.raises(GuestError, match="is frozen"):
        scripted(guest_exec=refusal, guest_fsfreeze_status="frozen").run(["x"], timeout=5)
    with pytest.raises(GuestError) as caught:
        scripted(guest_exec=refusal, guest_fsfreeze_status="thawed").run(["x"], timeout=5)
    assert "frozen" not in str(caught.value)


class ShortWriter:
    """An agent that takes at most `most` bytes at a time."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = bytearray()
        self.closed = 0

    def __call__(self, request: str, _timeout: float) -> str:
        asked = json.loads(request)
        reply: object = {}
        if asked["execute"] == "guest-file-write":
            piece = base64.b64decode(asked["arguments"]["buf-b64"])[: self.most]
            self.taken += piece
            reply = {"count": len(piece), "eof": False}
        elif asked["execute"] == "guest-file-close":
            self.closed += 1
        return json.dumps({"return": 1000 if asked["execute"] == "guest-file-open" else reply})


def test_short_writes() -> None:
    agent, data = ShortWriter(7000), os.urandom(200_000)
    AgentChannel(agent).put_file("/x", data)
    assert (bytes(agent.taken), agent.closed) == (data, 1)
    stuck = ShortWriter(0)
    with pytest.raises(GuestError, match="/x could not be written"):
        AgentChannel(stuck).put_file("/x", data)
    assert stuck.closed == 1


def test_a_read_that_never_gets_on() -> None:
    channel = scripted(
        guest_file_open=1, guest_file_read={"count": 10, "buf-b64": "", "eof": False}, guest_file_close={}
    )
    assert channel.get_file("/x", limit=10) == b""


def test_no_more_is_asked_for_or_taken_than_the_limit() -> None:
    counts = []

    def command(request: str, _timeout: float) -> str:
        arguments = json.loads(request)["arguments"]
        counts.append(arguments.get("count"))
        data = base64.b64encode(bytes(100)).decode()
        return json.dumps({"return": {"count": 100, "buf-b64": data, "eof": False} if "count" in arguments else 1})

    assert AgentChannel(command).get_file("/x", limit=250) == bytes(250)
    assert counts == [None, 250, 150, 50, None]


def test_addresses_that_serve() -> None:
    names = [
        "127.0.0.1",
        "::1",
        "fe80::1%eth0",
        "169.254.1.1",
        "0.0.0.0",
        "2001:db8::5",
        "10.0.0.5",
        "rubbish; rm",
        None,
    ]
    said = [{"name": "lo"}, "rubbish", {"ip-addresses": [*({"ip-address": name} for name in names), 7, {}]}]
    assert scripted(guest_network_get_interfaces=[said]).addresses() == ["10.0.0.5", "2001:db8::5"]
    assert scripted(guest_network_get_interfaces=None).addresses() == []


REPLIES = ["", "[]", "{}", '{"error": "x"}', '{"return": "many"}', '{"return": null}', '{"return": {"x": []}}', "\x00"]


@pytest.mark.parametrize("reply", [*REPLIES, '{"return": true}', '{"return": -1}'])
def test_a_reply_that_makes_no_sense(reply: str) -> None:
    channel = AgentChannel(lambda _request, _timeout: reply)
    assert not channel.ping()
    for call in (channel.thaw, channel.freeze, channel.frozen, lambda: channel.freeze(["/"])):
        with pytest.raises(GuestError):
            call()


@pytest.mark.parametrize("reply", ['"', "{}", '{"return": {"exited": true}}', '{"return": 7}'])
def test_a_reply_that_makes_no_sense_of_a_command(reply: str) -> None:
    with pytest.raises(GuestError):
        AgentChannel(lambda _request, _timeout: reply).run(["x"], timeout=5)


@pytest.mark.parametrize("data", ["*", "é", "YQ", 7])
def test_what_is_not_base64(data: object) -> None:
    end = {"exited": True, "exitcode": 0, "out-data": data}
    with pytest.raises(GuestError, match="base64"):
        scripted(guest_exec={"pid": 1}, guest_exec_status=end).run(["x"], timeout=5)


def test_an_old_reply_is_not_taken_for_a_new_one() -> None:
    assert not AgentChannel(lambda _request, _timeout: '{"return": 1}').ping()

    def echo(request: str, _timeout: float) -> str:
        return json.dumps({"return": json.loads(request)["arguments"]["id"]})

    assert AgentChannel(echo).ping()
