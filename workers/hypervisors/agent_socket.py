"""The guest agent at the other end of a unix socket of QEMU's: one command, one reply, one connection.

The socket takes one client at a time, and the agent one command: what is left of a client that gave up (half a command
to the guest, a late reply from it) must not be taken for ours. `guest-sync-delimited` draws that line: 0xFF resets the
agent's parser, and 0xFF from it begins our reply.

Of the standard library alone, and a program of its own (`python agent_socket.py SOCKET` thaws): a guard process runs it
after everything else of ours was killed.
"""

from __future__ import annotations

import json
import secrets
import socket
import struct
import sys
import time

REPLY_LIMIT = 64 << 20
THAW_SECONDS = 10.0
_DELIMITER = b"\xff"


class AgentSilent(Exception):
    """No reply in time, or none that makes sense; what was asked may happen all the same."""


class Elsewhere(Exception):
    """Another process listens on the socket than the one that is meant."""


class _Link:
    def __init__(self, path: str, seconds: float, pid: int | None) -> None:
        self._deadline = time.monotonic() + seconds
        self._got = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000) or 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)  # waits where the queue is full too
            self._socket.connect(path)
            listening, _, _ = struct.unpack("3i", self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if pid not in (None, listening):
                raise Elsewhere(f"process {listening} listens there")
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def _limit(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def send(self, data: bytes) -> None:
        self._limit()
        self._socket.sendall(data)

    def receive(self, end: bytes) -> bytes:
        """What comes before `end`."""
        at = 0
        while (found := self._got.find(end, at)) < 0:
            at = len(self._got)
            if at > REPLY_LIMIT:
                raise AgentSilent(f"its reply is longer than {REPLY_LIMIT >> 20} MiB")
            self._limit()
            piece = self._socket.recv(1 << 20)
            if not piece:
                raise AgentSilent("QEMU closed the connection")
            self._got += piece
        taken = bytes(self._got[:found])
        del self._got[: found + len(end)]
        return taken


def ask(path: str, request: str, seconds: float, *, pid: int | None = None) -> str:
    """The JSON reply to the JSON command `request`. `pid`: the process that must be listening. Raises AgentSilent,
    Elsewhere, and OSError if nobody listens there."""
    try:
        link = _Link(path, seconds, pid)
    except BlockingIOError:
        raise AgentSilent("another program holds its socket") from None
    try:
        _synchronise(link)
        link.send(request.encode() + b"\n")
        return link.receive(b"\n").decode(errors="replace")
    except TimeoutError:
        raise AgentSilent(f"it did not answer within {seconds:g} s") from None
    except (BrokenPipeError, ConnectionResetError):
        raise AgentSilent("QEMU closed the connection") from None
    finally:
        link.close()


def _synchronise(link: _Link) -> None:
    token = secrets.randbelow(1 << 31)
    wanted = json.dumps({"execute": "guest-sync-delimited", "arguments": {"id": token}})
    link.send(_DELIMITER + wanted.encode() + b"\n")
    while True:
        link.receive(_DELIMITER)
        try:
            said = json.loads(link.receive(b"\n"))
        except ValueError:
            continue
        if isinstance(said, dict) and said.get("return") == token:
            return


def main() -> int:
    """Thaw; 0 if the agent said that it has."""
    try:
        said = json.loads(ask(sys.argv[1], '{"execute": "guest-fsfreeze-thaw"}', THAW_SECONDS))
    except (AgentSilent, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0 if isinstance(said, dict) and "return" in said else 1


if __name__ == "__main__":
    sys.exit(main())
