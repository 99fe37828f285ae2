"""How libvirt is reached: directly, or through a socket of another host.

libvirt has a transport over SSH of its own, which would log in a second time, with host keys and programs that are
found by other rules. Its socket through the connection that carries the data too has one login, one host key, and one
end: what libvirtd asks of a user there is the same, for sshd connects as that user.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from workers.contract.errors import HypervisorUnreachable
from workers.contract.hosts import Host

SOCKETS = (Path("/run/libvirt/libvirt-sock"), Path("/run/libvirt/virtqemud-sock"))
"""Of the one daemon (or the proxy in front of many), else of the one for QEMU alone."""


class Wire(Protocol):
    there: str
    """libvirt's URI, for a program on its own host."""
    start: str
    """The command that starts libvirt."""

    def dial(self) -> str:
        """libvirt's URI to open now. Raises HypervisorUnreachable."""
        ...

    def close(self) -> None: ...


class DirectWire:
    """On this host."""

    start = "systemctl start libvirtd"

    def __init__(self, uri: str) -> None:
        self.there = uri

    def dial(self) -> str:
        return self.there

    def close(self) -> None:
        """Nothing is held."""


class SocketWire:
    """Through a forwarded socket."""

    there = "qemu:///system"

    def __init__(self, host: Host, start: str, socket: Path | None = None) -> None:
        """`socket`: libvirt's, if it is not in a usual place."""
        self._host, self.start = host, start
        self._sockets = [socket] if socket else [*SOCKETS]
        self._held = ExitStack()

    def dial(self) -> str:
        self.close()
        found = self._host.look(self._sockets)
        there = next((path for path in self._sockets if found[path].exists), None)
        if there is None:
            raise HypervisorUnreachable(
                f"libvirt does not run on {self._host.name}: there is no {self._sockets[0]}", hint=self.start
            )
        return f"qemu+unix:///system?socket={quote(str(self._held.enter_context(self._host.socket(there))))}"

    def close(self) -> None:
        self._held.close()
