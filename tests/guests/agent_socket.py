"""The real guest agent of this host, over a unix socket: quick, and with an allow-list that a test chooses.

It is never allowed to freeze: that would stop the test and everything else. It sees a /root of its own, so that keys
which it is told to add stay out of this host's.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from workers.contract.errors import GuestError

NEVER = ("status", "freeze", "freeze-list", "thaw")
# The arguments are the agent and its own.
START = 'mount -t tmpfs own /root && mkdir -m 700 /root/.ssh && exec "$@"'


@dataclass(frozen=True)
class SocketCommand:
    """`command` of an AgentChannel, one at a time as libvirt does it: the agent turns a second connection away. Each
    has a connection of its own, so that a late reply to the one before is not taken for its own. `longest` is a limit
    in seconds on every time limit, for tests with agents that are silent."""

    path: Path
    longest: float = 60.0
    turn: Lock = field(default_factory=Lock)

    def __call__(self, request: str, timeout: float) -> str:
        with self.turn:
            return self._asked(request, timeout)

    def _asked(self, request: str, timeout: float) -> str:
        deadline = time.monotonic() + min(timeout, self.longest)
        reply = b""
        try:
            with socket.socket(socket.AF_UNIX) as link:
                link.settimeout(min(timeout, self.longest))
                link.connect(str(self.path))
                link.sendall(request.encode() + b"\n")
                while not reply.endswith(b"\n"):
                    link.settimeout(max(0.01, deadline - time.monotonic()))
                    piece = link.recv(1 << 20)
                    if not piece:
                        raise GuestError(f"no answer: the agent ended the connection after {len(reply)} bytes")
                    reply += piece
        except OSError as error:
            raise GuestError(f"no answer: {error}") from None
        return reply.decode()


@dataclass
class HostAgent:
    """`blocked`: further commands that it refuses, as an administrator would."""

    folder: Path
    blocked: tuple[str, ...] = ()
    longest: float = 60.0
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.command = SocketCommand(self.folder / "ga.sock", self.longest)
        blocked = ",".join([*(f"guest-fsfreeze-{act}" for act in NEVER), *self.blocked])
        agent = ["qemu-ga", "-m", "unix-listen", "-p", str(self.command.path), "-t", str(self.folder)]
        agent += ["-f", str(self.folder / "pid"), "-b", blocked]
        # `unshare` and the shell become the agent, so its process id is this one's.
        argv = ["unshare", "-m", "--propagation", "private", "/bin/sh", "-c", START, "sh", *agent]
        self.process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                return assert_answers(self.command)
            except GuestError:
                assert self.process.poll() is None, "qemu-ga ended"
                assert time.monotonic() < deadline, "qemu-ga does not answer"
                time.sleep(0.02)

    def stand_still(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def open_files(self) -> list[str]:
        """Files that it has open: handles that nobody closed."""
        found = []
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            try:
                found.append(str(link.readlink()))
            except FileNotFoundError:
                continue
        return sorted(name for name in found if name.startswith("/"))

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        self.process.wait(20)


def assert_answers(command: SocketCommand) -> None:
    """Raises GuestError while the agent is not up."""
    assert json.loads(command(json.dumps({"execute": "guest-ping"}), 5.0)) == {"return": {}}
