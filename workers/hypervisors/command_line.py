"""QEMU's command line as a list of options: read, and rewritten word by word. Pure: no I/O.

Three ways to write the same thing have to be known: `-drive file=a,,b.qcow2,if=virtio` (a comma doubled), `-blockdev`
with JSON, and file names as whole arguments (`-hda`, or no option at all).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from workers.contract.errors import UsageError

_FLAGS = """S s h help version daemonize nographic snapshot no-reboot no-shutdown enable-kvm nodefaults no-user-config
nouserconfig no-acpi no-hpet singlestep full-screen curses sdl usb no-quit win2k-hack only-migratable preconfig
no-fd-bootchk portrait semihosting old-param mem-prealloc alt-grab ctrl-grab async-teardown xen-attach
xen-domid-restrict no-frame"""
FLAGS = frozenset(_FLAGS.split())
"""Options that take no value."""
FILES = frozenset(["hda", "hdb", "hdc", "hdd", "fda", "fdb", "cdrom", "sd", "mtdblock", "pflash"])
"""Options whose whole value is an image; so is what stands without an option."""
_CHARDEVS = frozenset(["qmp", "qmp-pretty", "monitor", "serial", "parallel", "debugcon", "gdb", "vnc"])
"""Options whose value may be `unix:PATH,…` or `file:PATH,…`."""
_PATHS = frozenset(("pidfile", "D"))

Change = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Option:
    """`name` without dashes, empty for an image without an option; no `value`: a flag."""

    name: str
    value: str | None = None

    def words(self) -> list[str]:
        return [*([f"-{self.name}"] if self.name else []), *([self.value] if self.value is not None else [])]


def parse(arguments: Sequence[str]) -> list[Option]:
    """What stands behind the program's name."""
    found: list[Option] = []
    rest = iter(arguments)
    for word in rest:
        if not word.startswith("-") or word == "-":
            found.append(Option("", word))
            continue
        name = word.removeprefix("-").removeprefix("-")
        value = None if name in FLAGS else next(rest, None)
        if value is None and name not in FLAGS:
            raise UsageError(f"the command line ends with {word!r}, which wants a value")
        found.append(Option(name, value))
    return found


def words(options: Iterable[Option]) -> list[str]:
    return [word for option in options for word in option.words()]


# --- key=value,key=value -----------------------------------------------------------------------------------------


def fields(value: str) -> list[tuple[str, str | None]]:
    """`a,b=c,,d` → `[("a", None), ("b", "c,d")]`."""
    parts = [part.replace("\0", ",") for part in value.replace(",,", "\0").split(",")]
    split = [part.partition("=") for part in parts]
    return [(key, text if equals else None) for key, equals, text in split]


def joined(pairs: Iterable[tuple[str, str | None]]) -> str:
    return ",".join(
        key.replace(",", ",,") + ("" if text is None else f"={text.replace(',', ',,')}") for key, text in pairs
    )


def value_of(option: Option, key: str) -> str | None:
    """Of the option's `key`, whichever way it is written."""
    if option.value is None:
        return None
    if option.value.startswith("{"):
        found = _json(option.value).get(key)
        return found if isinstance(found, str) else None
    return next((text for name, text in fields(option.value) if name == key), None)


def with_value(option: Option, key: str, text: str) -> Option:
    """With another `text` for the `key` that it has."""
    if option.value is None:
        return option
    if option.value.startswith("{"):
        return replace(option, value=json.dumps({**_json(option.value), key: text}))
    return replace(option, value=joined((name, text if name == key else old) for name, old in fields(option.value)))


def _json(value: str) -> dict[str, object]:
    try:
        found = json.loads(value)
    except ValueError:
        raise UsageError(f"an argument of the command line is no JSON: {value[:80]}") from None
    if not isinstance(found, dict):
        raise UsageError(f"an argument of the command line is no JSON object: {value[:80]}")
    return found


# --- images --------------------------------------------------------------------------------------------------------


def images(option: Option, change: Change) -> Option:
    """The option with every image that it names passed through `change`."""
    if option.value is None:
        return option
    if option.name in FILES or not option.name:
        return replace(option, value=change(option.value))
    if option.name not in ("drive", "blockdev"):
        return option
    if option.value.startswith("{"):
        return replace(option, value=json.dumps(_changed(_json(option.value), change)))
    pairs = [
        (key, change(text) if text is not None and _names_image(key) else text) for key, text in fields(option.value)
    ]
    return replace(option, value=joined(pairs))


def _names_image(key: str) -> bool:
    return key in ("file", "filename") or key.endswith(".filename")


def _changed(found: object, change: Change) -> object:
    if isinstance(found, dict):
        return {
            key: change(inner) if key == "filename" and isinstance(inner, str) else _changed(inner, change)
            for key, inner in found.items()
        }
    if isinstance(found, list):
        return [_changed(inner, change) for inner in found]
    return found


def has_backing(option: Option) -> bool:
    """Whether it says itself what stands under an image."""
    if option.value is None:
        return False
    if option.value.startswith("{"):
        return '"backing"' in json.dumps(_json(option.value))
    return any(key == "backing" or ".backing" in key or key.startswith("backing.") for key, _ in fields(option.value))


def names_any(option: Option, wanted: Iterable[str]) -> bool:
    """Whether it names one of these images."""
    seen: list[str] = []

    def look(path: str) -> str:
        seen.append(path)
        return path

    images(option, look)
    return not set(wanted).isdisjoint(seen)


def without(options: Sequence[Option], unwanted: Iterable[str]) -> list[Option]:
    """Without these images, and without all that stands on them: nodes, drives, devices."""
    unwanted = set(unwanted)
    gone = {number for number, option in enumerate(options) if names_any(option, unwanted)}
    dead: set[str] = set()
    size = -1
    while size != len(gone):
        size = len(gone)
        dead |= {name for number in gone for key in ("id", "node-name") if (name := value_of(options[number], key))}
        for number, option in enumerate(options):
            if option.name in ("drive", "blockdev", "device"):
                used = {value_of(option, key) for key in ("file", "drive", "backing")}
                if used & dead:
                    gone.add(number)
    return [option for number, option in enumerate(options) if number not in gone]


# --- sockets and files that QEMU makes -----------------------------------------------------------------------------


def made_paths(option: Option, change: Change) -> Option:
    """The option with every socket that it listens on, and every file that it writes beside images, passed through
    `change`."""
    value = option.value
    if value is None:
        return option
    if option.name in _PATHS:
        return replace(option, value=change(value))
    if option.name in _CHARDEVS:
        return replace(option, value=_moved_chardev(option.name, value, change))
    if option.name == "chardev" and _is_made(value):
        pairs = [(key, change(text) if key in ("path", "logfile") and text else text) for key, text in fields(value)]
        return replace(option, value=joined(pairs))
    return option


def _is_made(value: str) -> bool:
    """A socket without `server` is somebody else's."""
    pairs = fields(value)
    if pairs[0][0] != "socket":
        return True
    return any(key == "server" and text in (None, "on", "yes", "y", "true") for key, text in pairs)


def _moved_chardev(option: str, value: str, change: Change) -> str:
    mux = "mon:" if value.startswith("mon:") else ""
    kind, colon, where = value.removeprefix(mux).partition(":")
    if kind not in ("unix", "file", "pipe") or not colon:
        return value
    pairs = fields(where)
    if kind == "unix" and option != "vnc" and not _is_made(f"socket,{where}"):
        return value
    return f"{mux}{kind}:{joined([(change(pairs[0][0]), pairs[0][1]), *pairs[1:]])}"


def made(options: Iterable[Option]) -> set[str]:
    """What `made_paths` would change."""
    found: set[str] = set()

    def look(path: str) -> str:
        found.add(path)
        return path

    for option in options:
        made_paths(option, look)
    return found


def monitor_paths(options: Sequence[Option]) -> set[str]:
    """Sockets that speak QMP."""
    control = {value_of(option, "chardev") for option in options if _is_control(option)}
    return made(
        option
        for option in options
        if option.name in ("qmp", "qmp-pretty") or (option.name == "chardev" and value_of(option, "id") in control)
    )


def _is_control(option: Option) -> bool:
    return option.name == "mon" and value_of(option, "mode") == "control"
