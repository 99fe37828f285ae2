"""The way into a guest by SSH, where its agent is absent or allows no commands.

Files go through `cat` on the same kind of session as commands, not through SFTP: that works with sudo and on servers
without an SFTP part, and there is one path of time limits and errors to trust.

A freeze holds one session open whose program (`extensions/linux/freezer`) was started before anything was frozen: on a
frozen root a server may not manage to start another one. The program thaws by itself when the session ends, so a host
that dies, or a wire that is cut, is a thaw.
"""

from __future__ import annotations

import shlex
import threading
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from workers.contract.errors import GuestError
from workers.contract.guests import GuestInfo, GuestOs, Ran
from workers.guests.host_keys import HostKeyPolicy
from workers.guests.ssh_link import Freezer, Session, connect

CONNECT_SECONDS = 30.0
FREEZE_SECONDS = 30.0
THAW_SECONDS = 10.0
ASK_SECONDS = 20.0
SLOWEST = 100_000
"""Bytes per second below which a file counts as stuck: sshd under emulation without AES instructions is slow."""
STREAM_LIMIT = 16 << 20

# What `info` asks: one line of answer each.
_ASK_INFO = """
uname -s
id -u
PATH=$PATH:/usr/sbin:/sbin
command -v fsfreeze || echo
sed -n 's/^PRETTY_NAME=//p' /etc/os-release 2>/dev/null | head -n 1
"""
# The shell says 127 for a program that is not there; sudo would say 1.
_SUDO = ("sudo", "-n", "--", "/bin/sh", "-c", 'exec "$@"', "sh")
_PUT = 'umask 077; rm -f -- "$1" && cat >"$1"'
_GET = 'head -c "$2" <"$1"'


class SshChannel:
    """See `seams.GuestChannel`. Connects at the first use, and again when the connection was lost. While it holds a
    freeze, `close` (and the end of this process) is a thaw. Commands of several threads can run at once."""

    def __init__(
        self,
        *,
        address: str,
        key: Path | bytes,
        host_key: HostKeyPolicy,
        port: int = 22,
        user: str = "root",
        connect_seconds: float = CONNECT_SECONDS,
        freeze_seconds: float = FREEZE_SECONDS,
    ) -> None:
        """`key`: the private key's file, or its text (OpenSSH or PEM, without a passphrase). A `user` other than root
        needs sudo without a password."""
        self._address, self._port, self._user = address, port, user
        self._key, self._host_key = key, host_key
        self._connect_seconds, self._freeze_seconds = connect_seconds, freeze_seconds
        self._lock = threading.Lock()
        self._link: Any = None
        self._freezer: Freezer | None = None

    def __str__(self) -> str:
        where = f"{self._user}@{self._address}"
        return f"ssh {where}" if self._port == 22 else f"ssh {where}:{self._port}"

    def info(self) -> GuestInfo:
        """Raises GuestError also when sudo does not let the user through."""
        ran = self._run(["/bin/sh", "-c", _ASK_INFO], b"", ASK_SECONDS, STREAM_LIMIT)
        software = str(self._connected().remote_version).removeprefix("SSH-2.0-")
        words = ran.err.decode(errors="replace").strip()
        if ran.code != 0 and "sudo" in words:
            raise GuestError(
                f"{self} cannot become root: {words}",
                hint=f"in the guest: echo '{self._user} ALL=(root) NOPASSWD: ALL' > /etc/sudoers.d/stillframe",
            )
        lines = ran.out.decode(errors="replace").splitlines()
        if ran.code != 0 or len(lines) < 3:
            return GuestInfo(os=GuestOs.OTHER, agent=software)
        linux, is_root, can_freeze = lines[0] == "Linux", lines[1] == "0", bool(lines[2])
        return GuestInfo(
            os=GuestOs.LINUX if linux else GuestOs.OTHER,
            release=lines[3].strip("\"'") if len(lines) > 3 else lines[0],
            agent=software,
            can_run=is_root,
            can_copy=is_root,
            can_freeze=linux and is_root and can_freeze,
            can_freeze_some=linux and is_root and can_freeze,
        )

    def ping(self) -> bool:
        try:
            return self._run(["true"], b"", ASK_SECONDS, STREAM_LIMIT).code == 0
        except GuestError:
            return False

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float) -> Ran:
        """The time for connecting is not part of `timeout`. After it the session is closed, and a program that does
        not notice goes on in the guest."""
        return self._run(argv, stdin, timeout, STREAM_LIMIT)

    def put_file(self, path: str, data: bytes) -> None:
        """The file is new, with mode 0600, also where there was another one."""
        ran = self._run(["/bin/sh", "-c", _PUT, "sh", path], data, ASK_SECONDS + len(data) / SLOWEST, STREAM_LIMIT)
        if ran.code != 0:
            raise GuestError(f"{path} could not be written in the guest: {_said(ran)}")

    def get_file(self, path: str, *, limit: int) -> bytes:
        argv = ["/bin/sh", "-c", _GET, "sh", path, str(limit)]
        ran = self._run(argv, b"", ASK_SECONDS + limit / SLOWEST, limit)
        if ran.code != 0:
            raise GuestError(f"{path} could not be read in the guest: {_said(ran)}")
        return ran.out

    def freeze(self, mounts: Sequence[str] = ()) -> int:
        """Mount points that are not mounted are ignored, as the guest agent does it."""
        if self._freezer is not None and self._freezer.alive():
            raise GuestError("the file systems are frozen already, by this channel")
        wanted = "".join(f"mount {_as_in_mountinfo(point)}\n" for point in mounts)
        self._end_freezer()
        freezer = self._freezer = self._start_freezer()
        try:
            return freezer.ask(f"{wanted}freeze\n", "frozen", self._freeze_seconds)
        except BaseException:
            # The end of its input thaws what it has frozen, or will have.
            freezer.close()
            raise

    def thaw(self) -> int:
        """Through the session that froze; else, if it is lost or a freeze still hangs in it (in another thread),
        through another connection: everything in the guest then, whoever froze it."""
        freezer, self._freezer = self._freezer, None
        if freezer is not None:
            try:
                return freezer.ask("thaw\n", "thawed", THAW_SECONDS)
            except GuestError:
                self._disconnect()
            finally:
                freezer.close()
        return self._ask_freezer("thaw\n", "thawed", THAW_SECONDS)

    def frozen(self) -> bool:
        """Whether a freezer, of this connection or another one, says so; what the guest agent froze is not seen."""
        if self._freezer is not None and self._freezer.alive():
            return True
        return self._ask_freezer("status\n", "noted", ASK_SECONDS) > 0

    def close(self) -> None:
        self._end_freezer()
        self._disconnect()

    def _ask_freezer(self, command: str, answer: str, timeout: float) -> int:
        freezer = self._start_freezer()
        try:
            return freezer.ask(command, answer, timeout)
        finally:
            freezer.close()

    def _start_freezer(self) -> Freezer:
        text = files("extensions").joinpath("linux/freezer").read_text()
        command = "exec " + self._as_root(["/bin/sh", "-c", text, "stillframe-freezer"])
        return Freezer(self._connected(), command, ASK_SECONDS)

    def _end_freezer(self) -> None:
        freezer, self._freezer = self._freezer, None
        if freezer is not None:
            freezer.close()

    def _as_root(self, argv: Sequence[str]) -> str:
        if any("\0" in word for word in argv):
            raise GuestError("a program's argument holds a zero byte, which no program can be given")
        return shlex.join(argv if self._user == "root" else [*_SUDO, *argv])

    def _run(self, argv: Sequence[str], stdin: bytes, timeout: float, limit: int) -> Ran:
        # `exec` runs programs only, never what the shell itself has under that name; and the shell that stays behind
        # reports a signal as 128 + n, which paramiko does not. What that shell says about it is thrown away.
        command = f"exec 3>&2 2>/dev/null; (exec 2>&3 3>&-; exec {self._as_root(argv)}); exit $?"
        with Session(self._connected(), command, timeout) as session:
            return session.finish(stdin, limit)

    def _connected(self) -> Any:
        with self._lock:
            if self._link is None or not self._link.is_authenticated():
                if self._link is not None:
                    self._link.close()
                self._link = None
                self._link = connect(
                    self._address, self._port, self._user, self._key, self._host_key, self._connect_seconds
                )
            return self._link

    def _disconnect(self) -> None:
        with self._lock:
            if self._link is not None:
                self._link.close()
                self._link = None


def _as_in_mountinfo(point: str) -> str:
    """A mount point as the kernel writes it into /proc/self/mountinfo: one word on one line."""
    return "".join(f"\\{ord(char):03o}" if char in " \t\n\\" else char for char in point)


def _said(ran: Ran) -> str:
    words = ran.err.decode(errors="replace").strip().splitlines()
    return words[-1] if words else f"exit code {ran.code}"
