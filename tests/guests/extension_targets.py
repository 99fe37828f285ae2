"""Where the driver of the Linux extension is tried, and packages that misbehave: the real one with a verb replaced.

Three places: a sandbox of this host behind a real sshd, with dash or busybox as the shell, and a real guest behind the
real agent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.extension_content import content, mode_of
from tests.contracts.sshd import SshGuest
from tests.guests.machines import MIB, GuestFactory
from workers.contract.guests import CONTRACT_VERSION, GuestInfo, GuestOs, Ran
from workers.contract.seams import GuestChannel, Package, PackageFile
from workers.guests.agent import AgentChannel
from workers.guests.host_keys import ConfiguredKey
from workers.guests.ssh import SshChannel
from workers.hypervisors import open_hypervisor

UUID = "11111111-2222-3333-4444-555555555555"
OTHER_UUID = "99999999-2222-3333-4444-555555555555"
V1, V2, V3 = "0.1.0+aaaaaaaa", "0.1.0+bbbbbbbb", "0.2.0+cccccccc"


@dataclass
class Watched:
    """A channel to a guest, with what passed over it."""

    channel: GuestChannel
    calls: list[str] = field(default_factory=list)
    timeouts: list[float] = field(default_factory=list)
    change: Callable[[bytes], bytes] = bytes
    """What becomes of a file on its way."""
    after_put: Callable[[], None] = lambda: None
    truncated: bool = False

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float) -> Ran:
        self.calls.append("run")
        self.timeouts.append(timeout)
        ran = self.channel.run(argv, stdin=stdin, timeout=timeout)
        return Ran(ran.code, ran.out, ran.err, truncated=True) if self.truncated else ran

    def put_file(self, path: str, data: bytes) -> None:
        self.calls.append("put")
        self.channel.put_file(path, self.change(data))
        self.after_put()

    def get_file(self, path: str, *, limit: int) -> bytes:
        return self.channel.get_file(path, limit=limit)

    def info(self) -> GuestInfo:
        return self.channel.info()

    def ping(self) -> bool:
        return self.channel.ping()

    def freeze(self, mounts: Sequence[str] = ()) -> int:
        raise AssertionError(f"nothing is to be frozen here: {mounts}")

    def thaw(self) -> int:
        raise AssertionError("nothing is frozen here")

    def frozen(self) -> bool:
        return False

    def close(self) -> None: ...

    # What tests need besides.

    def out(self, script: str) -> str:
        ran = self.channel.run(["/bin/sh", "-c", script], timeout=60)
        assert ran.code == 0, (script, ran)
        return ran.out.decode()

    def lines(self, script: str) -> list[str]:
        return self.out(script).split()


def package(version: str = V1, serial: int = 1, *, replaced: dict[str, str] | None = None, **more: Any) -> Package:
    """The real payload under that version; `replaced`: verb → what the entry point does instead."""
    files = content(GuestOs.LINUX)
    text = files["ext"].decode()
    instead = "".join(f'if [ "$1" = {verb} ]; then\n{does}\nfi\n' for verb, does in (replaced or {}).items())
    files["ext"] = f"#!/bin/sh\n# {version}\n{instead}{text}".encode()
    files |= more.pop("files", {})
    fields: dict[str, Any] = {"os": GuestOs.LINUX, "contract": CONTRACT_VERSION, "time_limits": {"status": 20}} | more
    made = {
        name: PackageFile(data, hashlib.sha256(data).hexdigest(), int(mode_of(name), 8)) for name, data in files.items()
    }
    return Package("stillframe.snapshot", version, serial, files=made, **fields)


def says(verb: str, fields: str = "", code: int = 0, ok: str = "true") -> str:
    return f"""echo '{{"verb": "{verb}", "ok": {ok}{fields and f", {fields}"}}}'; exit {code}"""


BROKEN = {
    "install fails": {"install": says("install", '"error": "no room"', 20, "false")},
    "install says nothing": {"install": "exit 0"},
    "install does nothing": {"install": says("install")},
    "install and a signal": {"install": 'mv "${0%/*}" "$3/$5"; kill -9 $$'},
    "cannot serve": {"probe": says("probe", '"error": "the guest lacks: setsid"', 10, "false")},
    "enable fails": {"enable": says("enable", '"error": "cannot make the link"', 20, "false")},
    "enable, then nonsense": {"enable": f"ln -sfn {V2} /opt/stillframe/current; echo {{; exit 0"},
    "status fails": {"status": says("status", '"error": "broken"', 20, "false")},
    "status says nothing": {"status": "exit 0"},
    "status is another": {"status": says("status", '"contract": 1, "version": "7", "serial": 2')},
    "status of another serial": {"status": says("status", f'"contract": 1, "version": "{V2}", "serial": 1')},
    "status of another contract": {"status": says("status", f'"contract": 2, "version": "{V2}", "serial": 2')},
    "status of another verb": {"status": says("probe", f'"contract": 1, "version": "{V2}", "serial": 2')},
    "a megabyte": {"status": "head -c 1048576 /dev/zero | tr '\\0' x; exit 0"},
    "it hangs": {"status": "exec sleep 30"},
}
"""verb → what it does instead; none of these may stay in force."""


@contextmanager
def ssh_target(folder: Path, shell: str) -> Iterator[Watched]:
    guest = SshGuest(folder, shell)
    policy = ConfiguredKey(str(guest.host_key))
    channel = SshChannel(address="127.0.0.1", port=guest.port, key=guest.key, host_key=policy)
    try:
        yield Watched(channel)
    finally:
        channel.close()
        guest.stop()


@contextmanager
def agent_target(factory: GuestFactory) -> Iterator[Watched]:
    hypervisor = open_hypervisor("qemu:///system")
    try:
        guest = factory({"vda": 16 * MIB}, label="extension")
        yield Watched(AgentChannel(hypervisor.agent_command(guest.uuid)))
    finally:
        hypervisor.close()
        factory.close()


def emptied(target: Watched) -> Watched:
    """Without an extension, and with nothing noted yet."""
    target.out("while umount /opt 2>/dev/null; do :; done; rm -rf /opt/stillframe /run/stillframe* /var/lib/stillframe")
    return Watched(target.channel)
