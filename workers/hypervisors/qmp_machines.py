"""Which QEMUs there are, by their QMP sockets: one, or all in a folder.

A folder of sockets holds other sockets too (guest agents, consoles, our own exports), and a connection to one of those
would be noticed at its other end. So what a QEMU's command line names as something else is not touched; what answers,
but not as a monitor does, is passed over in a folder, and an error where it was named.
"""

from __future__ import annotations

import uuid as uuids
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from workers.contract.errors import Busy, HypervisorUnreachable, UsageError
from workers.hypervisors import command_line, qemu_process
from workers.hypervisors.command_line import Option
from workers.hypervisors.qemu_process import Process
from workers.hypervisors.qmp_wire import Monitor, is_socket

NAME_LIMIT = 255
_NO_UUID = str(uuids.UUID(int=0))
_NAMESPACE = uuids.UUID("5d0a6a10-1f0b-4f0e-9f63-8f2f0d6b8f11")


@dataclass(frozen=True, slots=True)
class Found:
    """One machine."""

    socket: Path
    uuid: str
    name: str
    own_uuid: bool = True
    """False: QEMU was started without `-uuid`, and the one here stands for this host and socket."""
    held: str = ""
    """Somebody else holds its monitor: what is known comes from its command line."""
    pid: int = 0


class Sockets:
    """The QMP sockets at one URI's path."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def folder(self) -> Path:
        """Where sockets of restored machines go."""
        return self._path if self._path.is_dir() else self._path.parent

    @property
    def alone(self) -> bool:
        """One socket, and not a folder."""
        return not self._path.is_dir()

    def paths(self) -> list[Path]:
        """What may be monitors. Raises HypervisorUnreachable if there cannot be one."""
        if self.alone:
            if not self._path.parent.is_dir():
                raise HypervisorUnreachable(
                    f"there is no folder {self._path.parent} for the QMP socket {self._path.name}",
                    hint="start QEMU with -qmp unix:PATH,server=on,wait=off",
                )
            return [self._path] if is_socket(self._path) else []
        others = _named_as_something_else()
        try:
            entries = sorted(self._path.iterdir())
        except OSError as error:
            raise HypervisorUnreachable(f"the folder {self._path} cannot be read: {error.strerror}") from None
        return [path for path in entries if is_socket(path) and str(path.resolve()) not in others]


def identity(monitor: Monitor) -> Found:
    uuid = str(monitor.ask("query-uuid").get("UUID", _NO_UUID))
    name = str(monitor.ask("query-name").get("name") or "")
    return _completed(Found(monitor.path, uuid, name, pid=monitor.peer.pid))


def _completed(found: Found) -> Found:
    name = found.name or found.socket.name.removesuffix(".sock")
    found = replace(found, name="".join(char if char.isprintable() else "\ufffd" for char in name[:NAME_LIMIT]))
    if found.uuid == _NO_UUID:
        made = uuids.uuid5(_NAMESPACE, f"{_host()}:{found.socket.resolve()}")
        found = replace(found, uuid=str(made), own_uuid=False)
    return found


def _host() -> str:
    for path in (Path("/etc/machine-id"), Path("/proc/sys/kernel/hostname")):
        with suppress(OSError):
            return path.read_text().strip()
    return ""


def held(path: Path, busy: Busy) -> Found:
    """The machine whose monitor somebody else holds, by its command line. Raises `busy` where that does not tell."""
    process = next((each for each in qemu_process.running() if str(path.resolve()) in _monitors(each)), None)
    if process is None:
        raise busy
    told = {option.name: option.value or "" for option in command_line.parse(process.arguments)}
    uuid = told.get("uuid", _NO_UUID)
    with suppress(ValueError):
        uuid = str(uuids.UUID(uuid))
    pairs = command_line.fields(told.get("name", ""))
    name = next((text for key, text in pairs if key == "guest" and text), None) or pairs[0][0]
    return _completed(Found(path, uuid, name, held=str(busy), pid=process.pid))


def _options(process: Process) -> list[Option]:
    with suppress(UsageError):
        return command_line.parse(process.arguments)
    return []


def _absolute(process: Process, paths: Iterable[str]) -> set[str]:
    return {str((process.folder / path).resolve()) for path in paths}


def _monitors(process: Process) -> set[str]:
    return _absolute(process, command_line.monitor_paths(_options(process)))


def _named_as_something_else() -> set[str]:
    """Sockets that some QEMU has for another purpose than QMP."""
    found: set[str] = set()
    for process in qemu_process.running():
        found |= _absolute(process, command_line.made(_options(process))) - _monitors(process)
    return found
