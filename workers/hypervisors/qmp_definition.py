"""What a QEMU without libvirt is, as a document: its command line, and what it calls its disks.

It is what a point keeps as `definition`. `restored` makes of it the document of a machine on restored disks; where the
command line holds something that cannot be brought back from it (a file descriptor of the program that started it, an
image that is named in a way not known here), that is a UsageError before anything is written, and the disks can still
be restored one by one. Pure: no I/O.
"""

from __future__ import annotations

import re
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from workers.contract.errors import UsageError
from workers.contract.machines import Value
from workers.contract.seams import NewMachine
from workers.hypervisors import command_line
from workers.hypervisors.command_line import Option

DISKS_ONLY = "restore its disks one by one: stillframe restore disk POINT DISK --to FILE"
SOCKET_LIMIT = 107
_DESCRIPTOR = re.compile(r"(?:^|[,\"])(?:fds?|vhostfds?)\"?[=:]|/dev/fdset/|/dev/fd/|/proc/self/fd/")
_LEFT_OUT = frozenset(("S", "incoming", "loadvm", "daemonize", "nographic", "curses", "uuid", "name"))
"""What the rewritten command line has in its own way, or not at all."""


class Image(Value):
    """How the command line names an image."""

    names: list[str]
    """As QEMU says it, and as an absolute path."""
    format: str
    read_only: bool = False


class Definition(Value):
    kind: Literal["qemu-command-line"] = "qemu-command-line"
    version: Literal[1] = 1
    name: str
    uuid: str
    program: str
    arguments: list[str]
    folder: str
    """Where it was started: relative paths mean this one."""
    monitor: str
    """Path of its QMP socket."""
    images: dict[str, Image]
    """By target; those that take no part in backups too."""
    nvram: Image | None = None
    place: str = ""
    """Folder for its start script; empty: that of its first image."""

    def script_folder(self) -> Path:
        """Raises UsageError where there is no image that stands somewhere."""
        found = [name for image in self.images.values() for name in image.names if name.startswith("/")]
        if not self.place and not found:
            raise UsageError(f"{self.name} has no disk beside which its start script could be put")
        return Path(self.place or str(Path(found[0]).parent))


def read(text: str) -> Definition:
    """Raises UsageError for a definition that is not of a bare QEMU."""
    if text.lstrip().startswith("<"):
        raise UsageError("the point is of a machine of libvirt's, which QEMU alone cannot run", hint=DISKS_ONLY)
    try:
        return Definition.model_validate_json(text)
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise UsageError(f"the definition in the point cannot be read: {why}", hint=DISKS_ONLY) from None


def script(definition: Definition) -> str:
    """A program that starts the machine in the background."""
    command = shlex.join([definition.program, *definition.arguments])
    return (
        "#!/bin/sh\n"
        "# Starts a machine that Stillframe has restored. Ports, bridges and the like are those of the original.\n"
        f"cd -- {shlex.quote(definition.folder)} || exit 1\n"
        f"exec {command}\n"
    )


# --- restored ------------------------------------------------------------------------------------------------------


def restored(text: str, new: NewMachine, sockets: Path) -> str:
    """The definition `text` for the machine `new`; what it listens on goes to the folder `sockets`, unless it takes the
    place of its original. Raises UsageError.

    Other disks are left out, but for those that are only read. Ports on the network stay as they are: where the
    original still has them, the start fails and says so.
    """
    old = read(text)
    unknown = sorted(new.disks.keys() - old.images.keys())
    if unknown:
        raise UsageError(f"the definition in the point knows no disk {', '.join(unknown)}", hint=DISKS_ONLY)
    options = _understood(old.arguments)
    lost = [name for target, image in old.images.items() if _goes(target, image, new) for name in image.names]
    options = command_line.without(options, lost)
    images = {target: _placed(target, old.images[target], *new.disks[target]) for target in new.disks}
    pairs = [(old.images[target], image) for target, image in images.items()]
    nvram = _placed_nvram(old.nvram, new.nvram_path)
    if old.nvram and nvram:
        pairs.append((old.nvram, nvram))
    options = _with_images(options, pairs)
    monitor = str(sockets / f"{new.name}.sock") if new.fresh_macs else old.monitor
    if new.fresh_macs:
        options = [_with_own_mac(option) for option in _moved(options, old, monitor, sockets, new.name)]
    kept = {target: image for target, image in old.images.items() if target not in new.disks and image.read_only}
    return old.model_copy(
        update={
            "name": new.name,
            "uuid": new.uuid,
            "arguments": command_line.words(_told(options, old, new, monitor)),
            "monitor": monitor,
            "images": {**images, **kept},
            "nvram": nvram,
            "place": str(Path(next(iter(new.disks.values()))[0]).parent) if new.disks else "",
        }
    ).model_dump_json()


def _goes(target: str, image: Image, new: NewMachine) -> bool:
    return target not in new.disks and not image.read_only


def _understood(arguments: Sequence[str]) -> list[Option]:
    for word in arguments:
        if _DESCRIPTOR.search(word):
            why = f"its command line uses a file descriptor of the program that started it ({word[:60]})"
            raise UsageError(f"the machine cannot be started from its point: {why}", hint=DISKS_ONLY)
    options = command_line.parse(arguments)
    for option in options:
        if option.name in ("readconfig", "add-fd"):
            raise UsageError(f"the machine cannot be started from its point: it has -{option.name}", hint=DISKS_ONLY)
        if option.name in ("drive", "blockdev") and command_line.has_backing(option):
            why = "its command line puts a backing file under an image, and a restored one stands alone"
            raise UsageError(f"the machine cannot be started from its point: {why}", hint=DISKS_ONLY)
    return options


def _placed(target: str, old: Image, path: str, format: str) -> Image:
    if format != old.format:
        why = f"{target} is {old.format} for its command line, and would be {format}"
        raise UsageError(f"the machine cannot be started from its point: {why}", hint=DISKS_ONLY)
    return Image(names=[path], format=format)


def _placed_nvram(old: Image | None, path: str | None) -> Image | None:
    if old is None:
        return None
    if path is None:
        raise UsageError("the machine has firmware variables that are not in the point", hint=DISKS_ONLY)
    return Image(names=[path], format=old.format)


def _with_images(options: list[Option], pairs: Sequence[tuple[Image, Image]]) -> list[Option]:
    places = {name: new.names[0] for old, new in pairs for name in old.names}
    found: set[str] = set()

    def change(path: str) -> str:
        if path in places:
            found.add(places[path])
        return places.get(path, path)

    changed = [command_line.images(option, change) for option in options]
    for old, new in pairs:
        if new.names[0] not in found:
            why = f"its command line does not name the image {old.names[0]} in a way known here"
            raise UsageError(f"the machine cannot be started from its point: {why}", hint=DISKS_ONLY)
    return changed


def _moved(options: list[Option], old: Definition, monitor: str, sockets: Path, name: str) -> list[Option]:
    """With sockets and files of its own: QEMU would take the original's away."""
    places = {old.monitor: monitor}

    def change(path: str) -> str:
        path = str(Path(old.folder) / path)
        if path not in places:
            stem = Path(path).name
            taken = [place for place in places.values() if place.endswith(f"/{name}-{stem}")]
            places[path] = str(sockets / f"{name}-{len(taken) + 1}-{stem}" if taken else sockets / f"{name}-{stem}")
        return places[path]

    changed = [command_line.made_paths(option, change) for option in options]
    for path in places.values():
        if len(path.encode()) > SOCKET_LIMIT:
            raise UsageError(f"the path of a socket is too long for the system: {path}", hint="choose a shorter --name")
    return changed


def _with_own_mac(option: Option) -> Option:
    if option.name not in ("device", "nic", "net") or command_line.value_of(option, "mac") is None:
        return option
    return command_line.with_value(
        option, "mac", "52:54:00:" + ":".join(secrets.token_hex(3)[at : at + 2] for at in (0, 2, 4))
    )


def _told(options: list[Option], old: Definition, new: NewMachine, monitor: str) -> list[Option]:
    """Name and UUID, a monitor, and the background; nothing on a terminal, nothing that it would wait for."""
    told = [Option("name", _named(options, new.name)), Option("uuid", new.uuid)]
    for option in options:
        if option.name == "smbios" and command_line.value_of(option, "uuid") == old.uuid:
            told.append(command_line.with_value(option, "uuid", new.uuid))
        elif option.name not in _LEFT_OUT:
            told += _without_terminal(option)
    if any(option.name in ("nographic", "curses") for option in options):
        told.append(Option("display", "none"))
    if monitor not in {str(Path(old.folder) / path) for path in command_line.monitor_paths(told)}:
        told.append(Option("qmp", f"unix:{command_line.joined([(monitor, None)])},server=on,wait=off"))
    return [*told, Option("daemonize")]


def _named(options: list[Option], name: str) -> str:
    old = next((option.value for option in options if option.name == "name" and option.value), "")
    rest = [(key, text) for key, text in command_line.fields(old)[1:] if key != "guest"] if old else []
    return command_line.joined([("guest", name), *rest])


def _without_terminal(option: Option) -> list[Option]:
    if option.value in ("stdio", "mon:stdio") and option.name in ("serial", "parallel", "monitor", "qmp"):
        return [] if option.name == "qmp" else [replace(option, value="none" if option.name == "monitor" else "null")]
    if option.name == "chardev" and option.value and option.value.split(",")[0] == "stdio":
        return [Option("chardev", f"null,id={command_line.value_of(option, 'id') or ''}")]
    return [option]
