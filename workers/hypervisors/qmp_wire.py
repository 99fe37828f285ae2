"""One QEMU's monitor: short connections, each with time limits.

A QMP monitor serves one client at a time; whoever comes second is let in when the first has gone, and hears nothing
until then. So a connection is held for one act and no longer, that other commands of ours find their turn, and silence
in place of the greeting means that somebody else holds the monitor: Busy.

The library speaks asyncio; a connection brings its own loop, so that threads need not share one.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import stat
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError

from workers.contract.errors import Busy, HypervisorError, HypervisorUnreachable, StillframeError

GREETING_SECONDS = 5.0
"""How long another client's turn is waited for."""
ANSWER_SECONDS = 30.0
READ_LIMIT = 64 << 20
"""Bytes of one reply; the library gives up at it."""

logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # it would write of every lost connection to stderr

HELD_HINT = "give Stillframe a monitor of its own: -qmp unix:PATH,server=on,wait=off can be given twice"

Json = dict[str, Any]


class Refused(HypervisorError):
    """QEMU answered a command with an error, whose text is the message."""


@dataclass(frozen=True, slots=True)
class Peer:
    """The process that listens on a socket."""

    pid: int
    uid: int
    gid: int


def _peer(connection: socket.socket) -> Peer:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return Peer(*struct.unpack("3i", raw))


def _connected(path: Path, seconds: float) -> socket.socket:
    """A connection that perhaps waits in the queue still. Raises HypervisorUnreachable, Busy."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    whole, rest = divmod(max(seconds, 0.001), 1)  # Python's own time limit would not wait where the queue is full
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(whole), int(rest * 1_000_000)))
    try:
        connection.connect(str(path))
    except BlockingIOError:
        connection.close()
        raise _held(path) from None
    except OSError as error:
        connection.close()
        raise HypervisorUnreachable(
            f"no QEMU answers at {path}: {error.strerror}", hint="does it run, and may this user open its socket?"
        ) from None
    return connection


def _held(path: Path) -> Busy:
    return Busy(f"another program holds the QMP monitor {path}", hint=HELD_HINT)


def is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return False


def listener(path: Path) -> Peer | None:
    """Who listens on the socket at `path`; None if nobody does. Nothing is sent."""
    try:
        with _connected(path, 2.0) as connection:
            return _peer(connection)
    except StillframeError:
        return None


class Monitor:
    """A connection to one monitor. Use as a context manager, in one thread."""

    def __init__(self, path: Path, *, greeting_seconds: float = GREETING_SECONDS) -> None:
        """Raises HypervisorUnreachable, Busy, HypervisorError for what is no QMP monitor."""
        self.path = path
        connection = _connected(path, greeting_seconds)
        self.peer = _peer(connection)
        self._runner = asyncio.Runner()
        self._client = QMPClient(readbuflen=READ_LIMIT)
        try:
            self._runner.run(self._open(connection, greeting_seconds))
        except BaseException:
            self._runner.close()
            connection.close()
            raise

    async def _open(self, connection: socket.socket, seconds: float) -> None:
        connection.setblocking(False)
        try:
            await asyncio.wait_for(self._client.connect(connection), seconds)
        except TimeoutError:
            await self._disconnected()
            raise _held(self.path) from None
        except ConnectError as error:
            if isinstance(error.exc, (EOFError, OSError)):
                raise HypervisorUnreachable(f"QEMU closed its monitor {self.path}: {error.exc}") from None
            raise HypervisorError(f"{self.path} is no QMP monitor: {error.exc}") from None

    async def _disconnected(self) -> None:
        with suppress(QMPError, EOFError, OSError, asyncio.TimeoutError):
            await asyncio.wait_for(self._client.disconnect(), 5.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._runner.run(self._disconnected())
        finally:
            self._runner.close()

    @property
    def version(self) -> tuple[int, ...]:
        """Of QEMU."""
        greeting = self._client.greeting
        found = greeting.QMP.version.get("qemu") if greeting is not None else None
        return tuple(int(found[part]) for part in ("major", "minor", "micro")) if isinstance(found, Mapping) else ()

    def ask(self, command: str, arguments: Json | None = None, *, seconds: float = ANSWER_SECONDS) -> Any:
        """What QEMU returns. Raises Refused, HypervisorUnreachable; after the latter the command may have been done."""
        return self._runner.run(self._ask(command, arguments, seconds))

    async def _ask(self, command: str, arguments: Json | None, seconds: float) -> Any:
        try:
            return await asyncio.wait_for(self._client.execute(command, arguments), seconds)
        except TimeoutError:
            raise HypervisorUnreachable(
                f"QEMU did not answer {command} at {self.path} within {seconds:.0f} s"
            ) from None
        except ExecuteError as error:
            raise Refused(str(error)) from None
        except (QMPError, EOFError, OSError) as error:
            raise HypervisorUnreachable(f"QEMU closed its monitor {self.path} during {command}: {error}") from None

    def until(self, done: Callable[[], bool], seconds: float) -> bool:
        """Whether `done` came true within `seconds`; it is asked again after each event of QEMU."""
        deadline = time.monotonic() + seconds
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._runner.run(self._event(left))
        return True

    async def _event(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._client.events.get(), seconds)
