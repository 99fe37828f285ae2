"""The guest agents of bare QEMUs: which socket is whose, and one command over it.

A thaw must not wait for a monitor that somebody holds. So a socket that was found once is used again without asking, as
long as the same process listens there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from workers.contract.errors import GuestError
from workers.hypervisors import agent_socket, qemu_process
from workers.hypervisors.qmp_wire import Json, Monitor, Refused

PORT = "org.qemu.guest_agent.0"
_UNIX = re.compile(r"(?:disconnected:)?unix:(?P<path>.*?)(?:,server(?:=on)?)?(?: <-> .*)?$", re.DOTALL)
_NO_CHANNEL = GuestError(
    "the machine has no guest agent channel",
    hint=f"start QEMU with -device virtio-serial -chardev socket,path=…,server=on,wait=off,id=qga0 "
    f"-device virtserialport,chardev=qga0,name={PORT}",
)


@dataclass(frozen=True, slots=True)
class Socket:
    path: str
    pid: int
    """Of the QEMU that listens."""


def _chardev(monitor: Monitor) -> Json | None:
    """Of the agent's port."""
    for folder in ("/machine/peripheral", "/machine/peripheral-anon"):
        for child in monitor.ask("qom-list", {"path": folder}):
            if child.get("type") == "child<virtserialport>":
                port = f"{folder}/{child['name']}"
                if _asked(monitor, port, "name") == PORT:
                    label = _asked(monitor, port, "chardev")
                    return next((found for found in monitor.ask("query-chardev") if found["label"] == label), None)
    return None


def _asked(monitor: Monitor, path: str, name: str) -> object:
    try:
        return monitor.ask("qom-get", {"path": path, "property": name})
    except Refused:
        return None


def is_connected(monitor: Monitor) -> bool:
    """Whether the guest has opened its end."""
    found = _chardev(monitor)
    return bool(found and found.get("frontend-open"))


def socket_of(monitor: Monitor) -> Socket:
    """Raises GuestError where there is none that we could connect to."""
    found = _chardev(monitor)
    if found is None:
        raise _NO_CHANNEL
    named = _UNIX.match(str(found.get("filename", "")))
    if named is None:
        raise GuestError(
            f"the guest agent's channel is no unix socket ({found.get('filename')})", hint=str(_NO_CHANNEL.hint)
        )
    process = qemu_process.look(monitor.peer.pid)
    path = named["path"] if process is None else str(process.folder / named["path"])
    return Socket(path, monitor.peer.pid)


class Agents:
    """Of all machines of a host. Thread-safe."""

    def __init__(self, monitor: Callable[[str], AbstractContextManager[Monitor]]) -> None:
        self._monitor = monitor
        self._known: dict[str, Socket] = {}

    def socket(self, uuid: str, *, anew: bool = False) -> Socket:
        """Raises GuestError, NotFound, Busy."""
        if anew or uuid not in self._known:
            with self._monitor(uuid) as monitor:
                self._known[uuid] = socket_of(monitor)
        return self._known[uuid]

    def command(self, uuid: str) -> Callable[[str, float], str]:
        """See `Hypervisor.agent_command`."""

        def command(request: str, timeout: float) -> str:
            known = self._known.get(uuid)
            if known is not None:
                try:
                    return self._ask(known, request, timeout)
                except (agent_socket.Elsewhere, OSError):
                    pass  # that QEMU has ended
            return self._told(self.socket(uuid, anew=True), request, timeout)

        return command

    def _told(self, socket: Socket, request: str, timeout: float) -> str:
        try:
            return self._ask(socket, request, timeout)
        except (agent_socket.Elsewhere, OSError) as error:
            raise GuestError(f"the guest agent's socket {socket.path} cannot be reached: {error}") from None

    def _ask(self, socket: Socket, request: str, timeout: float) -> str:
        try:
            return agent_socket.ask(socket.path, request, timeout, pid=socket.pid)
        except agent_socket.AgentSilent as error:
            raise GuestError(
                f"the guest agent did not answer: {error}; what it was told may still happen",
                hint="install and start qemu-guest-agent in the guest",
            ) from None

    def thaw_command(self, uuid: str) -> list[str]:
        """See `Hypervisor.thaw_command`."""
        return [sys.executable, "-I", str(Path(agent_socket.__file__).resolve()), self.socket(uuid).path]
