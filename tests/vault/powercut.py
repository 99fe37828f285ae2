"""Power cuts, from what a real run asked of the kernel: `strace` records it, a model of a file system replays it, and
the power may fail after every call.

The model knows what POSIX promises and nothing more. Bytes are safe after `fdatasync` of their file, a name (made or
removed) after `fsync` of its folder; whatever else has happened may be there after the cut or not, each on its own.
"""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

# Calls that change files in a way that the model does not know are traced too, and refused.
_CALLS = (
    "openat,write,fsync,fdatasync,link,rename,unlink,unlinkat,mkdir,rmdir,"
    "open,creat,pwrite64,writev,pwritev,pwritev2,sendfile,copy_file_range,ftruncate,truncate,fallocate,linkat,renameat,"
    "renameat2,mkdirat,symlink,symlinkat,sync_file_range,mmap,?io_uring_enter"
)
_LINE = re.compile(r"\d+ +(\w+)\((.*)\) = (-?\d+)(<.*>)?")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"|(\w+)<((?:\\x[0-9a-f]{2})*)>')


@dataclass
class File:
    data: bytes = b""
    safe: bytes = b""


@dataclass
class Folder:
    names: dict[str, File | Folder] = field(default_factory=dict)
    safe: dict[str, File | Folder] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    name: str
    paths: tuple[str, ...]
    """As they are, of descriptors too."""
    data: bytes
    created: bool


def traced(argv: Sequence[str], trace: Path, *, cwd: Path) -> list[Call]:
    """Run a program to its end; the calls that it made and that succeeded, in order."""
    strace = ["strace", "-f", "-y", "-xx", "-s", "10000000", "-e", f"trace={_CALLS}", "-o", str(trace), *argv]
    subprocess.run(strace, check=True, capture_output=True, cwd=cwd)
    return list(_calls(trace.read_text()))


def _calls(text: str) -> Iterator[Call]:
    for line in text.splitlines():
        assert "<unfinished" not in line or "futex" in line, f"two threads at once: {line[:80]}"
        match = _LINE.match(line)
        if match is None or int(match[3]) < 0:
            continue
        texts, folders = [], []
        for quoted, _, target in _TEXT.findall(match[2]):
            decoded = bytes.fromhex((quoted or target).replace("\\x", ""))
            (folders if target else texts).append(decoded)
        if "write" in match[1]:
            yield Call(match[1], (folders[0].decode() if folders else "",), b"".join(texts), False)
            continue
        # A relative name is within the folder whose descriptor stands before it.
        names = [str(Path(folders[0].decode() if folders else "/", one.decode())) for one in texts]
        paths = tuple(names or [one.decode() for one in folders])
        name = "truncation" if "O_TRUNC" in match[2] else match[1]
        yield Call(name, paths, b"", "O_CREAT" in match[2])


class Disk:
    """What the folder `root` holds, and what of it is safe."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.top = _loaded(root)

    def apply(self, call: Call) -> bool:
        """Whether the call concerned us."""
        inside = [path for path in call.paths if path == str(self._root) or path.startswith(f"{self._root}/")]
        if not inside:
            return False
        act: Callable[..., bool] | None = getattr(self, f"_{call.name}", None)
        assert act is not None, f"the model does not know {call.name} of {inside}"
        return act(call, *map(self._place, inside))

    def _place(self, path: str) -> tuple[Folder, str]:
        """The folder that holds `path`, and the name in it; for the top itself, an empty name."""
        parts = Path(path).relative_to(self._root).parts
        folder = self.top
        for part in parts[:-1]:
            found = folder.names[part]
            assert isinstance(found, Folder)
            folder = found
        return folder, parts[-1] if parts else ""

    def _openat(self, call: Call, place: tuple[Folder, str]) -> bool:
        folder, name = place
        if call.created and name not in folder.names:
            folder.names[name] = File()
            return True
        return False

    def _write(self, call: Call, place: tuple[Folder, str]) -> bool:
        file = place[0].names[place[1]]
        assert isinstance(file, File)
        file.data += call.data
        return True

    def _fdatasync(self, _call: Call, place: tuple[Folder, str]) -> bool:
        found = place[0].names[place[1]] if place[1] else self.top
        if isinstance(found, File):
            found.safe = found.data
        else:
            found.safe = dict(found.names)
        return True

    _fsync = _fdatasync

    def _link(self, _call: Call, old: tuple[Folder, str], new: tuple[Folder, str]) -> bool:
        new[0].names[new[1]] = old[0].names[old[1]]
        return True

    def _rename(self, _call: Call, old: tuple[Folder, str], new: tuple[Folder, str]) -> bool:
        new[0].names[new[1]] = old[0].names.pop(old[1])
        return True

    def _unlink(self, _call: Call, place: tuple[Folder, str]) -> bool:
        del place[0].names[place[1]]
        return True

    _unlinkat = _rmdir = _unlink

    def _mkdir(self, _call: Call, place: tuple[Folder, str]) -> bool:
        place[0].names[place[1]] = Folder()
        return True

    def _mmap(self, _call: Call, _place: tuple[Folder, str]) -> bool:
        return False  # sqlite's shared memory is not in the vault; maps of it are read

    # --- after the cut ---------------------------------------------------------------------------------------------

    def states(self, seed: int) -> Iterator[dict[str, bytes]]:
        """Path → content, as it may be found: nothing survived that was not safe; names did, bytes did not; everything
        did; and twice a throw of dice for each."""
        yield dict(_left(self.top, lambda: False, lambda: False))
        yield dict(_left(self.top, lambda: True, lambda: False))
        yield dict(_left(self.top, lambda: True, lambda: True))
        for number in range(2):
            throw = partial(random.Random(f"{seed} {number}").choice, (False, True))
            yield dict(_left(self.top, throw, throw))


def _left(
    folder: Folder, name_stays: Callable[[], bool], data_stays: Callable[[], bool]
) -> Iterator[tuple[str, bytes]]:
    for name in sorted(folder.names.keys() | folder.safe.keys()):
        now, before = folder.names.get(name), folder.safe.get(name)
        found = before if now is before or not name_stays() else now
        if isinstance(found, File):
            yield name, found.data if found.data == found.safe or data_stays() else found.safe
        elif found is not None:
            yield f"{name}/", b""
            yield from ((f"{name}/{path}", data) for path, data in _left(found, name_stays, data_stays))


def _loaded(folder: Path) -> Folder:
    names: dict[str, File | Folder] = {}
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        names[path.name] = _loaded(path) if path.is_dir() else File(path.read_bytes(), path.read_bytes())
    return Folder(names, dict(names))


def build(state: dict[str, bytes], root: Path) -> None:
    """Files and folders of a state, for real."""
    root.mkdir(parents=True)
    for name, data in state.items():
        if name.endswith("/"):
            (root / name).mkdir()
        else:
            (root / name).write_bytes(data)
