"""Another host, over SSH: POSIX sh and the coreutils that every distribution of a hypervisor has.

Each method is one question to a shell that is there already: one round trip. Names are arguments of the scripts below
and never part of their text (`ssh_shell.py` quotes them).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from workers import tools
from workers.contract.errors import DiskError, HypervisorUnreachable, NoSpace, TargetExists
from workers.contract.hosts import Seen
from workers.hosts.ssh_link import SshLink
from workers.hosts.ssh_shell import Answer, TooSlow

END_SECONDS = 60
_PATIENCE = 60.0
"""Seconds for what is quick anywhere: a disk may stall."""

_STAT = 'stat -L --printf "%f %d %i %s %.9Y %.9Z %n\\0" -- "$@" 2>/dev/null; :'
_WHY = 'exec stat -L -- "$@" >/dev/null'
_HEADS = 'n=$1; shift; exec head -q -c "$n" -- "$@"'
_READ = '[ -e "$1" ] || { [ -d "${1%/*}" ] && [ ! -x "${1%/*}" ]; } || exit 3; exec cat -- "$1"'
_WRITE = r"""
mkdir -p -- "${1%/*}" && rm -f -- "$1.partial" && cat > "$1.partial" && sync -- "$1.partial" &&
    mv -fT -- "$1.partial" "$1" || { rm -f -- "$1.partial"; exit 1; }
"""
_NAMES = r'[ -d "$1" ] && [ -r "$1" ] || exit 0; exec find "$1" -mindepth 1 -maxdepth 1 -name "$2" -printf "%f\0"'
_MAKE_FOLDER = '[ -d "$1" ] || { umask 022; mkdir -p -- "$1" && chmod "$2" -- "$1"; }'
_LINK = '[ ! -e "$2" ] && [ ! -L "$2" ] || exit 3; ln -T -- "$1" "$2" && sync -- "${2%/*}"'
_END = r"""
pid=$(cat -- "$1" 2>/dev/null) || exit 0
case $pid in ''|*[!0-9]*) exit 0 ;; esac
tr '\0' ' ' < "/proc/$pid/cmdline" 2>/dev/null | grep -qF -- "$2" || exit 0
kill "$pid" 2>/dev/null
exec timeout "$3" tail -s 0.02 --pid="$pid" -f /dev/null
"""


class SshHost:
    """See `contract.hosts.Host`."""

    local = False

    def __init__(self, link: SshLink) -> None:
        self.connection = link
        self.name = str(link.login.address)

    def _ask(self, script: str, *arguments: str, stdin: bytes = b"") -> Answer:
        """Raises HypervisorUnreachable, also for an answer that does not come."""
        try:
            return self._answer(script, *arguments, stdin=stdin, timeout=_PATIENCE)
        except TooSlow:
            raise HypervisorUnreachable(f"{self.name} did not answer for {_PATIENCE:.0f} s") from None

    def _answer(self, script: str, *arguments: str, stdin: bytes, timeout: float) -> Answer:
        with self.connection.shell() as shell:
            return shell.ask(script, *arguments, stdin=stdin, timeout=timeout)

    def _test(self, doing: str, condition: str, path: Path) -> bool:
        """Whether `condition` holds there. Raises DiskError where that cannot be said: no answer is not "no"."""
        answer = self._ask(condition, str(path))
        if answer.code not in (0, 1):
            why = _reason(answer.err.decode(errors="replace")) or f"exit {answer.code}"
            raise DiskError(f"{doing} {path} on {self.name}: {why}")
        return answer.code == 0

    def _do(self, doing: str, script: str, *arguments: str, stdin: bytes = b"", taken: int = -1) -> bytes:
        """The output of a script that must succeed; exit code `taken` is a TargetExists."""
        answer = self._ask(script, *arguments, stdin=stdin)
        if answer.code == taken:
            raise TargetExists(f"{arguments[-1]} exists already")
        if answer.code:
            words = answer.err.decode(errors="replace").strip().splitlines()
            kind = NoSpace if "No space left" in answer.err.decode(errors="replace") else DiskError
            raise kind(f"{doing} on {self.name}: {_reason(words[-1]) if words else f'exit {answer.code}'}")
        return answer.out

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 120.0) -> str:
        where = f" on {self.name}"
        try:
            answer = self._answer('exec "$@"', *argv, stdin=stdin, timeout=timeout)
        except TooSlow:
            raise tools.too_slow(argv, timeout, where) from None
        if answer.code == 127:
            raise tools.missing(argv, where)
        if answer.code:
            raise tools.failed(argv, answer.code, answer.err, where)
        return answer.out.decode(errors="replace")

    def look(self, paths: Sequence[Path], *, head: int = 0) -> dict[Path, Seen]:
        """Two questions for many paths: one program for all, and not one each."""
        found: dict[Path, Seen] = {}
        for some in _portions(paths):
            found |= _seen(self._do("looking at files", _STAT, *map(str, some)))
            found |= self._unseen([path for path in some if path not in found])
            if head:
                found |= self._heads({path: found[path] for path in some}, head)
        return found

    def _unseen(self, paths: Sequence[Path]) -> dict[Path, Seen]:
        """Why there was no answer: a line for each, in which a name has no line ends."""
        if not paths:
            return {}
        lines = self._ask(_WHY, *map(str, paths)).err.decode(errors="replace").splitlines()
        if len(lines) == len(paths):
            return {path: Seen(trouble=_reason(line)) for path, line in zip(paths, lines, strict=True)}
        if len(paths) > 1:  # some were made just now
            return {path: seen for each in paths for path, seen in self._unseen([each]).items()}
        return {paths[0]: Seen(trouble="it was just being made")}

    def _heads(self, found: dict[Path, Seen], head: int) -> dict[Path, Seen]:
        """With the first bytes. All come in one piece, and are believed to be whose they are if there are as many as
        there must be; else each file is asked for its own."""
        files = {path: seen for path, seen in found.items() if seen.is_file or seen.is_block_device}
        if not files:
            return {}
        lengths = [head if seen.is_block_device else min(head, seen.size) for seen in files.values()]
        answer = self._ask(_HEADS, str(head), *map(str, files))
        if answer.code == 0 and len(answer.out) == sum(lengths):
            ends = [*accumulate(lengths)]
            pieces = [answer.out[end - length : end] for end, length in zip(ends, lengths, strict=True)]
            return {path: replace(files[path], head=piece) for path, piece in zip(files, pieces, strict=True)}
        return {path: self._head(path, seen, head) for path, seen in files.items()}

    def _head(self, path: Path, seen: Seen, head: int) -> Seen:
        answer = self._ask(_HEADS, str(head), str(path))
        return replace(seen, head=answer.out, trouble=_reason(answer.err.decode(errors="replace")))

    def taken(self, path: Path) -> bool:
        return self._test("looking for", '[ -e "$1" ] || [ -L "$1" ]', path)

    def writable(self, folder: Path) -> bool:
        return self._test("looking at", '[ -w "$1" ]', folder)

    def read(self, path: Path) -> bytes | None:
        answer = self._ask(_READ, str(path))
        if answer.code == 3:
            return None
        if answer.code:
            raise DiskError(f"cannot read {path} on {self.name}: {_reason(answer.err.decode(errors='replace'))}")
        return answer.out

    def write(self, path: Path, data: bytes) -> None:
        self._do(f"cannot write {path}", _WRITE, str(path), stdin=data)

    def names(self, folder: Path, pattern: str) -> list[str]:
        found = self._do(f"cannot list {folder}", _NAMES, str(folder), pattern)
        return sorted(name.decode(errors="surrogateescape") for name in found.split(b"\0") if name)

    def free(self, path: Path) -> int:
        blocks, size = self._do(f"{path}", 'exec stat -f -c "%a %S" -- "$1"', str(path)).split()
        return int(blocks) * int(size)

    def make_folder(self, path: Path, mode: int) -> None:
        self._do(f"{path} cannot be made", _MAKE_FOLDER, str(path), f"{mode & ~0o022:o}")

    def link(self, path: Path, name: Path) -> None:
        self._do(f"{name} cannot be made", _LINK, str(path), str(name), taken=3)

    def sync(self, path: Path) -> None:
        self._do(f"cannot write {path}", 'exec sync -- "$1"', str(path))

    def remove(self, paths: Sequence[Path]) -> None:
        if paths:
            self._do(f"cannot remove {paths[0]}", 'exec rm -rf --one-file-system -- "$@"', *map(str, paths))

    def end(self, pid_file: Path, word: str) -> None:
        self._do(f"ending what {pid_file} names", _END, str(pid_file), word, str(END_SECONDS - 5))

    def socket(self, path: Path) -> AbstractContextManager[Path]:
        return self.connection.forwarded(path)

    def command(self, argv: Sequence[str]) -> list[str]:
        return [*self.connection.alone(), shlex.join(argv)]

    def close(self) -> None:
        self.connection.close()


def _portions(paths: Sequence[Path], most: int = 500) -> Iterator[Sequence[Path]]:
    for start in range(0, len(paths), most):
        yield paths[start : start + most]


def _reason(words: str) -> str:
    """The system's own words at the end of what a tool says."""
    return words.strip().rpartition(": ")[2] or words


def _nanoseconds(text: str) -> int:
    seconds, _, fraction = text.replace(",", ".").partition(".")
    return int(seconds) * 10**9 + int(fraction.ljust(9, "0")[:9] or 0)


def _seen(records: bytes) -> dict[Path, Seen]:
    """What `_STAT` prints."""
    found = {}
    for record in records.split(b"\0")[:-1]:
        mode, device, inode, size, modified, changed, name = record.decode(errors="surrogateescape").split(" ", 6)
        found[Path(name)] = Seen(
            mode=int(mode, 16),
            device=int(device),
            inode=int(inode),
            size=int(size),
            mtime_ns=_nanoseconds(modified),
            ctime_ns=_nanoseconds(changed),
        )
    return found
