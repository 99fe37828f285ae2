"""The seam `Host`: the machine room of a hypervisor, what is done there with files and processes.

A hypervisor may be this host or another one. Whoever needs a scratch file, the header of an image or a helper beside
QEMU asks its `Host`, and does not know which. Calls from afar cost a round trip each: ask for many things at once.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from workers.contract.errors import DiskError


@dataclass(frozen=True, slots=True)
class Seen:
    """What `Host.look` found at a path, symbolic links followed."""

    mode: int = 0
    """As `stat` has it, type bits included; 0: nothing is there, or it cannot be looked at."""
    device: int = 0
    inode: int = 0
    size: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    head: bytes = b""
    """The first bytes of a file, as many as were asked for."""
    trouble: str = ""
    """Why it cannot be looked at, or its head not be read, in the system's words."""

    @property
    def exists(self) -> bool:
        """False also of something behind a folder that cannot be entered: see `trouble`."""
        return self.mode != 0

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)

    def same_file(self, other: Seen) -> bool:
        """Two names of one file."""
        return self.exists and (self.device, self.inode) == (other.device, other.inode)

    @property
    def is_block_device(self) -> bool:
        return stat.S_ISBLK(self.mode)


class Host(Protocol):
    """Files and processes where a hypervisor runs. All paths are absolute, and are paths there; names may be hostile.

    Raises HypervisorUnreachable when it cannot be reached, NoSpace, and DiskError for whatever else it refuses."""

    name: str
    """For people: `this host`, or `root@lab1`."""
    local: bool
    """Its files and unix sockets are this process's own."""

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 120.0) -> str:
        """Standard output of a program (no shell in between), without an environment of ours. DiskError if it is not
        installed, fails, or exceeds `timeout` seconds; it may go on then."""
        ...

    def look(self, paths: Sequence[Path], *, head: int = 0) -> dict[Path, Seen]:
        """What is at each path now, with the first `head` bytes of those that are files or devices."""
        ...

    def taken(self, path: Path) -> bool:
        """Whether anything has that name, a symbolic link that leads nowhere included."""
        ...

    def writable(self, folder: Path) -> bool:
        """Whether files can be made in a folder."""
        ...

    def read(self, path: Path) -> bytes | None:
        """A small file; None if there is none."""
        ...

    def write(self, path: Path, data: bytes) -> None:
        """Put a small file in place, whole or not at all, durable, for its owner only, with its folder."""
        ...

    def names(self, folder: Path, pattern: str) -> list[str]:
        """Names in a folder that fit a glob, sorted; empty if it is not there or cannot be read."""
        ...

    def free(self, path: Path) -> int:
        """Bytes that are free at an existing path."""
        ...

    def make_folder(self, path: Path, mode: int) -> None:
        """With its parents; one that is there is left as it is."""
        ...

    def link(self, path: Path, name: Path) -> None:
        """A second name, durable. TargetExists if that is taken."""
        ...

    def sync(self, path: Path) -> None:
        """The file's content is durable when this returns."""
        ...

    def remove(self, paths: Sequence[Path]) -> None:
        """Files, and folders with all that is in them. Absent already: no error."""
        ...

    def end(self, pid_file: Path, word: str) -> None:
        """End the process that a file names, and wait for it: only if its command line holds `word`, so that a number
        that was taken over by another program is left alone (invariant 4)."""
        ...

    def socket(self, path: Path) -> AbstractContextManager[Path]:
        """A unix socket of this process's own that leads to the one there, while the block lasts."""
        ...

    def command(self, argv: Sequence[str]) -> list[str]:
        """A program of this process's host that runs `argv` there over a connection of its own: for processes that
        outlive this one."""
        ...

    def close(self) -> None: ...


def looked(host: Host, path: Path) -> Seen:
    """What is at one path. Raises DiskError if it cannot be looked at."""
    found = host.look([path])[path]
    if not found.exists:
        raise DiskError(f"{path}: {found.trouble}")
    return found
