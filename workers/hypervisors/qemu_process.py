"""What the kernel knows of a QEMU process: its command line, its folder, its open files.

The process is found by its socket (the kernel names who listens there), never by its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    program: str
    arguments: list[str]
    """Empty if they are no text: nothing could be said of them."""
    folder: Path
    """Where it was started, as far as that is known."""
    open_files: frozenset[str]
    """Absolute paths; empty where we may not look."""

    def absolute(self, path: str) -> Path:
        """QEMU's word for a file. One that runs in the background has left the folder that a relative path means, so
        an open file that ends so is taken first."""
        if path.startswith("/"):
            return Path(path)
        tail = "/" + path.removeprefix("./")
        found = [name for name in self.open_files if name.endswith(tail)]
        return Path(found[0]) if len(found) == 1 else self.folder / path


def look(pid: int) -> Process | None:
    """None: it is gone, or hidden from us."""
    folder = _PROC / str(pid)
    words = _command_line(folder)
    if not words:
        return None
    program = words[0]
    with suppress(OSError):
        named = (folder / "exe").readlink()
        program = str(named) if named.exists() else program
    return Process(pid, program, words[1:], _started_in(folder), frozenset(_open_files(folder)))


def running() -> Iterator[Process]:
    """Everything that calls itself qemu; its open files are not looked at."""
    for folder in _PROC.glob("[0-9]*"):
        words = _command_line(folder)
        if words and "qemu" in Path(words[0]).name:
            yield Process(int(folder.name), words[0], words[1:], _started_in(folder), frozenset())


def user_of(pid: int) -> tuple[int, int] | None:
    """The user and group that a process acts as now (`-runas` changes them after its sockets were made)."""
    try:
        lines = (_PROC / str(pid) / "status").read_text().splitlines()
    except OSError:
        return None
    effective = {line.split(":")[0]: int(line.split()[2]) for line in lines if line.startswith(("Uid:", "Gid:"))}
    return effective["Uid"], effective["Gid"]


def _command_line(folder: Path) -> list[str]:
    try:
        raw = (folder / "cmdline").read_bytes()
    except OSError:
        return []
    try:
        return raw.decode().removesuffix("\0").split("\0") if raw else []
    except UnicodeDecodeError:
        return [raw.split(b"\0")[0].decode(errors="replace")]


def _started_in(folder: Path) -> Path:
    """Its working folder; a background process works in `/`, and its shell's `PWD` tells where it came from."""
    with suppress(OSError):
        now = (folder / "cwd").readlink()
        if now != Path("/"):
            return now
    with suppress(OSError):
        for entry in (folder / "environ").read_bytes().split(b"\0"):
            if entry.startswith(b"PWD=/"):
                return Path(entry[4:].decode(errors="surrogateescape"))
    return Path("/")


def _open_files(folder: Path) -> Iterator[str]:
    with suppress(OSError):
        for link in (folder / "fd").iterdir():
            with suppress(OSError):
                name = str(link.readlink())
                if name.startswith("/"):
                    yield name
